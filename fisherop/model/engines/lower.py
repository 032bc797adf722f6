"""The operations that compute the linear part of a tape fastest, at the shapes of this tape, on this device."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fisherop.model.engines.kernels import (
    as_taken,
    convolve_phases,
    fold,
    nchw,
    nhwc,
    pair,
    phase_geometry,
    phases,
    places_nhwc,
    take_nhwc,
    unpool,
)
from fisherop.model.engines.nodes import IMAGE, LINEAR, STATIC, Node, needed
from fisherop.model.engines.places import put, put_slices, take, take_slices
from fisherop.model.engines.simplify import (
    CLEAN,
    KEEP_LAYOUT,
    Rule,
    each,
    is_constant,
    is_linear,
    new_arguments,
    put_instead,
    rewrite,
    wants_nhwc,
    windows,
)
from fisherop.model.engines.tape import Tape

aten = torch.ops.aten
_FEW_CHANNELS = 4  # up to so many, PyTorch's transposed convolution is slow
_LARGE_KERNEL = 5  # from which on an ordinary convolution is faster than a matrix product and a sum over windows
_MOST_WORK = 1.5  # times as many products, for a convolution of all phases
_MANY = 256  # places in a block, for which turning the weights costs little


def lower(tape: Tape, out: Node) -> Node:
    """An equal node whose operations are those that compute it fastest, at the shapes of this tape."""
    return _guard(tape, rewrite(tape, rewrite(tape, out, _CLEAN), _LOWER))


def layout(out: Node) -> list[int] | None:
    """(C, H, W) of a flat response that is computed in the layout NHWC; None of any other."""
    x = out
    while x.op in (torch.reshape, Tensor.contiguous) and (x is out or x.value.ndim != 4):
        x = x.args[0]
    is_one = x is not out and len(x.value) == 1 and x.value.ndim == 4 and x.value.numel() == out.value.numel()
    return list(x.value.shape[1:]) if is_one and _is_laid_out(x) else None


def _contiguous(tape: Tape, node: Node, args: tuple, alone: list[int]) -> Node | None:
    """Not where it would undo the layout; `_guard` makes what operations rely on."""
    return args[0] if is_linear(args[0]) and _is_laid_out(args[0]) else None


def _mask(tape: Tape, node: Node, args: tuple, alone: list[int]) -> Node | None:
    """Once is enough: what J v ends with, Jᵀ begins with."""
    x = args[0]
    return x if x.op is node.op and x.args[1:] == args[1:] else None


def _lower_convolution(tape: Tape, node: Node, args: tuple, alone: list[int]) -> Node | None:
    x, weight, *_ = args
    if not wants_nhwc(node) or weight.level != STATIC:
        return None
    return _transposed(tape, node, args) or tape.linear(node.value, node.op, tape.linear(x.value, nhwc, x), *args[1:])


def _transposed(tape: Tape, node: Node, args: tuple) -> Node | None:
    """A transposed convolution by other means, where these are faster."""
    x, weight, _, stride, padding, dilation, transposed, beyond, groups = args
    if not transposed or groups != 1:
        return None
    stride, padding, dilation, beyond = (each(t, 2) for t in (stride, padding, dilation, beyond))
    (k, _, *sizes), (channels, *size) = x.value.shape, node.value.shape[1:]
    kernel = list(weight.value.shape[2:])
    if [*kernel, *stride] == [1, 1, 1, 1] and not any((*padding, *beyond)) and k * math.prod(sizes) >= _MANY:
        turned = tape.constant(torch.transpose, weight, 0, 1)
        x = tape.linear(x.value, nhwc, x)
        return tape.linear(node.value, node.op, x, turned, None, stride, padding, stride, False, beyond, 1)
    if channels > _FEW_CHANNELS:
        return None
    if dilation == [1, 1] and min(kernel) >= _LARGE_KERNEL:
        around, start, work = zip(*map(phase_geometry, kernel, stride, padding, sizes, size), strict=True)
        if min(around) >= 0 and math.prod(work) <= _MOST_WORK * math.prod(kernel):
            made = tape.constant(phases, weight, stride, padding)
            x, shape = tape.linear(x.value, nhwc, x), [channels, *size]
            return tape.linear(node.value, convolve_phases, x, made, shape, stride, list(around), list(start))
    if list(map(windows, size, kernel, stride, padding, dilation)) != sizes:
        return None
    matrix = tape.constant(torch.t, tape.constant(torch.reshape, weight, [len(weight.value), -1]))
    return tape.linear(node.value, fold, matrix, x, size, kernel, dilation, padding, stride)


def _lower_add(tape: Tape, node: Node, args: tuple, alone: list[int]) -> Node | None:
    """Both terms in one layout, since what a convolution reads is converted for it anyway."""
    shape = node.value.shape
    if not all(map(is_linear, args)) or any(a.value.shape != shape for a in args) or len(shape) < 4:
        return None
    converted = [_is_laid_out(a) for a in args]
    if converted[0] == converted[1]:
        return None
    terms = [a if done else _converted(tape, a) for a, done in zip(args, converted, strict=True)]
    return tape.linear(node.value, node.op, *terms)


def _converted(tape: Tape, x: Node) -> Node:
    """(…, C, H, W) in the layout NHWC, by the same node as where a convolution reads it."""
    images = x.value.flatten(0, -4)
    if x.value.ndim == 4:
        return tape.linear(images, nhwc, x)
    flat = tape.linear(images, torch.reshape, x, list(images.shape))
    return tape.linear(x.value, torch.reshape, tape.linear(images, nhwc, flat), list(x.value.shape))


def _lower_gather(tape: Tape, node: Node, args: tuple, alone: list[int]) -> Node | None:
    """The choice that max pooling makes in forward mode, by places in the layout in which a convolution left `x`."""
    x, dimension, places = args
    source = x.args[0] if x.op is torch.reshape else x
    if not (is_constant(places) and source.value.ndim == 4 and _is_laid_out(source)):
        return None
    (k, channels, *size), shape = source.value.shape, list(x.value.shape)
    places = _before_expansion(places)
    fits = shape[-2:] == [channels, math.prod(size)] and places.value.shape[:-1] == (1, channels)
    if not fits or math.prod(shape[:-2]) != k or dimension not in (-1, len(shape) - 1):
        return None
    places = tape.constant(places_nhwc, places, like=places.value.reshape(-1))
    taken = tape.linear(node.value.flatten(0, -3), take_nhwc, source, places, channels)
    return tape.linear(node.value, torch.reshape, taken, list(node.value.shape))


def _lower_threshold(tape: Tape, node: Node, args: tuple, alone: list[int]) -> Node | None:
    """With the mask in the layout of what was taken."""
    x, point, threshold = args
    taken = x.args[0] if x.op is torch.reshape else x
    if taken.op is not take_nhwc or not is_constant(point) or point.value.ndim != 3:
        return None
    return tape.linear(node.value, node.op, x, tape.constant(as_taken, point), threshold)


def _lower_reshape(tape: Tape, node: Node, args: tuple, alone: list[int]) -> Node | None:
    """What is flattened from NHWC becomes contiguous first, in the fast way."""
    x, shape = args
    whole = math.prod(x.value.shape[-3:])
    if (
        x.value.ndim < 4
        or x.value.shape[-3] == 1
        or shape[-1:] == [x.value.shape[-1]]
        or not shape
        or whole > shape[-1]
    ):
        return None
    return tape.linear(node.value, torch.reshape, tape.linear(x.value, nchw, x), shape) if _is_laid_out(x) else None


def _is_laid_out(x: Node) -> bool:
    """Whether a convolution made this tensor's layout."""
    seen: set[int] = set()
    stack = [x]
    while stack:
        x = stack.pop()
        if wants_nhwc(x) and (x.op is nhwc or (x.op is aten.convolution.default and x.args[1].level == STATIC)):
            return True
        keeps = x.op is torch.reshape and x.args[0].value.shape[-3:] == x.value.shape[-3:]  # the parts of a block
        if (keeps or x.op in KEEP_LAYOUT) and x.index not in seen:
            seen.add(x.index)
            stack.extend(filter(is_linear, x.args))
    return False


