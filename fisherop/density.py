"""How the eigenvalues of F are spread, by stochastic Lanczos quadrature: from small matrices, by pure functions.

S. Ubaru, J. Chen and Y. Saad, Fast estimation of tr(f(A)) via stochastic Lanczos quadrature, SIAM J. Matrix Anal. Appl.
38 (2017); G. H. Golub and G. Meurant, Matrices, Moments and Quadrature with Applications, Princeton (2010), chapter 6.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import scipy.linalg
import scipy.special
from numpy.typing import ArrayLike, NDArray

from fisherop import checks

_TAIL = 0.0125  # at each end of a band of 95 %: half of what is allowed, since the variance is an estimate, too
_WIDE = float(scipy.special.ndtri(1 - _TAIL))  # standard deviations


class Estimate(NamedTuple):
    """A value, its standard error, and the band from `low` to `high` in which the truth lies with probability 0.95.

    Of a normal distribution it would hold 0.975: the standard error is estimated, too.
    """

    value: float
    error: float
    low: float
    high: float

    def times(self, factor: float) -> Estimate:
        """Of `factor` times the same."""
        return Estimate(*(factor * x for x in self))

    def __str__(self) -> str:
        if self.low == self.high:
            return f"{self.value:.6g}, exactly"
        return f"{self.value:.4g} ± {self.error:.1g} (95 %: {self.low:.4g} to {self.high:.4g})"


class Quadrature:
    """Gauss quadrature of vᵀf(F)v for a unit vector v, by the Jacobi matrix T of its Krylov space: F V = V T + β w eᵀ.

    Parameters
    ----------
    nodes : array_like, shape (m,)
        The eigenvalues of T.
    start, residuals : array_like, shape (m,)
        The first components of the eigenvectors of T, and β times the last ones.
    noise : float
        A bound of the rounding of F, in its 2-norm.
    """

    def __init__(self, nodes: ArrayLike, start: ArrayLike, residuals: ArrayLike, noise: float) -> None:
        self.nodes = checks.array("nodes", nodes, ("m",)).astype(np.float64)
        shape = (len(self.nodes),)
        if shape == (0,):
            checks.refuse(ValueError, "nodes", "at least one number", nodes)
        self.start, self.residuals = (
            checks.array(name, x, shape).astype(np.float64) for name, x in (("start", start), ("residuals", residuals))
        )
        self.noise = checks.number("noise", noise, "a number from 0", lambda noise: noise >= 0)

    def __reduce__(self) -> tuple:
        return Quadrature, tuple(self.to_dict().values())

    def to_dict(self) -> dict[str, Any]:
        """The parameters."""
        return {"nodes": self.nodes, "start": self.start, "residuals": self.residuals, "noise": self.noise}

    def times(self, factor: float) -> Quadrature:
        """That of `factor` times F."""
        return Quadrature(factor * self.nodes, self.start, factor * self.residuals, factor * self.noise)

    def gauss(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Nodes, from 0, and weights, both (m,)."""
        return self.nodes.clip(min=0.0), self.start**2

    def radau(self, x: float) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
        """The rule with a node at x: the other nodes and their weights, both (m,), and the weight of x.

        T is bordered by β eᵀ, with the corner x + β² eᵀ(T − x)⁻¹e, with which x is an eigenvalue (Golub and Meurant,
        section 6.2).
        """
        theta, r = self.nodes, self.residuals
        if not r.any():
            return theta, self.start**2, 0.0
        corner = x + (r**2 / self._distances(x)).sum()
        values, y = scipy.linalg.eigh(np.block([[np.diag(theta), r[:, None]], [r, np.array([[corner]])]]))
        weights, here = (self.start @ y[:-1]) ** 2, np.argmin(np.abs(values - x))
        return np.delete(values, here), np.delete(weights, here), float(weights[here])

    def _distances(self, x: float | NDArray[np.float64]) -> NDArray[np.float64]:
        """Of the nodes from x, and not zero."""
        distances, least = self.nodes - x, 4 * np.finfo(float).eps * np.abs(self.nodes).max()
        return np.where(np.abs(distances) < least, least or 1.0, distances)

    def shares_below(self, x: float) -> tuple[float, float]:
        """Bounds of vᵀ[F < x]v: the Chebyshev–Markov–Stieltjes inequalities, with the rounding of F."""
        low = 0.0
        if x > self.noise:
            values, weights, _ = self.radau(x - self.noise)
            low = float(weights[values < x - self.noise].sum())
        values, weights, at_x = self.radau(x + self.noise)
        return low, min(float(weights[values < x + self.noise].sum()) + at_x, 1.0)

    def curves_below(self, x: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Bounds as of `shares_below` for ascending x (p,), wider, without an eigenproblem for each.

        The share by Gauss quadrature, too, lies between those bounds, whose distance is the weight of x in the rule
        with a node there. The vector of that node is −β (T − x)⁻¹e beside 1.
        """
        low, high = (self._around(x + shift) for shift in (-self.noise, self.noise))
        return np.maximum.accumulate(low[0].clip(min=0.0)), np.minimum.accumulate(high[1][::-1].clip(max=1.0))[::-1]

    def _around(self, x: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        gauss = self.start**2 @ (self.nodes[:, None] < x)
        ratios = self.residuals / self._distances(x[:, None])
        at_x = (ratios @ self.start) ** 2 / (1 + (ratios**2).sum(axis=1))
        return gauss - at_x, gauss + at_x


@dataclass(frozen=True, eq=False, repr=False)
class SpectralDensity:
    """How many eigenvalues F has, and of which size, of the whole spectrum (N in all).

    Estimates come from random vectors v, for which N vᵀf(F)v is tr f(F) on average. The variance of that is 2 N / (N +
    2) · Σ (f(λ) − tr f(F) / N)², which is estimated, too. Bands add what the quadrature leaves open,
    where a bound of that is known.

    Attributes
    ----------
    runs : tuple of Quadrature
        One of each random vector, of F / λ_max.
    image_size : int
        N.
    n_zeros : int
        Eigenvalues known to be zero, which the runs leave out.
    is_exact : bool
        Whether the nodes are the eigenvalues themselves.
    lambda_max : float
        The largest eigenvalue that was seen.
    n_products : float
    """

    runs: tuple[Quadrature, ...]
    image_size: int
    n_zeros: int
    is_exact: bool
    lambda_max: float
    n_products: float

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        by = "all its eigenvalues" if self.is_exact else f"{self.n_probes} random vectors"
        by = "1 random vector" if by == "1 random vectors" else by
        lines = [
            f"spectrum of F ({self.image_size} × {self.image_size}), by {by}, {self.n_products:g} products",
            "",
            f"tr F                 {self._of(lambda x: x).times(self.lambda_max)}",
            f"tr F / λ_max         {self.effective_dimension}",
            f"(tr F)² / tr F²      {self.participation_ratio}",
        ]
        lines += [f"λ < {x:.0e} λ_max     {self.count_below(x)}" for x in (1e-1, 1e-2, 1e-3, 1e-4)]
        return "\n".join(lines)

    @property
    def n_probes(self) -> int:
        """How many random vectors there were."""
        return len(self.runs)

    @property
    def trace(self) -> float:
        """tr F."""
        return self._of(lambda x: x).value * self.lambda_max

    @property
    def trace_error(self) -> float:
        """One standard error of `trace`."""
        return self._of(lambda x: x).error * self.lambda_max

    @property
    def effective_dimension(self) -> Estimate:
        """tr F / λ_max: as many directions as noticeable as the first would give this trace."""
        return self._of(lambda x: x)

    @property
    def participation_ratio(self) -> Estimate:
        """(tr F)² / tr F², the number of eigenvalues if all are equal; its error is that of the linear terms."""
        first, second = (self._of(f).value for f in (lambda x: x, lambda x: x**2))
        if second == 0:
            return Estimate(0.0, 0.0, 0.0, 0.0)
        error = self._of(lambda x: 2 * first / second * x - (first / second) ** 2 * x**2).error
        value = first**2 / second
        return Estimate(value, error, max(value - _WIDE * error, 1.0), min(value + _WIDE * error, self.image_size))

    def trace_of(self, function: Callable[[NDArray[np.float64]], ArrayLike]) -> Estimate:
        """tr f(F), for a function f of arrays of eigenvalues (m,), from 0.

        The band leaves the error of the quadrature out, which is none for polynomials of degree below 2 m, m the
        steps of a run.
        """
        checks.function("function", function)
        scale = self.lambda_max

        def checked(x: NDArray[np.float64]) -> NDArray[np.float64]:
            values = checks.array("what function gives", function(scale * x), (len(x),))
            return values.astype(np.float64)

        return self._of(checked)

    def log_det(self, epsilon: float) -> Estimate:
        """log det(F / λ_max + ε I): that of F + ε λ_max I, less N log λ_max.

        Its band holds the error of the quadrature, by rules that bound it on both sides.

        Raises
        ------
        ValueError
            `epsilon` is not above 0, or J is zero.
        """
        epsilon = checks.number("epsilon", epsilon, "a number above 0", lambda epsilon: epsilon > 0)
        if self.lambda_max == 0:
            raise ValueError("J is zero, so that F / λ_max is not defined")

        def function(x: NDArray[np.float64]) -> NDArray[np.float64]:
            return np.log(x.clip(min=0.0) + epsilon)

        # derivatives of even order are negative, those of odd order positive: Gauss is above, Radau from 0 below
        above, below = self._of(function), self._of(function, _radau)
        error = max(above.error, below.error)
        middle, half = (above.value + below.value) / 2, abs(above.value - below.value) / 2 + _WIDE * error
        return Estimate(middle, error, middle - half, middle + half)

    def count_below(self, threshold: float) -> Estimate:
        """How many eigenvalues are below `threshold` · λ_max: directions that the model does not notice.

        The share of so many directions in a random vector has a beta distribution, so that the band is right for small
        numbers, too; it holds the error of the quadrature, which is between bounds, and the rounding of products. The
        `error` includes half the distance of those bounds.

        Raises
        ------
        ValueError
            `threshold` is not above 0.
        """
        threshold = checks.number("threshold", threshold, "a number above 0", lambda threshold: threshold > 0)
        n, probes, zeros = self._n, self.n_probes, self.n_zeros
        if self.lambda_max == 0:
            return Estimate(*[float(self.image_size)] * 4)._replace(error=0.0)
        if self.is_exact or threshold > 2:
            count = float(((self.runs[0].nodes < threshold).sum() if threshold <= 2 else n) + zeros)
            return Estimate(count, 0.0, count, count)
        low, high = np.mean([run.shares_below(threshold) for run in self.runs], axis=0)
        share = np.mean([run.start[run.nodes < threshold] @ run.start[run.nodes < threshold] for run in self.runs])
        count = n * min(max(float(share), low), high)
        half = n * (high - low) / 2
        error = math.sqrt(2 * n / (n + 2) * count * max(1 - count / n, 0.0) / probes)
        least, most = _fewest(low, n, probes), n - _fewest(1 - high, n, probes)
        count = min(max(count, least), most)
        return Estimate(count + zeros, math.hypot(error, half), least + zeros, most + zeros)

    def density(self, decades: ArrayLike, width: float = 0.25) -> tuple[NDArray[np.float64], ...]:
        """Eigenvalues per decade, as a smooth function of log₁₀(λ / λ_max).

        Parameters
        ----------
        decades : array_like, shape (p,)
            Where, in log₁₀(λ / λ_max).
        width : float
            The standard deviation of the Gaussian by which each eigenvalue is spread, in decades.

        Returns
        -------
        density, low, high : ndarray, shape (p,)
            With the band of each value, which holds the error of the quadrature: it is wide where the steps were too
            few to tell where the eigenvalues are. Those that are zero are nowhere.
        """
        decades = checks.array("decades", decades, ("p",)).astype(np.float64)
        width = checks.number("width", width, "a number from 0.01 to 10", lambda width: 0.01 <= width <= 10)
        if (np.abs(decades) > 300).any():
            checks.refuse(ValueError, "decades", "numbers from −300 to 300", decades)
        out = np.zeros((3, len(decades)))
        if self.lambda_max == 0 or len(decades) == 0:
            return tuple(out)

        def kernel(x: NDArray[np.float64], place: float) -> NDArray[np.float64]:
            return np.exp(-(((x - place) / width) ** 2) / 2) / (width * math.sqrt(2 * math.pi))

        def of(x: NDArray[np.float64], place: float) -> NDArray[np.float64]:
            with np.errstate(divide="ignore"):
                return kernel(np.log10(x), place)

        # the density is −∫ kernel′(t) n(t) dt, n(t) the number below, which lies between bounds, in each piece of t
        least, most = min(decades.min(), 0.0), max(decades.max(), 0.0)
        pieces = np.arange(max(least, -30.0) - 5 * width, min(most, 1.0) + 5 * width, width / 8)
        below = self._n * np.mean([run.curves_below(10**pieces) for run in self.runs], axis=0)
        for i, place in enumerate(decades.tolist()):
            value, error, _, _ = self._of(functools.partial(of, place=place))
            fall = -np.diff(kernel(pieces, place))
            up, down = fall.clip(min=0.0), fall.clip(max=0.0)
            low = float(up @ below[0, :-1] + down @ below[1, 1:])
            high = float(up @ below[1, 1:] + down @ below[0, :-1])
            if self.is_exact:
                low = high = value
            out[:, i] = value, max(min(low, value) - _WIDE * error, 0.0), max(high, value) + _WIDE * error
        return tuple(out)

    @property
    def _n(self) -> int:
        """The dimension that the random vectors are of."""
        return self.image_size - self.n_zeros

    def _of(
        self,
        function: Callable[[NDArray[np.float64]], NDArray[np.float64]],
        rule: Callable[[Quadrature], tuple[NDArray[np.float64], NDArray[np.float64]]] = Quadrature.gauss,
    ) -> Estimate:
        """tr f(F / λ_max), for a function of nodes, by a rule.

        For the variance, each node stands for an eigenvalue at least: its weight may be less by chance, and then the
        variance, too, would be too small.
        """
        n, rules = self._n, [rule(run) for run in self.runs]
        values = [np.asarray(function(nodes), dtype=np.float64) for nodes, _ in rules]
        at_zero = float(np.asarray(function(np.zeros(1)), dtype=np.float64)[0]) if self.n_zeros else 0.0
        peak = max(float(np.abs(f).max(initial=0.0)) for f in values) or 1.0  # squares stay in range
        mean = float(np.mean([weights @ (f / peak) for (_, weights), f in zip(rules, values, strict=True)]))
        value = n * mean * peak + self.n_zeros * at_zero
        if self.is_exact:
            return Estimate(value, 0.0, value, value)
        squares = [(f / peak - mean) ** 2 for f in values]
        variance = np.mean([np.maximum(w, 1 / n) @ square for (_, w), square in zip(rules, squares, strict=True)])
        error = n * peak * math.sqrt(2 / (n + 2) * float(variance) / self.n_probes)
        return Estimate(value, error, value - _WIDE * error, value + _WIDE * error)

    @classmethod
    def of_runs(
        cls, runs: Iterable[Quadrature], image_size: int, n_products: float, n_zeros: int = 0, is_exact: bool = False
    ) -> SpectralDensity:
        """From quadratures of F."""
        found = list(runs)
        top = max(max(float(run.nodes.max(initial=0.0)) for run in found), 0.0)
        n_zeros = 0 if top == 0 else n_zeros
        runs = found if top == 0 else [run.times(1 / top) for run in found]
        return cls(tuple(runs), image_size, n_zeros, is_exact, top, n_products)


def _radau(run: Quadrature) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The rule with a node at 0."""
    nodes, weights, at_zero = run.radau(0.0)
    return np.r_[0.0, nodes.clip(min=0.0)], np.r_[at_zero, weights]


def _fewest(share: float, n: int, probes: int) -> float:
    """The smallest number of n directions whose share in random vectors reaches this with the probability of a tail."""
    share = min(max(share, 0.0), 1.0)
    low, high = 0.0, float(n)
    if share <= 0:
        return 0.0
    if share >= 1:
        return float(n)
    for _ in range(60):
        middle = (low + high) / 2
        below = scipy.special.betainc(probes * middle / 2, probes * (n - middle) / 2, share)
        low, high = (low, middle) if below < 1 - _TAIL else (middle, high)
    return low
