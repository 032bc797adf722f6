"""Sphinx builds the site by this: ``sphinx-build -W --keep-going docs build/docs``. `.ci/docs` does it from nothing."""

import pathlib
import sys

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE))

from building import gallery, inventories, names  # noqa: E402

import fisherop  # noqa: E402

project = "fisherop"
author = "the authors of fisherop"
copyright = author
version = release = fisherop.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.doctest",
    "sphinx.ext.intersphinx",
    "numpydoc",
    "myst_parser",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["tutorials/*.ipynb", "tutorials/**/*.md5", "building", "requirements.txt"]
myst_enable_extensions = ["colon_fence", "deflist", "attrs_inline"]
myst_heading_anchors = 3

# A reference that leads nowhere is an error.
nitpicky = True
default_role = "documented"
# Links to other projects need no network: each inventory is made of the few names that pages refer to.
intersphinx_mapping = inventories.mapping(HERE / "inventories")
intersphinx_disabled_reftypes = ["std:*"]

autosummary_generate = False  # pages of the reference list what they describe
autodoc_typehints = "none"  # shapes and types stand in the docstrings
autodoc_member_order = "bysource"
toc_object_entries_show_parents = "hide"
numpydoc_show_class_members = False
doctest_global_setup = "import fisherop"

sphinx_gallery_conf = gallery.settings(HERE)

html_theme = "pydata_sphinx_theme"
html_title = "fisherop"
html_static_path = ["_static"]
html_css_files = ["fisherop.css"]
html_show_sourcelink = False
html_theme_options = {
    "show_toc_level": 2,
    "navbar_align": "left",
    "header_links_before_dropdown": 7,
    "navbar_end": ["theme-switcher"],
    "footer_start": ["copyright"],
    "footer_end": [],
    "pygments_light_style": "tango",
    "back_to_top_button": False,
}
html_sidebars = {"start": [], "search": []}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True


def setup(app):
    names.setup(app)
