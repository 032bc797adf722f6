"""From an image and a model to a Jacobian: what is refused, how products are made, and how these are held to truth."""
