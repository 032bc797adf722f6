"""Anybody's matrix or operator as a Jacobian."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import issparse
from torch import Tensor

from fisherop import checks
from fisherop.jacobian import Images, Jacobian, OfModel
from fisherop.model.linearize import Linearization

_NUMPY = {torch.float32: np.dtype(np.float32), torch.float64: np.dtype(np.float64)}
_WHAT = (
    "a LinearOperator, a sparse or dense matrix of real numbers, a PyLops operator, a dense tensor, a Linearization, "
    "an operator of fisherop, or of a subclass of fisherop.jacobian.Jacobian"
)
_WRONG = 1e-3  # relative deviation of the adjoint from the product: what is less may be rounding, or an inner iteration


def as_jacobian(A: Any) -> Jacobian:
    """The Jacobian that A is, or that an operator of this library multiplies by, or of a model's linearization, or of
    any matrix; see `FromOperator` for the latter, and for the errors.
    """
    products = getattr(A, "products", A)
    if isinstance(products, Images):
        return products.products
    if isinstance(products, Linearization):
        return OfModel(products)
    return products if Jacobian in type(products).__mro__ else FromOperator(A)


class FromOperator(Jacobian):
    """The products of a SciPy `LinearOperator`, a sparse or dense matrix, a PyLops operator, or a dense tensor.

    Of an operator the adjoint is compared with the product for random vectors, by two products with each. It is given
    copies of vectors, one at a time unless it has a product with several columns of its own.

    Parameters
    ----------
    A : of shape (M, N)
        Real and finite, and, if an operator, with an adjoint. Products are float32 if `A` is, else float64.

    Raises
    ------
    TypeError
        It is none of these, complex, or lacks an adjoint.
    ValueError
        It has no element, holds NaN or infinity, or its adjoint is that of another matrix.
    """

    def __init__(self, A: Any) -> None:
        self.source = self.A = A
        if isinstance(A, Tensor):
            if A.layout != torch.strided:
                checks.refuse(TypeError, "A", _WHAT, A, "it is sparse: use A.to_dense(), or a sparse array of SciPy")
            if A.is_meta or A.is_complex() or A.ndim != 2:
                checks.refuse(TypeError, "A", f"{_WHAT}, of two dimensions", A)
            self.A = A.detach() if A.dtype in _NUMPY else A.detach().double()
            self.dtype, self.device = self.A.dtype, self.A.device
        else:
            self._take(A)
        m, n = self.A.shape
        self.shape = int(m), int(n)
        if 0 in self.shape:
            checks.refuse(ValueError, "A", "a matrix with at least one element", A)
        values = self._values()
        if values is None:
            self._compare_adjoint()
        elif not (checks.is_finite(values) if isinstance(values, Tensor) else np.isfinite(values).all()):
            checks.refuse(ValueError, "A", "finite", A, "it holds NaN or infinity")
        self._seen = self._fingerprint()

    def _take(self, A: Any) -> None:
        if np.ma.isMaskedArray(A):
            checks.refuse(TypeError, "A", f"{_WHAT}, without a mask", A, "use A.filled()")
        if isinstance(A, np.ndarray) and A.ndim != 2:
            checks.refuse(ValueError, "A", f"{_WHAT}, of two dimensions", A)
        if issparse(A):
            sparse: Any = A
            A = sparse.tocsr() if sparse.format in ("lil", "dok") else sparse  # whose products are slow
        self.A = checks.operator("A", A, _WHAT)
        kind = np.dtype(self.A.dtype or np.float64)
        if kind.kind not in "biuf":
            checks.refuse(TypeError, "A", _WHAT, A, f"its dtype is {kind}")
        if issparse(A) and kind.kind != "f":  # sums would overflow small integer types
            self.A = checks.operator("A", A.astype(np.float64), _WHAT)
        self.dtype = torch.float32 if (kind.kind, kind.itemsize) == ("f", 4) else torch.float64
        self.device = torch.device("cpu")

    def jvp(self, rows: Tensor) -> Tensor:
        return rows @ self.A.T if isinstance(self.A, Tensor) else self._times(rows, "matvec", "matmat", self.shape[0])

    def vjp(self, rows: Tensor) -> Tensor:
        return rows @ self.A if isinstance(self.A, Tensor) else self._times(rows, "rmatvec", "rmatmat", self.shape[1])

    def _times(self, rows: Tensor, one: str, several: str, length: int) -> Tensor:
        given = np.array(rows.detach().numpy())  # a copy: the operator may write to it, or keep it
        if len(given) == 0:
            return rows.new_zeros(0, length)
        if _has_its_own(self.A, several):
            out = np.asarray(getattr(self.A, several)(given.T))
        else:
            out = np.stack([np.asarray(getattr(self.A, one)(row)).reshape(-1) for row in given], axis=1)
        if out.dtype.kind == "c":
            checks.refuse(TypeError, "A", "an operator whose products are real", out)
        if out.shape != (length, len(given)):
            raise ValueError(f"A must give products of {length} elements, got an array of shape {out.shape}")
        with np.errstate(over="ignore"):
            products = torch.from_numpy(np.array(out.T, _NUMPY[self.dtype], order="C"))
        if not checks.is_finite(products) and np.isfinite(given).all():
            raise OverflowError(f"a product with A holds NaN or infinity, or more than {self.dtype} can hold: scale it")
        return products

    def _compare_adjoint(self) -> None:
        """⟨A x, A x⟩ = ⟨x, Aᵀ A x⟩ for a random x, and ⟨Aᵀy, Aᵀy⟩ = ⟨y, A Aᵀy⟩ for a random y."""
        rng = np.random.default_rng(0)
        self.mismatch = 0.0
        x, y = (torch.from_numpy(rng.standard_normal((1, n)) / n**0.5).to(self.dtype) for n in self.shape[::-1])
        ax = self.jvp(x)  # an error here is the operator's own
        try:
            aty, atax = self.vjp(y), self.vjp(ax)
        except NotImplementedError as error:  # as SciPy's operators and PyLops' say that they have no adjoint
            cure = f"give it an rmatvec ({error})" if str(error) else "give it an rmatvec"
            checks.refuse(TypeError, "A", "an operator with products and with an adjoint", self.source, cure)
        pairs = [(x, ax, atax), (y, aty, self.jvp(aty))]
        for given, product, back in pairs:
            there, here = float((product.double() ** 2).sum()), float((given.double() * back.double()).sum())
            # x may lie where A is small, so that rounding counts beside what A x is
            rounding = 100 * torch.finfo(self.dtype).eps * float(given.double().norm() * back.double().norm())
            off = abs(there - here) / max(there, abs(here)) if abs(there - here) > rounding else 0.0
            if off > _WRONG:
                checks.refuse(
                    ValueError,
                    "A",
                    "an operator whose adjoint is that of its products",
                    self.source,
                    f"for a random x, ⟨A x, A x⟩ = {there:.6g}, but ⟨x, Aᵀ A x⟩ = {here:.6g}: check its rmatvec",
                )
            self.mismatch = max(self.mismatch, off)

    def _values(self) -> Tensor | NDArray | None:
        """The elements, of a matrix that has them in one place."""
        if isinstance(self.A, Tensor):
            return self.A
        values = getattr(self.source, "data", None) if issparse(self.source) else self.source
        return values if isinstance(values, np.ndarray) and values.dtype.kind in "biuf" else None

    def _fingerprint(self) -> bytes:
        values = self._values()
        if values is None or (isinstance(values, Tensor) and values.device.type != "cpu"):
            return str(getattr(values, "_version", "")).encode() if isinstance(values, Tensor) else b""
        array = np.ascontiguousarray(values.numpy() if isinstance(values, Tensor) else values)
        return hashlib.blake2b(array.reshape(-1).view(np.uint8).data).digest()

    def check_current(self) -> None:
        if self._fingerprint() != self._seen:
            raise RuntimeError("the matrix has changed since its operator was made: make a new one of it")

    def is_same(self, other: Jacobian) -> bool:
        return isinstance(other, FromOperator) and self.source is other.source


def _has_its_own(A: Any, several: str) -> bool:
    """Whether an operator multiplies several columns; SciPy's gives its functions one by one, as matrices (N, 1)."""
    if type(A).__name__ == "MatrixLinearOperator":
        return True
    function = getattr(A, f"_CustomLinearOperator__{several}_impl", None)
    owner = next(kind for kind in type(A).__mro__ if f"_{several}" in vars(kind))
    return function is not None or not owner.__module__.startswith("scipy.")
