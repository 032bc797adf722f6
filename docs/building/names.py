"""Names in docstrings: `name` is a link where it is described in the reference, and code where it isn't.

A name that begins with a public name of fisherop must be described, so that a misspelled one is an error; a parameter
or a word of code, as `tol`, needs no description.
"""

import re

from sphinx.domains.python import PyXRefRole

import fisherop


class Documented(PyXRefRole):
    """The default role."""

    def process_link(self, env, refnode, has_explicit_title, title, target):
        refnode["by_default"] = True
        return super().process_link(env, refnode, has_explicit_title, title, target)


def resolve(app, env, node, contnode):
    """What is left when Sphinx has looked in the module and the class that a docstring is of."""
    if node.get("refdomain") != "py" or not node.get("by_default"):
        return None
    target, domain = node["reftarget"], env.domains["py"]
    places = [f"fisherop.solvers.{target}.{target}"]
    if target not in fisherop._MODULES:  # `noise` is also a word of a result
        places.append(f"fisherop.{target}")
    if node.get("py:class"):
        places.insert(0, f"{node['py:class']}.{target}")
    for place in places:
        if place in domain.objects:
            return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", place, node, contnode)
    first = target.removeprefix("fisherop.").split(".")[0]
    is_public = first in fisherop.__all__ or target.startswith("fisherop.")
    return None if is_public else contnode


def link_pages(app, what, name, obj, options, lines):
    """A page that a docstring names by its file is a link to it."""
    lines[:] = [re.sub(r"docs/(\w+)\.md", r":doc:`docs/\1.md </\1>`", line) for line in lines]


def setup(app):
    app.add_role_to_domain("py", "documented", Documented())  # the domain's, so that Sphinx finds it by this name alone
    app.connect("autodoc-process-docstring", link_pages)
    app.connect("missing-reference", resolve, priority=900)
