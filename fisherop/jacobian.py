"""Jacobians made of others: times a number, where F would leave the range of the dtype; with counters of their own."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor

# Of log₂ ‖J‖, by dtype. Within the first, ‖J‖⁴, which the norm of F v takes, leaves room in the dtype. The second is
# what J v can be held in for N up to 2²⁴, and what the eigenvalues ‖J v‖² can be held in as float64.
_COMFORTABLE = {"float32": 25, "float64": 200}
POSSIBLE = {"float32": 115, "float64": 500}


class Scaled:
    """2ᵉ J: the products of a linearization times a power of two, which changes no digit of them.

    Everything else is the linearization's own, its counters and its listener included.

    Parameters
    ----------
    linearization : Linearization
        J, of shape (M, N).
    exponent : int
        e; it may be negative.
    """

    def __init__(self, linearization: Any, exponent: int) -> None:
        self.linearization = linearization
        self.exponent = exponent

    def jvp(self, tangents: Tensor) -> Tensor:
        """2ᵉ J times each of k changes of the image: ``(k, *image_shape) -> (k, M)``."""
        return self._times(self.linearization.jvp, tangents)

    def vjp(self, cotangents: Tensor) -> Tensor:
        """2ᵉ Jᵀ times each of k weightings of the response: ``(k, M) -> (k, *image_shape)``."""
        return self._times(self.linearization.vjp, cotangents)

    def _times(self, multiply: Callable[[Tensor], Tensor], block: Tensor) -> Tensor:
        # half before and half after, so that neither the product nor what the model computes on its way is lost
        before = self.exponent // 2
        return multiply(block * 2.0**before).mul_(2.0 ** (self.exponent - before))

    @property
    def on_product(self) -> Callable[[float], None] | None:
        return self.linearization.on_product

    @on_product.setter
    def on_product(self, listener: Callable[[float], None] | None) -> None:
        self.linearization.on_product = listener

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "linearization":  # copy and pickle ask before there is one
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(self.linearization, name)


class Counted:
    """The products of a linearization, counted from here on, and heard by a listener of their own.

    So that solvers which share a linearization, at the same time or one after the other, know each what it has spent.
    Everything else is the linearization's own; its counters and its listener go on.

    Parameters
    ----------
    linearization : Linearization
        J, of shape (M, N), or what stands for one.
    """

    def __init__(self, linearization: Any) -> None:
        self.linearization = linearization
        self.n_jvp = self.n_vjp = 0
        self.on_product: Callable[[float], None] | None = None
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple:  # counts begin at zero, as those of a linearization
        return type(self), (self.linearization,)

    @property
    def n_products(self) -> float:
        """One product is one J v plus one Jᵀu."""
        return (self.n_jvp + self.n_vjp) / 2

    def jvp(self, tangents: Tensor) -> Tensor:
        """J times each of k changes of the image: ``(k, *image_shape) -> (k, M)``."""
        out = self.linearization.jvp(tangents)
        self._count(len(tangents), 0)
        return out

    def vjp(self, cotangents: Tensor) -> Tensor:
        """Jᵀ times each of k weightings of the response: ``(k, M) -> (k, *image_shape)``."""
        out = self.linearization.vjp(cotangents)
        self._count(0, len(cotangents))
        return out

    def _count(self, n_jvp: int, n_vjp: int) -> None:
        with self._lock:
            self.n_jvp += n_jvp
            self.n_vjp += n_vjp
        if self.on_product is not None:
            self.on_product((n_jvp + n_vjp) / 2)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "linearization":  # copy and pickle ask before there is one
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(self.linearization, name)


def counted(operator: Any) -> Any:
    """The operator of the same kind whose products are counted from here on; the model must be as it was."""
    operator.linearization.check_current()
    own = type(operator).from_linearization(Counted(operator.linearization))
    own.jacobian.dense = operator.jacobian.dense
    return own


def shared(linearization: Any) -> Any:
    """The linearization that several `Counted` may share."""
    while isinstance(linearization, Counted):
        linearization = linearization.linearization
    return linearization


def scaled(operator: Any, exponent: int) -> Any:
    """The operator of the same kind of 2ᵉ J; itself for e = 0."""
    if exponent == 0:
        return operator
    return type(operator).from_linearization(Scaled(operator.linearization, exponent))


def comfortable_exponent(size: float, dtype: str) -> int:
    """e of the `Scaled` Jacobian with which F can be computed, ‖J v‖ being `size` for a unit vector v; 0 if with J."""
    exponent = round(-math.log2(size)) if size else 0
    return exponent if abs(exponent) > _COMFORTABLE[dtype] else 0


def check_size(size: float, dtype: str) -> None:
    """Refuse a J of which products are lost, ‖J v‖ being `size` for a unit vector v; it may be zero."""
    most = 2.0 ** POSSIBLE[dtype]
    if size == 0 or 1 / most <= size <= most:
        return
    error, what = (FloatingPointError, "small") if size < 1 else (OverflowError, "large")
    raise error(
        f"the model's Jacobian J is too {what} for {dtype}: ‖J v‖ is about {size:.1e} for a unit vector v, and must "
        f"lie between {1 / most:.0e} and {most:.0e}: scale the model's response, as by lambda x: model(x) * "
        f"{1 / min(size, most**2):.0e}"
    )
