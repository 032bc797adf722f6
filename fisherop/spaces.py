"""Which changes of the image count: subspaces of it, and metrics on it.

`mask`, `bandpass`, `channels`, `zero_mean` and `span` give a `Space`; a product of spaces is what lies in all of them.
Passed as ``subspace=`` to `FisherOperator`, `JacobianOperator` or `Eigendistortion`, it makes solvers work in the
coordinates of an orthonormal basis B (N, d) of it, so that nothing of its complement is among the eigenvectors.
``metric=`` says which norm of a change is one, where that isn't the Euclidean one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from fisherop import checks


@dataclass(frozen=True, eq=False)
class Space:
    """A subspace of images, made of parts: those vectors that lie in all of them.

    ``a * b`` is what lies in both. That is what the product of their projections projects on, if these commute, which
    is required of all but `zero_mean`.
    """

    parts: tuple[Any, ...]

    def __mul__(self, other: Space) -> Space:
        return Space(self.parts + checks.instance("what is multiplied with a Space", other, Space, "a Space").parts)


@dataclass(frozen=True, eq=False)
class Mask:
    """A weight from 0 of each element, of which those above 0 count."""

    weights: Tensor


@dataclass(frozen=True)
class Band:
    """Frequencies."""

    shape: tuple[int, ...]
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class Channels:
    """Orthonormal directions (C, c)."""

    weights: Tensor


@dataclass(frozen=True)
class ZeroMean:
    """No part in the constant image."""


@dataclass(frozen=True, eq=False)
class Span:
    """Images, or columns."""

    basis: Tensor


def mask(weights: ArrayLike | Tensor) -> Space:
    """An aperture, a patch, a fovea: changes of those pixels where a weight isn't zero.

    Parameters
    ----------
    weights : array_like, shape of the image or of its last dimensions
        Zeros and ones, or weights from 0 to 1, as at a soft edge: the norm of a change is that of change / weight, so
        that the most noticeable distortions fade out towards the edge. The least noticeable ones then lie where weights
        are small, since a change of norm 1 is small there: for those take zeros and ones.
    """
    values = checks.array("weights", weights, what="an array of weights from 0 to 1")
    if values.ndim == 0 or (values < 0).any() or (values > 1).any() or not values.any():
        checks.refuse(ValueError, "weights", "from 0 to 1, and not all 0", weights)
    return Space((Mask(torch.from_numpy(np.array(values, dtype=np.float64))),))


def bandpass(shape: Sequence[int], low: float, high: float) -> Space:
    """Changes of spatial frequencies √(f_x² + f_y²) from `low` to `high`, of each channel.

    Parameters
    ----------
    shape : sequence of int
        (height, width), or the image's shape, which ends in it.
    low, high : float
        In cycles per image, both included; 0 is the mean. These are the frequencies of the discrete Fourier transform,
        for which the image goes on at the opposite edge.
    """
    sizes = tuple(checks.integers("shape", shape, least=2))
    low = checks.number("low", low, "a number from 0", lambda low: low >= 0)
    high = checks.number("high", high, "a number from low", lambda high: high >= low)
    return Space((Band(sizes, low, high),))


def channels(weights: ArrayLike | Tensor) -> Space:
    """Changes along directions in the space of colours, the same directions at all pixels.

    Parameters
    ----------
    weights : array_like, shape (C,) or (c, C)
        One direction that the channels of a pixel move along, as ``[1, 1, 1]``, by which red, green and blue change
        alike and no hue does, or ``[1, -1, 0]``, from green to red; or several that span a plane. Weights of the luma
        are no direction: the plane orthogonal to them holds the changes that keep it. The channels are the image's
        third dimension from the end.
    """
    values = np.atleast_2d(checks.array("weights", weights, what="an array of shape (C,) or (c, C)"))
    singular = np.linalg.svd(values.astype(np.float64), compute_uv=False) if values.ndim == 2 and values.size else [0]
    if values.ndim != 2 or len(values) > values.shape[1] or min(singular) <= 1e-6 * max(singular):
        checks.refuse(ValueError, "weights", "of shape (C,) or (c, C), and linearly independent", weights)
    return Space((Channels(torch.from_numpy(np.linalg.qr(values.T.astype(np.float64))[0])),))


def zero_mean() -> Space:
    """Changes whose sum over all elements of the image is zero."""
    return Space((ZeroMean(),))


def span(basis: ArrayLike | Tensor) -> Space:
    """Linear combinations of given images.

    Parameters
    ----------
    basis : array_like, shape (p, ...) or (N, p)
        Images of the image's shape, or columns; linearly independent.
    """
    values = checks.array("basis", basis, what="an array of images (p, ...), or of columns (N, p)")
    if values.ndim < 2 or not values.size:
        checks.refuse(ValueError, "basis", "images (p, ...), or columns (N, p)", basis)
    return Space((Span(torch.from_numpy(np.array(values, dtype=np.float64))),))
