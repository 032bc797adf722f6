"""The operations that compute the linear part of a tape fastest, at the shapes of this tape, on this device."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fisherop.model.engines.nodes import IMAGE, LINEAR, STATIC, Node, needed
from fisherop.model.engines.places import put, put_slices, take, take_slices
from fisherop.model.engines.simplify import (
    CLEAN,
    KEEP_LAYOUT,
    Rule,
    each,
    is_constant,
    is_linear,
    nhwc,
    replaced,
    rewrite,
    wants_nhwc,
    windows,
)
from fisherop.model.engines.tape import Tape

aten = torch.ops.aten
_FEW_CHANNELS = 4  # up to so many, a matrix product and a sum over windows beat PyTorch's transposed convolution


def lower(tape: Tape, out: Node) -> Node:
    """An equal node whose operations are those that compute it fastest, at the shapes of this tape."""
    return _guard(tape, rewrite(tape, rewrite(tape, out, CLEAN), _LOWER))


def _lower_convolution(tape: Tape, node: Node, args: tuple, alone: list[int]) -> Node | None:
    x, weight, _, stride, padding, dilation, transposed, _, groups = args
    if not wants_nhwc(node) or weight.level != STATIC:
        return None
    _, channels, *size = node.value.shape
    kernel = list(weight.value.shape[2:])
    stride, padding, dilation = (each(t, 2) for t in (stride, padding, dilation))
    fits = list(map(windows, size, kernel, stride, padding, dilation)) == list(x.value.shape[2:])
    if transposed and groups == 1 and channels <= _FEW_CHANNELS and fits:
        matrix = tape.constant(torch.t, tape.constant(torch.reshape, weight, [weight.value.shape[0], -1]))
        return tape.linear(node.value, _convolve_transposed, matrix, x, size, kernel, dilation, padding, stride)
    return tape.linear(node.value, node.op, tape.linear(x.value, nhwc, x), *args[1:])


def _lower_add(tape: Tape, node: Node, args: tuple, alone: list[int]) -> Node | None:
    """Both terms in one layout, since what a convolution reads is converted for it anyway."""
    if not (all(map(is_linear, args)) and wants_nhwc(node)):
        return None
    converted = [_is_laid_out(a) for a in args]
    if converted[0] == converted[1] or any(a.value.shape != node.value.shape for a in args):
        return None
    terms = [a if done else tape.linear(a.value, nhwc, a) for a, done in zip(args, converted, strict=True)]
    return tape.linear(node.value, node.op, *terms)


def _lower_gather(tape: Tape, node: Node, args: tuple, alone: list[int]) -> Node | None:
    """The choice that max pooling makes in forward mode, by places in the layout in which a convolution left `x`."""
    x, dimension, places = args
    source = x.args[0] if x.op is torch.reshape else x
    if not (_is_laid_out(source) and len(source.value) == 1 and dimension in (-1, 2) and is_constant(places)):
        return None
    channels = source.value.shape[1]
    if x.value.ndim != 3 or x.value.shape[1] != channels or places.value.shape[1] != channels:
        return None
    return tape.linear(node.value, take_nhwc, source, tape.constant(_places_nhwc, places), channels)


def _places_nhwc(places: Tensor) -> Tensor:
    """Of places within each channel, (1, C, n)."""
    channels = places.shape[1]
    return (places.mT * channels + torch.arange(channels, device=places.device)).reshape(-1)


def take_nhwc(x: Tensor, places: Tensor, channels: int) -> Tensor:
    """Elements of (1, C, H, W), as (1, C, n)."""
    return x.permute(0, 2, 3, 1).reshape(-1).index_select(0, places).reshape(1, -1, channels).mT


def _lower_threshold(tape: Tape, node: Node, args: tuple, alone: list[int]) -> Node | None:
    """With the mask in the layout of what was taken."""
    x, point, threshold = args
    if x.op is not take_nhwc or not is_constant(point):
        return None
    return tape.linear(node.value, node.op, x, tape.constant(_as_taken, point), threshold)


def _as_taken(x: Tensor) -> Tensor:
    """(1, C, n) in the layout of `take_nhwc`."""
    return x.mT.contiguous().mT


def _is_laid_out(x: Node) -> bool:
    """Whether a convolution made this tensor's layout."""
    seen: set[int] = set()
    stack = [x]
    while stack:
        x = stack.pop()
        if x.op in (nhwc, aten.convolution.default) and wants_nhwc(x):
            return True
        if x.op in KEEP_LAYOUT and x.index not in seen:
            seen.add(x.index)
            stack.extend(filter(is_linear, x.args))
    return False


def _guard(tape: Tape, out: Node) -> Node:
    """Give a contiguous tensor to operations that may rely on it, where a layout has been changed by `_lay_out`."""
    changed: set[int] = set()
    new: dict[int, Node] = {}
    for node in needed([out], above=IMAGE):
        args, kwargs = replaced(node.args, new), replaced(node.kwargs, new)
        hit = any(p.index in changed or (p.level < LINEAR and _is_nhwc(p.value)) for p in node.parents)
        if hit and not _takes_any_layout(node.op):
            args = tuple(
                tape.linear(a.value, Tensor.contiguous, a) if is_linear(a) and isinstance(a.value, Tensor) else a
                for a in args
            )
            hit = False
        new[node.index] = tape.linear(node.value, node.op, *args, **kwargs) if node.op else node
        if hit or node.op is nhwc:
            changed |= {node.index, new[node.index].index}
    return new[out.index]


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


def _convolve_transposed(matrix: Tensor, x: Tensor, *geometry: Any) -> Tensor:
    """A matrix product and a sum over windows; one vector at a time, so that what lies between fits the cache."""
    return torch.cat([aten.col2im.default(matrix @ one.flatten(2), *geometry) for one in x.split(1)])


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
    """The constant that was repeated for each vector of a block."""
    shape = [1, *x.value.shape[1:]]
    at = x
    while at.level < LINEAR and at.op in (aten.expand.default, torch.reshape, Tensor.contiguous):
        at = at.args[0]
        if list(at.value.shape) == shape:
            return at
    return x


def unpool(g: Tensor, shape: Sequence[int], is_nhwc: bool, *args: Any) -> Tensor:
    """The backward pass of max pooling, which reads of what was pooled its shape (C, H, W) and its layout alone."""
    *geometry, indices = args
    layout = torch.channels_last if is_nhwc else torch.contiguous_format
    like = torch.empty((1, *shape), dtype=g.dtype, device=g.device, memory_format=layout)
    backward, indices = aten.max_pool2d_with_indices_backward.default, indices.long()
    parts = [backward(one, like, *geometry, indices) for one in g.split(1)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


_LOWER: dict[Callable, Rule] = {
    aten.add.Tensor: _lower_add,
    aten.gather.default: _lower_gather,
    aten.threshold_backward.default: _lower_threshold,
    aten.convolution.default: _lower_convolution,
    aten.max_pool2d_with_indices_backward.default: _lower_max_pool_backward,
}
_LOGICAL = {  # functions of our own, and Python's, that read elements by index
    operator.getitem,
    put,
    put_slices,
    take,
    take_slices,
    torch.reshape,
    _convolve_transposed,
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
