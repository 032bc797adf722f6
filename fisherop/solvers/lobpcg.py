"""Locally optimal block preconditioned conjugate gradients, through `scipy.sparse.linalg.lobpcg`."""

from __future__ import annotations

import dataclasses
import math
import warnings

import numpy as np
import scipy.sparse.linalg as sla
from numpy.typing import NDArray

from fisherop import checks
from fisherop.operators import FisherOperator
from fisherop.result import Answer
from fisherop.solvers.ends import each_end, estimate_norm


def lobpcg(
    operator: FisherOperator,
    k: int,
    which: str,
    *,
    tol: float,
    maxiter: int | None,
    rng: np.random.Generator,
    preconditioner: sla.LinearOperator | NDArray | None = None,
) -> Answer:
    """Both ends of F itself, in a block of k random vectors: a block sees up to k copies of a repeated eigenvalue.

    Parameters
    ----------
    maxiter : int, optional
        Iterations at each end, by default 2000. SciPy's own default, 20, is hardly ever enough.
    preconditioner : operator, shape (N, N), optional
        An approximate inverse of F, for the smallest end.

    Raises
    ------
    ValueError
        N < 5 k, where SciPy would quietly go dense.
    """
    n = operator.shape[0]
    if n < 5 * k:
        raise ValueError(f"method='lobpcg' needs 5 k ≤ N, got k={k} and N={n}: use method='exact'")
    if preconditioner is not None:
        checks.square("preconditioner", preconditioner, n)
    # SciPy's tol is absolute, and so are its own thresholds: it gets F / unit, of about 1, which changes no digit.
    scale = estimate_norm(operator, rng, steps=10)
    unit = 2.0 ** round(math.log2(scale)) if scale > 0 else 1.0

    def search(end: str) -> NDArray:
        nonlocal scale
        values, vectors = sla.lobpcg(
            operator.in_float64(unit),
            rng.standard_normal((n, k)),
            M=preconditioner if end == "smallest" else None,
            tol=tol * scale / unit,
            maxiter=maxiter or 2000,
            largest=end == "largest",
        )
        scale = max(scale, unit * float(values.max()))
        return vectors[:, np.argsort(values)[::-1]]

    with warnings.catch_warnings(record=True) as caught:  # the certificate judges what SciPy only warns of
        warnings.simplefilter("always")
        answer = each_end(which, n, search, (), "LOBPCG")
    said = sorted({str(w.message).split("\n")[0] for w in caught})
    return dataclasses.replace(answer, details={"SciPy's lobpcg": "; ".join(said)} if said else {})
