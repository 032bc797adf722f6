"""The derivative of a model at one image, as products with blocks of tensors."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import logging
import math
import pickle
import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from fisherop.engines import ENGINES, Traced

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
        Maps the image to its response: a tensor, or any nesting of tuples, lists and dicts of tensors, which is
        flattened and concatenated in order. A module's parameters, buffers and gradients are not changed (but for
        buffers that its first call sets up). It must not change while the linearization is in use.
    engine : {"auto", "traced", "functional", "double_backward"}
        How products are made. ``"traced"``: by the operations of one J v and one Jᵀu, recorded, without what depends
        on the image alone, which is computed once; for an `nn.Module` the record serves later images of the same shape
        and dtype, until the module changes. ``"functional"``: J v in forward mode, at every product anew, Jᵀu by the
        backward pass of one forward pass that is kept. ``"double_backward"``: both from that backward pass, which is
        differentiated once more; for models with operations that have no forward mode. ``"auto"``: the first of these
        that can be built and is right. Recording costs 15 to 25 forward passes, ``"functional"`` 20 to 30 and about
        three more at every product.
    chunk_size : int, optional
        How many products go through the model at a time, at most. By default 64, and fewer where a tensor of a block
        would reach 32 MiB (``"traced"``), or all that it computes on its way 1 GiB (the other engines).

    Returns
    -------
    Linearization
        Its products ``J v`` and ``Jᵀu``, checked for a random v: they are finite, satisfy the adjoint identity, have
        the same bits when repeated, and, where they are traced, agree with PyTorch's own derivatives.

    Raises
    ------
    TypeError
        The image or the response is not a floating-point tensor of one dtype.
    ValueError
        The image holds more than one image, NaN or infinity; the model is in training mode, on another device,
        not deterministic, not differentiable, or its derivatives are inconsistent.
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
    n_jvp, n_vjp : int
        How many vectors were multiplied with J and with Jᵀ since construction.
    on_product : callable or None
        Called with the number of products after each chunk (0.5 a vector and direction), for progress bars.
    """

    def __init__(
        self, image: Tensor, model: Callable[[Tensor], Any], *, engine: str = "auto", chunk_size: int | None = None
    ) -> None:
        _check_image(image)
        if engine != "auto" and engine not in ENGINES:
            raise ValueError(f"engine must be 'auto' or one of {', '.join(map(repr, ENGINES))}, got {engine!r}")
        if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 1):
            raise ValueError(f"chunk_size must be a positive integer or None, got {chunk_size!r}")
        if not callable(model):
            raise TypeError(f"model must be a callable or an nn.Module, got {type(model).__name__}")
        _check_model(image, model)
        self.model = model
        self._options = {"engine": engine, "chunk_size": chunk_size}
        self.on_product: Callable[[float], None] | None = None
        with _ONE_AT_A_TIME, torch.inference_mode(False), torch.no_grad():
            self.image = image.detach().clone()
            self.engine_report: tuple[str, ...] = ()
            self.n_jvp = self.n_vjp = 0
            names = tuple(ENGINES) if engine == "auto" else (engine,)
            if not ("traced" in names and self._resume(chunk_size)):
                self.response, activation_bytes = _check_response(model, self.image)
                self._choose_engine(names, chunk_size, activation_bytes)
        self.n_jvp = self.n_vjp = 0  # the cost of the checks is construction's, not the user's

    def __reduce__(self) -> tuple:
        check_picklable(self.model)
        return functools.partial(type(self), **self._options), (self.image, self.model)

    def __copy__(self) -> Linearization:  # a model that can't be pickled may be copied all the same
        return type(self)(self.image, self.model, **self._options)

    def __deepcopy__(self, memo: dict[int, Any]) -> Linearization:
        return type(self)(self.image, copy.deepcopy(self.model, memo), **self._options)

    def _resume(self, chunk_size: int | None) -> bool:
        """Take the program that an earlier image left, if there is one and it agrees with the model at this image."""
        try:
            engine = Traced.resume(self.image, self.model)
            if engine is None:
                return False
            self._engine = engine
            v = self._random((1, *self.image_shape), seed=0)
            response, reference = self._forward_mode(v)
            self._check_close("response", engine.response, response, 1000 * torch.finfo(response.dtype).eps)
            self.response = response.reshape(self._leaf_shape)
            self._check_engine(v, reference, chunk_size or engine.chunk_size)
        except (RuntimeError, ValueError) as error:
            Traced.forget(self.image, self.model)
            self._report(f"traced: the program of an earlier image is rejected, {error}")
            return False
        self._report(self._in_use("traced", "by the program of an earlier image, "))
        return True

    def _choose_engine(self, names: tuple[str, ...], chunk_size: int | None, activation_bytes: int) -> None:
        """Take the first engine that can be built and is right."""
        v = self._random((1, *self.image_shape), seed=0)
        for name in names:
            try:
                self._engine = engine = ENGINES[name](self._respond, self.image, self.response.flatten())
                if isinstance(engine, Traced):
                    self._check_engine(v, self._forward_mode(v)[1], chunk_size or engine.chunk_size)
                    engine.keep(self.image, self.model)
                else:
                    default = max(1, min(_MAX_CHUNK, _BLOCK_BYTES // max(1, activation_bytes)))
                    self._check_engine(v, None, chunk_size or default)
            except (RuntimeError, ValueError) as error:
                self._report(f"{name}: rejected, {str(error).splitlines()[0]}")
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
        self._check_block(tangents, "tangents", self.image_shape)
        return self._by_chunks(self._engine.jvp, tangents, (self.response_size,), "n_jvp")

    def vjp(self, cotangents: Tensor) -> Tensor:
        """Jᵀ times each of k weightings of the response: ``(k, M) -> (k, *image_shape)``."""
        self._check_block(cotangents, "cotangents", (self.response_size,))
        return self._by_chunks(self._engine.vjp, cotangents, self.image_shape, "n_vjp")

    def _by_chunks(
        self, multiply: Callable[[Tensor], Tensor], block: Tensor, shape: tuple[int, ...], counter: str
    ) -> Tensor:
        device, nothing = block.device.type, contextlib.nullcontext()
        alone = nothing if isinstance(self._engine, Traced) else _ONE_AT_A_TIME
        plain = torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nothing
        with alone, torch.inference_mode(False), torch.no_grad(), plain:
            out = block.new_empty(len(block), *shape)
            n = math.ceil(len(block) / self.chunk_size)  # chunks of equal size, so that few programs are made
            for chunk, target in zip(block.chunk(n), out.chunk(n), strict=True) if n else ():
                target.copy_(multiply(chunk))
                setattr(self, counter, getattr(self, counter) + len(chunk))
                if self.on_product is not None:
                    self.on_product(len(chunk) / 2)
        return out

    def respond(self, image: Tensor) -> Tensor:
        """The model's response to an image of this shape, flat (M,)."""
        with _ONE_AT_A_TIME, torch.no_grad():
            return self._respond(image)

    def _respond(self, x: Tensor) -> Tensor:
        leaves = _answer(self.model, x)
        flat = _flatten(leaves)
        self._leaf_shape = leaves[0].shape if len(leaves) == 1 else flat.shape
        self._leaf_sizes = [leaf.numel() for leaf in leaves]
        return flat

    def _check_block(self, block: Tensor, name: str, shape: tuple[int, ...]) -> None:
        if not isinstance(block, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(block).__name__}")
        if tuple(block.shape[1:]) != shape or block.ndim == 0:
            wanted = ", ".join(map(str, ("k", *shape)))
            raise ValueError(f"{name} must have shape ({wanted}), got {tuple(block.shape)}")
        if block.dtype != self.image.dtype or block.device != self.image.device:
            raise TypeError(
                f"{name} must be {self.image.dtype} on {self.image.device} like the image, "
                f"got {block.dtype} on {block.device}"
            )

    def _random(self, shape: tuple[int, ...], seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(20171127 + seed)  # no seed of the user's, or v might be the image
        return torch.randn(shape, generator=generator, dtype=self.image.dtype).to(self.image.device)

    def _forward_mode(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """The response and J v, flat, by PyTorch itself."""
        with forward_ad.dual_level():
            response, jv = forward_ad.unpack_dual(self._respond(forward_ad.make_dual(self.image, v[0])))
            return response.clone(), torch.zeros_like(response) if jv is None else jv.clone()

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
        floor = 4 * torch.finfo(reference.dtype).eps * torch.linalg.vector_norm(reference.double()).item()
        for a, b in zip(actual.split(self._leaf_sizes), reference.split(self._leaf_sizes), strict=True):
            error, norm = (torch.linalg.vector_norm(x.double()).item() for x in (a - b, b))
            if not error <= tolerance * norm + floor:
                raise RuntimeError(
                    f"its {what} differs from PyTorch's by {error / norm if norm else error:.1e} of its norm"
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
            self._check_close("J v", jv[0], reference, _tolerance(jv.dtype))
        forward, reverse = ((a.double() * b.double()).sum().item() for a, b in ((jv, u), (v, jtu)))
        allowed = _tolerance(jv.dtype) * max(torch.linalg.vector_norm(x.double()).item() for x in (jv, jtu))
        if abs(forward - reverse) > allowed:
            raise ValueError(
                f"the model's forward-mode and reverse-mode derivatives disagree: ⟨J v, u⟩ = {forward:.6e}, "
                f"⟨v, Jᵀu⟩ = {reverse:.6e} (difference allowed: {allowed:.1e}); the usual causes are torch.no_grad "
                "inside the model (use .detach() on what it computes) and a custom autograd function whose jvp or "
                "backward is wrong; PyTorch's instance norm is wrong before a layer that changes the memory layout"
            )
        if not torch.equal(jv, self.jvp(v)):
            raise ValueError("the model's derivative is not the same when it is asked for twice")


class _DryRun(pickle.Pickler):
    """Pickles to nowhere, and leaves out tensors, which can be pickled and may be large."""

    def __init__(self) -> None:
        super().__init__(types.SimpleNamespace(write=len), pickle.HIGHEST_PROTOCOL)

    def reducer_override(self, obj: Any) -> Any:
        return (int, ()) if isinstance(obj, Tensor) else NotImplemented


def check_picklable(model: Callable[[Tensor], Any]) -> None:
    """Raise PicklingError, with what to do, where a model can't be pickled: a pickler names only what it fails at.

    What plain pickle refuses is left to cloudpickle, where joblib or Dask have loaded it and it takes the model.
    """
    try:
        _DryRun().dump(model)
    except Exception as error:
        for name in {"cloudpickle", "joblib.externals.cloudpickle"} & set(sys.modules):
            with contextlib.suppress(Exception):
                sys.modules[name].dumps(model)
                return
        named = getattr(model, "__qualname__", type(model).__qualname__)
        raise pickle.PicklingError(
            f"a linearization is pickled as its image and its model, but the model {named} can't be pickled: {error}. "
            "Let it be an nn.Module, or a function, defined at the top level of a module; or send what it is built "
            "from, and linearize there"
        ) from error


def _tolerance(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps ** 0.5


def _check_image(image: Tensor) -> None:
    if not isinstance(image, Tensor):
        raise TypeError(f"image must be a torch.Tensor, got {type(image).__name__}: use torch.as_tensor(image)")
    if image.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"image must be float32 or float64, got {image.dtype}: use image.to(torch.float32)")
    if image.numel() == 0:
        raise ValueError(f"image is empty: its shape is {tuple(image.shape)}")
    if image.ndim >= 4 and image.shape[0] > 1:
        raise ValueError(
            f"image must be one image, got a batch of {image.shape[0]} (shape {tuple(image.shape)}): take them one at "
            "a time, `for one in image.split(1)`; where the first dimension is no batch, pass `image[None]` and "
            "`lambda x: model(x[0])`"
        )
    if not torch.isfinite(image).all():
        raise ValueError("image holds NaN or infinity")


def _check_model(image: Tensor, model: Callable[[Tensor], Any]) -> None:
    if not isinstance(model, nn.Module):
        return
    for name, module in model.named_modules():
        drops = isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
        learns = isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
        if module.training and (drops or learns):
            raise ValueError(
                f"model is in training mode and holds {type(module).__name__} ({name or 'itself'!r}), so that its "
                "response is random or depends on its history: call model.eval() first"
            )
    if any(t.is_inference() for t in itertools.chain(model.parameters(), model.buffers())):
        raise ValueError(
            "model was made under torch.inference_mode, so that PyTorch can't differentiate it: make it outside, or "
            "use torch.no_grad there"
        )
    state = [t for t in itertools.chain(model.parameters(), model.buffers()) if t.is_floating_point()]
    for what, own, theirs in (
        ("device", image.device, {t.device for t in state}),
        ("dtype", image.dtype, {t.dtype for t in state}),
    ):
        if state and own not in theirs:
            others = ", ".join(sorted(map(str, theirs)))
            raise ValueError(
                f"image and model must share one {what}, got an image of {own} and a model of {others}: use "
                "image.to(...) or model.to(...)"
            )


def _buffers(model: Callable[[Tensor], Any]) -> dict[str, Tensor]:
    """Copies of a module's buffers."""
    return {name: b.clone() for name, b in model.named_buffers()} if isinstance(model, nn.Module) else {}


def _check_buffers(model: Callable[[Tensor], Any], before: dict[str, Tensor], after_first: dict[str, Tensor]) -> None:
    """Refuse a module whose second call changes a buffer, with its buffers as they were before the first."""
    for name, now in _buffers(model).items():
        first = after_first.get(name)
        same = first is not None and first.shape == now.shape
        if same and torch.allclose(first, now, rtol=0, atol=0, equal_nan=True):
            continue
        for other, buffer in model.named_buffers():
            if other in before and before[other].shape == buffer.shape:
                buffer.copy_(before[other])
        raise ValueError(
            f"model changes its buffer {name!r} at every call, so that its response depends on its history: freeze "
            "it, by model.eval() or in the model's forward"
        )


class _ActivationBytes(TorchDispatchMode):
    """Adds up the bytes of everything that a forward pass computes: a bound on what it can hold at once."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view and isinstance(out, Tensor):
            self.total += out.numel() * out.element_size()
        return out


def _check_response(model: Callable[[Tensor], Any], image: Tensor) -> tuple[Tensor, int]:
    """Run the model twice; return its response, and the bytes of its activations."""
    before = _buffers(model)
    with torch.enable_grad():
        x = image.clone().requires_grad_()
        leaves = _answer(model, x)
        for leaf in leaves:
            if leaf.dtype != image.dtype or leaf.device != image.device:
                raise TypeError(
                    f"the response must be {image.dtype} on {image.device} like the image, got {leaf.dtype} on "
                    f"{leaf.device}: let the model return only what it computes from the image in that dtype"
                )
        flat = _flatten(leaves)
        if flat.numel() == 0:
            raise ValueError("the model's response is empty")
    if not _depends_on(flat, x):
        raise ValueError(
            "the model's response has no gradient with respect to the image: it does not depend on the image, or only "
            "through steps that can't be differentiated (detach, no_grad, rounding, argmax, conversion to NumPy)"
        )
    response = (leaves[0] if len(leaves) == 1 else flat).detach().clone()
    if not torch.isfinite(response).all():
        raise ValueError("the model's response to this image holds NaN or infinity")
    after_first = _buffers(model)
    with _ActivationBytes() as activations:
        again = _flatten(_answer(model, image))
    _check_buffers(model, before, after_first)
    if again.numel() != response.numel():
        raise ValueError(f"the model answered with {response.numel()} values, then with {again.numel()}")
    difference = float((again - response.flatten()).abs().max())
    scale = float(response.abs().max())
    if not difference <= 100 * torch.finfo(image.dtype).eps * scale:
        raise ValueError(
            f"the model answers differently when asked twice: its responses differ by up to {difference:.2g} where "
            f"they reach {scale:.2g}; remove its randomness (model.eval(), a fixed seed inside)"
        )
    return response, activations.total


def _depends_on(y: Tensor, x: Tensor) -> bool:
    """Whether PyTorch's graph leads from y to its leaf x."""
    seen, stack = set(), [y.grad_fn]
    while stack:
        step = stack.pop()
        if step is not None and step not in seen:
            if getattr(step, "variable", None) is x:
                return True
            seen.add(step)
            stack.extend(parent for parent, _ in step.next_functions)
    return False


def _answer(model: Callable[[Tensor], Any], x: Tensor) -> list[Tensor]:
    """The tensors of the model's response to a copy of x, which an in-place first layer may change."""
    with _differentiable_attention():
        return _leaves(model(x.clone()))


@contextlib.contextmanager
def _differentiable_attention() -> Iterator[None]:
    """Attention by its formula: its fused kernels have no forward mode. PyTorch's switches are as before afterwards."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


def _leaves(response: Any) -> list[Tensor]:
    """The tensors of a nested response, in order."""
    if isinstance(response, Tensor):
        return [response]
    if isinstance(response, Mapping):
        return [leaf for part in response.values() for leaf in _leaves(part)]
    if isinstance(response, tuple | list):
        return [leaf for part in response for leaf in _leaves(part)]
    raise TypeError(
        "the model's response must be a tensor, or a nesting of tuples, lists and dicts of tensors; "
        f"it holds {type(response).__name__}"
    )


def _flatten(leaves: list[Tensor]) -> Tensor:
    if not leaves:
        raise ValueError("the model's response holds no tensor")
    flat = [leaf.reshape(-1) for leaf in leaves]
    return flat[0] if len(flat) == 1 else torch.cat(flat)
