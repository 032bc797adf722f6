"""ARPACK's implicitly restarted Lanczos, through `scipy.sparse.linalg.eigsh`."""

from __future__ import annotations

import numpy as np
import scipy.sparse.linalg as sla
from numpy.typing import NDArray

from fisherop import checks
from fisherop.operators import FisherOperator
from fisherop.result import SolverStopped
from fisherop.sample import ritz_extremes


def eigsh(
    operator: FisherOperator,
    k: int,
    which: str,
    *,
    tol: float,
    maxiter: int | None,
    rng: np.random.Generator,
    ncv: int | None = None,
) -> tuple[NDArray, NDArray]:
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

    scale = ritz_extremes(operator, np.empty((n, 0)), 1, rng.standard_normal(n))[1]
    fisher = operator.in_float64(scale)  # ARPACK's test has an absolute floor, which a small F would fall below

    def largest(matrix: sla.LinearOperator, k: int, tol: float, basis: int) -> tuple[NDArray, NDArray]:
        values, vectors = sla.eigsh(
            matrix,
            k,
            which="LA",
            tol=tol,
            v0=rng.standard_normal(n),
            maxiter=maxiter or 1000,
            ncv=min(n, ncv or max(2 * k + 1, basis)),
        )
        return values[::-1], vectors[:, ::-1]

    nothing = np.empty(0), np.empty((n, 0))
    found = {"largest": nothing, "smallest": nothing}
    try:
        end = "largest"
        if which == "smallest":
            top = largest(fisher, 1, 1e-2, 20)
        else:
            top = found[end] = largest(fisher, k, tol, 20)
        if which != "largest":
            end = "smallest"
            shift = 1.01 * float(top[0][0])
            shifted = sla.LinearOperator((n, n), lambda x: shift * x - fisher @ x, dtype=fisher.dtype)
            values, vectors = largest(shifted, k, tol, 60)
            found[end] = shift - values[::-1], vectors[:, ::-1]
    except sla.ArpackError as error:
        if which in ("both", end) and isinstance(error, sla.ArpackNoConvergence):  # it carries what did converge
            found[end] = error.eigenvalues, error.eigenvectors
        raise SolverStopped(f"ARPACK at the {end} end: {error}", found["largest"][1], found["smallest"][1]) from error
    return scale * np.concatenate([v for v, _ in found.values()]), np.hstack([v for _, v in found.values()])
