"""What the build of the site takes beside Sphinx and its extensions."""
