"""The Jacobian of a model at an image, with noise on the response, in a subspace of the image, in a metric."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fisherop.basis import Basis
from fisherop.combinators import Restricted, Whitened
from fisherop.jacobian import Counted, Jacobian, OfModel, Scaled
from fisherop.model.linearize import Linearization, linearize
from fisherop.noise import Root
from fisherop.spaces import Space


def at(
    image: Tensor, model: Callable[[Tensor], Any], options: dict[str, Any], observed: tuple[Any, Any, Any]
) -> tuple[Jacobian, int | None]:
    """The Jacobian of a model at one of many images, and the bytes that it holds."""
    lin = linearize(image, model, **options)
    return observe(lin, *observed), lin.held_bytes


def observe(lin: Linearization, noise: Any, subspace: Space | None, metric: Any) -> Jacobian:
    """The Jacobian of a model at an image, with noise, in a subspace, in a metric."""
    J: Jacobian = OfModel(lin)
    if noise is not None:
        J = Whitened(J, Root(noise, lin.response))
    if subspace is not None or metric is not None:
        J = Restricted(J, Basis(lin.image, subspace, metric))
    return J


def how(J: Any) -> dict[str, Any]:
    """The `noise`, `subspace` and `metric` that a Jacobian was made with."""
    found: dict[str, Any] = {}
    while isinstance(J, Counted | Scaled | Whitened | Restricted):
        if isinstance(J, Whitened) and isinstance(J.root, Root):
            found["noise"] = J.root.noise
        if isinstance(J, Restricted) and isinstance(J.space, Basis):
            found |= {"subspace": J.space.subspace, "metric": J.space.metric}
        J = J.J
    return {name: value for name, value in found.items() if value is not None}
