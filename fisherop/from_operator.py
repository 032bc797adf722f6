"""Anybody's matrix or operator as a Jacobian."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy.sparse import issparse
from torch import Tensor

from fisherop import checks
from fisherop.jacobian import Jacobian

_NUMPY = {torch.float32: np.dtype(np.float32), torch.float64: np.dtype(np.float64)}


class FromOperator(Jacobian):
    """The products of a SciPy `LinearOperator`, a sparse or dense matrix, a PyLops operator, or a dense tensor.

    Parameters
    ----------
    A : of shape (M, N)
        Real, and, if an operator, with an adjoint. Products are float32 where `A` is, else float64.

    Raises
    ------
    TypeError
        It is none of these, or complex.
    ValueError
        It has no element.
    """

    def __init__(self, A: Any) -> None:
        what = "a LinearOperator, a sparse or dense matrix of real numbers, a PyLops operator, or a dense tensor"
        if isinstance(A, Tensor):
            if A.layout != torch.strided or A.is_meta or A.is_complex() or A.ndim != 2:
                checks.refuse(TypeError, "A", f"{what} of two dimensions", A)
            self.A = A.detach() if A.dtype in _NUMPY else A.detach().double()
            self.dtype, self.device = self.A.dtype, self.A.device
        else:
            if isinstance(A, np.ndarray) and A.ndim != 2:
                checks.refuse(ValueError, "A", f"{what} of two dimensions", A)
            self.A = checks.operator("A", A, what)
            parts = (getattr(self.A, f"_CustomLinearOperator__{name}_impl", self) for name in ("rmatvec", "rmatmat"))
            if not any(parts):  # an operator of SciPy's made of functions
                checks.refuse(TypeError, "A", "an operator with an adjoint", A, "give it an rmatvec")
            kind = np.dtype(self.A.dtype or np.float64)
            if kind.kind not in "biuf":
                checks.refuse(TypeError, "A", what, A)
            self.dtype = torch.float32 if kind == np.float32 else torch.float64
            self.device = torch.device("cpu")
            if issparse(A) and kind.kind != "f":  # sums would overflow small integer types
                self.A = checks.operator("A", A.astype(np.float64), what)
        m, n = self.A.shape
        self.shape = int(m), int(n)
        if 0 in self.shape:
            checks.refuse(ValueError, "A", "a matrix with at least one element", A)

    def jvp(self, rows: Tensor) -> Tensor:
        if isinstance(self.A, Tensor):
            return rows @ self.A.T
        return self._from_numpy(self.A.matmat(rows.numpy().T), self.shape[0])

    def vjp(self, rows: Tensor) -> Tensor:
        if isinstance(self.A, Tensor):
            return rows @ self.A
        return self._from_numpy(self.A.rmatmat(rows.numpy().T), self.shape[1])

    def _from_numpy(self, columns: Any, length: int) -> Tensor:
        columns = np.asarray(columns)
        if columns.dtype.kind == "c":
            checks.refuse(TypeError, "A", "an operator whose products are real", columns)
        if columns.ndim != 2 or len(columns) != length:
            raise ValueError(f"A must give products of {length} rows, got an array of shape {columns.shape}")
        return torch.from_numpy(np.array(columns.T, _NUMPY[self.dtype], order="C"))
