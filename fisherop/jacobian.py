"""The one protocol: what multiplies blocks of rows with J and Jᵀ is a Jacobian, and so is what is made of others."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

# Of |log₂ ‖J‖|, by dtype. Below the first, ‖J‖⁴, which arises in the norm of F v, is well within the dtype's range.
# Below the second, J v is within it for N up to 2²⁴, and the eigenvalues ‖J v‖² are within that of float64.
_COMFORTABLE = {"float32": 25, "float64": 200}
POSSIBLE = {"float32": 115, "float64": 500}
_SLAB = 2**16  # columns that go through temporary memory at a time


class Jacobian(Protocol):
    """J, of shape (M, N), as products with blocks of rows, in one dtype, on one device.

    Attributes
    ----------
    shape : (int, int)
        (M, N).
    dtype : torch.dtype
        float32 or float64.
    device : torch.device
        Where all rows are.
    mismatch : float
        How far products with J and with Jᵀ are from those of one matrix, relative to them, beyond rounding.
    chunk_size : int
        How many products are best made at a time.
    is_stacked : bool
        Whether J is of many parts, whose responses together are better never held: `normal` needs no more than one.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    mismatch: float = 0.0
    chunk_size: int = 64
    is_stacked: bool = False

    def jvp(self, rows: Tensor) -> Tensor:
        """J times each row: ``(k, N) -> (k, M)``."""
        ...

    def vjp(self, rows: Tensor) -> Tensor:
        """Jᵀ times each row: ``(k, M) -> (k, N)``."""
        ...

    def normal(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """R and JᵀJ times each row: ``(k, N) -> (min(k, M), k), (k, N)``, where J rowsᵀ = Q R.

        A Krylov method for F needs no more: RᵀR is the Gram matrix of J times the rows, and R has the singular values
        of J on their span. So a J of many parts never holds all responses at once. R is float64.
        """
        images = self.jvp(rows)
        return triangle(images), self.vjp(images)

    def to_images(self, rows: Tensor) -> Tensor:
        """The changes of the image that rows ``(k, N)`` stand for: others than these where they are coordinates."""
        return rows

    def to_noise(self, changes: Tensor) -> Tensor:
        """Changes of the response, as rows, in the units in which J has them."""
        return changes

    def check_current(self) -> None:
        """Raise RuntimeError if these are no longer the products that they were."""

    def is_same(self, other: Jacobian) -> bool:
        """Whether the other, which isn't a `Counted` one, multiplies by the same matrix."""
        return self is other


def triangle(rows: Tensor) -> Tensor:
    """R of the QR factorization of the columns whose rows these are, in float64: tall and skinny, slab by slab."""
    if len(rows) == 1:
        return torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)[None]
    r = rows.new_empty(0, len(rows), dtype=torch.float64)
    for columns in rows.split(_SLAB, dim=1):
        r = torch.linalg.qr(torch.cat([r, columns.T.double()]), mode="r")[1]
    return r


class _Of(Jacobian):
    """A Jacobian made of another, with its attributes unless others are given."""

    def __init__(self, J: Jacobian, n_responses: int | None = None, n_pixels: int | None = None) -> None:
        self.J = J
        m, n = J.shape
        self.shape = m if n_responses is None else n_responses, n if n_pixels is None else n_pixels
        self.dtype, self.device, self.mismatch, self.chunk_size = J.dtype, J.device, J.mismatch, J.chunk_size
        self.is_stacked = J.is_stacked

    def to_images(self, rows: Tensor) -> Tensor:
        return self.J.to_images(rows)

    def to_noise(self, changes: Tensor) -> Tensor:
        return self.J.to_noise(changes)

    def check_current(self) -> None:
        self.J.check_current()


class OfModel(Jacobian):
    """The Jacobian of a model at an image: a `Linearization`, whose images are rows here."""

    def __init__(self, linearization: Any) -> None:
        self.linearization = linearization
        self.shape = linearization.response_size, linearization.image_size
        self.dtype, self.device = linearization.image.dtype, linearization.image.device
        self.mismatch, self.chunk_size = linearization.mismatch, linearization.chunk_size

    def jvp(self, rows: Tensor) -> Tensor:
        return self.linearization.jvp(rows.reshape(-1, *self.linearization.image_shape))

    def vjp(self, rows: Tensor) -> Tensor:
        return self.linearization.vjp(rows).reshape(-1, self.shape[1])

    def normal(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        r, products = self.linearization.normal(rows.reshape(-1, *self.linearization.image_shape))
        return r, products.reshape(-1, self.shape[1])

    @property
    def n_products(self) -> float:
        """Those of the linearization so far."""
        return self.linearization.n_products

    def check_current(self) -> None:
        self.linearization.check_current()

    def is_same(self, other: Jacobian) -> bool:
        return isinstance(other, OfModel) and self.linearization is other.linearization


class Images:
    """A linearization whose products are an operator's own: counted apart, or times a power of two."""

    def __init__(self, products: Jacobian, linearization: Any) -> None:
        self.products, self._linearization = products, linearization

    def jvp(self, tangents: Tensor) -> Tensor:
        """As `Linearization.jvp`."""
        return self.products.jvp(tangents.reshape(len(tangents), -1))

    def vjp(self, cotangents: Tensor) -> Tensor:
        """As `Linearization.vjp`."""
        return self.products.vjp(cotangents).reshape(-1, *self.image_shape)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.products if hasattr(self.products, name) else self._linearization, name)


