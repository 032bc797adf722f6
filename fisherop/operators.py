"""The Jacobian and the Fisher information matrix as SciPy operators: the only crossing between torch and NumPy."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.sparse.linalg import LinearOperator
from torch import Tensor, nn

from fisherop import checks
from fisherop.by_rows import ByRows
from fisherop.combinators import Restricted, Whitened
from fisherop.from_operator import as_jacobian
from fisherop.jacobian import Counted, Images, Jacobian, OfModel, Scaled, uncounted
from fisherop.model.linearize import Linearization, linearize
from fisherop.model.recipe import Recipe
from fisherop.observed import at, how, observe
from fisherop.on_workers import spread
from fisherop.pooled import pool
from fisherop.spaces import Space

if TYPE_CHECKING:
    from typing_extensions import Self

_DENSE_BYTES = 2**31


class _Operator(ByRows):
    """What both operators share: how they are made, and what of the model they tell."""

    _shape_for: Any  # of the operator, by its products

    def __init__(
        self,
        image: Tensor,
        model: Callable[[Tensor], Any],
        *,
        noise: Any = None,
        subspace: Space | None = None,
        metric: Any = None,
        engine: str = "auto",
        chunk_size: int | None = None,
        memory: int | None = None,
    ) -> None:
        lin = linearize(image, model, engine=engine, chunk_size=chunk_size, memory=memory)
        self._bind(observe(lin, noise, subspace, metric))

    @classmethod
    def from_linearization(cls, linearization: Linearization) -> Self:
        """The operator of a linearization that exists already; nothing is computed."""
        if not hasattr(linearization, "jvp"):
            checks.refuse(TypeError, "linearization", "a Linearization", linearization, "use linearize(image, model)")
        return cls._from(OfModel(linearization))

    @classmethod
    def of(cls, A: Any) -> Self:
        """The operator of any matrix: for `FisherOperator` that of AᵀA.

        Parameters
        ----------
        A : of shape (M, N)
            A SciPy ``LinearOperator`` with an adjoint, a sparse or dense matrix of real numbers, a PyLops operator, a
            dense tensor, a `Linearization`, another `fisherop.jacobian.Jacobian`, or an operator of this library, which
            stands for its J, also if it is a `FisherOperator`. Products are float32 if `A` is, else float64. An
            operator is given copies of vectors, and its adjoint is compared with its products for random ones.

        Raises
        ------
        TypeError
            It is none of these, complex, or lacks an adjoint.
        ValueError
            It has no element, not two dimensions, NaN or infinity, or an adjoint that is not its own.
        """
        return cls._from(as_jacobian(A))

    @classmethod
    def pooled(
        cls,
        images: Sequence[Tensor],
        model: Callable[[Tensor], Any],
        *,
        weights: Sequence[float] | None = None,
        memory: int = 2**30,
        client: Any = None,
        timeout: float = 60.0,
        noise: Any = None,
        subspace: Space | None = None,
        metric: Any = None,
        engine: str = "auto",
        chunk_size: int | None = None,
    ) -> Self:
        """The operator of many images: F is Σ wᵢ JᵢᵀJᵢ, whose extremes are universal distortions.

        A product takes one at each image, one after the other, and counts as one.

        Parameters
        ----------
        images : sequence of Tensor
            Of one shape.
        model : callable or nn.Module
            As in `linearize`, or a callable without arguments that builds one; a layer is a `LayerResponse`.
        weights : sequence of float, optional
            From 0; by default 1 / n each, so that F is the mean.
        memory : int
            Bytes for what is computed at the images. Those beyond it are linearized again at each product, for an
            `nn.Module` from the program that is kept, at about twice the time.
        client : distributed.Client, optional
            Of a Dask cluster: its workers share the images, each within `memory`, with copies of the model as in
            `sweep`. They may die and come back; after `timeout` seconds without any, products raise RuntimeError.
        noise, subspace, metric, engine, chunk_size
            As of an operator of one image.

        Raises
        ------
        TypeError, ValueError, RuntimeError
            As by `linearize`; ValueError if the images or the weights do not fit each other.
        """
        made: Any = {"options": {"engine": engine, "chunk_size": chunk_size}, "observed": (noise, subspace, metric)}
        if client is not None:
            return cls._from(spread(images, model, weights, memory, client, timeout, **made))
        model = Recipe(model, "given").model()
        return cls._from(pool(images, functools.partial(at, model=model, **made), weights, memory))

    @classmethod
    def _from(cls, products: Jacobian) -> Self:
        operator = cls.__new__(cls)
        operator._bind(products)
        return operator

    def _bind(self, products: Jacobian) -> None:
        if 0 in products.shape:
            checks.refuse(ValueError, "A", "a matrix with at least one element", products)
        self.products: Any = products if hasattr(products, "n_products") else Counted(products)
        dtype = np.dtype(str(products.dtype).removeprefix("torch."))
        super().__init__(dtype, self._shape_for(products))  # pyright: ignore[reportCallIssue]
        self.args = ()  # as of SciPy's own operators that are not composed of others

    def __reduce__(self) -> tuple:
        return type(self)._from, (self.products,)

    @property
    def linearization(self) -> Linearization:
        """That of the model at the image alone; AttributeError for an operator of anything else."""
        J, is_own = self.products, True
        while isinstance(J, Counted | Scaled | Whitened | Restricted):
            is_own &= isinstance(J, Counted | Scaled)
            J = J.J
        if not isinstance(J, OfModel):
            raise AttributeError(f"{self!r} has no linearization: it is of a {type(J).__name__}, and not of a model")
        if J is self.products or not is_own:
            return J.linearization
        return cast(Linearization, Images(self.products, J.linearization))

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Shape of the image, (N,) where there is none; its N elements are the operator's columns, in C order."""
        if hasattr(self, "linearization"):
            return self.linearization.image_shape
        return getattr(uncounted(self.products), "image_shape", (self.products.shape[1],))

    @property
    def response_shape(self) -> tuple[int, ...]:
        """Shape of the model's response, M elements; (M,) where there is none."""
        return self.linearization.response_shape if hasattr(self, "linearization") else (self.products.shape[0],)

    @property
    def n_products(self) -> float:
        """Products done so far (one is one J v plus one Jᵀu), of every operator on the same linearization."""
        return self.products.n_products

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """The operator of the same model at the same image on another device, or in another precision.

        A module is copied, then moved; any other model has to take the new image as it is.

        Parameters
        ----------
        *args, **kwargs
            A device, a dtype (float32 or float64), or both, as `torch.Tensor.to` takes them.

        Raises
        ------
        TypeError, ValueError, RuntimeError
            As by `torch.Tensor.to`, `copy.deepcopy` and `linearize`; TypeError for an operator of a matrix.
        """
        if not hasattr(self, "linearization"):
            raise TypeError(f"{self!r} is of no model: convert the matrix, as by A.astype(...), and use of()")
        lin = self.linearization
        lin.check_current()
        image, model = checks.moved("what to() is given", lin.image, *args, **kwargs), lin.model
        if image is lin.image:
            return self
        if isinstance(model, nn.Module):
            with torch.inference_mode(False):  # or PyTorch could not differentiate it
                model = copy.deepcopy(model).to(*args, **kwargs)
            return type(self)(image, model, **lin.options, **self.observed)
        try:
            return type(self)(image, model, **lin.options, **self.observed)
        except (RuntimeError, TypeError, ValueError) as error:
            raise RuntimeError(
                f"the model is not an nn.Module, so that it can't be copied and moved, and it fails for an image of "
                f"{image.dtype} on {image.device}: make an operator from image.to(...) and a model that accepts it; "
                f"against= takes that operator, too. {error}"
            ) from error

    @property
    def observed(self) -> dict[str, Any]:
        """The `noise`, `subspace` and `metric` that it was made with."""
        return how(self.products)

    def in_float64(self, scale: float = 1.0) -> LinearOperator:
        """This operator / `scale` for a solver that works in float64, around the model's products in their own dtype.

        Around float32 products, a solver's own rounding would otherwise add to the model's.
        """
        scale = checks.number("scale", scale, "a finite number other than 0", bool)

        def promoted(name: str) -> Callable[[NDArray], NDArray]:
            return lambda x: self._promoted(name, x).astype(np.float64) / scale

        products = {name: promoted(name) for name in ("matvec", "rmatvec", "matmat", "rmatmat")}
        return LinearOperator(self.shape, dtype=np.float64, **products)  # pyright: ignore[reportCallIssue]

    def _promoted(self, name: str, x: NDArray) -> NDArray:
        return getattr(self, name)(x)

    def to_tensors(self, columns: ArrayLike) -> Tensor:
        """Columns ``(N, k)`` as a block of images ``(k, *image_shape)``, in the image's dtype, on its device.

        With `subspace` or `metric`, the columns ``(d, k)`` are coordinates, and the images are what they stand for.
        """
        columns = checks.array("columns", columns, (self.products.shape[1], "k"))
        return self.products.to_images(self._to_torch(columns.T)).reshape(-1, *self.image_shape)

    @staticmethod
    def to_columns(block: Tensor) -> NDArray[np.floating]:
        """A block of tensors ``(k, ...)`` as columns ``(N, k)``."""
        return block.reshape(len(block), math.prod(block.shape[1:])).cpu().numpy().T


