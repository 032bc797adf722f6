"""Power iteration, on the model's device: what the field has used so far. Slow, and here stopped by its residual."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fisherop.jacobian import Jacobian
from fisherop.operators import FisherOperator
from fisherop.result import Answer


def power(
    operator: FisherOperator,
    k: int,
    which: str,
    *,
    tol: float,
    maxiter: int | None,
    rng: np.random.Generator,
) -> Answer:
    """Orthogonal iteration with Rayleigh–Ritz rotation; on λ_max I − F for the smallest end.

    One product a vector and iteration: the product that makes the next block also gives this one's residual.

    Parameters
    ----------
    maxiter : int, optional
        Iterations at each end, by default 2000.

    References
    ----------
    Golub and Van Loan, Matrix Computations, 4th ed., sections 7.3.2 and 8.2.4.
    """
    J, n = operator.products, operator.shape[0]
    maxiter = maxiter or 2000

    def start(k: int) -> Tensor:
        return operator.to_tensors(rng.standard_normal((n, k))).reshape(k, n)

    largest = smallest = start(0)
    if which == "smallest":
        values, _ = _iterate(J, start(1), None, 1e-2, maxiter)
    else:
        values, largest = _iterate(J, start(k), None, tol, maxiter)
    if which != "largest":
        _, smallest = _iterate(J, start(k), float(values.max()), tol, maxiter)
    return Answer(operator.to_columns(largest), operator.to_columns(smallest))


def _iterate(J: Jacobian, v: Tensor, shift: float | None, tol: float, maxiter: int) -> tuple[Tensor, Tensor]:
    """Ritz values (k,), descending, and vectors (k, N), of F for `shift` None, else of its smallest end."""
    best = v.new_zeros(len(v)), v
    for _ in range(maxiter):
        v = torch.linalg.qr(v.T)[0].T
        jv = J.jvp(v)
        fv = J.vjp(jv)
        values, rotation = torch.linalg.eigh(jv.double() @ jv.double().T)
        values, rotation = values.flip(0), rotation.flip(1).T.to(v.dtype)
        v, fv = rotation @ v, rotation @ fv
        residuals = torch.linalg.vector_norm(fv.double() - values[:, None] * v, dim=1)
        allowed = tol * (float(values.max()) if shift is None else shift)
        if (residuals <= allowed).all() or (shift is not None and float(values.max()) <= allowed):
            break
        best = values, v
        v = fv if shift is None else shift * v - fv
    else:
        return best
    return values, v