class Counted(_Of):
    """The products of a Jacobian, counted from here on, and heard by a listener of their own.

    So that solvers which share one, at the same time or one after the other, know each what it has spent.

    Attributes
    ----------
    n_jvp, n_vjp : int
    on_product : callable or None
        Called with the number of products after each block: 0.5 a row and direction.
    """

    def __init__(self, J: Jacobian) -> None:
        super().__init__(J)
        self.n_jvp = self.n_vjp = 0
        self.on_product: Callable[[float], None] | None = None
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple:  # counts begin at zero, as those of a linearization
        return type(self), (self.J,)

    @property
    def n_products(self) -> float:
        """One product is one J v plus one Jᵀu."""
        return (self.n_jvp + self.n_vjp) / 2

    def jvp(self, rows: Tensor) -> Tensor:
        out = self.J.jvp(rows)
        self._count(len(rows), 0)
        return out

    def vjp(self, rows: Tensor) -> Tensor:
        out = self.J.vjp(rows)
        self._count(0, len(rows))
        return out

    def normal(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        out = self.J.normal(rows)
        self._count(len(rows), len(rows))
        return out

    def _count(self, n_jvp: int, n_vjp: int) -> None:
        with self._lock:
            self.n_jvp += n_jvp
            self.n_vjp += n_vjp
        if self.on_product is not None:
            self.on_product((n_jvp + n_vjp) / 2)


class Scaled(_Of):
    """2ᵉ J, e an integer: the products of J times a power of two, which changes no digit of them."""

    def __init__(self, J: Jacobian, exponent: int) -> None:
        super().__init__(J)
        self.exponent = exponent

    @property
    def n_products(self) -> float:
        """Those of J, which counts them."""
        return self.J.n_products  # pyright: ignore[reportAttributeAccessIssue]

    def jvp(self, rows: Tensor) -> Tensor:
        return self._times(self.J.jvp, rows)

    def vjp(self, rows: Tensor) -> Tensor:
        return self._times(self.J.vjp, rows)

    def _times(self, multiply: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
        # half before and half after, so that neither the product nor what the model computes on its way is lost
        before = self.exponent // 2
        return multiply(rows * 2.0**before).mul_(2.0 ** (self.exponent - before))


class Transposed(_Of):
    """Jᵀ, of shape (N, M)."""

    def __init__(self, J: Jacobian) -> None:
        super().__init__(J, n_responses=J.shape[1], n_pixels=J.shape[0])

    def jvp(self, rows: Tensor) -> Tensor:
        return self.J.vjp(rows)

    def vjp(self, rows: Tensor) -> Tensor:
        return self.J.jvp(rows)

    def is_same(self, other: Jacobian) -> bool:
        return isinstance(other, Transposed) and is_same(self.J, other.J)


def uncounted(J: Any) -> Any:
    """What a `Counted` Jacobian counts the products of."""
    return uncounted(J.J) if isinstance(J, Counted) else J


def is_same(J: Any, other: Any) -> bool:
    """Whether two Jacobians multiply by the same matrix, so that a search with one can go on with the other."""
    return uncounted(J).is_same(uncounted(other))


Products = OfModel | Counted | Scaled  # what an operator multiplies by: Jacobians that count


def comfortable_exponent(size: float, dtype: str) -> int:
    """The exponent e for which F of 2ᵉ J can be computed, if ‖J v‖ is `size` for a unit vector v; 0 if J will do."""
    exponent = round(-math.log2(size)) if size else 0
    return exponent if abs(exponent) > _COMFORTABLE[dtype] else 0


def check_size(size: float, dtype: str) -> None:
    """Refuse a J of which products are lost, ‖J v‖ being `size` for a unit vector v; it may be zero."""
    most = 2.0 ** POSSIBLE[dtype]
    if math.isnan(size):
        raise OverflowError("products with J hold NaN")
    if size == 0 or 1 / most <= size <= most:
        return
    error, what = (FloatingPointError, "small") if size < 1 else (OverflowError, "large")
    raise error(
        f"the Jacobian J is too {what} for {dtype}: ‖J v‖ is about {size:.1e} for a unit vector v, and must lie "
        f"between {1 / most:.0e} and {most:.0e}: scale the matrix, or the model's response, as by lambda x: model(x) * "
        f"{1 / min(size, most**2):.0e}"
    )
