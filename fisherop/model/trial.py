"""Products tried before they are believed: against independent ones, by the adjoint identity, twice, in blocks."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fisherop.model.slopes import norm

ROUNDINGS = 32  # by which the same product may differ when it is computed in another way
_LOG = logging.getLogger(__name__)
_Product = Callable[[Tensor], Tensor]


class Trial(NamedTuple):
    """Products that were found right.

    `v` (1, *image_shape) and `u` (1, M) with `jv` and `jtu`; `mismatch` is how far these are from those of one matrix,
    relative to them, where steps in a lower precision or rounding make it so; `error` that of J v against an
    independent one.
    """

    v: Tensor
    u: Tensor
    jv: Tensor
    jtu: Tensor
    mismatch: float
    error: float


def tolerance(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps ** 0.5


def random(shape: tuple[int, ...], like: Tensor, seed: int) -> Tensor:
    """Normal numbers, by no seed of the user's, or they might be the image."""
    generator = torch.Generator("cpu").manual_seed(20171127 + seed)
    return torch.randn(shape, generator=generator, dtype=like.dtype, device="cpu").to(like.device)


def check_close(what: str, actual: Tensor, reference: Tensor, sizes: Sequence[int], allowed: float) -> float:
    """Refuse a flat response that differs from an independent one, in any of the tensors that it consists of.

    Returns the largest difference, relative to the tensor's norm, beyond four roundings of the whole.
    """
    floor, worst = 4 * torch.finfo(reference.dtype).eps * norm(reference), 0.0
    for a, b in zip(actual.split(sizes), reference.split(sizes), strict=True):
        error, size = norm(a - b), norm(b)
        if not error <= allowed * size + floor:
            raise RuntimeError(
                f"its {what} differs from PyTorch's by {error / size if size else error:.1e} of its norm"
            )
        if error > floor:
            worst = max(worst, (error - floor) / size if size else math.inf)
    return worst


def check_products(
    jvp: _Product,
    vjp: _Product,
    v: Tensor,
    reference: Tensor | None,
    sizes: Sequence[int],
    precision: float,
    allowed: float | None = None,
    *,
    rounding: float = 0.0,
    again: bool = True,
) -> Trial:
    """Hold J v to an independent one, if there is one, and Jᵀu to J v by the adjoint identity ⟨J v, u⟩ = ⟨v, Jᵀu⟩.

    Since v and u are random and independent, an error E of Jᵀ changes ⟨v, Jᵀu⟩ by about ‖E‖, in whatever direction
    it lies. The same product again must have the same bits, or, on an accelerator, which may sum in any order, differ
    by rounding alone.

    Parameters
    ----------
    jvp, vjp : callable
        The products.
    v : Tensor, shape (1, ``*image_shape``)
    reference : Tensor, shape (M,), optional
        J v by other means.
    sizes : sequence of int
        Of the tensors that the response consists of.
    precision : float
        The machine epsilon of the model's least precise step.
    allowed : float, optional
        How far J v may be from the reference; by default the root of the precision.
    rounding : float
        Of ‖J v‖, what may be lost where the response hardly changes with the image, as a confident softmax.
    again : bool
        Whether to ask for the same product twice; the operations of a kept program have been.
    """
    jv = jvp(v)
    u = random((1, jv.shape[1]), v, seed=1)
    jtu = vjp(u)
    if not (torch.isfinite(jv).all() and torch.isfinite(jtu).all()):
        raise ValueError(
            "the model's derivative at this image holds NaN or infinity, though its response is finite; "
            "a square root, norm or division of zero is the usual cause: add a small constant inside it"
        )
    coarse = max(tolerance(jv.dtype), precision**0.5)
    error = math.inf
    if reference is not None:
        error = check_close("J v", jv[0], reference, sizes, coarse if allowed is None else allowed)
    forward, reverse = (torch.dot(a.double().flatten(), b.double().flatten()).item() for a, b in ((jv, u), (v, jtu)))
    size, low = max(norm(jv), norm(jtu)), precision > torch.finfo(jv.dtype).eps
    rounds = coarse * size < abs(forward - reverse) <= rounding
    mismatch = abs(forward - reverse) / size if size and (low or rounds) else 0.0
    if abs(forward - reverse) > coarse * size and not rounds:
        raise ValueError(
            f"the model's forward-mode and reverse-mode derivatives disagree: ⟨J v, u⟩ = {forward:.6e}, "
            f"⟨v, Jᵀu⟩ = {reverse:.6e} (difference allowed: {coarse * size:.1e}"
            f"{f', for steps of precision {precision:.0e} inside' if low else ''}); the usual causes are "
            "torch.no_grad inside the model (use .detach() on what it computes) and a custom autograd function "
            "whose jvp or backward is wrong; PyTorch's instance norm is wrong before a layer that changes the "
            "memory layout"
        )
    differs = 0.0 if v.device.type == "cpu" else ROUNDINGS * torch.finfo(jv.dtype).eps
    if again and not norm(jv - jvp(v)) <= differs * norm(jv):
        raise ValueError("the model's derivative is not the same when it is asked for twice")
    return Trial(v, u, jv, jtu, mismatch, error)


def vectorizes(jvp: _Product, vjp: _Product, v: Tensor) -> bool:
    """Whether blocks of products work, are right, and are more than a loop with a warning at every call."""
    block = torch.cat([v, v.flip(-1)])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            jv = jvp(block)
            for at_once, one in ((jv, jvp(block[1:])), (vjp(jv), vjp(jv[1:]))):
                if ((at_once[1:] - one).abs() > tolerance(one.dtype) * one.abs().max()).any():
                    raise RuntimeError("two products at once differ from single ones")
        except RuntimeError as error:
            _LOG.info("products go through the model one at a time, since a block of them fails: %s", error)
            return False
    for warning in caught:
        if "batching rule" in str(warning.message):
            _LOG.info("products go through the model one at a time: %s", warning.message)
            return False
    return True
