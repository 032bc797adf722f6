"""The crossing between NumPy and torch: SciPy's operators, whose products are those of blocks of rows of tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import issparse
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from fisherop import checks

_BATCHES = tuple(map(int, scipy.__version__.split(".")[:2])) >= (1, 18)  # SciPy multiplies stacks of vectors, matrices
_Product = Callable[[Tensor], Tensor]


class ByRows(LinearOperator):
    """A SciPy operator that multiplies by `products`, a Jacobian, with checks of what comes in and goes out."""

    dtype: np.dtype
    products: Any
    _forward: Any  # rows (k, N) to rows, as the operator multiplies
    _reverse: Any  # as its adjoint does

    def _to_torch(self, array: NDArray) -> Tensor:
        # Always a copy: torch refuses read-only memory and negative strides, even unused ones as of v[:, ::-1] at k = 1
        return torch.from_numpy(np.array(array, self.dtype, order="C")).to(self.products.device)

    # The public methods only say better what is wrong; which shapes mean what is SciPy's to decide. It calls `_matvec`
    # with (N,) or (N, 1), from 1.18 on with rows (..., N), and `_matmat` with (N, k), from 1.18 on with (..., N, k).

    def matvec(self, x: ArrayLike) -> NDArray:
        return super().matvec(self._checked("matvec", x, self.shape[1]))

    def matmat(self, X: ArrayLike) -> NDArray:
        return super().matmat(self._checked("matmat", X, self.shape[1]))

    def rmatvec(self, x: ArrayLike) -> NDArray:
        return super().rmatvec(self._checked("rmatvec", x, self.shape[0]))

    def rmatmat(self, X: ArrayLike) -> NDArray:
        return super().rmatmat(self._checked("rmatmat", X, self.shape[0]))

    def _matvec(self, x: NDArray) -> NDArray:
        return self._times_vectors(self._forward, x, (self.shape[1], self.shape[0]))

    def _rmatvec(self, x: NDArray) -> NDArray:
        return self._times_vectors(self._reverse, x, self.shape)

    def _matmat(self, X: NDArray) -> NDArray:
        return self._times_columns(self._forward, X, (self.shape[1], self.shape[0]))

    def _rmatmat(self, X: NDArray) -> NDArray:
        return self._times_columns(self._reverse, X, self.shape)

    def _checked(self, method: str, x: Any, n: int) -> NDArray:
        """`x` as an array, whose shape the `method` of the SciPy in use takes."""
        x = x if issparse(x) else np.asanyarray(x)
        if x.dtype.kind not in "biufc":
            raise TypeError(f"{self!r} multiplies numbers, got an array of dtype {x.dtype}")
        if method.endswith("matvec"):
            fits = x.shape in ((n,), (n, 1)) or (_BATCHES and x.shape[-1:] == (n,))
            wanted = f"(..., {n})" if _BATCHES else f"({n},) or ({n}, 1)"
            wanted += f", and {method.replace('vec', 'mat')} columns ({n}, k)"
            if issparse(x):
                raise TypeError(_sparse_message(self))
        else:
            fits = (x.ndim == 2 or (_BATCHES and x.ndim > 2)) and x.shape[-2] == n
            wanted = f"(..., {n}, k)" if _BATCHES else f"({n}, k)"
        if not fits:
            raise ValueError(f"{method} of {self!r} takes arrays of shape {wanted}; got {x.shape}")
        return x

    def _times_vectors(self, multiply: _Product, x: NDArray, sizes: tuple[int, int]) -> NDArray:
        x = np.asarray(x)
        return self._times_rows(multiply, x[:, 0] if x.shape == (sizes[0], 1) else x, sizes)

    def _times_columns(self, multiply: _Product, X: NDArray, sizes: tuple[int, int]) -> NDArray:
        if issparse(X):
            raise TypeError(_sparse_message(self))
        return self._times_rows(multiply, np.asarray(X).swapaxes(-1, -2), sizes).swapaxes(-1, -2)

    def _times_rows(self, multiply: _Product, rows: NDArray, sizes: tuple[int, int]) -> NDArray:
        """Rows ``(..., n)``, each by a product that takes ``(k, n)`` to ``(k, m)``, as ``(..., m)``; sizes are n, m."""
        if np.iscomplexobj(rows):
            re, im = (self._times_rows(multiply, part, sizes) for part in (np.real(rows), np.imag(rows)))
            return re + 1j * im
        (n, m), batch = sizes, rows.shape[:-1]
        with np.errstate(over="ignore"):
            block = self._to_torch(rows.reshape(math.prod(batch), n))
        if not checks.is_finite(block):
            if np.isfinite(rows).all():
                raise OverflowError(f"{self!r} was given a vector that exceeds what {self.dtype} can hold: scale it")
            raise ValueError(f"{self!r} was given a vector that holds NaN or infinity")
        return self._within_range(multiply(block)).cpu().numpy().reshape(*batch, m)

    def _within_range(self, product: Tensor) -> Tensor:
        if not checks.is_finite(product):
            raise OverflowError(f"a product with {self!r} exceeds what {self.dtype} can hold: scale its J")
        return product


def _sparse_message(operator: LinearOperator) -> str:
    instead = "scipy.sparse.linalg.aslinearoperator(x) for a product that is an operator"
    return f"{operator!r} multiplies dense arrays, got a sparse one: use x.toarray(), or {instead}"
