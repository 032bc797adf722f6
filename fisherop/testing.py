"""For tests and benchmarks, the library's and yours: the adjoint test, linear models of known spectrum, FLOPs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.sparse.linalg import LinearOperator
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from fisherop import checks


def check_adjoint(
    operator: LinearOperator, *, rng: int | np.random.Generator | None = 0, rtol: float | None = None
) -> None:
    """Assert ⟨A x, A x⟩ = ⟨x, AᴴA x⟩ for a random x: forward and adjoint products belong to one matrix.

    Parameters
    ----------
    operator : LinearOperator, shape (M, N)
    rng : int or Generator
    rtol : float, optional
        Relative to ‖A x‖²; by default the square root of the dtype's machine epsilon.

    Raises
    ------
    AssertionError
        The sides differ by more; the message says by how much.
    """
    operator = checks.operator("operator", operator, "a LinearOperator, or what aslinearoperator accepts")
    if np.dtype(operator.dtype).kind not in "iufc":
        checks.refuse(TypeError, "operator", "of real or complex numbers", operator.dtype)
    dtype = np.result_type(operator.dtype, np.float32)
    _, n = operator.shape
    x = checks.generator(rng).standard_normal(n).astype(dtype)
    ax = operator.matvec(x)
    left = float(np.vdot(ax, ax).real)
    right = float(np.vdot(x, operator.rmatvec(ax)).real)
    if rtol is None:
        allowed = float(np.finfo(dtype).eps ** 0.5)
    else:
        allowed = checks.number("rtol", rtol, "a number from 0", lambda rtol: rtol >= 0)
    assert abs(left - right) <= allowed * left, f"⟨A x, A x⟩ = {left:.8g}, but ⟨x, AᴴA x⟩ = {right:.8g}"


def matrix_with_singular_values(
    sigma: ArrayLike, m: int, n: int, *, rng: int | np.random.Generator | None = 0
) -> NDArray[np.float64]:
    """A random matrix (m, n) whose singular values are `sigma`, at most min(m, n) of them; the rest are zero."""
    m, n, rng = checks.integer("m", m), checks.integer("n", n), checks.generator(rng)
    sigma = checks.array("sigma", sigma, ("r",)).astype(np.float64)
    if len(sigma) > min(m, n) or (sigma < 0).any():
        checks.refuse(ValueError, "sigma", f"at most min(m, n) = {min(m, n)} numbers from 0", sigma)
    u = np.linalg.qr(rng.standard_normal((m, len(sigma))))[0]
    v = np.linalg.qr(rng.standard_normal((n, len(sigma))))[0]
    return (u * sigma) @ v.T


def linear_model(matrix: ArrayLike, dtype: torch.dtype = torch.float64) -> Callable[[Tensor], Tensor]:
    """The model y = A x of a matrix A (M, N), for an image of N elements in any shape: its Jacobian is A."""
    matrix = checks.array("matrix", matrix, ("M", "N"))
    weight = torch.tensor(matrix, dtype=checks.floating("dtype", dtype))

    def model(x: Tensor) -> Tensor:
        if x.numel() != weight.shape[1] or x.dtype != dtype:
            checks.refuse(ValueError, "image", f"of {weight.shape[1]} elements of {dtype}, as the matrix is", x)
        return weight.to(x.device) @ x.reshape(-1)

    return model


def count_flops(run: Callable[[], object]) -> int:
    """The floating-point operations of what `run` does, by PyTorch's own formulas: convolutions and matrix products."""
    checks.function("run", run)
    with _Flops() as counter:
        run()
    return counter.total


class _Flops(TorchDispatchMode):
    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.total += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out
