"""How products with a Jacobian are made: each engine differentiates a function of one tensor at a point.

An engine is made of a function of the image that gives a flat response, the image, that response, and, if wanted, a
change v of the image. It has
``jvp(tangents: (k, *image_shape)) -> (k, M)`` and ``vjp(cotangents: (k, M)) -> (k, *image_shape)``. They are called
without gradients being recorded. Where k = 1, nothing is vectorized. Beside these it has

- ``name``;
- ``is_recorded``: products are recorded operations, which any thread may run at any time, and whose blocks it tries
  itself; it has ``normal(tangents) -> ((k, M), (k, *image_shape))``, too: J v, its elements in some order, and JᵀJ v.
  Else they are made by differentiating, which is done by one thread at a time;
- ``calls_model``: a product J v runs the model;
- ``program``: what other images can resume, or None; ``reference``: J v for that v by PyTorch, if products are not;
- ``chunk_size(bytes)``: how many products it should make together, where a call of the model computes so many bytes;
- ``slope(respond, x, v)``: J v at x by PyTorch alone, in a mode that the model has.
"""

from fisherop.model.engines.nodes import NotLinear
from fisherop.model.engines.plain import DoubleBackward, Functional
from fisherop.model.engines.traced import Traced

ENGINES = {"traced": Traced, "functional": Functional, "double_backward": DoubleBackward}


def advice(error: Exception) -> str:
    """What to change in the model, where an engine rejects it for lack of a derivative or of a record."""
    text = str(error)
    if "jvp function" in text or "setup_context" in text:
        return "; give the torch.autograd.Function a jvp beside its backward"
    if "forward AD" in text or "forward-mode" in text.lower():
        return "; write this step with operations that have a forward mode"
    if isinstance(error, NotLinear):
        return "; keep such steps to what doesn't depend on the image, or write them without"
    return ""
