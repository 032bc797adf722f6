"""The derivative of a model at one image, as products with blocks of tensors."""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fisherop import checks
from fisherop.compat import attempt, prepare_recording
from fisherop.draws import generators_kept
from fisherop.engines import (
    ENGINES,
    DoubleBackward,
    Functional,
    Traced,
    advice,
    forward_mode,
    slope,
    slope_by_backward,
)
from fisherop.guard import Guard
from fisherop.pickles import check_picklable
from fisherop.response import Response, check_image, check_model, examine
from fisherop.slopes import check_slope, norm

_LOG = logging.getLogger(__name__)
_BLOCK_BYTES = 2**30  # that a block of products may compute on its way, by default
_MAX_CHUNK = 64
_ONE_AT_A_TIME = threading.RLock()  # forward mode and the switches of attention are global to PyTorch


def linearize(
    image: Tensor, model: Callable[[Tensor], Any], *, engine: str = "auto", chunk_size: int | None = None
) -> Linearization:
    """Differentiate `model` at `image`.

    Parameters
    ----------
    image : Tensor, shape ``image_shape``
        One image of any shape, float32 or float64; a leading batch dimension of 1 is usual. It is copied.
    model : callable or nn.Module
        Maps the image to its response: a tensor, or any nesting of tuples, lists, dicts and dataclasses of tensors,
        which is flattened and concatenated in order; None is left out. What `torch.compile` wraps runs uncompiled. The
        model is left as it is after one plain call: what that sets up is kept, as ordinary tensors. It must not change
        while the linearization is in use.
    engine : {"auto", "traced", "functional", "double_backward"}
        How products are made. ``"traced"``: by the operations of one J v and one Jᵀu, recorded, without what depends
        on the image alone, which is computed once; for an `nn.Module` the record serves later images of the same shape
        and dtype, until the module changes. ``"functional"``: J v by dual numbers, at every product anew, Jᵀu by the
        backward pass of one forward pass that is kept. ``"double_backward"``: both from that backward pass, which is
        differentiated once more; for models with operations that have no forward mode. ``"auto"``: the first of these
        that can be built, is right, and leaves the model as it was.
    chunk_size : int, optional
        How many products go through the model at a time, at most. By default 64, and fewer where a tensor of a block
        would reach 32 MiB (``"traced"``), or all that it computes on its way 1 GiB (the other engines).

    Returns
    -------
    Linearization
        Its products ``J v`` and ``Jᵀu``, checked for a random v: they are finite, satisfy the adjoint identity, have
        the same bits when repeated, agree with PyTorch's own derivatives where they are traced, and with the slope of
        the response.

    Raises
    ------
    TypeError
        The image or the response is not a floating-point tensor of one dtype; a complex response needs
        `torch.view_as_real`.
    ValueError
        The image holds more than one image, NaN or infinity; the model is in training mode, on another device,
        not deterministic, not differentiable, or its derivatives are inconsistent, or not the slope of its response.
    RuntimeError
        The engine named, or each of those tried, can't be built or is wrong; the message quotes why.
    """
    return Linearization(image, model, engine=engine, chunk_size=chunk_size)


