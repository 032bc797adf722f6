"""How products with a Jacobian are made: each engine differentiates a function of one tensor at a point.

An engine is made of a function of the image that gives a flat response, the image, and that response. It has
``jvp(tangents: (k, *image_shape)) -> (k, M)`` and ``vjp(cotangents: (k, M)) -> (k, *image_shape)``. They are called
without gradients being recorded. Where k = 1, nothing is vectorized.
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
