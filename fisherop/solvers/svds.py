"""Singular vectors of J, through `scipy.sparse.linalg.svds` (ARPACK on JᵀJ)."""

from __future__ import annotations

import numpy as np
import scipy.sparse.linalg as sla
from numpy.typing import NDArray

from fisherop import checks
from fisherop.operators import FisherOperator
from fisherop.result import Answer
from fisherop.solvers.ends import each_end, estimate_norm, from_products


def svds(
    operator: FisherOperator,
    k: int,
    which: str,
    *,
    tol: float,
    maxiter: int | None,
    rng: np.random.Generator,
    ncv: int | None = None,
) -> Answer:
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
    jacobian = operator.jacobian.in_float64(estimate_norm(operator, rng) ** 0.5)
    stacked = from_products(
        (m + n, n),
        matvec=lambda v: np.concatenate([jacobian.matvec(v.ravel()), v.ravel()]),
        rmatvec=lambda u: jacobian.rmatvec(u[:m].ravel()) + u[m:].ravel(),
    )

    def search(end: str) -> NDArray:
        basis = ncv or max(2 * k + 1, 20 if end == "largest" else 60)
        _, _, vh = sla.svds(
            stacked,
            k,
            which="LM" if end == "largest" else "SM",
            tol=(tol / 2) ** 0.5,  # which SciPy squares; the largest eigenvalue is 2
            v0=rng.standard_normal(n),
            maxiter=maxiter or 1000,
            ncv=min(basis, n - 1) if n > k + 2 else None,
            return_singular_vectors="vh",  # pyright: ignore[reportArgumentType]
        )
        return vh[::-1].T

    return each_end(which, n, search, sla.ArpackError, "ARPACK")