class Linearization:
    """The Jacobian ``J`` (M × N) of a model at an image, on the torch side. Made by `linearize`.

    It pickles as the image, the model, `engine` and `chunk_size` as they were given, and is linearized anew where it is
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
        How far J v and Jᵀu are from those of one matrix, relative to them, where the model has steps in a lower
        precision than the image's, or rounding is large, as in a confident softmax; else 0.
    n_jvp, n_vjp : int
        How many vectors were multiplied with J and with Jᵀ since construction.
    on_product : callable or None
        Called with the number of products after each chunk (0.5 a vector and direction), for progress bars.
    """

    def __init__(
        self, image: Tensor, model: Callable[[Tensor], Any], *, engine: str = "auto", chunk_size: int | None = None
    ) -> None:
        check_image(image)
        checks.choice("engine", engine, ("auto", *ENGINES))
        chunk_size = checks.integer("chunk_size", chunk_size, optional=True)
        check_model(image, model)
        self.model = model
        self._options = {"engine": engine, "chunk_size": chunk_size}
        self.on_product: Callable[[float], None] | None = None
        prepare_recording()
        with _ONE_AT_A_TIME, torch.inference_mode(False), torch.no_grad(), generators_kept(image.device):
            self.image = image.detach().clone()
            self._respond = Response(model)
            self._precision = torch.finfo(image.dtype).eps
            self.engine_report: tuple[str, ...] = ()
            self.n_jvp = self.n_vjp = 0
            names = tuple(ENGINES) if engine == "auto" else (engine,)
            if not ("traced" in names and self._resume(chunk_size)):
                self._examine(names, chunk_size)
        self.n_jvp = self.n_vjp = 0  # the cost of the checks is construction's, not the user's

    def __reduce__(self) -> tuple:
        check_picklable(self.model, "a linearization", "send what it is built from, and linearize there")
        return functools.partial(type(self), **self._options), (self.image, self.model)

    def __copy__(self) -> Linearization:  # a model that can't be pickled may be copied all the same
        return type(self)(self.image, self.model, **self._options)

    def __deepcopy__(self, memo: dict[int, Any]) -> Linearization:
        return type(self)(self.image, copy.deepcopy(self.model, memo), **self._options)

    def _resume(self, chunk_size: int | None) -> bool:
        """Take the program that an earlier image left, if there is one and it agrees with the model at this image."""
        engine, guard = None, Guard(self.model)
        self._respond.sparse = guard.holds_sparse
        try:
            engine = Traced.resume(self.image, self.model)
            if engine is None:
                return False
            self._engine = engine
            v = self._random((1, *self.image_shape), seed=0)
            with attempt():
                response, reference = forward_mode(self._respond, self.image, v[0])
                self._check_close("response", engine.response, response, 1000 * torch.finfo(response.dtype).eps)
                self.response = response.clone().reshape(self._respond.shape)
                self._precision = max(self._precision, engine.precision)
                self._check_engine(v, reference, chunk_size or engine.chunk_size)
        except (RuntimeError, ValueError) as error:
            Traced.forget(self.image, self.model)
            self._report(f"traced: the program of an earlier image is rejected, {error}")
            return False
        finally:
            if engine is not None:
                guard.restore()
        self._report(self._in_use("traced", "by the program of an earlier image, "))
        return True

    def _examine(self, names: tuple[str, ...], chunk_size: int | None) -> None:
        """See what the model does when it is called; then choose an engine, and leave the model as after one call."""
        before = guard = Guard(self.model, values=True)
        self._respond.sparse = guard.holds_sparse
        try:
            seen, guard = examine(self._respond, self.image, before)
            self.response = seen.response.reshape(self._respond.shape)
            self._precision = max(self._precision, seen.precision)
            self._choose_engine(names, chunk_size, seen.bytes, guard)
            with attempt():
                decided = check_slope(
                    self._respond,
                    self.image,
                    *self._checked,
                    slope_by_backward if isinstance(self._engine, DoubleBackward) else slope,
                    precision=self._precision,
                    detaches=seen.detaches,
                )
            if isinstance(self._engine, Traced):
                self._engine.keep(self.image, self.model, self._precision)
            if not decided:
                note = "rounding or kinks hide the slope of the response, so that J v could not be held against it"
                self.engine_report = (*self.engine_report[:-1], note, self.engine_report[-1])
        except BaseException:
            guard = before
            raise
        finally:
            guard.restore()

    def _choose_engine(self, names: tuple[str, ...], chunk_size: int | None, bytes_: int, guard: Guard) -> None:
        """Take the first engine that can be built, is right, and leaves the model as it was."""
        v = self._random((1, *self.image_shape), seed=0)
        for name in names:
            try:
                with attempt():
                    self._engine = engine = ENGINES[name](self._respond, self.image, self.response.flatten())
                    if isinstance(engine, Traced):
                        reference = slope(self._respond, self.image, v[0])
                        self._check_engine(v, reference, chunk_size or engine.chunk_size)
                    else:
                        default = max(1, min(_MAX_CHUNK, _BLOCK_BYTES // max(1, bytes_)))
                        self._check_engine(v, None, chunk_size or default)
                    changed = guard.restore()
                    if changed:
                        raise RuntimeError(f"it changes the model's {changed[0]}")
            except (RuntimeError, ValueError) as error:
                guard.restore()
                self._report(f"{name}: rejected, {str(error).splitlines()[0]}{advice(error)}")
                if name != "traced" and isinstance(error, ValueError):
                    raise  # the model is at fault, not the engine
                if name == names[-1]:
                    tried = "; ".join(self.engine_report)
                    raise RuntimeError(f"PyTorch can't differentiate this model as it has to be: {tried}") from error
            else:
                self._report(self._in_use(name))
                return

    def _check_engine(self, v: Tensor, reference: Tensor | None, chunk_size: int) -> None:
        """Of its products, and of blocks, which are taken apart where that fails; a traced engine tries each size."""
        self.chunk_size = chunk_size
        self._check_derivatives(v, reference)
        if chunk_size > 1 and not isinstance(self._engine, Traced) and not self._vectorises(v):
            self.chunk_size = 1

    def _nonlinearity(self, v: Tensor, u: Tensor) -> float:
        """‖J (v + w) − J v − J w‖ and the same of Jᵀ: what rounding leaves, as cancellation in a confident softmax."""
        w, z = self._random(tuple(v.shape), seed=2), self._random(tuple(u.shape), seed=3)
        triples = (map(self.jvp, (v + w, v, w)), map(self.vjp, (u + z, u, z)))
        return sum(norm(both.double() - one.double() - other.double()) for both, one, other in triples)

    def _report(self, line: str) -> None:
        self.engine_report += (line,)
        _LOG.info("engine %s", line)

    def _in_use(self, name: str, how: str = "") -> str:
        line = f"{name}: in use, {how}{self.chunk_size} vectors at a time"
        if isinstance(self._engine, Traced):
            image, model = self._engine.held_bytes
            line += f", holding {image / 2**20:.1f} MiB for the image and {model / 2**20:.1f} MiB for the model"
        return line

    @property
    def image_shape(self) -> tuple[int, ...]:
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
    def n_products(self) -> float:
        """Cost so far: one product is one J v plus one Jᵀu."""
        return (self.n_jvp + self.n_vjp) / 2

    def jvp(self, tangents: Tensor) -> Tensor:
        """J times each of k changes of the image: ``(k, *image_shape) -> (k, M)``."""
        checks.tensor("tangents", tangents, ("k", *self.image_shape), self.image)
        if not isinstance(self._engine, Functional):
            return self._by_chunks(self._engine.jvp, tangents, (self.response_size,), "n_jvp")
        with _ONE_AT_A_TIME:  # which runs the model
            guard = Guard(self.model)
            try:
                with attempt():
                    return self._by_chunks(self._engine.jvp, tangents, (self.response_size,), "n_jvp")
            finally:
                guard.restore()

    def vjp(self, cotangents: Tensor) -> Tensor:
        """Jᵀ times each of k weightings of the response: ``(k, M) -> (k, *image_shape)``."""
        checks.tensor("cotangents", cotangents, ("k", self.response_size), self.image)
        return self._by_chunks(self._engine.vjp, cotangents, self.image_shape, "n_vjp")

    def _by_chunks(
        self, multiply: Callable[[Tensor], Tensor], block: Tensor, shape: tuple[int, ...], counter: str
    ) -> Tensor:
        device, nothing = block.device.type, contextlib.nullcontext()
        alone = nothing if isinstance(self._engine, Traced) else _ONE_AT_A_TIME
        plain = torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nothing
        with alone, torch.inference_mode(False), torch.no_grad(), plain:
            out = block.new_empty(len(block), *shape)
            n = -(-len(block) // self.chunk_size)  # chunks of equal size, so that few programs are made
            for chunk, target in zip(block.chunk(n), out.chunk(n), strict=True) if n else ():
                target.copy_(multiply(chunk))
                setattr(self, counter, getattr(self, counter) + len(chunk))
                if self.on_product is not None:
                    self.on_product(len(chunk) / 2)
        return out

    def respond(self, image: Tensor) -> Tensor:
        """The model's response to an image of this shape, flat (M,)."""
        checks.tensor("image", image, self.image_shape, self.image)
        with _ONE_AT_A_TIME, torch.no_grad():
            return self._respond(image)

    def _random(self, shape: tuple[int, ...], seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(20171127 + seed)  # no seed of the user's, or v might be the image
        return torch.randn(shape, generator=generator, dtype=self.image.dtype).to(self.image.device)

    def _vectorises(self, v: Tensor) -> bool:
        """Whether blocks of products work, are right, and are more than a loop with a warning at every call."""
        block = torch.cat([v, v.flip(-1)])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                jv = self.jvp(block)
                for at_once, one in ((jv, self.jvp(block[1:])), (self.vjp(jv), self.vjp(jv[1:]))):
                    if ((at_once[1:] - one).abs() > _tolerance(one.dtype) * one.abs().max()).any():
                        raise RuntimeError("two products at once differ from single ones")
            except RuntimeError as error:
                _LOG.info("products go through the model one at a time, since a block of them fails: %s", error)
                return False
        for warning in caught:
            if "batching rule" in str(warning.message):
                _LOG.info("products go through the model one at a time: %s", warning.message)
                return False
        return True

    def _check_close(self, what: str, actual: Tensor, reference: Tensor, tolerance: float) -> None:
        """Refuse a flat response that differs from an independent one, in any of the tensors that it consists of."""
        floor = 4 * torch.finfo(reference.dtype).eps * norm(reference)
        for a, b in zip(actual.split(self._respond.sizes), reference.split(self._respond.sizes), strict=True):
            error, size = norm(a - b), norm(b)
            if not error <= tolerance * size + floor:
                raise RuntimeError(
                    f"its {what} differs from PyTorch's by {error / size if size else error:.1e} of its norm"
                )

    def _check_derivatives(self, v: Tensor, reference: Tensor | None) -> None:
        """Hold J v to an independent one, if there is one, and Jᵀu to J v by the adjoint identity ⟨J v, u⟩ = ⟨v, Jᵀu⟩.

        Since v and u are random and independent, an error E of Jᵀ changes ⟨v, Jᵀu⟩ by about ‖E‖, in whatever direction
        it lies. The same product again must have the same bits.
        """
        jv, u = self.jvp(v), self._random((1, self.response_size), seed=1)
        jtu = self.vjp(u)
        if not (torch.isfinite(jv).all() and torch.isfinite(jtu).all()):
            raise ValueError(
                "the model's derivative at this image holds NaN or infinity, though its response is finite; "
                "a square root, norm or division of zero is the usual cause: add a small constant inside it"
            )
        if reference is not None:
            self._check_close("J v", jv[0], reference, max(_tolerance(jv.dtype), self._precision**0.5))
        forward, reverse = ((a.double() * b.double()).sum().item() for a, b in ((jv, u), (v, jtu)))
        size, coarse = max(norm(jv), norm(jtu)), self._precision > torch.finfo(jv.dtype).eps
        allowed = max(_tolerance(jv.dtype), self._precision**0.5) * size
        # Rounding isn't linear; a factor or a term that is wrong is.
        rounds = allowed < abs(forward - reverse) <= 30 * self._nonlinearity(v, u)
        self.mismatch = abs(forward - reverse) / size if size and (coarse or rounds) else 0.0
        if abs(forward - reverse) > allowed and not rounds:
            raise ValueError(
                f"the model's forward-mode and reverse-mode derivatives disagree: ⟨J v, u⟩ = {forward:.6e}, "
                f"⟨v, Jᵀu⟩ = {reverse:.6e} (difference allowed: {allowed:.1e}"
                f"{f', for steps of precision {self._precision:.0e} inside' if coarse else ''}); the usual causes are "
                "torch.no_grad inside the model (use .detach() on what it computes) and a custom autograd function "
                "whose jvp or backward is wrong; PyTorch's instance norm is wrong before a layer that changes the "
                "memory layout. Or rounding, where a response saturates, as that of a very confident softmax does: "
                "use a float64 image and model, or the response before it"
            )
        if not torch.equal(jv, self.jvp(v)):
            raise ValueError("the model's derivative is not the same when it is asked for twice")
        self._checked = v[0], jv[0]


def _tolerance(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps ** 0.5
