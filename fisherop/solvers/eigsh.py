"""ARPACK's implicitly restarted Lanczos, through `scipy.sparse.linalg.eigsh`."""

from __future__ import annotations

import numpy as np
import scipy.sparse.linalg as sla
from numpy.typing import NDArray

from fisherop import checks
from fisherop.operators import FisherOperator
from fisherop.result import Answer
from fisherop.solvers.ends import each_end, estimate_norm, from_products


def eigsh(
    operator: FisherOperator,
    k: int,
    which: str,
    *,
    tol: float,
    maxiter: int | None,
    rng: np.random.Generator,
    ncv: int | None = None,
) -> Answer:
    """The largest eigenvalues of F, and of 1.01 λ_max I − F for the smallest: there ARPACK converges, not at F's own.

    Parameters
    ----------
    maxiter : int, optional
        Restarts at each end, by default 1000.
    ncv : int, optional
        Lanczos vectors, by default max(2 k + 1, 20) at the largest end and max(2 k + 1, 60) at the smallest.

    Raises
    ------
    SolverStopped
        ARPACK did not converge; it carries what did.
    """
    n = operator.shape[0]
    if k >= n:
        raise ValueError(f"method='eigsh' needs k < N, got k={k} and N={n}: use method='exact'")
    ncv = checks.integer("ncv", ncv, k + 1, n, optional=True)

    # ARPACK's test has an absolute floor, which a small F would fall below
    fisher = operator.in_float64(estimate_norm(operator, rng))
    lambda_max: float | None = None

    def largest(matrix: sla.LinearOperator, k: int, tol: float, basis: int) -> tuple[NDArray, NDArray]:
        values, vectors = sla.eigsh(
            matrix,
            k,
            which="LA",
            tol=tol,  # pyright: ignore[reportArgumentType]
            v0=rng.standard_normal(n),
            maxiter=maxiter or 1000,
            ncv=min(n, ncv or max(2 * k + 1, basis)),
        )
        return values[::-1], vectors[:, ::-1]

    def search(end: str) -> NDArray:
        nonlocal lambda_max
        if end == "largest":
            values, vectors = largest(fisher, k, tol, 20)
            lambda_max = float(values[0])
            return vectors
        shift = 1.01 * (float(largest(fisher, 1, 1e-2, 20)[0][0]) if lambda_max is None else lambda_max)
        shifted = from_products((n, n), matvec=lambda x: shift * x - fisher.matvec(x))
        return largest(shifted, k, tol, 60)[1][:, ::-1]

    return each_end(which, n, search, sla.ArpackError, "ARPACK")