def _guard(tape: Tape, out: Node) -> Node:
    """Give a contiguous tensor to operations that may rely on it, where a layout has been changed by `lay_out`."""
    changed: set[int] = set()
    new: dict[int, Node] = {}
    for node in needed([out], above=IMAGE):
        args = new_arguments(node, new)
        hit = any(p.index in changed or (p.level < LINEAR and _is_nhwc(p.value)) for p in node.parents)
        if hit and not _takes_any_layout(node.op):
            args = tuple(
                tape.linear(a.value, Tensor.contiguous, a) if is_linear(a) and isinstance(a.value, Tensor) else a
                for a in args
            )
            hit = False
        here = put_instead(tape, node, None, args, new)
        if hit or node.op is nhwc:
            changed |= {node.index, here.index}
    return new.get(out.index, out)


def _is_nhwc(x: Any) -> bool:
    return (
        isinstance(x, Tensor)
        and x.ndim == 4
        and x.is_contiguous(memory_format=torch.channels_last)
        and not x.is_contiguous()
    )


def _takes_any_layout(op: Callable) -> bool:
    if isinstance(op, torch._ops.OpOverload):
        return op.is_view or torch.Tag.pointwise in op.tags or op in _ANY_LAYOUT
    return op in _LOGICAL


def _lower_max_pool_backward(tape: Tape, node: Node, args: tuple, alone: list[int]) -> Node | None:
    """One vector at a time, since a block would take copies of the constants, one for each vector."""
    g, x, *geometry, indices = args
    indices = _before_expansion(indices)
    if not is_linear(g) or not is_constant(x) or indices.level == LINEAR or len(indices.value) != 1:
        return None
    if x.value.ndim != 4 or len(x.value) != len(g.value):
        return None
    return tape.linear(node.value, unpool, g, list(x.value.shape[1:]), _is_laid_out(g), *geometry, indices)


