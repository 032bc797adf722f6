"""The derivative of a model at one image, as products with blocks of tensors."""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fisherop import checks
from fisherop.jacobian import triangle
from fisherop.model.build import build, in_chunks
from fisherop.model.compat import clean_failure
from fisherop.model.current import Current
from fisherop.model.engines import ENGINES
from fisherop.model.guard import Guard
from fisherop.model.pickles import check_picklable
from fisherop.model.response import Response, check_image, check_model
from fisherop.model.undisturbed import alone, keeping_settings


def linearize(
    image: Tensor,
    model: Callable[[Tensor], Any],
    *,
    engine: str = "auto",
    chunk_size: int | None = None,
    memory: int | None = None,
) -> Linearization:
    """Differentiate `model` at `image`.

    Parameters
    ----------
    image : Tensor, shape ``image_shape``
        One image of any shape, float32 or float64; a leading batch dimension of 1 is usual. It is copied.
    model : callable or nn.Module
        Maps the image to its response: a tensor, or any nesting of tuples, lists, dicts and dataclasses of tensors,
        which is flattened and concatenated in order; None is left out. What `torch.compile` wraps runs uncompiled. The
        model is left in the state that one plain call leaves it in; tensors that this call creates are kept, detached.
        It must not change while the linearization is in use: see `check_current`.
    engine : {"auto", "traced", "functional", "double_backward"}
        How products are made. ``"traced"`` replays the recorded operations of one J v and one Jᵀu; what depends only
        on the image is computed once; for an `nn.Module` the record serves later images of the same shape and dtype,
        until the module changes. ``"functional"``: J v by dual numbers, at every product anew, Jᵀu by the
        backward pass of one forward pass that is kept. ``"double_backward"``: both from that backward pass, which is
        differentiated once more; for models with operations that have no forward mode. ``"auto"``: the first of these
        that can be built, is right, and leaves the model as it was.
    chunk_size : int, optional
        How many products go through the model at a time, at most. By default 64, or as many as keep each tensor of a
        block below 32 MiB (``"traced"``), or all its intermediate results together below 1 GiB (the other engines).
    memory : int, optional
        Bytes that this may take, by default as many as the machine has. It is estimated, within a factor of two, by one
        forward pass, before more is done; a program that an earlier image left takes less, and is not held to it.

    Returns
    -------
    Linearization
        Its products ``J v`` and ``Jᵀu``, checked for a random v: they are finite, satisfy the adjoint identity, and
        agree with PyTorch's own derivatives where they are traced; those of a record are checked when it is made to
        have the same bits when repeated, and to agree with the slope of the response.

    Raises
    ------
    TypeError
        The image is neither float32 nor float64, or the response is not of the same dtype; a complex response needs
        `torch.view_as_real`.
    ValueError
        The image holds more than one image, NaN or infinity; the model is in training mode, on another device, not
        deterministic, or not differentiable; PyTorch's own derivatives are inconsistent, or not the slope of the
        response; or it would take more than `memory`, and the message estimates how much, and how long a product takes.
    RuntimeError
        No engine, or not the one named, could be built and passed these checks; the message quotes why.
    """
    return Linearization(image, model, engine=engine, chunk_size=chunk_size, memory=memory)