class JacobianOperator(_Operator):
    """The Jacobian ``J = df/dx`` of a model at an image, shape (M, N), as a SciPy ``LinearOperator``.

    Parameters
    ----------
    image : Tensor, shape ``image_shape``
        The image, N elements, float32 or float64.
    model : callable or nn.Module
        Its response has M elements; see `linearize` for what is accepted, and for the errors raised.
    noise : optional
        Of the response: one of `fisherop.noise`. J is S J then, with SᵀS the information of the responses; by default
        white Gaussian noise of unit variance, with which S is the identity.
    subspace : Space, optional
        The changes of the image that count, of `fisherop.spaces`. J is J B then, B (N, d) a basis, and the vectors are
        coordinates, which `to_tensors` makes images of.
    metric : array_like or LinearOperator, optional
        The norm of a change, if it isn't the Euclidean one: √(Σ wᵢ xᵢ²) with a positive weight of each element, or of
        the last dimensions; or an operator R (N, N), W^(-1/2) of a metric W, with which ‖R z‖ counts as ‖z‖.
    engine, chunk_size, memory
        How products are made, how many at a time, and what that may take; see `linearize`.

    Notes
    -----
    ``J @ V`` costs a forward-mode derivative a column, ``J.H @ U`` a reverse-mode one. Vectors of another dtype are
    cast; the result has the operator's dtype, which is the image's. The shapes that `matvec` and `matmat` take are
    those of the SciPy in use, which from 1.18 on multiplies stacks of vectors (..., N) and of matrices (..., N, k).

    An operator pickles, for joblib, multiprocessing and Dask, as its image, its model and these options, and is
    linearized anew where it arrives; what `to_dense` computed is not sent.
    """

    dense: NDArray | None = None
    """The matrix (M, N), once `to_dense` has computed it."""

    @staticmethod
    def _shape_for(products: Jacobian) -> tuple[int, int]:
        return products.shape

    @property
    def fisher(self) -> FisherOperator:
        """F = JᵀJ on the same linearization; its `jacobian` is this operator."""
        operator = FisherOperator._from(self.products)
        operator._jacobian = self
        return operator

    _forward = property(lambda self: self.products.jvp)
    _reverse = property(lambda self: self.products.vjp)

    def to_dense(self, max_bytes: int = _DENSE_BYTES) -> NDArray:
        """The matrix (M, N), by min(M, N) products with unit vectors; it is kept in `dense`, read-only.

        Raises
        ------
        ValueError
            It would take more than `max_bytes` (2 GiB by default).
        """
        max_bytes = checks.memory("max_bytes", max_bytes)
        if self.dense is not None:
            return self.dense
        checks.dense_size(self, max_bytes)
        step, (m, n) = self.products.chunk_size, self.shape
        by_rows = m <= n
        dense = np.empty((m, n) if by_rows else (n, m), self.dtype)
        for start in range(0, len(dense), step):
            unit = np.zeros((len(dense), min(step, len(dense) - start)), self.dtype)
            np.fill_diagonal(unit[start:], 1.0)
            block = self.rmatmat(unit) if by_rows else self.matmat(unit)
            dense[start : start + unit.shape[1]] = block.T
        self.dense = dense if by_rows else dense.T
        self.dense.flags.writeable = False
        return self.dense


