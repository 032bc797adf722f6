"""What a solver's answer is worth: certificates by fresh products, whoever found the vectors.

`certify` checks what it is given, `measure` multiplies, `judge` compares. Nothing here is shared with a solver, on
purpose: an error in the Lanczos iteration of `golub_kahan` can't hide itself in the one by which it is judged.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from fisherop import checks
from fisherop.operators import counted, scaled
from fisherop.result import EigenResult, Evidence, Status
from fisherop.sample import Sample

PROBE_STEPS = 30
_RITZ = 3  # times twice the noise: of a tridiagonal T, whose entries are products with F, three in a row
_SLAB = 2**14  # rows at a time
_EPS64 = float(np.finfo(np.float64).eps)


def certify(
    operator: Any,
    vectors: ArrayLike,
    eigenindex: Sequence[int] | NDArray[np.integer],
    *,
    tol: float = 1e-6,
    method: str = "certify",
    probe: int = PROBE_STEPS,
    rng: int | np.random.Generator | None = None,
    ground: str | Evidence | None = None,
    bounds: tuple[float, float] = (0.0, np.inf),
    details: Mapping[str, Any] | None = None,
    sample: Sample | None = None,
    against: Any = None,
) -> EigenResult:
    """Certify that vectors are the eigenvectors of F they are said to be, by fresh products and nothing else.

    Costs 1 product a vector, 2 for the noise, and `probe` to look for directions beyond those found. Where F would
    leave the range of the dtype, the products are those of J times a power of two, and what is found is scaled back.

    J is the Jacobian of the program that runs, in its own arithmetic. Where that program's constants are inexact, as
    the slope of a sigmoid near saturation is in float32, J is the exact Jacobian for these constants, and `noise` does
    not reveal their error: with `against`, a more precise program judges the same vectors.

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
        Relative to λ_max, for which the largest Rayleigh quotient is used; being at most λ_max, it makes every test
        stricter.
    method : str
        The name of what found the vectors; it is kept in the result.
    probe : int
        Steps of a Lanczos run from a fresh random vector, in the complement of `vectors`: a Ritz value beyond a pair
        by more than 2 tol λ_max shows that its index is wrong. With 0 steps λ_max is known from `vectors` alone.
    rng : int or Generator, optional
        For the probe.
    ground : str or Evidence, optional
        Why the pairs are the extreme ones, where this is known; it is kept in the result, unless it is refuted.
    bounds : (float, float)
        Of all eigenvalues of F, known from elsewhere; the result's are at most these, widened by rounding.
    details : mapping, optional
        What else there is to report; it is kept in the result.
    sample : Sample, optional
        Of the operator, where there is one already; else it is drawn by `rng`.
    against : torch.dtype or FisherOperator, optional
        Judge by other products: ``torch.float64`` copies a module and linearizes it in that precision; or give an
        operator of your own. `bounds` are then ignored.

    Returns
    -------
    EigenResult
        Which of the pairs hold, and by how much.

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
    checks.instance("ground", ground, (str, Evidence, type(None)), "a str, an Evidence, or None")
    details = dict(checks.instance("details", details, (Mapping, type(None)), "a mapping, or None") or {})
    checks.instance("sample", sample, (Sample, type(None)), "a Sample, or None")
    bounds = _checked_bounds(bounds)
    evidence = Evidence("stated", text=ground) if isinstance(ground, str) else ground
    dtype, eps = operator.dtype, float(np.finfo(operator.dtype).eps)
    if against is not None:
        operator.products.check_current()
        operator, sample, bounds = judging(operator, against), None, (0.0, np.inf)
        evidence = evidence and dataclasses.replace(evidence, dtype=str(dtype), confidence=0.0)
        details["against"] = f"judged by products in {operator.dtype}"
    operator = counted(operator)
    n = operator.shape[0]
    index = check_index(checks.integers("eigenindex", eigenindex, 0), n)
    v = checks.array("vectors", vectors, (n, len(index)), "columns, one for each eigenindex, as an array")
    v = v.astype(dtype)  # what is judged is what is returned
    norms = check_orthonormal(v, eps)
    sample = sample or Sample.of(operator, checks.spawned(rng))

    measured = measure(operator, v, norms, min(probe, n - len(index)), sample)
    # another arithmetic may have another order
    order = _check_order(measured.unit * measured.values, np.inf if against is not None else measured.rounding(eps))
    measured = measured.ordered(order)
    status = judge(measured, index, tol)
    if sample.size == measured.scale == 0:
        evidence, bounds = Evidence("zero"), (0.0, 0.0)
        checks.warn(
            f"{evidence}, and those returned are arbitrary. J is zero, for example, for a metric at its reference, a "
            "head of zeros, units that are all off, and round or sign"
        )
    elif Status.NOT_EXTREME in status:
        evidence = Evidence("refuted")
    elif evidence is None and measured.n_steps == 0:
        evidence = Evidence("complete" if len(index) == n else "none")
    elif evidence is None:
        evidence = Evidence("complement", steps=measured.n_steps)
    lambda_min_bounds, lambda_max_bounds = measured.enclosures(*bounds)
    return EigenResult(
        eigenvalues=measured.unit * measured.values,
        eigenvectors=v[:, order],
        eigenindex=index,
        residual_norms=measured.unit * measured.residuals,
        status=status,
        tol=tol,
        method=method,
        n_products=operator.n_products,
        image_size=n,
        response_size=measured.m,
        lambda_max_bounds=lambda_max_bounds,
        lambda_min_bounds=lambda_min_bounds,
        noise=measured.noise,
        evidence=evidence,
        details=details,
    )


