"""Singular vectors of J, through `scipy.sparse.linalg.svds` (ARPACK on JᵀJ)."""

from __future__ import annotations

import numpy as np
import scipy.sparse.linalg as sla
from numpy.typing import NDArray

from fisherop.operators import FisherOperator
from fisherop.result import SolverStopped, ritz_extremes


def svds(
    operator: FisherOperator,
    k: int,
    which: str,
    *,
    tol: float,
    maxiter: int | None,
    rng: np.random.Generator,
    ncv: int | None = None,
) -> tuple[NDArray, NDArray]:
    """The largest and the smallest singular values of J, squared.

    Parameters
    ----------
    maxiter : int, optional
        ARPACK's restarts at each end, by default 200.
    ncv : int, optional
        Lanczos vectors, by default max(2 k + 1, 20) at the largest end and max(2 k + 1, 60) at the smallest.

    Raises
    ------
    ValueError
        k ≥ min(M, N).
    SolverStopped
        ARPACK did not converge; or the smallest end is asked for where M < N: SciPy takes the smaller of JᵀJ and
        JJᵀ, whose spectrum lacks the N − M zeros of F.
    """
    m, n = operator.jacobian.shape
    side = min(m, n)
    if k >= side:
        raise ValueError(f"method='svds' needs k < min(M, N), got k={k} and J of {m} × {n}: use method='exact'")
    nothing = np.empty((n, 0))
    scale = ritz_extremes(operator, nothing, 1, rng)[1] ** 0.5
    if scale == 0:  # J is zero, where every vector is right and ARPACK has none to start with
        count = 2 * k if which == "both" else k
        return np.zeros(count), np.linalg.qr(rng.standard_normal((n, count)))[0]
    jacobian = operator.jacobian.in_float64(scale)  # as in eigsh: ARPACK's test has an absolute floor
    found: dict[str, tuple[NDArray, NDArray]] = {}
    for end in ("largest", "smallest") if which == "both" else (which,):
        largest = found["largest"][1] if "largest" in found else nothing
        if end == "smallest" and m < n:
            raise SolverStopped(
                f"svds takes the smaller of JᵀJ and JJᵀ, here JJᵀ ({m} × {n}), which lacks the null space of F",
                largest,
                nothing,
            )
        basis = ncv or max(2 * k + 1, 20 if end == "largest" else 60)
        try:
            _, sigma, vh = sla.svds(
                jacobian,
                k,
                which="LM" if end == "largest" else "SM",
                tol=tol**0.5,  # which SciPy squares
                v0=rng.standard_normal(side),
                maxiter=maxiter or 200,
                ncv=min(basis, side - 1) if side > k + 2 else None,
                return_singular_vectors="vh",
            )
        except sla.ArpackError as error:  # it carries eigenvectors of JᵀJ where M ≥ N, of JJᵀ elsewhere
            partial = getattr(error, "eigenvectors", nothing) if m >= n else nothing
            ends = (partial, nothing) if end == "largest" else (largest, partial)
            raise SolverStopped(f"ARPACK at the {end} end: {error}", *ends) from error
        found[end] = (scale * sigma[::-1]) ** 2, vh[::-1].T
    return np.concatenate([v for v, _ in found.values()]), np.hstack([v for _, v in found.values()])
