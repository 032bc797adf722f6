"""What a solver's answer is worth: certificates by fresh products, whoever found the vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from fisherop import checks
from fisherop.current import warn
from fisherop.jacobian import counted, scaled
from fisherop.sample import Sample, ritz_extremes

PROBE_STEPS = 30
_RITZ = 3  # times twice the noise: of a tridiagonal T, whose entries are products with F, three in a row
_SLAB = 2**14  # rows at a time


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


@dataclass(frozen=True, eq=False)
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
        eigenvalues below 4 ε² λ_max are noise. The inequalities are held with ε as a margin, that of residuals, where
        tol is at least 10 ε, with 4 ε / √N: rounding errors, whose direction is random, add to what is measured.
    ground : str
        Why the pairs are believed to be the extreme ones.
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
    ground: str
    details: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for array in (self.eigenvalues, self.eigenvectors, self.eigenindex, self.residual_norms, self.status):
            array.flags.writeable = False

    @property
    def converged(self) -> NDArray[np.bool_]:
        return np.isin(self.status.astype(str), [Status.EIGENPAIR, Status.NULL])

    def __str__(self) -> str:
        top = self.lambda_max_bounds[0]
        scale = top if top > 0 else 1.0
        lines = [
            f"{self.method}: {len(self.eigenvalues)} eigenpairs of F ({self.image_size} × {self.image_size}), "
            f"J is {self.response_size} × {self.image_size}, tol {self.tol:.0e}, {self.n_products:g} products",
            "",
            f"{'index':>9}  {'eigenvalue':>12}  {'/ λ_max':>9}  {'residual / λ_max':>16}  status",
        ]
        rows = zip(self.eigenindex, self.eigenvalues, self.residual_norms, self.status, strict=True)
        for index, value, residual, status in rows:
            lines.append(f"{index:>9}  {value:>12.5e}  {value / scale:>9.2e}  {residual / scale:>16.1e}  {status}")
        upper = self.lambda_max_bounds[1]
        above = f" ≤ {upper:.5e}" if np.isfinite(upper) else ""
        zero = " (M < N)" if self.response_size < self.image_size else ""
        lines += [
            "",
            f"λ_max: {top:.5e} ≤ λ_max{above}",
            f"λ_min: {self.lambda_min_bounds[0]:.5g} ≤ λ_min ≤ {self.lambda_min_bounds[1]:.5e}{zero}",
            f"extreme: {self.ground}",
            f"noise: residuals below {self.noise:.0e} λ_max are rounding",
        ]
        for name, value in self.details.items():
            if not isinstance(value, list):
                lines.append(f"{name}: {value:.3g}" if isinstance(value, float) else f"{name}: {value}")
        return "\n".join(lines)


class ConvergenceError(RuntimeError):
    """A solver did not reach `tol`. What it found stands, certified, in `result`."""

    def __init__(self, message: str, result: EigenResult) -> None:
        super().__init__(message, result)
        self.result = result

    def __str__(self) -> str:
        return self.args[0]


class SolverStopped(RuntimeError):
    """Raised by a solver that can't go on; carries what it has, columns (N, k') by descending eigenvalue.

    `by_rounding` says that more iterations would not help.
    """

    def __init__(
        self,
        message: str,
        largest: NDArray,
        smallest: NDArray,
        details: Mapping[str, Any] | None = None,
        *,
        by_rounding: bool = False,
    ) -> None:
        super().__init__(message, largest, smallest, details)
        self.by_rounding = by_rounding
        self.largest = largest
        self.smallest = smallest
        self.details = dict(details or {})

    def __str__(self) -> str:
        return self.args[0]


def certify(
    operator: Any,
    vectors: ArrayLike,
    eigenindex: Sequence[int],
    *,
    tol: float = 1e-6,
    method: str = "certify",
    probe: int = PROBE_STEPS,
    rng: int | np.random.Generator | None = None,
    ground: str | None = None,
    details: Mapping[str, Any] | None = None,
    sample: Sample | None = None,
    against: Any = None,
) -> EigenResult:
    """Certify that vectors are the eigenvectors of F they are said to be, by fresh products and nothing else.

    Costs 1 product a vector, 2 for the noise, and `probe` to look for directions beyond those found. Where F would
    leave the range of the dtype, the products are those of J times a power of two, and what is found is scaled back.

    J is the Jacobian of the program that runs, in its own arithmetic. Where that program's constants are inexact, as
    the slope of a sigmoid near saturation is in float32, J is exact for them, and `noise` doesn't show that they are:
    `against` judges the same vectors by the products of a more precise program.

    Parameters
    ----------
    operator : FisherOperator or JacobianOperator
        Of shape (N, N) or (M, N).
    vectors : array_like, shape (N, K)
        Orthonormal columns, by descending eigenvalue.
    eigenindex : sequence of int, length K
        The index claimed for each, ascending: 0, 1, … from the largest end, …, N − 2, N − 1 at the smallest, or both.
        −1 stands for N − 1, and so on.
    tol : float
        Relative to λ_max, in whose place stands a Rayleigh quotient: at most λ_max, it makes each inequality stricter.
    probe : int
        Steps of a Lanczos run from a fresh random vector, in the complement of `vectors`: a Ritz value beyond a pair
        by more than 2 tol λ_max shows that its index is wrong. Without them λ_max is known from `vectors` alone.
    rng : int or Generator, optional
        For the probe.
    method, ground, details
        Are kept in the result.
    sample : Sample, optional
        Of the operator, where there is one already; else it is drawn by `rng`.
    against : torch.dtype or FisherOperator, optional
        Whose products judge the vectors: of the model in ``torch.float64``, for which a module is copied and linearized
        once more, or of an operator of your own. Outer bounds in `details` are not taken over.

    Returns
    -------
    EigenResult

    Raises
    ------
    ValueError
        The vectors are not finite, orthonormal and in descending order of their Rayleigh quotients, or the indices
        don't fit.
    OverflowError, FloatingPointError
        J is so large or so small that its products leave what the dtype can hold.

    Warns
    -----
    RuntimeWarning
        J is zero, so that every vector is both extremes.
    """
    operator = getattr(operator, "fisher", operator)
    if not hasattr(operator, "jacobian"):
        checks.refuse(TypeError, "operator", "a FisherOperator or a JacobianOperator", operator)
    tol, probe = checks.tolerance(tol), checks.integer("probe", probe, 0)
    checks.instance("method", method, str, "a str, the name of what found the vectors")
    checks.instance("ground", ground, (str, type(None)), "a str, or None")
    details = dict(checks.instance("details", details, (Mapping, type(None)), "a mapping, or None") or {})
    checks.instance("sample", sample, (Sample, type(None)), "a Sample, or None")
    for claim in ("lambda_max_upper", "lambda_min_lower"):
        if claim in details and not (_is_number(details[claim]) and details[claim] >= 0):
            checks.refuse(ValueError, f"details[{claim!r}]", "a number from 0, a bound of F's spectrum", details[claim])
    dtype, eps = operator.dtype, float(np.finfo(operator.dtype).eps)
    if against is not None:
        operator.linearization.check_current()
        operator, sample = judging(operator, against), None
        ground = ground and f"{ground}, in {dtype}"
        details = {name: x for name, x in details.items() if name not in ("lambda_max_upper", "lambda_min_lower")}
        details["against"] = f"judged by products in {operator.dtype}"
    operator = counted(operator)
    n, m = operator.shape[0], operator.jacobian.shape[0]
    index = check_index(checks.integers("eigenindex", eigenindex, 0), n)
    v = checks.array("vectors", vectors, (n, len(index)), "columns, one for each eigenindex, as an array")
    v = v.astype(dtype)  # what is judged is what is returned
    norms = check_orthonormal(v, eps)

    sample = sample or Sample.of(operator, checks.spawned(rng))
    operator = scaled(operator, sample.exponent)
    unit = 2.0 ** (-2 * sample.exponent)  # what stands for an eigenvalue of 1 from here on
    jacobian = operator.jacobian
    jv = jacobian.matmat(v).astype(np.float64) / norms
    values = np.einsum("ij,ij->j", jv, jv)
    fv = jacobian.rmatmat(jv).astype(np.float64)
    residuals = np.linalg.norm(fv - values * (v / norms), axis=0)

    probe = min(probe, n - len(index))
    low, high = ritz_extremes(operator, v, probe, sample.start)
    sigma_max = max(values.max(initial=0.0), high) ** 0.5
    noise = sample.noise(jacobian, v[:, :1], jv[:, :1] * norms[:1], sigma_max)
    # a sample of the noise may show less, by chance, and sums of M squares have rounding of their own
    margin = 2 * max(noise, float(np.finfo(operator.dtype).eps)) + m**0.5 * float(np.finfo(np.float64).eps)
    of_ritz = _RITZ * margin + 1000 * float(np.finfo(np.float64).eps)  # and of T itself, some eps for each step
    high *= max(0.0, 1 - of_ritz)
    scale = max(values.max(initial=0.0), high)
    low += of_ritz * scale
    largest, error = values.max(initial=0.0) ** 0.5, margin * scale**0.5
    rounding = 1000 * eps * largest**2 + 100 * ((largest + error) ** 2 - largest**2)  # of ‖J v‖², from that of J v
    # another arithmetic may have another order
    order = _check_order(unit * values, np.inf if against is not None else unit * rounding)
    v, jv, values, residuals = v[:, order], jv[:, order], values[order], residuals[order]
    status = _status(index, values, residuals, jv, low, high, scale, tol, noise, m, n)
    if Status.NOT_EXTREME in status:
        ground = "refuted for the pairs marked: a direction beyond them exists"
    elif ground is None and probe == 0:
        ground = "all N pairs are here" if len(index) == n else "not examined"
    elif ground is None:
        ground = f"no direction beyond these in {probe} Lanczos steps from a random vector orthogonal to them"
    highest = details.pop("lambda_max_upper", np.inf) / unit + margin * scale
    lowest = details.pop("lambda_min_lower", 0.0) / unit - margin * scale
    if sample.size == scale == 0:
        ground, highest = "J is zero at this image, so that every vector is both extremes", 0.0
        warn(
            f"{ground}, and those returned are arbitrary: so is J of a metric at its reference, of a head of zeros, of "
            "units that are all off, and of round or sign"
        )
    least = min((values.min(initial=np.inf) ** 0.5 + error) ** 2, low) if m >= n else 0.0
    return EigenResult(
        eigenvalues=unit * values,
        eigenvectors=v,
        eigenindex=index,
        residual_norms=unit * residuals,
        status=status,
        tol=tol,
        method=method,
        n_products=operator.n_products,
        image_size=n,
        response_size=m,
        lambda_max_bounds=(unit * scale * max(0.0, 1 - margin) ** 2, unit * max(scale, highest)),
        lambda_min_bounds=(unit * min(max(lowest, 0.0), least), unit * least),
        noise=noise,
        ground=ground,
        details=details,
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def judging(operator: Any, against: Any) -> Any:
    """The Fisher operator that judges in the place of another."""
    if isinstance(against, torch.dtype):
        checks.moved("against", operator.linearization.image, against)
        return operator.to(against)
    judge = getattr(against, "fisher", against)
    if not hasattr(judge, "jacobian"):
        checks.refuse(TypeError, "against", "a dtype, as torch.float64, or a FisherOperator", against)
    shape = operator.jacobian.shape
    if judge.jacobian.shape != shape:
        checks.refuse(ValueError, "against", f"an operator of a Jacobian of {shape[0]} × {shape[1]}", judge)
    return judge


def check_index(eigenindex: list[int], n: int) -> NDArray[np.intp]:
    """Indices from 0, by ascending value; ValueError unless they run from one end of 0 … n − 1, or both."""
    if not all(-n <= i < n for i in eigenindex):
        checks.refuse(ValueError, "eigenindex", f"indices from 0 to {n - 1}, or from -1 down to -{n}", eigenindex)
    index = np.array([i % n for i in eigenindex], dtype=np.intp)
    if (np.diff(index) <= 0).any():
        raise ValueError(f"eigenindex must ascend within 0 … {n - 1}, got {eigenindex}")
    from_top = int((index == np.arange(len(index))).sum())
    if not np.array_equal(index[from_top:], np.arange(n - len(index) + from_top, n)):
        raise ValueError(
            f"eigenindex must run on from 0, or up to {n - 1}, or both, since no other index can be examined; got "
            f"{eigenindex}"
        )
    return index


def check_orthonormal(v: NDArray, eps: float) -> NDArray[np.float64]:
    """The norms of columns (N, K); ValueError unless these are orthonormal."""
    gram = np.zeros((v.shape[1], v.shape[1]))
    for i in range(0, len(v), _SLAB):  # of which copies in float64 are small
        slab = v[i : i + _SLAB].astype(np.float64)
        gram += slab.T @ slab
    deviation = np.abs(gram - np.eye(len(gram))).max(initial=0.0)
    if deviation > 1000 * eps:
        raise ValueError(
            f"vectors must be orthonormal to {1000 * eps:.0e}, but VᵀV differs from the identity by {deviation:.1e}: "
            "orthonormalise them first, with numpy.linalg.qr"
        )
    return np.sqrt(np.diag(gram))


def _check_order(values: NDArray[np.float64], rounding: float) -> NDArray[np.intp]:
    """The permutation that sorts values which are in descending order but for rounding."""
    if np.diff(values).max(initial=0.0) > rounding:
        j = int(np.argmax(np.diff(values)))
        raise ValueError(
            f"vectors must be in descending order of ‖J v‖², but column {j} has {values[j]:.6g} and column {j + 1} "
            f"{values[j + 1]:.6g}"
        )
    return np.argsort(-values, kind="stable")


def _status(
    index: NDArray[np.intp],
    values: NDArray[np.float64],
    residuals: NDArray[np.float64],
    jv: NDArray[np.float64],
    low: float,
    high: float,
    scale: float,
    tol: float,
    noise: float,
    m: int,
    n: int,
) -> NDArray[np.object_]:
    allowed = tol * scale
    # Rounding adds to a residual at nearly a right angle, so that what is measured is too large, but for chance; unless
    # an iteration has settled where the two cancel, which it can at a tolerance near the noise.
    share = min(1.0, 4 / n**0.5) if 10 * noise <= tol else 1.0
    is_pair = residuals + noise * scale * share <= allowed

    # Together the last pairs prove as many eigenvalues ≤ tol · λ_max, if J is that small on all of their span.
    at_bottom = np.count_nonzero(index == np.arange(n - len(index), n))
    few, more = 0, at_bottom + 1  # so many are null, and so many are not: the norm of a longer block is larger
    while more - few > 1:
        count = (few + more) // 2
        largest = np.linalg.norm(jv[:, len(index) - count :], ord=2) + noise * scale**0.5
        few, more = (count, more) if largest**2 <= allowed else (few, count)
    is_null = np.arange(len(index)) >= len(index) - few

    slack = 2 * (tol + noise) * scale  # an index is claimed to no more
    from_top = index == np.arange(len(index))
    from_bottom = index == np.arange(n - len(index), n)
    beyond = (
        (from_top & (values < high - slack))
        | (from_bottom & (values > low + slack))
        | ((index >= m) & (values > (tol + 2 * noise) * scale))  # zero, since M < N
    )

    status = np.full(len(index), Status.UNCONVERGED, dtype=object)
    status[is_pair] = Status.EIGENPAIR
    status[is_pair & beyond] = Status.NOT_EXTREME
    status[is_null] = Status.NULL
    return status
