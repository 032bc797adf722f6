"""ARPACK's implicitly restarted Lanczos, through `scipy.sparse.linalg.eigsh`."""

from __future__ import annotations

import numpy as np
import scipy.sparse.linalg as sla
from numpy.typing import NDArray

from fisherop.operators import FisherOperator
from fisherop.result import SolverStopped


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

    fisher = operator.in_float64()
    found: list[tuple[NDArray, NDArray]] = []
    end = "largest"
    try:
        top = largest(fisher, k, tol, 20) if which != "smallest" else largest(fisher, 1, 1e-2, 20)
        if which != "smallest":
            found.append(top)
        if which != "largest":
            end = "smallest"
            shift = 1.01 * float(top[0][0])
            shifted = sla.LinearOperator((n, n), lambda x: shift * x - fisher @ x, dtype=fisher.dtype)
            values, vectors = largest(shifted, k, tol, 60)
            found.append((shift - values[::-1], vectors[:, ::-1]))
    except sla.ArpackError as error:  # non-convergence carries what converged, other faults nothing
        vectors = getattr(error, "eigenvectors", np.empty((n, 0)))
        raise SolverStopped(
            f"ARPACK at the {end} end: {error}",
            largest=found[0][1] if found else vectors if end == "largest" else np.empty((n, 0)),
            smallest=vectors if end == "smallest" else np.empty((n, 0)),
        ) from error
    return np.concatenate([v for v, _ in found]), np.hstack([v for _, v in found])
