"""What solvers answer, what is known of it, and what is raised where that isn't enough."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fisherop import markup
from fisherop.density import Quadrature, SpectralDensity


class Status(str, Enum):
    """What is known of a pair (λ, v); ``tol`` is relative to λ_max. Each text says what to make of it."""

    EIGENPAIR = "eigenpair"
    """‖F v − λ v‖₂ ≤ tol · λ_max."""
    NULL = "null to tol"
    """At the smallest end, ‖J v‖₂² ≤ tol · λ_max, jointly with all later pairs: a proof, without a residual."""
    NOT_EXTREME = "not extreme"
    """An eigenpair, but its index is wrong: a direction beyond it exists."""
    UNCONVERGED = "not converged"
    """None of these."""

    __str__ = str.__str__


@dataclass(frozen=True)
class Nullity:
    """How many eigenvalues are null to tol, by an estimate, but no fewer than proven, and its standard error."""

    estimate: float
    standard_error: float

    def __str__(self) -> str:
        return f"about {self.estimate:.3g} ± {self.standard_error:.1g} eigenvalues are null to tol, by an estimate"


@dataclass(frozen=True)
class Evidence:
    """Why pairs are believed to be the extreme ones. Its `str` says so in words.

    Attributes
    ----------
    source : str
        ``"krylov"``: they are the extreme Ritz pairs of a Krylov space. ``"dense"``: all singular values of J are
        known. ``"complement"``: a Lanczos run in their complement found nothing beyond them. ``"complete"``: all N
        pairs are here. ``"none"``: nobody looked. ``"refuted"``: a direction beyond a pair was found. ``"zero"``: J is
        zero. ``"stated"``: whoever asked for the certificate says so, in `text`.
    n_start : int
        Random vectors that the Krylov space began from; 0 where it began from given ones and a random vector.
    is_probed : bool
        Whether another Krylov space was searched, from random vectors orthogonal to the pairs.
    chance : float
        An eigenvalue more than 2 tol beyond the pairs is missed with at most this probability; 0 where none is known.
    confidence : float
        The probability with which both outer bounds, of λ_min and of λ_max, hold; 0 where none is known.
    steps : int
        Of the Lanczos run in the complement.
    dtype : str
        The arithmetic that all this was found in, where another judges.
    text : str
        See ``"stated"``.
    """

    source: str
    n_start: int = 0
    is_probed: bool = False
    chance: float = 0.0
    confidence: float = 0.0
    steps: int = 0
    dtype: str = ""
    text: str = ""

    def __str__(self) -> str:
        words = {
            "krylov": self._krylov,
            "dense": "all singular values of the dense J",
            "complement": f"no direction beyond these in {self.steps} Lanczos steps from a random vector orthogonal to "
            "them",
            "complete": "all N pairs are here",
            "none": "not examined",
            "refuted": "refuted for the pairs marked: a direction beyond them exists",
            "zero": "J is zero, so that every vector is both extremes",
            "stated": self.text,
        }[self.source]
        return words + (f", in {self.dtype}" if self.dtype else "")

    @property
    def _krylov(self) -> str:
        start = {0: "v0 and a random vector", 1: "a random vector"}.get(self.n_start, f"{self.n_start} random vectors")
        words = f"extreme Ritz pairs of a Krylov space from {start}"
        if self.is_probed:
            words += ", and of another from random vectors orthogonal to them"
        if self.chance > 0:
            words += "; in the first, " if self.is_probed else "; "
            words += "an eigenvalue more than 2 tol beyond these is missed with a chance of at most "
            words += f"{self.chance:.1g}"
        if self.confidence > 0:
            words += f"; the outer bounds of λ_min and λ_max hold with probability {self.confidence:.3f}"
        return words


@dataclass(frozen=True, eq=False)
class Answer:
    """What a solver found, before it is judged.

    Attributes
    ----------
    largest, smallest : ndarray, shapes (N, k₁) and (N, k₂)
        Orthonormal columns by descending eigenvalue: those of the largest eigenvalues, and those of the smallest.
    evidence : fisherop.result.Evidence, optional
        Why these are the extreme ones, by `golub_kahan` or `exact`. Of other solvers, yours too, it is not taken: the
        certificate looks beyond what they found.
    bounds : (float, float)
        All eigenvalues of F lie within, by the solver's own theory: a lower bound of λ_min, an upper one of λ_max.
    details : mapping
        What else there is to report: it goes to the result.
    range_error : float, optional
        A bound of ‖J − Q Qᵀ J‖₂, Q being what a randomized method worked in.
    n_earlier : float
        Products of an earlier call that this one went on from.
    quadratures : tuple of Quadrature
        What each random vector that it started from says of the whole spectrum.
    """

    largest: NDArray
    smallest: NDArray
    evidence: Evidence | None = None
    bounds: tuple[float, float] = (0.0, np.inf)
    details: Mapping[str, Any] = field(default_factory=dict)
    range_error: float | None = None
    n_earlier: float = 0.0
    quadratures: tuple[Quadrature, ...] = ()

    def times(self, factor: float) -> Answer:
        """The answer for J times `factor`, of that for J."""
        bounds = self.bounds[0] * factor**2, self.bounds[1] * factor**2
        error = None if self.range_error is None else self.range_error * factor
        found = tuple(one.times(factor**2) for one in self.quadratures)
        return dataclasses.replace(self, bounds=bounds, range_error=error, quadratures=found)


@dataclass(frozen=True, eq=False, repr=False)
class EigenResult:
    """Certified eigenpairs of F = JᵀJ (N × N), J of shape (M, N).

    Attributes
    ----------
    eigenvalues : ndarray, shape (K,)
        Rayleigh quotients ‖J v‖₂² of the eigenvectors, descending, accumulated in float64.
    eigenvectors : ndarray, shape (N, K)
        Orthonormal columns, in the operator's dtype.
    eigenindex : ndarray of int, shape (K,)
        The rank that is claimed for each among all N: 0 for the largest, N − 1 for the smallest. Residuals are held
        one by one, and in a cluster no wider than a few tol · λ_max one eigenvalue may stand for another, so that an
        index holds for the eigenvalue to within 2 √K · tol · λ_max.
    residual_norms : ndarray, shape (K,)
        ‖F v − λ v‖₂.
    status : ndarray of Status, shape (K,)
        What the pair satisfies.
    converged : ndarray of bool, shape (K,)
        Whether it is an eigenpair or null to tol, with no evidence against its index.
    tol : float
        The tolerance, relative to λ_max.
    method : str
        The solver.
    n_products : float
        Products spent, the certificate's included, and those of an earlier call that this one goes on from; one product
        is one J v plus one Jᵀu.
    image_size, response_size : int
        N and M.
    lambda_max_bounds, lambda_min_bounds : (float, float)
        Intervals for the extreme eigenvalues of F. The inner bounds are Rayleigh quotients; the outer ones come from
        the solver's own theory, or are 0, since F is positive semidefinite, and infinity. Each is wider by the rounding
        of products: see "What a certificate means" in docs/design.md. λ_min = 0 where M < N. Both
        intervals are (0, 0) where J is zero, so that every vector is both extremes.
    noise : float
        Relative rounding error of products, ε = ‖J(x + y) − J x − J y‖ / σ_max. Residuals below ε λ_max and
        eigenvalues below 4 ε² λ_max are noise. The inequalities are tested with ε as a margin; for residuals, if tol is
        at least 10 ε, with 4 ε / √N, since rounding errors of random direction enlarge what is measured.
    evidence : Evidence
        Why the pairs are believed to be the extreme ones.
    ground : str
        The same in words.
    details : mapping
        What else the solver reports.
    """

    eigenvalues: NDArray[np.float64]
    eigenvectors: NDArray[np.floating]
    eigenindex: NDArray[np.intp]
    residual_norms: NDArray[np.float64]
    status: NDArray[np.object_]
    tol: float
    method: str
    n_products: float
    image_size: int
    response_size: int
    lambda_max_bounds: tuple[float, float]
    lambda_min_bounds: tuple[float, float]
    noise: float
    evidence: Evidence
    details: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for array in (self.eigenvalues, self.eigenvectors, self.eigenindex, self.residual_norms, self.status):
            array.flags.writeable = False

    @property
    def converged(self) -> NDArray[np.bool_]:
        """Whether each pair holds, shape (K,)."""
        return np.isin(self.status.astype(str), [Status.EIGENPAIR, Status.NULL])

    @property
    def density(self) -> SpectralDensity | None:
        """The spectrum of F by the random vectors that `golub_kahan` started from, usually one: no product more.

        None where another method was used, a start was given, or a restart lost what it takes. See `spectral_density`
        for more random vectors, and narrower bands.
        """
        runs = self.details.get("quadrature") if self.method == "golub_kahan" else None
        if not runs:
            return None
        return SpectralDensity.of_runs((Quadrature(**run) for run in runs), self.image_size, self.n_products)

    @property
    def ground(self) -> str:
        """`evidence` in words."""
        return str(self.evidence)

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        head, *rows = zip(*([name, *texts] for name, texts in self._columns().items()), strict=True)
        lines = [self._head, ""]
        for index, value, share, residual, status in (head, *rows):
            lines.append(f"{index:>9}  {value:>12}  {share:>9}  {residual:>16}  {status}")
        lines += ["", *(f"{name}: {text}" for name, text in self._notes().items())]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """The same for a notebook; of more than 50 pairs the first 25 and the last 25."""
        return self._html(self._some())

    def _some(self, most: int = 50) -> list[int]:
        """Places of all pairs, or of as many at both ends."""
        count = len(self.eigenvalues)
        return [i for i in range(count) if min(i, count - 1 - i) < most // 2 or count <= most]

    def _html(self, places: Sequence[int], more: Mapping[str, Sequence[str]] | None = None) -> str:
        """The table of the pairs at these places, with more columns, and all else that `str` says."""
        count = len(self.eigenvalues)
        some = "" if len(places) == count else f"{len(places)} of the {count} pairs that were found"
        table = markup.table(self._columns(places) | dict(more or {}), some)
        return f"{markup.paragraph(self._head)}{table}{markup.definitions(self._notes())}"

    @property
    def _head(self) -> str:
        return (
            f"{self.method}: {len(self.eigenvalues)} eigenpairs of F ({self.image_size} × {self.image_size}), "
            f"J is {self.response_size} × {self.image_size}, tol {self.tol:.0e}, {self.n_products:g} products"
        )

    def _columns(self, places: Sequence[int] | None = None) -> dict[str, list[str]]:
        """The table, of all pairs or of those at these places."""
        places = range(len(self.eigenvalues)) if places is None else places
        scale = self.lambda_max_bounds[0] if self.lambda_max_bounds[0] > 0 else 1.0
        values, residuals = self.eigenvalues, self.residual_norms
        return {
            "index": [f"{self.eigenindex[i]}" for i in places],
            "eigenvalue": [f"{values[i]:.5e}" for i in places],
            "/ λ_max": [f"{values[i] / scale:.2e}" for i in places],
            "residual / λ_max": [f"{residuals[i] / scale:.1e}" for i in places],
            "status": [f"{self.status[i]}" for i in places],
        }

    def _notes(self) -> dict[str, str]:
        """What holds of all pairs, each under its name."""
        top, upper = self.lambda_max_bounds
        above = f" ≤ {upper:.5e}" if np.isfinite(upper) else ""
        low, high = self.lambda_min_bounds
        least = f"{low:.5g} ≤ λ_min ≤ {high:.5e}" if self.response_size >= self.image_size else "λ_min = 0 (M < N)"
        notes = {
            "λ_max": f"{top:.5e} ≤ λ_max{above}",
            "λ_min": least,
            "extreme": self.ground,
            "noise": f"residuals below {self.noise:.0e} λ_max are rounding",
        }
        for name, value in self.details.items():
            if not isinstance(value, list):
                notes[name] = f"{value:.3g}" if isinstance(value, float) else f"{value}"
        return notes


class ConvergenceError(RuntimeError):
    """A solver did not reach `tol`. What it found stands, certified, in `result`."""

    def __init__(self, message: str, result: EigenResult) -> None:
        super().__init__(message, result)
        self.result = result

    def __str__(self) -> str:
        return self.args[0]


class SolverStopped(RuntimeError):
    """Raised by a solver that can't go on; carries what it has.

    Parameters
    ----------
    message : str
        What stopped it.
    answer : Answer
        What it found by then, of each end as many vectors as it has.
    by_rounding : bool
        Whether more iterations would not help.
    """

    def __init__(self, message: str, answer: Answer, *, by_rounding: bool = False) -> None:
        super().__init__(message, answer)
        self.by_rounding = by_rounding
        self.answer = answer

    def __str__(self) -> str:
        return self.args[0]
