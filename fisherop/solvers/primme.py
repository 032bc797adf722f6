"""Generalized Davidson with locally optimal restarts (GD+k), of the package PRIMME, an optional extra."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import scipy.sparse.linalg as sla
from numpy.typing import NDArray

from fisherop import checks
from fisherop.operators import FisherOperator
from fisherop.result import Answer
from fisherop.solvers.ends import each_end, estimate_norm


def primme(
    operator: FisherOperator,
    k: int,
    which: str,
    *,
    tol: float,
    maxiter: int | None,
    rng: np.random.Generator,
    ncv: int | None = None,
    preconditioner: sla.LinearOperator | NDArray | None = None,
) -> Answer:
    """Both ends of F itself, by ``primme.eigsh``.

    A. Stathopoulos and J. R. McCombs, PRIMME: preconditioned iterative multimethod eigensolver, ACM Trans. Math. Softw.
    37 (2010).

    Parameters
    ----------
    maxiter : int, optional
        Outer iterations at each end, by default 20,000.
    ncv : int, optional
        Basis vectors, by default PRIMME's choice.
    preconditioner : operator, shape (N, N), optional
        An approximate inverse of F, for the smallest end.

    Raises
    ------
    ValueError
        k ≥ N.
    ModuleNotFoundError
        PRIMME is not installed.
    SolverStopped
        PRIMME did not converge.
    """
    try:
        package: Any = importlib.import_module("primme")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "method='primme' needs the package primme: pip install 'fisherop[primme]', with OpenBLAS and LAPACK at hand"
        ) from error
    n = operator.shape[0]
    if k >= n:
        raise ValueError(f"method='primme' needs k < N, got k={k} and N={n}: use method='exact'")
    ncv = checks.integer("ncv", ncv, k + 1, n, optional=True)
    if preconditioner is not None:
        checks.square("preconditioner", preconditioner, n)
    fisher = operator.in_float64(estimate_norm(operator, rng))

    def search(end: str) -> NDArray:
        values, vectors = package.eigsh(
            fisher,
            k,
            which="LA" if end == "largest" else "SA",
            v0=rng.standard_normal((n, 1)),
            ncv=ncv,
            maxiter=maxiter or 20_000,
            tol=tol,  # relative to the norm of F
            method="PRIMME_DEFAULT_MIN_MATVECS",
            OPinv=preconditioner if end == "smallest" else None,
        )
        return vectors[:, np.argsort(values)[::-1]]

    return each_end(which, n, search, package.PrimmeError, "PRIMME")