@dataclass(frozen=True, eq=False)
class Measurements:
    """What was measured of unit vectors v, for 2ᵉ J: all but `noise` and `margin` are in its units.

    Attributes
    ----------
    unit : float
        What an eigenvalue of 1 stands for.
    n, m : int
        J is of shape (m, n).
    values, residuals : ndarray, shape (K,)
        ‖J v‖² and ‖F v − λ v‖.
    jv : ndarray, shape (m, K)
    low, high : float
        Rayleigh quotients of two vectors orthogonal to all v, the lowest and the highest that a Lanczos run found,
        `low` raised and `high` lowered by the possible effect of rounding; infinity and 0 if no run was asked for.
    n_steps : int
        Lanczos steps done.
    scale : float
        The largest Rayleigh quotient, which stands for λ_max.
    noise, margin : float
        The relative error ε of products, and the margin that bounds allow for it, both relative to σ_max.
    """

    unit: float
    n: int
    m: int
    values: NDArray[np.float64]
    residuals: NDArray[np.float64]
    jv: NDArray[np.float64]
    low: float
    high: float
    n_steps: int
    scale: float
    noise: float
    margin: float

    def ordered(self, order: NDArray[np.intp]) -> Measurements:
        return dataclasses.replace(
            self, values=self.values[order], residuals=self.residuals[order], jv=self.jv[:, order]
        )

    def rounding(self, eps: float) -> float:
        """Of the largest ‖J v‖², from errors of J v and of the norm of v: a generous bound, to check the order."""
        largest, error = self.values.max(initial=0.0) ** 0.5, self.margin * self.scale**0.5
        return self.unit * (1000 * eps * largest**2 + 100 * ((largest + error) ** 2 - largest**2))

    def enclosures(self, low: float, high: float) -> tuple[tuple[float, float], tuple[float, float]]:
        """Intervals for λ_min and λ_max: Rayleigh quotients inside, known bounds outside, widened by the margin."""
        inner = (self.values.min(initial=np.inf) ** 0.5 + self.margin * self.scale**0.5) ** 2
        least = min(inner, self.low) if self.m >= self.n else 0.0
        lowest, highest = low / self.unit - self.margin * self.scale, high / self.unit + self.margin * self.scale
        of_max = self.scale * max(0.0, 1 - self.margin) ** 2, max(self.scale, highest)
        return (
            (self.unit * min(max(lowest, 0.0), least), self.unit * least),
            (self.unit * of_max[0], self.unit * of_max[1]),
        )


def measure(operator: Any, v: NDArray, norms: NDArray, n_steps: int, sample: Sample) -> Measurements:
    """Multiply columns `v` (N, K) of these norms, and look beyond them by so many Lanczos steps."""
    operator = scaled(operator, sample.exponent)
    jacobian = operator.jacobian
    m, n = jacobian.shape
    jv = jacobian.matmat(v).astype(np.float64) / norms
    values = np.einsum("ij,ij->j", jv, jv)
    fv = jacobian.rmatmat(jv).astype(np.float64)
    residuals = np.linalg.norm(fv - values * (v / norms), axis=0)

    low, high, n_steps = ritz_extremes(operator, v, n_steps, sample.start)
    sigma_max = max(values.max(initial=0.0), high) ** 0.5
    noise = sample.noise(jacobian, v[:, :1], jv[:, :1] * norms[:1], sigma_max)
    # the sampled noise may be too small by chance; sums of M squares add rounding of their own
    margin = 2 * max(noise, float(np.finfo(operator.dtype).eps)) + m**0.5 * _EPS64
    of_ritz = _RITZ * margin + 1000 * _EPS64  # and the rounding of T itself
    high *= max(0.0, 1 - of_ritz)
    scale = max(values.max(initial=0.0), high)
    return Measurements(
        unit=2.0 ** (-2 * sample.exponent),
        n=n,
        m=m,
        values=values,
        residuals=residuals,
        jv=jv,
        low=low + of_ritz * scale,
        high=high,
        n_steps=n_steps,
        scale=scale,
        noise=noise,
        margin=margin,
    )


