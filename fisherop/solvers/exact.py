"""The dense Jacobian and its singular value decomposition: the ground truth where it fits in memory."""

from __future__ import annotations

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from fisherop import checks
from fisherop.operators import FisherOperator
from fisherop.result import Answer, Evidence


def exact(
    operator: FisherOperator,
    k: int,
    which: str,
    *,
    tol: float,
    maxiter: int | None,
    rng: np.random.Generator,
    max_bytes: int | None = None,
) -> Answer:
    """All singular values of the dense J, in float64; not eigenvalues of F, which squares the condition number.

    `tol` and `maxiter` have no effect; `rng` draws vectors of the null space where M < N and few of them are wanted. J
    is kept in ``operator.jacobian.dense``. Costs min(M, N) / 2 products.

    Parameters
    ----------
    max_bytes : int, optional
        Memory allowed; by default half of what the machine has.

    Returns
    -------
    Answer
        All N, where ``which="both"`` and 2 k ≥ N, are its `largest`.

    Raises
    ------
    ValueError
        J and its decomposition would take more than `max_bytes`.
    """
    jacobian = operator.jacobian
    m, n = jacobian.shape
    top, bottom = {"largest": (k, 0), "smallest": (0, k), "both": (k, k)}[which]
    top, bottom = (n, 0) if top + bottom >= n else (top, bottom)
    nulls = max(0, min(n - m, max(0, top - m) + bottom))  # beyond the vectors of the thin decomposition
    is_full = 2 * nulls > n - m
    rank = n if is_full else min(m, n) + nulls
    needed = m * n * (jacobian.dtype.itemsize + 2 * 8) + (2 * n * rank + 3 * min(rank, n) ** 2) * 8
    allowed = checks.machine_memory() // 2 if max_bytes is None else checks.memory("max_bytes", max_bytes)
    if needed > allowed:
        raise ValueError(
            f"method='exact' would take about {needed / 2**30:.3g} GiB for a Jacobian of {m} × {n}, over the limit of "
            f"{allowed / 2**30:.3g} GiB: use an iterative method, a smaller image, or pass max_bytes={needed}"
        )
    dense = jacobian.to_dense(max_bytes=needed).astype(np.float64)
    if m > n:
        dense = scipy.linalg.qr(dense, mode="r", overwrite_a=True)[0][:n]  # the same σ and v, without a large U
    _, sigma, vh = scipy.linalg.svd(dense, full_matrices=is_full, overwrite_a=True)
    if nulls and not is_full:
        vh = np.concatenate([vh, _beside(vh, nulls, rng)])
    # by a perturbation of the matrix, which is that of its products and of its decomposition
    error = 2 * max(m, n) * float(np.finfo(jacobian.dtype).eps) * sigma[0]
    least = max(sigma[-1] - error, 0.0) if m >= n else 0.0
    with np.errstate(over="ignore"):
        lower, upper = float(np.square(least)), float(np.square(sigma[0] + error))
    return Answer(
        vh[:top].T, vh[len(vh) - bottom :].T, Evidence("dense"), bounds=(lower if lower < np.inf else 0.0, upper)
    )


def _beside(rows: NDArray, count: int, rng: np.random.Generator) -> NDArray:
    """So many orthonormal rows, orthogonal to others that are orthonormal."""
    new = rng.standard_normal((count, rows.shape[1]))
    for _ in range(2):  # the second time removes what rounding left
        new -= (new @ rows.T) @ rows
        new = np.linalg.qr(new.T)[0].T
    return new
