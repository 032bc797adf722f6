"""Jacobians made of others: noise on the responses, restrictions of the image, weighted sums of F."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fisherop import checks
from fisherop.from_operator import as_jacobian
from fisherop.jacobian import Jacobian, _Of, triangle


class Diagonal(Jacobian):
    """A diagonal matrix (n, n), given as the tensor (n,) of its elements."""

    def __init__(self, elements: Tensor) -> None:
        self.elements = elements.detach()
        self.shape = len(elements), len(elements)
        self.dtype, self.device = elements.dtype, elements.device

    def jvp(self, rows: Tensor) -> Tensor:
        return rows * self.elements

    def vjp(self, rows: Tensor) -> Tensor:
        return rows * self.elements


class Whitened(_Of):
    """W J, W (M', M) a matrix on the side of the response: Σ^(-1/2), so that F is that of noise of covariance Σ.

    Parameters
    ----------
    J : Jacobian, or what `as_jacobian` makes one of
        An operator of this library, a `Linearization`, a matrix.
    root : Tensor, shape (M', M) or (M,), or what `as_jacobian` takes
        W, or its diagonal, in J's dtype and on its device.
    """

    def __init__(self, J: Any, root: Any) -> None:
        J = as_jacobian(J)
        self.root = _matrix("root", root, J, f"(M', {J.shape[0]}), or a tensor ({J.shape[0]},)")
        if self.root.shape[1] != J.shape[0]:
            checks.refuse(ValueError, "root", f"of shape (M', M), M = {J.shape[0]}", root)
        super().__init__(J, n_responses=self.root.shape[0])

    def jvp(self, rows: Tensor) -> Tensor:
        return self.root.jvp(self.J.jvp(rows))

    def vjp(self, rows: Tensor) -> Tensor:
        return self.J.vjp(self.root.vjp(rows))

    def to_noise(self, changes: Tensor) -> Tensor:
        return self.root.jvp(self.J.to_noise(changes))


class Restricted(_Of):
    """J B, B (N, p) on the side of the image: orthonormal columns that span a subspace, or the root of a metric.

    Its vectors z are coordinates: B z is the change of the image. A diagonal of zeros and ones leaves the pixels that
    it excludes in the null space; to leave them out, let B have the columns of the others.

    Parameters
    ----------
    J : Jacobian, or what `as_jacobian` makes one of
        An operator of this library, a `Linearization`, a matrix.
    space : Tensor, shape (N, p) or (N,), or what `as_jacobian` takes
        B, or its diagonal, in J's dtype and on its device.
    """

    def __init__(self, J: Any, space: Any) -> None:
        J = as_jacobian(J)
        self.space = _matrix("space", space, J, f"({J.shape[1]}, p), or a tensor ({J.shape[1]},)")
        if self.space.shape[0] != J.shape[1]:
            checks.refuse(ValueError, "space", f"of shape (N, p), N = {J.shape[1]}", space)
        super().__init__(J, n_pixels=self.space.shape[1])

    def jvp(self, rows: Tensor) -> Tensor:
        return self.J.jvp(self.space.jvp(rows))

    def vjp(self, rows: Tensor) -> Tensor:
        return self.space.vjp(self.J.vjp(rows))

    def normal(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        r, products = self.J.normal(self.space.jvp(rows))
        return r, self.space.vjp(products)

    def to_images(self, rows: Tensor) -> Tensor:
        return self.J.to_images(self.space.jvp(rows))


def _matrix(name: str, given: Any, J: Jacobian, shape: str) -> Jacobian:
    if isinstance(given, Tensor) and given.ndim == 1:
        matrix = Diagonal(given)
        if not checks.is_finite(given):
            checks.refuse(ValueError, name, "finite", given)
    else:
        matrix = as_jacobian(given)
    if (matrix.dtype, matrix.device) != (J.dtype, J.device):
        raise TypeError(
            f"{name} must be a matrix {shape} of {J.dtype} on {J.device}, as J is; got {matrix.dtype} on "
            f"{matrix.device}: convert it"
        )
    return matrix


class Stacked(_Of):
    """[√w₁ J₁; √w₂ J₂; …]: F is the weighted sum of the parts' Fisher matrices.

    A product with F takes one part after the other, and nothing that is as long as all responses together: `normal`
    has R by the triangles of the parts, and JᵀJ v by sums.

    Parameters
    ----------
    parts : sequence of (float, Jacobian)
        Weights from 0, and Jacobians of the same N, dtype and device, or what `as_jacobian` makes Jacobians of:
        operators of this library, linearizations, matrices.
    """

    def __init__(self, parts: Sequence[tuple[float, Any]]) -> None:
        what = "a sequence of at least one (weight, Jacobian)"
        pairs = checks.several("parts", parts, tuple, what)
        if any(len(pair) != 2 for pair in pairs):
            checks.refuse(ValueError, "parts", what, parts)
        weights = [checks.number("a weight", weight, "a number from 0", lambda w: w >= 0) for weight, _ in pairs]
        self.parts = tuple(zip(weights, (as_jacobian(J) for _, J in pairs), strict=True))
        first = self.parts[0][1]
        for _, J in self.parts:
            if (J.shape[1], J.dtype, J.device) != (first.shape[1], first.dtype, first.device):
                raise ValueError(
                    f"parts must share N, dtype and device: got {J.shape[1]}, {J.dtype}, {J.device} beside "
                    f"{first.shape[1]}, {first.dtype}, {first.device}"
                )
        super().__init__(first, n_responses=sum(J.shape[0] for _, J in self.parts))
        self.mismatch, self.is_stacked = max(J.mismatch for _, J in self.parts), True

    def jvp(self, rows: Tensor) -> Tensor:
        return torch.cat([weight**0.5 * J.jvp(rows) for weight, J in self.parts], dim=1)

    def vjp(self, rows: Tensor) -> Tensor:
        products = rows.new_zeros(len(rows), self.shape[1])
        for piece, (weight, J) in zip(rows.split([J.shape[0] for _, J in self.parts], dim=1), self.parts, strict=True):
            products += weight**0.5 * J.vjp(piece.contiguous())
        return products

    def normal(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        triangles, products = [], torch.zeros_like(rows)
        for weight, J in self.parts:
            r, product = J.normal(weight**0.5 * rows)  # before, and after: the weight alone may be out of range
            triangles.append(r)
            products += weight**0.5 * product
        return triangle(torch.cat(triangles).T), products

    def check_current(self) -> None:
        for _, J in self.parts:
            J.check_current()
