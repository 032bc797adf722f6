"""The randomized singular value decomposition, on the model's device."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from fisherop import checks
from fisherop.operators import FisherOperator
from fisherop.result import Answer

_TRIALS = 10


def randomized_svd(
    operator: FisherOperator,
    k: int,
    which: str,
    *,
    tol: float,
    maxiter: int | None,
    rng: np.random.Generator,
    p: int = 5,
    q: int = 2,
) -> Answer:
    """The largest end from the range of J applied to random images: a few products, and an error to match.

    `tol` and `maxiter` have no effect. Costs (k + p)(q + 1) products, and 5 for the error.

    Parameters
    ----------
    p : int
        Oversampling: k + p random vectors.
    q : int
        Power iterations, re-orthonormalized at each half.

    Returns
    -------
    Answer
        Its `range_error` bounds ‖J − QQᵀJ‖₂, Q the basis found, with probability 1 − 10⁻¹⁰, so that
        λ_max ≤ σ₁(QᵀJ)² + range_error²: its upper bound of λ_max.

    Raises
    ------
    ValueError
        `which` isn't ``"largest"``, or k > min(M, N), or p or q is negative.

    References
    ----------
    Halko, Martinsson and Tropp 2011, SIAM Review 53: Algorithm 4.4 for Q, Algorithm 5.1 for the decomposition,
    equation 4.3 for the error.
    """
    m, n = operator.jacobian.shape
    J = operator.products
    if which != "largest":
        raise ValueError(
            f"method='randomized_svd' finds the largest end only, got which={which!r}: use which='largest' or another "
            "method"
        )
    if k > min(m, n):
        raise ValueError(f"method='randomized_svd' needs k ≤ min(M, N), got k={k} and J of {m} × {n}")
    p, q = checks.integer("p", p, 0), checks.integer("q", q, 0)

    def orthonormal(rows: Tensor) -> Tensor:
        return torch.linalg.qr(rows.T)[0].T.contiguous()

    def gaussian(count: int) -> Tensor:
        return operator.to_tensors(rng.standard_normal((n, count))).reshape(count, n)

    basis = orthonormal(J.jvp(gaussian(min(k + p, m, n))))
    for _ in range(q):
        basis = orthonormal(J.jvp(orthonormal(J.vjp(basis))))
    _, sigma, vh = torch.linalg.svd(J.vjp(basis).double(), full_matrices=False)

    trials = J.jvp(gaussian(_TRIALS))
    missed = (trials - (trials @ basis.T) @ basis).double()
    error = 10 * math.sqrt(2 / math.pi) * float(torch.linalg.vector_norm(missed, dim=1).max())
    rounding = 10 * torch.finfo(J.dtype).eps * float(sigma[0]) ** 2  # of the products, and of Q's orthonormality
    upper = float(sigma[0]) ** 2 + error**2 + rounding
    return Answer(operator.to_columns(vh[:k]), np.empty((n, 0)), bounds=(0.0, upper), range_error=error)