class Linearization:
    """The Jacobian ``J`` (M × N) of a model at an image, on the torch side. Made by `linearize`.

    It pickles as the image, the model, and these options as they were given, and is linearized anew where it is
    unpickled, which costs what `linearize` costs; so does a copy by `copy.deepcopy`. Counts begin at zero there.

    Attributes
    ----------
    image : Tensor, shape ``image_shape``
        A detached copy of the image (N elements).
    response : Tensor, shape ``response_shape``
        The model's response to it (M elements), detached.
    engine_report : tuple of str
        A line for each engine that was tried: why it was rejected, or, the last, that it is in use, and what memory a
        traced one holds. They are also logged at level INFO.
    chunk_size : int
        The number of vectors that pass through the model together.
    mismatch : float
        Relative deviation of J v and Jᵀu from the products of one matrix, if steps in a lower precision or large
        rounding, as in a saturated softmax, cause one; else 0.
    n_jvp, n_vjp : int
        How many vectors were multiplied with J and with Jᵀ since construction.
    on_product : callable or None
        Called after each chunk, for progress bars, with the number of products: 0.5 for each vector multiplied by J or
        by Jᵀ.
    """

    def __init__(
        self,
        image: Tensor,
        model: Callable[[Tensor], Any],
        *,
        engine: str = "auto",
        chunk_size: int | None = None,
        memory: int | None = None,
    ) -> None:
        check_image(image)
        checks.choice("engine", engine, ("auto", *ENGINES))
        chunk_size = checks.integer("chunk_size", chunk_size, optional=True)
        check_model(image, model)
        self.model = model
        memory = None if memory is None else checks.memory("memory", memory)
        self.options = {"engine": engine, "chunk_size": chunk_size, "memory": memory}
        self.on_product: Callable[[float], None] | None = None
        self.n_jvp = self.n_vjp = 0
        self._counting = threading.Lock()
        self._respond = respond = Response(model, memory=memory)
        names = tuple(ENGINES) if engine == "auto" else (engine,)
        built = alone(lambda last: build(image, respond, names, chunk_size, last), image.device, self._draws)
        self.image, self.response, self.chunk_size = built.image, built.response, built.chunk_size
        self.engine_report, self.mismatch = built.report, built.trial.mismatch
        self._engine = built.engine
        self._current = Current(respond, built.contents, built.engine, built.trial, self.image, self.response)

    def _draws(self) -> bool:
        return self._respond.draws

    def __reduce__(self) -> tuple:
        check_picklable(self.model, "a linearization", "send what it is built from, and linearize there")
        return functools.partial(type(self), **self.options), (self.image, self.model)

    def __copy__(self) -> Linearization:  # a model that can't be pickled may be copied all the same
        return type(self)(self.image, self.model, **self.options)

    def __deepcopy__(self, memo: dict[int, Any]) -> Linearization:
        with torch.inference_mode(False):
            return type(self)(self.image, copy.deepcopy(self.model, memo), **self.options)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """The image's shape, N elements."""
        return tuple(self.image.shape)

    @property
    def response_shape(self) -> tuple[int, ...]:
        """The response's shape; ``(M,)`` where it consists of several tensors."""
        return tuple(self.response.shape)

    @property
    def image_size(self) -> int:
        """N, the number of elements of the image."""
        return self.image.numel()

    @property
    def response_size(self) -> int:
        """M, the number of elements of the response."""
        return self.response.numel()

    @property
    def held_bytes(self) -> int | None:
        """Bytes that are held for this image, beside what is held for the model; None where that isn't known."""
        own = self.image.nbytes + self.response.nbytes
        return own + self._engine.held_bytes[0] if self._engine.is_recorded else None

    @property
    def n_products(self) -> float:
        """Cost so far: one product is one J v plus one Jᵀu."""
        return (self.n_jvp + self.n_vjp) / 2

    def jvp(self, tangents: Tensor) -> Tensor:
        """J times each of k changes of the image: ``(k, *image_shape) -> (k, M)``."""
        checks.tensor("tangents", tangents, ("k", *self.image_shape), self.image)
        return self._run(self._engine.jvp, tangents, (self.response_size,), self._engine.calls_model, 1, 0)

    def vjp(self, cotangents: Tensor) -> Tensor:
        """Jᵀ times each of k weightings of the response: ``(k, M) -> (k, *image_shape)``."""
        checks.tensor("cotangents", cotangents, ("k", self.response_size), self.image)
        return self._run(self._engine.vjp, cotangents, self.image_shape, False, 0, 1)

    def normal(self, tangents: Tensor) -> tuple[Tensor, Tensor]:
        """R and JᵀJ times each of k changes of the image.

        ``(k, *image_shape) -> (min(k, M), k), (k, *image_shape)``, where J times the changes, as columns, is Q R; R is
        float64. What is recorded makes both by one program.
        """
        checks.tensor("tangents", tangents, ("k", *self.image_shape), self.image)
        if not self._engine.is_recorded:
            images = self.jvp(tangents)
            return triangle(images), self.vjp(images)
        parts = [self.response.new_empty(0, self.response_size)]

        def multiply(block: Tensor) -> Tensor:
            images, products = self._engine.normal(block)
            parts.append(images)
            return products

        products = self._run(multiply, tangents, self.image_shape, False, 1, 1)
        return triangle(parts[1] if len(parts) == 2 else torch.cat(parts)), products

    def _run(
        self,
        multiply: Callable[[Tensor], Tensor],
        block: Tensor,
        shape: tuple[int, ...],
        calls_model: bool,
        jvp: int,
        vjp: int,
    ) -> Tensor:
        """Multiply a block.

        If the engine differentiates, no other thread may do so meanwhile; if it calls the model, the model is restored
        afterwards.
        """
        self._current.check()

        def done(count: int) -> None:
            with self._counting:
                self.n_jvp += jvp * count
                self.n_vjp += vjp * count
            if self.on_product is not None:
                self.on_product((jvp + vjp) * count / 2)

        def run(last: list[Callable] | None = None) -> Tensor:
            if not calls_model:
                return in_chunks(multiply, block, shape, self.chunk_size, done, owned=self._engine.is_recorded)
            if last is not None:
                last.append(Guard(self.model).restore)
            with clean_failure():
                return in_chunks(multiply, block, shape, self.chunk_size, done)

        if self._engine.is_recorded:
            return keeping_settings(run, block.device)
        return alone(run, block.device, self._draws)

    def respond(self, image: Tensor) -> Tensor:
        """The model's response to an image of this shape, flat (M,)."""
        checks.tensor("image", image, self.image_shape, self.image)
        check_model(self.image, self.model)

        def run(last: list[Callable]) -> Tensor:
            last.append(Guard(self.model).restore)
            with clean_failure(), torch.no_grad():
                return self._respond(image)

        return alone(run, image.device, self._draws)

    def check_current(self) -> None:
        """Raise RuntimeError if the model has changed so that products may be wrong; see `Current`.

        Warns if it has changed, but the products are still those of the model as it was. Before a product only the
        identity, memory and version of the model's tensors are compared.
        """
        self._current.check(thoroughly=True)