class FisherOperator(_Operator):
    """The Fisher information matrix ``F = JᵀJ`` of a model at an image, shape (N, N), as a SciPy ``LinearOperator``.

    Without `noise` it is that of a response with white Gaussian noise of unit variance: ``‖J v‖² = vᵀF v`` is the
    squared discriminability of a small change v of the image. F is symmetric and positive semidefinite.

    Parameters
    ----------
    image, model, noise, subspace, metric, engine, chunk_size, memory
        As in `JacobianOperator`.
    """

    @staticmethod
    def _shape_for(products: Jacobian) -> tuple[int, int]:
        return products.shape[1], products.shape[1]

    @property
    def jacobian(self) -> JacobianOperator:
        """The Jacobian operator on the same linearization."""
        if not hasattr(self, "_jacobian"):
            self._jacobian = JacobianOperator._from(self.products)
        return self._jacobian

    def _forward(self, rows: Tensor) -> Tensor:
        if len(rows) == 1 or self.products.is_stacked:
            r, products = self.products.normal(rows)
            images = self._within_range(r).T  # of the norms of J v
        else:
            images = self._within_range(self.products.jvp(rows))
            products = self.products.vjp(images)
        if bool((images.any(dim=1) & ~products.any(dim=1)).any()):  # vᵀF v = ‖J v‖² > 0
            raise FloatingPointError(
                f"a product with {self!r} is below what {self.dtype} can hold, though J v isn't zero: scale the "
                "model's response up, or use eigenpairs, which does that inside"
            )
        return products

    _reverse = _forward

    def _promoted(self, name: str, x: NDArray) -> NDArray:
        vec = name[-3:]  # by J, where a product with F may vanish beside larger ones
        return getattr(self.jacobian, f"rmat{vec}")(getattr(self.jacobian, f"mat{vec}")(x))

    def _adjoint(self) -> FisherOperator:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self

    def _transpose(self) -> FisherOperator:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self

    def to_dense(self, max_bytes: int = _DENSE_BYTES) -> NDArray:
        """The matrix (N, N), from the dense Jacobian.

        Raises
        ------
        ValueError
            It, or the Jacobian, would take more than `max_bytes` (2 GiB by default).
        OverflowError
            It exceeds what the dtype can hold.
        """
        checks.dense_size(self, max_bytes)
        jacobian = self.jacobian.to_dense(max_bytes)
        with np.errstate(over="ignore", invalid="ignore"):
            dense = jacobian.T @ jacobian
        if not np.isfinite(dense).all():
            raise OverflowError(f"{self!r} exceeds what {self.dtype} can hold: scale its J")
        return dense


def counted(operator: Any) -> Any:
    """An operator of the same kind that counts its products from here on; RuntimeError if the model has changed."""
    operator.products.check_current()
    own = type(operator)._from(Counted(operator.products))
    own.jacobian.dense = operator.jacobian.dense
    return own


def scaled(operator: Any, exponent: int) -> Any:
    """The operator of the same kind of 2ᵉ J; itself for e = 0."""
    return operator if exponent == 0 else type(operator)._from(Scaled(operator.products, exponent))
