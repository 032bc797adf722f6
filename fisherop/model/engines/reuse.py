"""Which operations of a program write their result over an argument, so that it goes through less memory."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fisherop.model.engines.compact import by_places, pooled_backward
from fisherop.model.engines.kernels import convolve_phases, fold, nchw, nhwc, take_nhwc, unpool
from fisherop.model.engines.nodes import Node

aten = torch.ops.aten
_OTHERS = 0  # the owner of what the program did not allocate; nodes count from 1


def in_place(nodes: Sequence[Node], outputs: Sequence[Node]) -> dict[int, Callable]:
    """For some of the nodes, by index, an operation that leaves the same result in the memory of an argument.

    The program itself has allocated this memory, and reads it there for the last time: it belongs to nothing that the
    caller passes in, to no constant, and to no result of the program.

    Parameters
    ----------
    nodes : sequence of Node
        In the order in which they run.
    outputs : sequence of Node
        The results of the program.
    """
    owners: dict[int, frozenset[int]] = defaultdict(lambda: frozenset([_OTHERS]))  # of the memory of each node's value
    repeats: set[int] = set()  # the nodes whose value may have several elements at one place
    read: dict[int, float] = {}  # when the memory of an owner is read last
    for now, node in enumerate(nodes):
        for owner in frozenset().union(*(owners[p.index] for p in node.parents)):
            read[owner] = now
        if node.op in _ALLOCATES or node.op in _IN_PLACE:
            owners[node.index] = frozenset([node.index])
        elif node.op is not None:  # the result may be a view of any argument
            owners[node.index] = frozenset().union(*(owners[p.index] for p in node.parents))
            if node.op not in _REARRANGES or any(p.index in repeats for p in node.parents):
                repeats.add(node.index)
    for owner in frozenset([_OTHERS]).union(*(owners[node.index] for node in outputs)):
        read[owner] = math.inf

    found: dict[int, Callable] = {}
    for now, node in enumerate(nodes):
        for where, op in enumerate(_IN_PLACE.get(node.op, ())):
            x = node.args[where]
            if op is None or not isinstance(x, Node) or x.index in repeats or (where > 0 and node.kwargs):
                continue
            (owner, *several) = owners[x.index]
            shared = sum(owner in owners[p.index] for p in node.parents)
            same = (x.value.shape, x.value.dtype) == (node.value.shape, node.value.dtype)
            if not several and same and shared == 1 and read[owner] == now:
                found[node.index] = op
                break
    return found


def _threshold(g: Tensor, x: Tensor, threshold: float) -> Tensor:
    return aten.threshold_backward.grad_input(g, x, threshold, grad_input=g)


def _add_to_second(x: Tensor, y: Tensor) -> Tensor:
    return y.add_(x)


_IN_PLACE: dict[Callable, tuple[Callable | None, ...]] = {  # over the first argument, over the second
    aten.add.Tensor: (aten.add_.Tensor, _add_to_second),
    aten.sub.Tensor: (aten.sub_.Tensor,),
    aten.mul.Tensor: (aten.mul_.Tensor,),
    aten.neg.default: (aten.neg_.default,),
    aten.threshold_backward.default: (_threshold,),
}
_ALLOCATES = {
    aten.avg_pool2d.default,
    aten.avg_pool2d_backward.default,
    aten.bmm.default,
    aten.convolution.default,
    aten.gather.default,
    aten.index_select.default,
    aten.max_pool2d_with_indices_backward.default,
    aten.mm.default,
    by_places,
    convolve_phases,
    fold,
    pooled_backward,
    take_nhwc,
    unpool,
}
_REARRANGES = {Tensor.contiguous, aten.permute.default, aten.transpose.int, nchw, nhwc, torch.reshape}
