"""From an image and a model to products that have been found right: a pipeline of values.

What the model does when it is called (`examine`), or a program that an earlier image left; then an engine for its
products; then whether these are right. `build` gives a `Built`, or raises what is wrong with the model.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fisherop.checks import warn
from fisherop.model import programs
from fisherop.model.compat import clean_failure, prepare_recording
from fisherop.model.contents import Contents
from fisherop.model.engines import ENGINES, Traced, advice
from fisherop.model.engines.plain import forward_mode
from fisherop.model.guard import Guard
from fisherop.model.response import Response, examine
from fisherop.model.slopes import check_slope, norm
from fisherop.model.trial import ROUNDINGS, Trial, check_close, check_products, random, vectorizes

_MUCH = 2**24  # bytes that are held for an image
_LOG = logging.getLogger("fisherop.model.linearize")


class Built(NamedTuple):
    """An engine that makes right products of a model at an image, and what was learned on the way."""

    image: Tensor
    response: Tensor
    engine: Any
    chunk_size: int
    trial: Trial
    contents: Contents
    report: tuple[str, ...]


def build(
    image: Tensor, respond: Response, names: tuple[str, ...], chunk_size: int | None, last: list[Callable]
) -> Built:
    """Build the first of these engines that can be built, is right, and leaves the model as it was.

    Parameters
    ----------
    image : Tensor, shape ``image_shape``
    respond : Response
        Of the model. What is learned of its calls is noted there.
    names : tuple of str
        Of engines, in order.
    chunk_size : int, optional
        How many vectors go through the model together, if the caller knows.
    last : list of callable
        Gets what is to be done at the end, whatever happens: see `alone`.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As by `linearize`.
    """
    prepare_recording()
    with torch.inference_mode(False), torch.no_grad():
        image = image.detach().clone()
        report: list[str] = []
        built = _resumed(image, respond, chunk_size, last, report) if "traced" in names else None
        return built or _new(image, respond, names, chunk_size, last, report)


def _resumed(
    image: Tensor, respond: Response, chunk_size: int | None, last: list[Callable], report: list[str]
) -> Built | None:
    """By the program that an earlier image left, if there is one and it agrees with the model at this image.

    It must agree as it did at the image of the recording, but for rounding.
    """
    model = respond.model
    if not programs.has(image, model):
        return None
    contents, guard = Contents(model), Guard(model)
    respond.sparse = guard.holds_sparse
    kept = programs.recall(image, model, contents)
    if kept is None:
        return None
    last.append(guard.restore)
    eps = torch.finfo(image.dtype).eps
    try:
        engine = Traced.resume(kept.program)
        v = random((1, *image.shape), image, seed=0)
        with clean_failure():
            response, reference = forward_mode(respond, image, v[0])  # before anything is held
            check_close("response", engine.prepare(image), response, respond.sizes, ROUNDINGS * eps)
            response = response.clone().reshape(respond.shape)
            respond.draws = kept.draws
            allowed = max(ROUNDINGS * eps, ROUNDINGS * kept.error)
            size = chunk_size or engine.chunk_size(0)
            precision = max(eps, kept.precision)
            trial, size = _tried(engine, respond, image, response, v, reference, size, precision, allowed)
    except (RuntimeError, ValueError) as error:
        programs.forget(image, model)
        _say(report, f"traced: the program of an earlier image is rejected, {error}")
        guard.restore()
        return None
    _say(report, _in_use(engine, size, "by the program of an earlier image, "))
    return Built(image, response, engine, size, trial, contents, tuple(report))


def _new(
    image: Tensor,
    respond: Response,
    names: tuple[str, ...],
    chunk_size: int | None,
    last: list[Callable],
    report: list[str],
) -> Built:
    """See what the model does when it is called; then choose an engine, and leave the model as after one call."""
    guards = [Guard(respond.model, values=True)]
    last.append(lambda: guards and guards[-1].restore())
    respond.sparse = guards[0].holds_sparse
    seen, settled = examine(respond, image, guards[0])
    response = seen.response.reshape(respond.shape)
    precision = max(torch.finfo(image.dtype).eps, seen.precision)
    if seen.has_fast_path:
        warn(
            "without gradients the model answers otherwise, by PyTorch's fast path for attention, which leaves out "
            "what is padded: J is that of its response with gradients (enable_nested_tensor=False makes them one)"
        )
    engine, trial, size = _chosen(image, respond, response, names, chunk_size, seen.bytes, precision, settled, report)
    v, jv = trial.v[0], trial.jv[0]
    frees = engine.is_recorded and engine.held_bytes[0] > _MUCH
    if frees:
        engine.release()  # float64 takes memory
    with clean_failure():
        decided = check_slope(
            *(respond, image, v, jv, engine.slope),
            precision=precision,
            detaches=seen.detaches,
            program=engine.by_program if engine.is_recorded and not engine.program.reads_image else None,
        )
    if frees:
        engine.prepare(image)
    if not decided:
        note = "rounding or kinks hide the slope of the response, so that J v could not be held against it"
        report.insert(len(report) - 1, note)
    guards.append(settled)
    settled.restore()
    guards.clear()
    contents = Contents(respond.model)
    if engine.program is not None:
        programs.keep(image, respond.model, engine.program, contents, precision, trial.error, respond.draws)
    return Built(image, response, engine, size, trial, contents, tuple(report))


def _chosen(
    image: Tensor,
    respond: Response,
    response: Tensor,
    names: tuple[str, ...],
    chunk_size: int | None,
    bytes_: int,
    precision: float,
    guard: Guard,
    report: list[str],
) -> tuple[Any, Trial, int]:
    """The first engine that can be built, is right, and leaves the model as it was; its trial, and its chunk size."""
    v = random((1, *image.shape), image, seed=0)
    for name in names:
        try:
            with clean_failure():
                engine = ENGINES[name](respond, image, response.flatten(), v[0])
                reference, engine.reference = engine.reference, None
                if engine.is_recorded:
                    answer = engine.prepare(image)
                    check_close("response", answer, response.flatten(), respond.sizes, ROUNDINGS * precision)
                size = chunk_size or engine.chunk_size(bytes_)
                trial, size = _tried(engine, respond, image, response, v, reference, size, precision)
                changed = guard.restore()
                if changed:
                    raise RuntimeError(f"it changes the model's {changed[0]}")
        except (RuntimeError, ValueError) as error:
            guard.restore()
            _say(report, f"{name}: rejected, {str(error).splitlines()[0]}{advice(error)}")
            if name != "traced" and isinstance(error, ValueError):
                raise  # the model is at fault, not the engine
            if name == names[-1]:
                tried = "; ".join(report)
                raise RuntimeError(f"PyTorch can't differentiate this model as it has to be: {tried}") from error
        else:
            _say(report, _in_use(engine, size))
            return engine, trial, size
    raise AssertionError("there is no engine to choose from")


def _tried(
    engine: Any,
    respond: Response,
    image: Tensor,
    response: Tensor,
    v: Tensor,
    reference: Tensor | None,
    chunk_size: int,
    precision: float,
    allowed: float | None = None,
) -> tuple[Trial, int]:
    """The products that were found right, and how many may be made together: one, where blocks of them fail.

    A recorded engine tries each size of a block when it first comes. A difference is `allowed` by a kept program.
    """
    jvp, vjp = (
        functools.partial(in_chunks, multiply, shape=shape, chunk_size=chunk_size)
        for multiply, shape in ((engine.jvp, (response.numel(),)), (engine.vjp, tuple(image.shape)))
    )
    size = norm(image)
    # what the rounding of the response leaves of a derivative, for a change as large as the image
    rounding = 100 * precision * norm(response) * norm(v) / size if size else 0.0
    new = allowed is None
    trial = check_products(jvp, vjp, v, reference, respond.sizes, precision, allowed, rounding=rounding, again=new)
    if chunk_size > 1 and not engine.is_recorded and not vectorizes(jvp, vjp, v):
        chunk_size = 1
    return trial, chunk_size


def in_chunks(
    multiply: Callable[[Tensor], Tensor],
    block: Tensor,
    shape: tuple[int, ...],
    chunk_size: int,
    done: Callable[[int], None] = lambda count: None,
    owned: bool = False,
) -> Tensor:
    """Products of a block, some at a time, without gradients or autocast; `done` hears how many they are each time.

    `owned` says that `multiply` gives tensors that nothing else holds, but for `block`: then they may be the result.
    """
    device = block.device.type
    plain = contextlib.nullcontext()
    if torch.is_autocast_enabled(device):
        plain = torch.autocast(device, enabled=False)
    with torch.inference_mode(False), torch.no_grad(), plain:
        if owned and 0 < len(block) <= chunk_size:
            out = multiply(block)
            done(len(block))
            memory = out.untyped_storage()
            is_own = memory.data_ptr() != block.untyped_storage().data_ptr() and memory.nbytes() == out.nbytes
            return out if is_own and out.is_contiguous() else out.clone(memory_format=torch.contiguous_format)
        out = block.new_empty(len(block), *shape)
        n = -(-len(block) // chunk_size)  # chunks of equal size, so that few programs are made
        for chunk, target in zip(block.chunk(n), out.chunk(n), strict=True) if n else ():
            target.copy_(multiply(chunk))
            done(len(chunk))
    return out


def _say(report: list[str], line: str) -> None:
    report.append(line)
    _LOG.info("engine %s", line)


def _in_use(engine: Any, chunk_size: int, how: str = "") -> str:
    line = f"{engine.name}: in use, {how}{chunk_size} vector{'s' * (chunk_size > 1)} at a time"
    if engine.is_recorded:
        image, model = engine.held_bytes
        line += f", holding {image / 2**20:.1f} MiB for the image and {model / 2**20:.1f} MiB for the model"
    return line
