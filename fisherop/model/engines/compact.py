"""Constants of the linear part that say the same in less memory; products keep their bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fisherop.model.engines.kernels import take_nhwc, unpool
from fisherop.model.engines.nodes import IMAGE, Node, device_of
from fisherop.model.engines.simplify import Rule, is_constant, is_linear, rewrite
from fisherop.model.engines.tape import Tape

aten = torch.ops.aten
_LARGEST = 2**31  # a place that int32 doesn't hold


def compact(tape: Tape, out: Node) -> Node:
    """An equal node, in which masks take a byte for each element, and places four."""
    return rewrite(tape, out, _COMPACT)


def _threshold(tape: Tape, node: Node, args: tuple, alone: list[int]) -> Node | None:
    g, point, threshold = args
    if not is_linear(g) or not _depends_on_image(point) or point.value.dtype == torch.uint8:
        return None
    mask = tape.constant(_passes, point, threshold, like=point.value.to(torch.uint8))
    return tape.linear(node.value, node.op, g, mask, 0)


def _passes(x: Tensor, threshold: float) -> Tensor:
    """1 where `aten.threshold_backward` lets a gradient pass, NaN included."""
    return (x <= threshold).logical_not_().to(torch.uint8)


def _indexed(tape: Tape, node: Node, args: tuple, alone: list[int]) -> Node | None:
    x, dimension, places, *rest = args
    if not _depends_on_image(places) or places.value.dtype != torch.int64 or x.value.numel() >= _LARGEST:
        return None
    return tape.linear(node.value, by_places, node.op, x, dimension, tape.constant(Tensor.int, places), *rest)


def by_places(op: Callable, x: Tensor, dimension: int, places: Tensor, *rest: Tensor) -> Tensor:
    return op(x, dimension, places.long(), *rest)


def _take(tape: Tape, node: Node, args: tuple, alone: list[int]) -> Node | None:
    x, places, channels = args
    if x.value.numel() >= _LARGEST:
        return None
    return tape.linear(node.value, node.op, x, tape.constant(Tensor.int, places), channels)


def _unpool(tape: Tape, node: Node, args: tuple, alone: list[int]) -> Node | None:
    *others, indices = args
    if node.value.numel() >= _LARGEST or not _depends_on_image(indices):
        return None
    return tape.linear(node.value, node.op, *others, tape.constant(Tensor.int, indices))


def _max_pool_backward(tape: Tape, node: Node, args: tuple, alone: list[int]) -> Node | None:
    """It reads nothing of the image of max pooling but its shape."""
    g, x, *geometry, indices = args
    if not is_linear(g) or not _depends_on_image(x) or not _depends_on_image(indices) or x.value.numel() >= _LARGEST:
        return None
    blank = tape.static(torch.zeros(1, dtype=x.value.dtype, device=device_of(x.value)).expand(x.value.shape))
    return tape.linear(node.value, pooled_backward, g, blank, *geometry, tape.constant(Tensor.int, indices))


def pooled_backward(g: Tensor, x: Tensor, *args: Any) -> Tensor:
    *geometry, indices = args
    return aten.max_pool2d_with_indices_backward.default(g, x, *geometry, indices.long())


def _depends_on_image(x: object) -> bool:
    return is_constant(x) and x.level == IMAGE


_COMPACT: dict[Callable, Rule] = {
    aten.threshold_backward.default: _threshold,
    **dict.fromkeys((aten.gather.default, aten.scatter.src, aten.scatter_add.default), _indexed),
    aten.max_pool2d_with_indices_backward.default: _max_pool_backward,
    take_nhwc: _take,
    unpool: _unpool,
}
