"""Bases of subspaces of images, and of metrics, as Jacobians: from coordinates to images, and back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fisherop import checks
from fisherop.combinators import Diagonal
from fisherop.from_operator import as_jacobian
from fisherop.jacobian import Jacobian
from fisherop.spaces import Band, Channels, Mask, Space, Span, ZeroMean

_DENSE = 2048  # coordinates, up to which a metric that doesn't fit a subspace is made dense
_FIT = 1e-5  # relative; what may be rounding in float32
_EMPTY = "subspace is empty at this image: no change but zero lies in all of its parts"


class Basis(Jacobian):
    """B (N, d): the images of coordinates, for a subspace and a metric at an image.

    Without a metric and soft weights its columns are orthonormal.

    Parameters
    ----------
    image : Tensor
        For its shape, dtype and device.
    subspace : Space, optional
    metric : array_like or LinearOperator, optional
        A positive weight of each element of the image, or of its last dimensions: the square of the norm of a change x
        is Σ wᵢ xᵢ². Or an operator R (N, N), W^(-1/2) of a metric W: the norm of R z is ‖z‖.

    Raises
    ------
    TypeError, ValueError
        The subspace or the metric does not fit the image, is empty, or they do not fit each other.
    """

    def __init__(self, image: Tensor, subspace: Space | None, metric: Any) -> None:
        self.image, self.subspace, self.metric = image, subspace, metric
        self.dtype, self.device = image.dtype, image.device
        parts = () if subspace is None else checks.instance("subspace", subspace, Space, "of fisherop.spaces").parts
        self._maps: list[Jacobian] = []
        soft = self._restrict(parts)
        if metric is not None:
            self._measure(metric)
        if soft is not None:
            self._append(Diagonal(soft.to(image)))
        if any(isinstance(part, ZeroMean) for part in parts):
            sums = self.vjp(torch.ones(1, image.numel(), dtype=self.dtype, device=self.device))[0]
            size = float(torch.linalg.vector_norm(sums.double()))
            if size > _FIT * image.numel() ** 0.5:
                self._append(_Complement(sums / size))

    def __reduce__(self) -> tuple:
        return type(self), (self.image, self.subspace, self.metric)

    @property
    def shape(self) -> tuple[int, int]:  # pyright: ignore[reportIncompatibleVariableOverride]
        n = self.image.numel()
        return n, self._maps[-1].shape[1] if self._maps else n

    def jvp(self, rows: Tensor) -> Tensor:
        for one in reversed(self._maps):
            rows = one.jvp(rows)
        return rows

    def vjp(self, rows: Tensor) -> Tensor:
        for one in self._maps:
            rows = one.vjp(rows)
        return rows

    def _append(self, one: Jacobian) -> None:
        if one.shape[1] == 0:
            raise ValueError(_EMPTY)
        self._maps.append(one)

    def _restrict(self, parts: tuple[Any, ...]) -> Tensor | None:
        """Bases of the parts but that of zero mean, whose projections have to commute; soft weights of coordinates."""
        shape = tuple(self.image.shape)
        masks = [part for part in parts if isinstance(part, Mask)]
        bands = [part for part in parts if isinstance(part, Band)]
        colours = [part for part in parts if isinstance(part, Channels)]
        spans = [part for part in parts if isinstance(part, Span)]
        if masks and bands:
            raise ValueError(
                "subspace holds a mask and a bandpass, whose projections do not commute: no change but zero may lie in "
                "both; restrict to one, or to the span of masked waves"
            )
        soft = None
        if masks:
            weights = _product([part.weights for part in masks], shape)
            inside = _Inside(shape, weights, self.image)
            self._append(inside)
            shape, values = inside.inner, weights[weights > 0]
            soft = None if (values == 1).all() else values
        for band in bands[:1]:
            low, high = max(b.low for b in bands), min(b.high for b in bands)
            if any(b.shape[-2:] != shape[-2:] for b in bands) or len(shape) < 2:
                checks.refuse(ValueError, "shape", f"(height, width) of the image, {shape[-2:]}", band.shape)
            fourier = _Fourier(shape, low, high, self.image)
            self._append(fourier)
            shape = fourier.inner
        axis = self.image.ndim - 3
        for part in colours:
            if axis < 0 or axis > len(shape) - 2 or shape[axis] != len(part.weights):
                has = (
                    f"has {shape[axis]}"
                    if 0 <= axis <= len(shape) - 2
                    else "has no channels, or a mask tells them apart"
                )
                raise ValueError(
                    f"channels has weights of {len(part.weights)} channels, but the image, of shape "
                    f"{tuple(self.image.shape)}, {has} (the third dimension from the end): give as many weights"
                )
            along = _Along(shape, axis, part.weights.to(self.image))
            self._append(along)
            shape = along.inner
            if len(colours) > 1:
                raise ValueError("subspace holds several channels: give one, with several directions")
        if soft is not None:
            soft = soft.expand(*shape[:-1], len(soft)).reshape(-1)
        for part in spans:
            self._append(self._spanned(part.basis))
            if soft is not None or len(spans) > 1:
                raise ValueError("subspace holds a span beside another, or beside soft weights: multiply its images")
        return soft

    def _spanned(self, basis: Tensor) -> Jacobian:
        """What lies in the span, in the coordinates that there are, whose projections must commute with its own."""
        n = self.image.numel()
        rows = basis.reshape(len(basis), -1) if basis[0].numel() == n else basis.T if len(basis) == n else None
        if rows is None or len(rows) > n:
            checks.refuse(ValueError, "basis", f"images of {n} elements, or columns of {n}", basis)
        q, r = torch.linalg.qr(rows.T)
        if float(r.diagonal().abs().min()) <= 1e-10 * float(r.diagonal().abs().max()):
            checks.refuse(ValueError, "basis", "linearly independent", basis)
        inside = self.vjp(q.T.to(self.image)).double().cpu()
        u, s, _ = torch.linalg.svd(inside.T, full_matrices=False)
        if ((s > 1e-4) & (s < 1 - 1e-4)).any():
            raise ValueError(
                "subspace holds a span that lies in part within its other parts: project its images on them first"
            )
        if not (s > 0.5).any():
            raise ValueError(_EMPTY)
        return as_jacobian(u[:, s > 0.5].contiguous().to(self.image))

    def _measure(self, metric: Any) -> None:
        n, d = self.shape
        weights = None
        if hasattr(metric, "matvec") or Jacobian in type(metric).__mro__:
            root: Any = as_jacobian(metric)
            if root.shape != (n, n):
                checks.refuse(ValueError, "metric", f"an operator of shape ({n}, {n})", metric)
            if (root.dtype, root.device) != (self.dtype, self.device):
                root = _Cast(root, self.image)
        else:
            values = checks.array("metric", metric, what="positive weights, or a LinearOperator W^(-1/2)")
            if not values.size or not (values > 0).all():
                checks.refuse(ValueError, "metric", "positive", metric)
            weights = _product(
                [torch.from_numpy(np.array(values, dtype=np.float64))], tuple(self.image.shape), "metric"
            )
            weights = weights.expand(self.image.shape).reshape(-1).to(self.device)
            root = Diagonal(weights.rsqrt().to(self.dtype))
        if d == n:
            self._maps.insert(0, root)
            return
        z = torch.randn(3, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(self.image)
        x = root.jvp(self.jvp(z))
        off = torch.linalg.vector_norm((x - self.jvp(self.vjp(x))).double(), dim=1)
        if bool((off <= _FIT * torch.linalg.vector_norm(x.double(), dim=1)).all()):
            self._maps.insert(0, root)  # it maps the subspace to itself
            return
        if weights is None or d > _DENSE:
            raise ValueError(
                "metric does not map the subspace to itself, so that W^(-1/2) leads out of it; with weights this can "
                f"be solved up to {_DENSE} dimensions, here {d}: choose a metric that commutes with it, as by pixel "
                "for a mask, by frequency for a bandpass, or restrict further"
            )
        b = self.jvp(torch.eye(d, dtype=self.dtype, device=self.device)).double()
        factor = torch.linalg.cholesky(b * weights @ b.T)
        identity = torch.eye(d, dtype=torch.float64, device=self.device)
        self._append(as_jacobian(torch.linalg.solve_triangular(factor.T, identity, upper=True).to(self.dtype)))


def _product(weights: list[Tensor], shape: tuple[int, ...], name: str = "weights") -> Tensor:
    """Of weights of an image, or of its last dimensions, in the largest of their shapes."""
    product = torch.ones((), dtype=torch.float64)
    for one in weights:
        fitting = one.reshape(shape) if one.shape == (math.prod(shape),) else one
        while fitting.ndim > len(shape) or (fitting.ndim > 1 and len(fitting) == 1 != shape[-fitting.ndim]):
            fitting = fitting[0]
        if fitting.shape != shape[len(shape) - fitting.ndim :]:
            checks.refuse(ValueError, name, f"of the image's shape {shape}, or of its last dimensions", one)
        product = product * fitting
    return product


class _Map(Jacobian):
    """A linear map of tensors of a shape to tensors of another, whose rows are flat."""

    def __init__(self, outer: Sequence[int], inner: Sequence[int], like: Any) -> None:
        self.outer, self.inner = tuple(outer), tuple(inner)
        self.shape = math.prod(outer), math.prod(inner)
        self.dtype, self.device = like.dtype, like.device


class _Inside(_Map):
    """From the elements inside a mask of the last dimensions to all."""

    def __init__(self, shape: tuple[int, ...], weights: Tensor, like: Tensor) -> None:
        self._inside = (weights > 0).reshape(-1).to(like.device)
        self._lead = shape[: len(shape) - weights.ndim]
        super().__init__(shape, (*self._lead, int(self._inside.sum())), like)

    def jvp(self, rows: Tensor) -> Tensor:
        whole = rows.new_zeros(len(rows), *self._lead, len(self._inside))
        whole[..., self._inside] = rows.reshape(-1, *self.inner)
        return whole.reshape(len(rows), -1)

    def vjp(self, rows: Tensor) -> Tensor:
        return rows.reshape(len(rows), *self._lead, -1)[..., self._inside].reshape(len(rows), -1)


class _Fourier(_Map):
    """From coordinates in the real orthonormal Fourier basis of a band to images.

    Of `rfft2` with ``norm="ortho"`` it takes the bins within the band, each pair of conjugates once: the real and the
    imaginary part times √2, and those that are their own conjugates, which are real.
    """

    def __init__(self, shape: tuple[int, ...], low: float, high: float, like: Tensor) -> None:
        height, width = shape[-2:]
        fy = torch.fft.fftfreq(height, 1 / height, dtype=torch.float64)[:, None]
        fx = torch.fft.rfftfreq(width, 1 / width, dtype=torch.float64)[None]
        within = (torch.hypot(fy, fx) >= low - 1e-9) & (torch.hypot(fy, fx) <= high + 1e-9)
        has_mirror = (fx == 0) | (fx == width / 2)  # its own conjugates are in the same column
        is_real = has_mirror & ((fy == 0) | (fy.abs() == height / 2))
        pairs = within & ~is_real & ~(has_mirror & (fy < 0))
        self._real, self._pairs = ((a & within).nonzero().T.to(like.device) for a in (is_real, pairs))
        mirrored = (pairs & has_mirror).nonzero().T.to(like.device)
        self._mirror = torch.stack([mirrored[0], (height - mirrored[0]) % height, mirrored[1]])
        self._half = height, width // 2 + 1
        super().__init__(shape, (*shape[:-2], self._real.shape[1] + 2 * self._pairs.shape[1]), like)

    def jvp(self, rows: Tensor) -> Tensor:
        coordinates = rows.reshape(-1, *self.inner)
        real, re, im = coordinates.split([self._real.shape[1], *[self._pairs.shape[1]] * 2], dim=-1)
        bins = torch.zeros(*coordinates.shape[:-1], *self._half, dtype=torch.complex(rows[:0], rows[:0]).dtype)
        bins = bins.to(rows.device)
        bins[..., self._real[0], self._real[1]] = torch.complex(real, torch.zeros_like(real))
        bins[..., self._pairs[0], self._pairs[1]] = torch.complex(re, im) * 0.5**0.5
        row, mirror, column = self._mirror
        bins[..., mirror, column] = bins[..., row, column].conj()
        return torch.fft.irfft2(bins, s=self.outer[-2:], norm="ortho").reshape(len(rows), -1)

    def vjp(self, rows: Tensor) -> Tensor:
        bins = torch.fft.rfft2(rows.reshape(-1, *self.outer), norm="ortho")
        pairs = bins[..., self._pairs[0], self._pairs[1]] * 2**0.5
        real = bins[..., self._real[0], self._real[1]].real
        return torch.cat([real, pairs.real, pairs.imag], dim=-1).reshape(len(rows), -1)


class _Along(_Map):
    """A matrix (C, c) along one dimension."""

    def __init__(self, shape: tuple[int, ...], axis: int, matrix: Tensor) -> None:
        self._axis, self._matrix = axis, matrix
        super().__init__(shape, (*shape[:axis], matrix.shape[1], *shape[axis + 1 :]), matrix)

    def jvp(self, rows: Tensor) -> Tensor:
        return self._times(self._matrix, rows.reshape(-1, *self.inner))

    def vjp(self, rows: Tensor) -> Tensor:
        return self._times(self._matrix.T, rows.reshape(-1, *self.outer))

    def _times(self, matrix: Tensor, x: Tensor) -> Tensor:
        return (x.movedim(self._axis + 1, -1) @ matrix.T).movedim(-1, self._axis + 1).reshape(len(x), -1)


class _Complement(_Map):
    """Coordinates of what is orthogonal to a unit vector, by the Householder reflection of that to the first axis."""

    def __init__(self, unit: Tensor) -> None:
        w = unit.clone()
        w[0] += 1.0 if w[0] >= 0 else -1.0
        self._w = w / torch.linalg.vector_norm(w)
        super().__init__((len(unit),), (len(unit) - 1,), unit)

    def jvp(self, rows: Tensor) -> Tensor:
        return self._reflect(torch.nn.functional.pad(rows, (1, 0)))

    def vjp(self, rows: Tensor) -> Tensor:
        return self._reflect(rows)[:, 1:]

    def _reflect(self, rows: Tensor) -> Tensor:
        return rows - 2 * (rows @ self._w)[:, None] * self._w


class _Cast(_Map):
    """A matrix, in another dtype and on another device."""

    def __init__(self, J: Jacobian, like: Tensor) -> None:
        self._J = J
        super().__init__(J.shape[:1], J.shape[1:], like)

    def jvp(self, rows: Tensor) -> Tensor:
        return self._J.jvp(rows.to(self._J.device, self._J.dtype)).to(rows)

    def vjp(self, rows: Tensor) -> Tensor:
        return self._J.vjp(rows.to(self._J.device, self._J.dtype)).to(rows)