def _before_expansion(x: Node) -> Node:
    """The constant that was repeated for each vector of a block, (1, …)."""
    at = x
    while at.level < LINEAR and at.op in (aten.expand.default, torch.reshape, Tensor.contiguous):
        (_, *rest), before = at.value.shape, list(at.args[0].value.shape)
        if at.op is aten.expand.default and (not before or rest[len(rest) + 1 - len(before) :] != before[1:]):
            return x  # repeated otherwise
        at = at.args[0]
        if len(before) > 1 and before == [1, *x.value.shape[1 - len(before) :]]:
            return at
    return x


_CLEAN = CLEAN | {Tensor.contiguous: _contiguous, aten.threshold_backward.default: _mask}
_LOWER: dict[Callable, Rule] = {
    aten.add.Tensor: _lower_add,
    aten.gather.default: _lower_gather,
    aten.threshold_backward.default: _lower_threshold,
    aten.convolution.default: _lower_convolution,
    torch.reshape: _lower_reshape,
    aten.max_pool2d_with_indices_backward.default: _lower_max_pool_backward,
}
_LOGICAL = {  # functions of our own, and Python's, that read elements by index
    operator.getitem,
    pair,
    put,
    put_slices,
    take,
    take_slices,
    torch.reshape,
    convolve_phases,
    fold,
    nchw,
    nhwc,
    take_nhwc,
    unpool,
}
_ANY_LAYOUT = {
    aten.convolution.default,
    aten.max_pool2d_with_indices_backward.default,
    aten.mm.default,
    aten.bmm.default,
    aten.addmm.default,
    aten.sum.dim_IntList,
    aten.mean.dim,
    aten.cat.default,
    aten.gather.default,
    aten.expand.default,
}
