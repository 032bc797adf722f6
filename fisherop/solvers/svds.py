"""Singular vectors of J, through `scipy.sparse.linalg.svds` (ARPACK on JᵀJ)."""

from __future__ import annotations

import numpy as np
import scipy.sparse.linalg as sla
from numpy.typing import NDArray

from fisherop import checks
from fisherop.operators import FisherOperator
from fisherop.result import SolverStopped
from fisherop.sample import ritz_extremes


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
    """The largest and the smallest singular values of [J; σ₁ I], whose right singular vectors are those of J.

    Of J itself SciPy takes the smaller of JᵀJ and JJᵀ, whose spectrum lacks the null space of F where M < N; and ARPACK
    stops relative to the eigenvalue found, which for the smallest ones can't be reached.

    Parameters
    ----------
    maxiter : int, optional
        ARPACK's restarts at each end, by default 1000.
    ncv : int, optional
        Lanczos vectors, by default max(2 k + 1, 20) at the largest end and max(2 k + 1, 60) at the smallest.

    Raises
    ------
    ValueError
        k ≥ N.
    SolverStopped
        ARPACK did not converge; it carries what did.
    """
    m, n = operator.jacobian.shape
    if k >= n:
        raise ValueError(f"method='svds' needs k < N, got k={k} and N={n}: use method='exact'")
    ncv = checks.integer("ncv", ncv, k + 1, n, optional=True)
    nothing = np.empty((n, 0))
    scale = ritz_extremes(operator, nothing, 1, rng.standard_normal(n))[1] ** 0.5
    jacobian = operator.jacobian.in_float64(scale)
    stacked = sla.LinearOperator(
        (m + n, n),
        matvec=lambda v: np.concatenate([jacobian @ v.ravel(), v.ravel()]),
        rmatvec=lambda u: jacobian.rmatvec(u[:m].ravel()) + u[m:].ravel(),
        dtype=np.float64,
    )
    found: dict[str, tuple[NDArray, NDArray]] = {}
    for end in ("largest", "smallest") if which == "both" else (which,):
        basis = ncv or max(2 * k + 1, 20 if end == "largest" else 60)
        try:
            _, sigma, vh = sla.svds(
                stacked,
                k,
                which="LM" if end == "largest" else "SM",
                tol=(tol / 2) ** 0.5,  # which SciPy squares; the largest eigenvalue is 2
                v0=rng.standard_normal(n),
                maxiter=maxiter or 1000,
                ncv=min(basis, n - 1) if n > k + 2 else None,
                return_singular_vectors="vh",
            )
        except sla.ArpackError as error:
            partial = getattr(error, "eigenvectors", nothing)
            largest = found["largest"][1] if found else nothing
            stopped = (partial, nothing) if end == "largest" else (largest, partial)
            raise SolverStopped(f"ARPACK at the {end} end: {error}", *stopped) from error
        found[end] = scale**2 * (sigma[::-1] ** 2 - 1), vh[::-1].T
    return np.concatenate([v for v, _ in found.values()]), np.hstack([v for _, v in found.values()])
