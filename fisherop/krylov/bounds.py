"""What a Krylov space from a random start says of eigenvalues that it doesn't show: pure functions of Ritz pairs.

The argument, rounding included, is in docs/design.md, "Bounds under rounding".
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

DELTA = 1e-3  # the probability of a wrong bound, or of a vector that a probe misses


@dataclass(frozen=True, eq=False)
class RitzPairs:
    """Ritz pairs of F in a Krylov space of dimension m, in ascending order: T y = θ y.

    Attributes
    ----------
    values : ndarray, shape (m,)
        θ.
    residuals : ndarray, shape (b, m)
        C y in the coordinates of W, so that ‖F V y − θ V y‖ is the norm of a column.
    coefficients : ndarray, shape (m, m)
        y, in columns.
    start : ndarray, shape (p, m), or None
        Random unit vectors that the space holds, in the coordinates of V; None after a restart, which may lose them.
    n : int
        The dimension of the space that they are random in.
    noise : float
        The component of a product's rounding error along one unit vector, in the units of θ.
    eps : float
        The machine epsilon of the vectors.
    """

    values: NDArray[np.float64]
    residuals: NDArray[np.float64]
    coefficients: NDArray[np.float64]
    start: NDArray[np.float64] | None
    n: int
    noise: float
    eps: float

    def __len__(self) -> int:
        return len(self.values)

    @property
    def norms(self) -> NDArray[np.float64]:
        """The norms of the residuals."""
        return np.linalg.norm(self.residuals, axis=0)

    def chance_of(self, x: float, pairs: slice | NDArray = slice(None), noise: float | None = None) -> float:
        """A bound of the chance of an eigenvalue x whose eigenvector is orthogonal to all Ritz vectors but `pairs`.

        It is 1 after a restart. A given part of the start, v0, adds a constant to an eigenvector's share in it, which
        makes a small share less probable.
        """
        if self.start is None:
            return 1.0
        theta, residuals, y = (a[..., pairs] for a in (self.values, self.residuals, self.coefficients))
        noise = self.noise if noise is None else noise
        return chance_of_missing(x, theta, residuals, self.start @ y, self.n, noise)


@dataclass(frozen=True)
class Bounds:
    """All eigenvalues lie within, but for a probability of 2 δ."""

    low: float = 0.0
    high: float = math.inf

    def __and__(self, other: Bounds) -> Bounds:
        return Bounds(max(self.low, other.low), min(self.high, other.high))

    def times(self, factor: float) -> Bounds:
        return Bounds(factor * self.low, factor * self.high)


def chance_of_missing(
    x: float, theta: NDArray, residuals: NDArray, start: NDArray, n: int, noise: float = 0.0
) -> float:
    """A bound on the probability that F has an eigenvalue x, beyond all Ritz values, that a Krylov space doesn't show.

    Let F V = V T + W C + E, E the rounding of products, and h the unit eigenvector. Then hᵀ(F V − x V) = 0 gives ``(T
    − x) Vᵀh = −Cᵀ Wᵀh − Eᵀh``, so that the share of h in p random unit vectors V S within the space, ``SᵀVᵀh``, has a
    norm of at most ``q = ‖C (T − x)⁻¹ S‖₂ + noise · ‖(T − x)⁻¹ S‖₂``, where ``|hᵀE y| ≤ noise · ‖y‖``: see "Bounds
    under rounding" in docs/design.md. For random vectors in n dimensions, n times the square of that share is nearly
    χ² with p degrees of freedom. For p = 1 this is the bound by Lanczos polynomials of J. L. M. van Dorsselaer, M. E.
    Hochstenbach and H. A. van der Vorst, Computing probabilistic bounds for extreme eigenvalues of symmetric matrices
    with the Lanczos method, SIAM J. Matrix Anal. Appl. 22 (2001). It takes the polynomial of this run; that of J.
    Kuczyński and H. Woźniakowski, Estimating the largest eigenvalue by the power and Lanczos algorithms with a random
    start, SIAM J. Matrix Anal. Appl. 13 (1992), holds for any spectrum and is wider. q falls as x goes outwards: what
    holds for x holds for anything beyond.

    Parameters
    ----------
    x : float
    theta : ndarray, shape (m,)
        Ritz values.
    residuals : ndarray, shape (b, m)
        C times the eigenvectors of T.
    start : ndarray, shape (p, m)
        Sᵀ times the eigenvectors of T.
    n : int
    noise : float
        The component of a product's rounding error along one unit vector, in the units of `theta`.
    """
    p, q, distances = len(start), 0.0, theta - x
    if p == 0:  # nothing is known of a start
        return 1.0
    if noise == 0 and not residuals.any():
        return 0.0
    if not distances.all():  # x is rounded to a Ritz value
        return 1.0
    if residuals.any():
        q += np.linalg.norm((residuals / distances) @ start.T, 2)
    if noise > 0 and len(theta):
        q += noise * np.linalg.norm(start / distances, 2)
    if q == 0:
        return 0.0
    return math.exp(min(0.0, p / 2 * math.log(n * q**2 / 2) - math.lgamma(p / 2 + 1)))


def would_show(ritz: RitzPairs, x: float, pairs: slice, aim: float, noise: float | None = None) -> bool:
    """Whether an eigenvalue x would show in some Ritz pairs, but for a probability of at most δ.

    Converged pairs next to x say nothing of it.

    The random start may be lost in a restart. Then the residual of the nearest pair decides, relative to the distance:
    the missed vector, whose share in the random start is about that of the pair's own, would show in it.
    """
    i = np.arange(len(ritz))[pairs]
    i = i[(ritz.norms[i] > 0.01 * aim) | (abs(ritz.values[i] - x) > 2 * aim)]
    if ritz.start is not None:
        return ritz.chance_of(x, i, noise) <= DELTA
    distance = abs(ritz.values[i] - x)
    return not len(i) or bool((ritz.norms[i] / distance)[np.argmin(distance)] <= DELTA)


def outer_bounds(ritz: RitzPairs) -> Bounds:
    """Bounds beyond which no eigenvalue lies, but for a probability δ at each end; none after a restart."""
    if ritz.start is None:
        return Bounds()
    theta = ritz.values
    lowest = max(theta[0], 0.0)
    below = _distance(ritz, lowest, -1, lowest) if lowest > 0 else np.inf
    rounding = 10 * ritz.eps * theta[-1]  # of T
    above = _distance(ritz, theta[-1], 1, 1e3 * theta[-1])
    return Bounds(max(lowest - below - rounding, 0.0), theta[-1] + above + rounding)


def _distance(ritz: RitzPairs, end: float, sign: int, largest: float) -> float:
    """The smallest from an end at which the chance of an eigenvalue is at most δ."""
    low, high = largest * ritz.eps, largest
    if ritz.chance_of(end + sign * high) > DELTA:
        return np.inf
    while high > 1.01 * low:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if ritz.chance_of(end + sign * middle) <= DELTA else (middle, high)
    return high