def judge(measured: Measurements, index: NDArray[np.intp], tol: float) -> NDArray[np.object_]:
    """The status (K,) of the pairs, whose claimed indices are `index`."""
    scale, noise, values, count = measured.scale, measured.noise, measured.values, len(index)
    allowed = tol * scale
    # ε is that of a sum of three products, so it covers the two in F v. Rounding errors are nearly orthogonal to the
    # residual, so that the measured one tends to be too large, and 4 ε / √N is margin enough; but if tol is near the
    # noise, an iteration may have converged to where the two cancel, and the margin is ε.
    share = min(1.0, 4 / measured.n**0.5) if 10 * noise <= tol else 1.0
    is_pair = measured.residuals + noise * scale * share <= allowed

    # Together the last pairs prove as many eigenvalues ≤ tol · λ_max, if J is that small on all of their span. Errors
    # of different columns are nearly orthogonal, so that the norm of all is hardly larger than that of one.
    from_bottom = index == np.arange(measured.n - count, measured.n)
    few, more = (
        0,
        np.count_nonzero(from_bottom) + 1,
    )  # bisection: `few` pairs are null, `more` are not; the norm grows with the block
    while more - few > 1:
        middle = (few + more) // 2
        largest = np.linalg.norm(measured.jv[:, count - middle :], ord=2) + noise * scale**0.5
        few, more = (middle, more) if largest**2 <= allowed else (few, middle)
    is_null = np.arange(count) >= count - few

    slack = 2 * (tol + noise) * scale  # indices are claimed only to within this
    beyond = (
        ((index == np.arange(count)) & (values < measured.high - slack))
        | (from_bottom & (values > measured.low + slack))
        | ((index >= measured.m) & (values > (tol + 2 * noise) * scale))  # zero, since M < N
    )
    status = np.full(count, Status.UNCONVERGED, dtype=object)
    status[is_pair] = Status.EIGENPAIR
    status[is_pair & beyond] = Status.NOT_EXTREME
    status[is_null] = Status.NULL
    return status


def ritz_extremes(operator: Any, found: NDArray, steps: int, start: NDArray) -> tuple[float, float, int]:
    """Extreme Ritz values of F by Lanczos steps from `start`, beside what was found, and the number of steps.

    Infinity, 0 and 0 if no step was possible. Each value is the Rayleigh quotient of a vector orthogonal to `found`, so
    no bound on F's spectrum can contradict it. It works in NumPy, one vector at a time, and reorthogonalizes twice.
    """

    def orthogonalize(w: NDArray, count: int) -> NDArray:
        for _ in range(2):
            w = w - found @ (found.T @ w)
            w = w - basis[:, :count] @ (basis[:, :count].T @ w)
        return w

    jacobian, n = operator.jacobian, operator.shape[0]
    eps = np.finfo(np.float64).eps
    basis = np.empty((n, steps), operator.dtype)
    diagonal: list[float] = []
    off_diagonal: list[float] = []
    w = orthogonalize(start, 0)
    for j in range(steps):
        basis[:, j] = w / np.linalg.norm(w)
        image = jacobian.rmatvec(jacobian.matvec(basis[:, j])).astype(np.float64)
        diagonal.append(float(basis[:, j] @ image))
        w = orthogonalize(image, j + 1)
        length = np.linalg.norm(w)
        if length <= eps * np.linalg.norm(image):
            break  # exhausted to float64 precision: a remainder at float32 rounding level may lead to more directions
        w = orthogonalize(w / length, j + 1)
        off_diagonal.append(float(w @ image / np.linalg.norm(w)))
    if not diagonal:
        return np.inf, 0.0, 0
    off = off_diagonal[: len(diagonal) - 1]
    ritz = np.linalg.eigvalsh(np.diag(diagonal) + np.diag(off, 1) + np.diag(off, -1))
    return max(float(ritz[0]), 0.0), max(float(ritz[-1]), 0.0), len(diagonal)


def judging(operator: Any, against: Any) -> Any:
    """The Fisher operator that judges in the place of another."""
    if isinstance(against, torch.dtype):
        if not hasattr(operator, "linearization"):
            checks.refuse(TypeError, "against", "a FisherOperator, since this one is of no model", against)
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
    for i in range(0, len(v), _SLAB):  # so that the float64 copies stay small
        slab = v[i : i + _SLAB].astype(np.float64)
        gram += slab.T @ slab
    deviation = np.abs(gram - np.eye(len(gram))).max(initial=0.0)
    if deviation > 1000 * eps:
        raise ValueError(
            f"vectors must be orthonormal to {1000 * eps:.0e}, but VᵀV differs from the identity by {deviation:.1e}: "
            "orthonormalize them first, with numpy.linalg.qr"
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


def _checked_bounds(bounds: Any) -> tuple[float, float]:
    what = "(low, high), numbers that all eigenvalues of F lie between, from 0 and up to infinity"
    if not (isinstance(bounds, Sequence) and len(bounds) == 2 and all(map(_is_number, bounds))):
        checks.refuse(TypeError, "bounds", what, bounds)
    low, high = map(float, bounds)
    if not (0 <= low <= high and low < np.inf):
        checks.refuse(ValueError, "bounds", what, bounds)
    return low, high


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)
