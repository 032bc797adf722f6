"""The derivative of a model at one image, as products with blocks of tensors."""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fisherop import checks
from fisherop.checks import warn
from fisherop.model import programs
from fisherop.model.compat import attempt, prepare_recording
from fisherop.model.contents import Contents
from fisherop.model.current import Current
from fisherop.model.engines import ENGINES, DoubleBackward, Functional, Traced, advice
from fisherop.model.engines.plain import forward_mode, slope, slope_by_backward
from fisherop.model.guard import Guard
from fisherop.model.pickles import check_picklable
from fisherop.model.response import Response, check_image, check_model, examine
from fisherop.model.slopes import check_slope, norm
from fisherop.model.trial import ROUNDINGS, check_close, check_products, random, vectorizes
from fisherop.model.undisturbed import alone, in_thread

_LOG = logging.getLogger(__name__)
_BLOCK_BYTES = 2**30  # that a block of products may compute on its way, by default
_MAX_CHUNK = 64


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
        while the linearization is in use: see `check_current`.
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
        self.options = {"engine": engine, "chunk_size": chunk_size}
        self.on_product: Callable[[float], None] | None = None
        self._counting = threading.Lock()
        self.n_jvp = self.n_vjp = 0
        self.engine_report: tuple[str, ...] = ()
        self._precision = torch.finfo(image.dtype).eps
        self._current: Current | None = None  # while the model is being looked at
        names = tuple(ENGINES) if engine == "auto" else (engine,)
        self._respond = Response(model)
        alone(lambda last: self._build(image, names, chunk_size, last), image.device, self._draws)
        self.n_jvp = self.n_vjp = 0  # the cost of the checks is construction's, not the user's

    def _build(self, image: Tensor, names: tuple[str, ...], chunk_size: int | None, last: list[Callable]) -> None:
        prepare_recording()
        with torch.inference_mode(False), torch.no_grad():
            self.image = image.detach().clone()
            contents = Contents(self.model)
            if not ("traced" in names and self._resume(contents, chunk_size, last)):
                contents = self._examine(names, chunk_size, last)
            self._current = Current(self._respond, contents, self._engine, self._trial, self.image, self.response)

    def __reduce__(self) -> tuple:
        check_picklable(self.model, "a linearization", "send what it is built from, and linearize there")
        return functools.partial(type(self), **self.options), (self.image, self.model)

    def __copy__(self) -> Linearization:  # a model that can't be pickled may be copied all the same
        return type(self)(self.image, self.model, **self.options)

    def __deepcopy__(self, memo: dict[int, Any]) -> Linearization:
        with torch.inference_mode(False):
            return type(self)(self.image, copy.deepcopy(self.model, memo), **self.options)

    def _draws(self) -> bool:
        return self._respond.draws

    def _resume(self, contents: Contents, chunk_size: int | None, last: list[Callable]) -> bool:
        """Take the program that an earlier image left, if there is one and it agrees with the model at this image.

        It must agree as it did at the image of the recording, but for rounding.
        """
        guard = Guard(self.model)
        self._respond.sparse = guard.holds_sparse
        kept = programs.recall(self.image, self.model, contents)
        if kept is None:
            return False
        last.append(guard.restore)
        eps = torch.finfo(self.image.dtype).eps
        try:
            self._engine = engine = Traced.resume(self.image, kept.program)
            v = random((1, *self.image_shape), self.image, seed=0)
            with attempt():
                response, reference = forward_mode(self._respond, self.image, v[0])
                check_close("response", engine.response, response, self._respond.sizes, ROUNDINGS * eps)
                self.response = response.clone().reshape(self._respond.shape)
                self._precision = max(self._precision, kept.precision)
                self._respond.draws = kept.draws
                allowed = max(ROUNDINGS * eps, ROUNDINGS * kept.error)
                self._check_engine(v, reference, chunk_size or engine.chunk_size, allowed)
        except (RuntimeError, ValueError) as error:
            programs.forget(self.image, self.model)
            self._report(f"traced: the program of an earlier image is rejected, {error}")
            guard.restore()
            return False
        self._report(self._in_use("traced", "by the program of an earlier image, "))
        return True

    def _examine(self, names: tuple[str, ...], chunk_size: int | None, last: list[Callable]) -> Contents:
        """See what the model does when it is called; then choose an engine, and leave the model as after one call."""
        before = guard = Guard(self.model, values=True)
        last.append(lambda: guard.restore())
        self._respond.sparse = guard.holds_sparse
        seen, settled = examine(self._respond, self.image, before)
        self.response = seen.response.reshape(self._respond.shape)
        self._precision = max(self._precision, seen.precision)
        if seen.has_fast_path:
            warn(
                "without gradients the model answers otherwise, by PyTorch's fast path for attention, which leaves out "
                "what is padded: J is that of its response with gradients (enable_nested_tensor=False makes them one)"
            )
        self._choose_engine(names, chunk_size, seen.bytes, settled)
        with attempt():
            decided = check_slope(
                self._respond,
                self.image,
                self._trial.v[0],
                self._trial.jv[0],
                slope_by_backward if isinstance(self._engine, DoubleBackward) else slope,
                precision=self._precision,
                detaches=seen.detaches,
            )
        if not decided:
            note = "rounding or kinks hide the slope of the response, so that J v could not be held against it"
            self.engine_report = (*self.engine_report[:-1], note, self.engine_report[-1])
        guard = settled
        guard.restore()
        contents = Contents(self.model)
        if isinstance(self._engine, Traced):
            kept = contents, self._precision, self._trial.error, self._respond.draws
            programs.keep(self.image, self.model, self._engine.program, *kept)
        return contents

    def _choose_engine(self, names: tuple[str, ...], chunk_size: int | None, bytes_: int, guard: Guard) -> None:
        """Take the first engine that can be built, is right, and leaves the model as it was."""
        v = random((1, *self.image_shape), self.image, seed=0)
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

    def _check_engine(self, v: Tensor, reference: Tensor | None, chunk_size: int, allowed: float | None = None) -> None:
        """Of its products, and of blocks, which are taken apart where that fails; a traced engine tries each size."""
        self.chunk_size = chunk_size
        size = norm(self.image)
        # what the rounding of the response leaves of a derivative, for a change as large as the image
        rounding = 100 * self._precision * norm(self.response) * norm(v) / size if size else 0.0
        self._trial = check_products(
            self.jvp, self.vjp, v, reference, self._respond.sizes, self._precision, allowed, rounding=rounding
        )
        self.mismatch = self._trial.mismatch
        if chunk_size > 1 and not isinstance(self._engine, Traced) and not vectorizes(self.jvp, self.vjp, v):
            self.chunk_size = 1

    def _report(self, line: str) -> None:
        self.engine_report += (line,)
        _LOG.info("engine %s", line)

    def _in_use(self, name: str, how: str = "") -> str:
        line = f"{name}: in use, {how}{self.chunk_size} vector{'s' * (self.chunk_size > 1)} at a time"
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
        if self._current is not None:
            self._current.check()
        return self._run(
            self._engine.jvp, tangents, (self.response_size,), "n_jvp", isinstance(self._engine, Functional)
        )

    def vjp(self, cotangents: Tensor) -> Tensor:
        """Jᵀ times each of k weightings of the response: ``(k, M) -> (k, *image_shape)``."""
        checks.tensor("cotangents", cotangents, ("k", self.response_size), self.image)
        if self._current is not None:
            self._current.check()
        return self._run(self._engine.vjp, cotangents, self.image_shape, "n_vjp", False)

    def _run(
        self,
        multiply: Callable[[Tensor], Tensor],
        block: Tensor,
        shape: tuple[int, ...],
        counter: str,
        calls_model: bool,
    ) -> Tensor:
        """A block of products, alone where PyTorch differentiates, with a model unharmed where it is called."""

        def run(last: list[Callable] | None = None) -> Tensor:
            if not calls_model:
                return self._by_chunks(multiply, block, shape, counter)
            last.append(Guard(self.model).restore)
            with attempt():
                return self._by_chunks(multiply, block, shape, counter)

        if isinstance(self._engine, Traced):
            return in_thread(run, block.device)
        return alone(run, block.device, self._draws)

    def _by_chunks(
        self, multiply: Callable[[Tensor], Tensor], block: Tensor, shape: tuple[int, ...], counter: str
    ) -> Tensor:
        device = block.device.type
        plain = contextlib.nullcontext()
        if torch.is_autocast_enabled(device):
            plain = torch.autocast(device, enabled=False)
        with torch.inference_mode(False), torch.no_grad(), plain:
            out = block.new_empty(len(block), *shape)
            n = -(-len(block) // self.chunk_size)  # chunks of equal size, so that few programs are made
            for chunk, target in zip(block.chunk(n), out.chunk(n), strict=True) if n else ():
                target.copy_(multiply(chunk))
                with self._counting:
                    setattr(self, counter, getattr(self, counter) + len(chunk))
                if self.on_product is not None:
                    self.on_product(len(chunk) / 2)
        return out

    def respond(self, image: Tensor) -> Tensor:
        """The model's response to an image of this shape, flat (M,)."""
        checks.tensor("image", image, self.image_shape, self.image)
        check_model(self.image, self.model)

        def run(_: list[Callable]) -> Tensor:
            with torch.inference_mode(False), torch.no_grad():
                return self._respond(image)

        return alone(run, image.device, self._draws)

    def check_current(self) -> None:
        """Whether the model is still the one that was linearized, by all of it that is seen; see `Current`.

        Products look at the identity, place and version of its tensors alone.
        """
        self._current.check(thoroughly=True)
