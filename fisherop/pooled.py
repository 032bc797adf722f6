"""Many images at once: F = Σ wᵢ JᵢᵀJᵢ, in a memory that does not grow with their number."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fisherop import checks
from fisherop.combinators import Stacked
from fisherop.jacobian import Jacobian


class Again(Jacobian):
    """A Jacobian that is made anew at each visit: of a model at an image, from the program that is kept with the model.

    Parameters
    ----------
    make : callable
        Gives the Jacobian.
    like : Jacobian
        One that it gave.
    """

    def __init__(self, make: Callable[[], Jacobian], like: Jacobian) -> None:
        self._make = make
        self.shape, self.dtype, self.device = like.shape, like.dtype, like.device
        self.mismatch, self.chunk_size = like.mismatch, like.chunk_size
        self._probe = self._product(like)

    def _product(self, J: Jacobian) -> Tensor:
        """One number of it, which tells whether it is still the same: ‖J 1‖."""
        return torch.linalg.vector_norm(J.jvp(torch.ones(1, J.shape[1], dtype=J.dtype, device=J.device)).double())

    def jvp(self, rows: Tensor) -> Tensor:
        return self._make().jvp(rows)

    def vjp(self, rows: Tensor) -> Tensor:
        return self._make().vjp(rows)

    def normal(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return self._make().normal(rows)  # both by one visit

    def to_images(self, rows: Tensor) -> Tensor:
        return self._make().to_images(rows)

    def check_current(self) -> None:
        if not torch.isclose(self._product(self._make()), self._probe, rtol=1e-4, atol=0.0):
            raise RuntimeError("the model has changed since the images were pooled: make a new operator")


class Pooled(Stacked):
    """[√w₁ J₁; √w₂ J₂; …] of one model at many images of a shape."""

    def __init__(self, parts: Sequence[tuple[float, Jacobian]], image_shape: tuple[int, ...]) -> None:
        super().__init__(parts)
        self.image_shape = image_shape


def checked(images: Sequence[Tensor], weights: Sequence[float] | None) -> tuple[list[Tensor], list[float]]:
    """Images of one shape, and a weight for each, by default 1 / n."""
    if isinstance(images, Tensor):
        checks.refuse(TypeError, "images", "a sequence of images", images, "use images.split(1)")
    images = checks.several("images", images, Tensor, "a sequence of at least one image, each a tensor")
    weights = [1 / len(images)] * len(images) if weights is None else list(weights)
    if len(weights) != len(images):
        checks.refuse(ValueError, "weights", f"a number from 0 for each of the {len(images)} images", weights)
    for image in images:
        if image.shape != images[0].shape:
            raise ValueError(f"images must share one shape, got {tuple(image.shape)} beside {tuple(images[0].shape)}")
    return images, weights


def pool(
    images: Sequence[Tensor],
    build: Callable[[Tensor], tuple[Jacobian, int | None]],
    weights: Sequence[float] | None,
    memory: int,
) -> Pooled:
    """The Jacobians of a model at images, as many as `memory` holds; the others are made again at each product.

    Parameters
    ----------
    images : sequence of Tensor
    build : callable
        The Jacobian at an image, and the bytes that it holds, None where that isn't known.
    weights : sequence of float, optional
        By default 1 / n each.
    memory : int
        Bytes.
    """
    images, weights = checked(images, weights)
    spare, parts = checks.memory("memory", memory), []
    for weight, image in zip(weights, images, strict=True):
        J, held = build(image)
        if held is not None and held <= spare:
            spare -= held
        else:
            J = Again(functools.partial(_first, build, image), J)
        parts.append((weight, J))
    return Pooled(parts, tuple(images[0].shape))


def _first(build: Callable[[Any], tuple[Jacobian, int | None]], image: Tensor) -> Jacobian:
    return build(image)[0]
