"""A model as a function of one image that gives a flat vector, and what of models is refused."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fisherop import checks
from fisherop.model.compat import differentiable, uncompiled
from fisherop.model.draws import Draws, Watch, another_seed, elsewhere
from fisherop.model.guard import Guard
from fisherop.model.sparse import SparseProducts

_TRIES = 20  # calls of a model while other threads draw random numbers


class Response:
    """A model at images of one shape: ``respond(x: image_shape) -> (M,)``.

    Attributes
    ----------
    shape : tuple of int
        The shape of the last response; ``(M,)`` where it consists of several tensors.
    sizes : list of int
        The number of elements of each tensor that it consists of.
    sparse : bool
        Whether the model holds sparse tensors, whose products take a forward mode of ours.
    draws : bool
        Whether its calls were seen to draw on a global generator of random numbers.
    memory : int or None
        How many bytes it may take to linearize it; None: as many as the machine has.
    """

    shape: tuple[int, ...]
    sizes: list[int]

    def __init__(self, model: Callable[[Tensor], Any], *, sparse: bool = False, memory: int | None = None) -> None:
        self.model, self.memory = model, memory
        self.sparse = sparse
        self.draws = False

    def __call__(self, x: Tensor) -> Tensor:
        """The response to a copy of x, which an in-place first layer may change."""
        with differentiable(), SparseProducts() if self.sparse else contextlib.nullcontext():
            found = leaves(self.model(x.clone()))
        if not found:
            raise ValueError("the model's response holds no tensor")
        self.sizes = [leaf.numel() for leaf in found]
        flat = [leaf.reshape(-1) for leaf in found]
        self.shape = tuple(found[0].shape) if len(found) == 1 else (sum(self.sizes),)
        for leaf in flat:
            if leaf.is_complex():
                raise TypeError(
                    f"the response must be real like the image, got {leaf.dtype}: let the model return "
                    "torch.view_as_real(response), or its .abs()"
                )
            if leaf.dtype != flat[0].dtype or leaf.device != x.device:
                raise TypeError(_unlike(x, leaf))
        return flat[0] if len(flat) == 1 else torch.cat(flat)


def leaves(response: Any) -> list[Tensor]:
    """The tensors of a nested response, in order; None is left out."""
    if response is None:
        return []
    if isinstance(response, Tensor):
        return [response]
    if isinstance(response, Mapping):
        return [leaf for part in response.values() for leaf in leaves(part)]
    if isinstance(response, tuple | list):
        return [leaf for part in response for leaf in leaves(part)]
    if dataclasses.is_dataclass(response) and not isinstance(response, type):
        return [leaf for field in dataclasses.fields(response) for leaf in leaves(getattr(response, field.name))]
    raise TypeError(
        "the model's response must be a tensor, or a nesting of tuples, lists, dicts and dataclasses of tensors and "
        f"None; it holds {type(response).__name__}: choose its part, as `lambda x: model(x)[0]` or "
        "`lambda x: model(x).features` does"
    )


def _unlike(x: Tensor, leaf: Tensor) -> str:
    return (
        f"the response must be {x.dtype} on {x.device} like the image, got {leaf.dtype} on {leaf.device}: let the "
        "model return only what it computes from the image in that dtype"
    )


@dataclasses.dataclass(frozen=True)
class Examined:
    """What two plain calls of a model show.

    `response`, flat (M,); the `bytes` of all that a call computes; the lowest `precision` of its steps, as a machine
    epsilon; whether it calls ``.detach()``; whether PyTorch's fast path for attention answers otherwise.
    """

    response: Tensor
    bytes: int
    precision: float
    detaches: bool
    has_fast_path: bool


def examine(respond: Response, image: Tensor, before: Guard) -> tuple[Examined, Guard]:
    """Call a model twice; return what that shows, and the model's state after one call: what that sets up is kept.

    Raises
    ------
    TypeError, ValueError
        The response can't be used, or is random, or changes what the model holds at every call.
    """
    start = time.perf_counter()
    with Watch() as first, torch.no_grad():
        try:
            response = respond(image)
            if response.dtype != image.dtype:
                raise TypeError(_unlike(image, response))
        except (RuntimeError, TypeError) as error:
            respond.draws = not first.draws().none
            _check_dtype(image, respond.model, error)
            raise
        draws = first.draws()
        respond.draws = not draws.none
    _check_memory(first.bytes, time.perf_counter() - start, respond.memory, image.device)
    before.settle()
    settled = Guard(respond.model, like=before)
    if response.numel() == 0:
        raise ValueError("the model's response is empty")
    if not torch.isfinite(response).all():
        raise ValueError("the model's response to this image holds NaN or infinity")
    response = response.clone()
    with Watch() as second, torch.enable_grad():
        x = image.clone().requires_grad_()
        again = respond(x)
        draws_again = second.draws()
    others = _drawn_by_others(respond, image, draws, draws_again)
    draws, draws_again = draws.without(others), draws_again.without(others)
    respond.draws = not (draws.none and draws_again.none)
    if not _depends_on(again, x):
        raise ValueError(
            "the model's response has no gradient with respect to the image: it does not depend on the image, or only "
            "through steps that can't be differentiated (detach, no_grad, rounding, argmax, conversion to NumPy)"
        )
    _check_same(response, again.detach())
    source = next(iter(settled.drawn()), None) or draws.differ_from(draws_again)
    if source is not None and draws_again.none and not settled.drawn():  # the first call may have made what is kept
        with Watch() as third, torch.no_grad():
            _check_same(response, respond(image))
            source = draws_again.differ_from(third.draws())
    if source is None and draws.from_outside and draws_again.from_outside:  # or it seeds itself as PyTorch is seeded
        with another_seed(image.device), Watch() as third, torch.no_grad():
            respond(image)
            source = draws.differ_from(third.draws())
    if source is not None:
        busy = source in draws.elsewhere and len(sys._current_frames()) > 1
        raise ValueError(
            f"the model draws random numbers ({source}) that are others at every call, though the two responses "
            f"compared agree: {_CURE}" + busy * "; or another thread draws them all the time: let it wait"
        )
    has_fast_path = _has_fast_path(respond.model, image, response)
    changed = settled.restore()
    if changed:
        raise ValueError(
            f"model changes its {changed[0]} at every call, so that its response depends on its history: freeze it, "
            "by model.eval() or in the model's forward"
        )
    return Examined(response, first.bytes, first.precision, first.detaches, has_fast_path), settled


def _check_memory(bytes_: int, seconds: float, memory: int | None, device: torch.device) -> None:
    """Refuse what would not fit, by what a forward pass computes: building took 1.3 to 3.3 times as much."""
    limit = checks.machine_memory(device) if memory is None else memory
    needed = 2 * bytes_
    if needed > limit:
        raise ValueError(
            f"to linearize the model at this image would take {needed / 2**30:.3g} GiB, twice what a forward pass "
            f"computes, and each product about {2 * seconds:.2g} s, twice what that takes; the limit is "
            f"{limit / 2**30:.3g} GiB: take a smaller image or an earlier layer, or pass memory={needed}, in bytes"
        )


def _drawn_by_others(respond: Response, image: Tensor, *draws: Draws) -> set[str]:
    """Of Python's generator and NumPy's, which all threads share, those that another thread drew on.

    It was another thread if there are others, and some call of the model leaves the generator as it is.
    """
    seen = {name for one in draws for name, state in one.elsewhere.items() if state is not None}
    others: set[str] = set()
    for _ in range(_TRIES if len(sys._current_frames()) > 1 else 0):
        if others == seen:
            break
        before = elsewhere()
        with torch.no_grad():
            respond(image)
        now = elsewhere()
        others |= {name for name in seen if now[name] == before[name]}
    return others


def _has_fast_path(model: Callable[[Tensor], Any], image: Tensor, response: Tensor) -> bool:
    """Whether the model answers otherwise without gradients, as a TransformerEncoder does of what is padded."""
    kinds = nn.TransformerEncoder | nn.TransformerEncoderLayer | nn.MultiheadAttention
    if not (isinstance(model, nn.Module) and any(isinstance(module, kinds) for module in model.modules())):
        return False
    with torch.no_grad(), uncompiled():
        plain = torch.cat([leaf.reshape(-1) for leaf in leaves(model(image.clone()))])
    if plain.numel() != response.numel():
        return True
    difference, scale = (float(t.abs().max()) for t in (plain - response, response))
    return not difference <= torch.finfo(response.dtype).eps ** 0.5 * scale


_CURE = "remove its randomness (model.eval(), a fixed seed inside)"


def _check_same(response: Tensor, again: Tensor) -> None:
    if again.numel() != response.numel():
        raise ValueError(f"the model answered with {response.numel()} values, then with {again.numel()}")
    difference, scale = (float(t.abs().max()) for t in (again - response, response))
    if not difference <= 100 * torch.finfo(response.dtype).eps * scale:
        raise ValueError(
            f"the model answers differently when asked twice: its responses differ by up to {difference:.2g} where "
            f"they reach {scale:.2g}; {_CURE}"
        )


def check_image(image: Tensor) -> None:
    cure = "the image comes first, then the model" if callable(image) else "use torch.as_tensor(image)"
    if isinstance(image, tuple | list | Mapping) and any(isinstance(part, Tensor) for part in _values(image)):
        cure = "bind the model's other arguments, as functools.partial(model, mask=mask) does, and pass one tensor"
        if isinstance(image, list):
            cure = "FisherOperator.pooled takes many images; " + cure
    checks.instance("image", image, Tensor, "a torch.Tensor", cure)
    if image.dtype not in (torch.float32, torch.float64):
        cure = "use image.to(torch.float32)"
        if not image.is_floating_point() and not image.is_complex():
            cure = "use image / 255, or whatever makes of it the numbers that the model was trained on"
        elif image.is_complex():
            cure = "use torch.view_as_real(image), and a model that takes it"
        raise TypeError(f"image must be float32 or float64, got {image.dtype}: {cure}")
    if image.layout != torch.strided or image.is_meta:
        raise TypeError(
            f"image must be dense and hold values, got {image.layout} on {image.device}: use image.to_dense(), and "
            "another device than meta"
        )
    if image.numel() == 0:
        raise ValueError(f"image is empty: its shape is {tuple(image.shape)}")
    if image.ndim >= 4 and image.shape[0] > 1:
        raise ValueError(
            f"image must be one image, got a batch of {image.shape[0]} (shape {tuple(image.shape)}): take them one at "
            "a time, `for one in image.split(1)`; where the first dimension is no batch, pass `image[None]` and "
            "`lambda x: model(x[0])`"
        )
    if not checks.is_finite(image):
        raise ValueError("image holds NaN or infinity")


def _values(image: Any) -> Any:
    return image.values() if isinstance(image, Mapping) else image


def check_mode(model: Callable[[Tensor], Any]) -> None:
    """Raise ValueError where a module is in training mode, by which its response is random, or it changes."""
    for name, module in model.named_modules() if isinstance(model, nn.Module) else ():
        drops = isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
        learns = isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
        if module.training and (drops or learns):
            raise ValueError(
                f"model is in training mode and holds {type(module).__name__} ({name or 'itself'!r}), so that its "
                "response is random or depends on its history: call model.eval() first"
            )


def check_model(image: Tensor, model: Callable[[Tensor], Any]) -> None:
    checks.function("model", model, "a callable or an nn.Module")
    if isinstance(model, type) and issubclass(model, nn.Module):
        checks.refuse(TypeError, "model", "a callable or an nn.Module", model, "make an instance of it")
    if not isinstance(model, nn.Module):
        return
    check_mode(model)
    state = list(itertools.chain(model.parameters(), model.buffers()))
    if any(map(is_lazy, state)):
        raise ValueError("model has lazy parameters that are not made yet: call it once with an image first")
    if any(t.is_inference() for t in state):
        raise ValueError(
            "model was made under torch.inference_mode, so that PyTorch can't differentiate it: make it outside, or "
            "use torch.no_grad there"
        )
    devices = {t.device for t in state}
    if devices and image.device not in devices:
        others = ", ".join(sorted(map(str, devices)))
        raise ValueError(
            f"image and model must share one device, got an image of {image.device} and a model of {others}: use "
            f"model.to('{image.device}'), or image.to(...)"
        )


def _check_dtype(image: Tensor, model: Callable, error: Exception) -> None:
    """Say so where a module holds nothing in the image's dtype, which an error may be due to."""
    state = itertools.chain(model.parameters(), model.buffers()) if isinstance(model, nn.Module) else ()
    dtypes = {t.dtype for t in state if t.is_floating_point()}
    if dtypes and image.dtype not in dtypes:
        others = ", ".join(sorted(map(str, dtypes)))
        cure = ", or image.to(...)" if dtypes & {torch.float32, torch.float64} else ""
        raise ValueError(
            f"image and model must share one dtype, or the model must convert the image itself: got an image of "
            f"{image.dtype} and a model of {others}: use model.to({image.dtype}){cure}. {error}"
        ) from error


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
