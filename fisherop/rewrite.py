"""Rules by which the linear part of a tape becomes cheaper, its result being the same.

`simplify` is algebra: what copies or adds zero goes, products with constants are joined, and the scale of a batch norm
goes into the convolution beside it. `lower` then chooses the operations that compute this fastest.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fisherop.nodes import IMAGE, LINEAR, STATIC, Node, NotLinear, needed, replace
from fisherop.places import put, put_slices, take, take_slices
from fisherop.tape import Tape

aten = torch.ops.aten
_FEW_CHANNELS = 4  # up to so many, a matrix product and a sum over windows beat PyTorch's transposed convolution
Rule = Callable[[Tape, Node, tuple, list[int]], Node | None]  # tape, old node, new arguments, arguments used here alone


def simplify(tape: Tape, out: Node) -> Node:
    """An equal node, whose linear ancestors are fewer and cheaper."""
    return _lay_out(tape, _rewrite(tape, _rewrite(tape, out, _CLEAN), _JOIN))


def lower(tape: Tape, out: Node) -> Node:
    """An equal node whose operations are those that compute it fastest, at the shapes of this tape."""
    return _guard(tape, _rewrite(tape, _rewrite(tape, out, _CLEAN), _LOWER))


def _rewrite(tape: Tape, out: Node, rules: dict[Callable, Rule]) -> Node:
    nodes = needed([out], above=IMAGE)
    users = Counter(parent.index for node in nodes for parent in node.parents)
    new: dict[int, Node] = {}
    for node in nodes:
        if node.op is None:
            new[node.index] = node
            continue
        args, kwargs = (_replace(part, new) for part in (node.args, node.kwargs))
        alone = [i for i, a in enumerate(node.args) if isinstance(a, Node) and users[a.index] == 1]
        better = rules[node.op](tape, node, args, alone) if node.op in rules and not _alpha(kwargs) else None
        new[node.index] = better or tape.linear(node.value, node.op, *args, **kwargs)
    return new[out.index]


def _alpha(kwargs: dict) -> bool:
    return kwargs.get("alpha", 1) != 1


def _replace(tree: Any, new: dict[int, Node]) -> Any:
    return replace(tree, Node, lambda node: new.get(node.index, node))


def _is_linear(x: Any) -> bool:
    return isinstance(x, Node) and x.level == LINEAR


def _is_constant(x: Any) -> bool:
    return isinstance(x, Node) and x.level < LINEAR and isinstance(x.value, Tensor)


# ---- cleaning: one operation at a time


def _add(tape: Tape, node: Node, args: tuple, alone: list[int]) -> Node | None:
    """Without a term that is zero; any other constant would not be linear."""
    a, b = args
    if _is_linear(a) and _is_linear(b):
        return None
    one, other = (a, b) if _is_linear(a) else (b, a)
    if bool(other.value.any()) if isinstance(other, Node) else other != 0:
        raise NotLinear(f"{node.op} adds a constant to the derivative")
    if one.value.dtype != node.value.dtype:
        return None
    if one is b and node.op is aten.sub.Tensor:
        one = tape.linear(one.value, aten.neg.default, one)
    return _expand(tape, one, node)


def _expand(tape: Tape, x: Node, node: Node) -> Node:
    shape = node.value.shape
    return x if x.value.shape == shape else tape.linear(node.value, aten.expand.default, x, list(shape))


def _to_copy(tape: Tape, node: Node, args: tuple, alone: list[int]) -> Node | None:
    same = all(getattr(args[0].value, a) == getattr(node.value, a) for a in ("dtype", "device", "layout"))
    return args[0] if same else None


def _copy_into(tape: Tape, node: Node, args: tuple, alone: list[int]) -> Node | None:
    source = args[1]
    if not _is_linear(source) or source.value.dtype != node.value.dtype or source.value.device != node.value.device:
        return None
    return _expand(tape, source, node)


def _reshape(tape: Tape, node: Node, args: tuple, alone: list[int]) -> Node | None:
    x = args[0]
    while x.op is torch.reshape:
        x = x.args[0]
    same = x.value.shape == node.value.shape
    return x if same else tape.linear(node.value, torch.reshape, x, list(node.value.shape))


def _same_shape(tape: Tape, node: Node, args: tuple, alone: list[int]) -> Node | None:
    return args[0] if args[0].value.shape == node.value.shape else None


def _elementwise(tape: Tape, node: Node, args: tuple, alone: list[int]) -> Node | None:
    """g times an elementwise derivative: multiplication by a constant, which is the operation's result for ones."""
    g, *rest = args
    points = [a for a in rest if _is_constant(a)]
    if not _is_linear(g) or any(map(_is_linear, rest)) or not points:
        raise NotLinear(f"{node.op} is not linear")
    slope = tape.constant(node.op, tape.constant(aten.ones_like.default, points[0]), *rest, **node.kwargs)
    return _product(tape, node, g, slope)


def _mul(tape: Tape, node: Node, args: tuple, alone: list[int]) -> Node | None:
    """The constant comes second; the constants of two products in a row are multiplied if they are static."""
    if all(map(_is_linear, args)):
        raise NotLinear("the derivative holds a product of two tangents")
    x, c = args if _is_linear(args[0]) else args[::-1]
    return _product(tape, node, x, c) if isinstance(c, Node) else None


def _product(tape: Tape, node: Node, x: Node, c: Node) -> Node | None:
    while c.op is aten.expand.default and x.value.shape == node.value.shape:
        c = c.args[0]
    if torch.broadcast_shapes(x.value.shape, c.value.shape) != x.value.shape or x.value.dtype != node.value.dtype:
        return None
    first = x.args[1] if x.op is aten.mul.Tensor else None
    if _is_constant(first) and first.level == c.level == STATIC and first.value.shape == c.value.shape:
        return tape.linear(node.value, aten.mul.Tensor, x.args[0], tape.constant(aten.mul.Tensor, first, c))
    return tape.linear(node.value, aten.mul.Tensor, x, c)


def _div(tape: Tape, node: Node, args: tuple, alone: list[int]) -> Node | None:
    if _is_linear(args[1]):
        raise NotLinear("the derivative holds a quotient of two tangents")
    if not _is_constant(args[1]) or args[0].value.dtype != args[1].value.dtype:
        return None
    return _product(tape, node, args[0], tape.constant(aten.reciprocal.default, args[1]))


def _getitem(tape: Tape, node: Node, args: tuple, alone: list[int]) -> Node | None:
    rule = {
        aten.convolution_backward.default: _convolution_backward,
        aten.native_batch_norm_backward.default: _batch_norm_backward,
    }.get(args[0].op)
    return rule(tape, node, args[0].args) if rule and args[1] == 0 else None


def _convolution_backward(tape: Tape, node: Node, args: tuple) -> Node | None:
    """With respect to its input: the convolution with the same weights, transposed."""
    g, x, weight, _, stride, padding, dilation, transposed, _, groups, _ = args
    if not _is_linear(g) or _is_linear(x) or _is_linear(weight):
        return None
    sizes = list(
        zip(
            g.value.shape[2:],
            x.value.shape[2:],
            weight.value.shape[2:],
            *(_each(t, weight.value.ndim - 2) for t in (stride, padding, dilation)),
            strict=True,
        )
    )
    if transposed:
        beyond = [0] * len(sizes)
        if any(_windows(m, *geometry) != n for m, n, *geometry in sizes):
            return None
    else:
        beyond = [n - ((m - 1) * s - 2 * p + d * (size - 1) + 1) for m, n, size, s, p, d in sizes]
    return tape.linear(
        node.value, aten.convolution.default, g, weight, None, stride, padding, dilation, not transposed, beyond, groups
    )


def _windows(n: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """How often a kernel fits; not the size that a transposed convolution came from, if its output was padded a lot."""
    return (n + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def _each(numbers: Sequence[int], n: int) -> list[int]:
    return list(numbers) * (n if len(numbers) == 1 else 1)


def _batch_norm_backward(tape: Tape, node: Node, args: tuple) -> Node | None:
    """In evaluation mode: a constant scale per channel, made as forward mode makes it, so that they share it."""
    g, _, weight, _, var, _, _, train, epsilon, _ = args
    if not _is_linear(g) or train or var is None:
        return None
    shape = [1, -1] + [1] * (g.value.ndim - 2)
    scale = tape.constant(aten.reciprocal.default, tape.constant(torch.sqrt, tape.constant(torch.add, var, epsilon)))
    scale = tape.constant(torch.reshape, scale, shape)
    if weight is not None:
        scale = tape.constant(torch.mul, scale, tape.constant(torch.reshape, weight, shape))
    return _product(tape, node, g, scale)


# ---- joining: operations that are used once


def _join_mul(tape: Tape, node: Node, args: tuple, alone: list[int]) -> Node | None:
    x, c = args
    if 0 not in alone or not _is_constant(c):
        return None
    if x.op is aten.mul.Tensor and _is_constant(x.args[1]) and x.args[1].value.shape == c.value.shape:
        pair = sorted((x.args[1], c), key=lambda n: n.index)  # in one order, so that both directions share it
        return tape.linear(node.value, aten.mul.Tensor, x.args[0], tape.constant(aten.mul.Tensor, *pair))
    if x.op is aten.convolution.default and _is_linear(x.args[0]) and _is_per_channel(c, x):
        scaled = _scale(tape, x.args[1], c, 1 if x.args[6] else 0, x.args[8] if x.args[6] else 1)
        return scaled and tape.linear(node.value, x.op, x.args[0], scaled, *x.args[2:])
    return None


def _join_convolution(tape: Tape, node: Node, args: tuple, alone: list[int]) -> Node | None:
    x, weight, bias, *rest = args
    if bias is not None:
        raise NotLinear("a convolution adds a bias to the derivative")
    if not _is_constant(weight) or not (x.op is aten.mul.Tensor and _is_constant(x.args[1])):
        return None
    if not _is_per_channel(x.args[1], x):
        return None
    scaled = _scale(tape, weight, x.args[1], 0 if rest[3] else 1, 1 if rest[3] else rest[5])
    return scaled and tape.linear(node.value, node.op, x.args[0], scaled, None, *rest)


def _join_gather(tape: Tape, node: Node, args: tuple, alone: list[int]) -> Node | None:
    """A mask after a choice of elements, as max pooling makes it in forward mode, and not before: they are fewer."""
    x, dimension, places = args
    if 0 not in alone or not _is_linear(x) or not _is_constant(places) or places.value.numel() >= x.value.numel():
        return None
    masked = x.args[0] if x.op is torch.reshape else x
    if masked.op is not aten.threshold_backward.default:
        return None
    g, point, threshold = masked.args
    if not _is_constant(point) or point.value.shape != masked.value.shape:
        return None
    shape = list(x.value.shape)
    chosen = tape.linear(node.value, node.op, tape.linear(x.value, torch.reshape, g, shape), dimension, places)
    points = tape.constant(node.op, tape.constant(torch.reshape, point, shape), dimension, places)
    return tape.linear(node.value, masked.op, chosen, points, threshold)


def _join_threshold(tape: Tape, node: Node, args: tuple, alone: list[int]) -> Node | None:
    """The same for its transpose: the mask before the backward pass of max pooling."""
    x, point, threshold = args
    if x.op is not aten.max_pool2d_with_indices_backward.default or 0 not in alone:
        return None
    if not _is_constant(point) or point.value.shape != x.value.shape:
        return None
    g, places = x.args[0], x.args[-1]
    if not _is_linear(g) or not _is_constant(places) or g.value.numel() >= x.value.numel():
        return None
    flat = [[*a.value.shape[:-2], a.value.shape[-2:].numel()] for a in (point, places)]
    point, places = (tape.constant(torch.reshape, a, shape) for a, shape in zip((point, places), flat, strict=True))
    chosen = tape.constant(aten.gather.default, point, -1, places)
    chosen = tape.constant(torch.reshape, chosen, list(g.value.shape))
    return tape.linear(node.value, x.op, tape.linear(g.value, node.op, g, chosen, threshold), *x.args[1:])


def _is_per_channel(c: Node, x: Node) -> bool:
    shape = [1] * (x.value.ndim - c.value.ndim) + list(c.value.shape)
    return c.level == STATIC and shape == [1, x.value.shape[1]] + [1] * (x.value.ndim - 2)


def _scale(tape: Tape, weight: Node, c: Node, dimension: int, groups: int) -> Node | None:
    """The weights times the scale of their channels in a dimension; not where groups share that dimension."""
    if groups != 1 or weight.level != STATIC:
        return None
    shape = [1] * weight.value.ndim
    shape[dimension] = -1
    return tape.constant(torch.mul, weight, tape.constant(torch.reshape, c, shape))


# ---- layout and lowering: what convolutions in 2-D on the CPU do fastest


def _nhwc(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _wants_nhwc(node: Node) -> bool:
    value = node.value
    return (
        isinstance(value, Tensor)
        and value.ndim == 4
        and value.device.type == "cpu"
        and value.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
    )


def _lay_out(tape: Tape, out: Node) -> Node:
    """Keep weights, and constants that meet the result of a convolution, in the layout ``channels_last``."""
    nhwc: set[int] = set()
    new: dict[int, Node] = {}
    for node in needed([out], above=IMAGE):
        args = _replace(node.args, new)
        follows = node.op in _KEEP_LAYOUT and any(_is_linear(a) and a.index in nhwc for a in args)
        if node.op is aten.convolution.default and _wants_nhwc(node) and args[1].level == STATIC:
            args = (args[0], tape.constant(_nhwc, args[1]), *args[2:])
            follows = True
        elif follows:
            args = tuple(
                tape.constant(_nhwc, a) if _is_constant(a) and a.value.ndim == 4 and a.level == IMAGE else a
                for a in args
            )
        kwargs = _replace(node.kwargs, new)
        new[node.index] = tape.linear(node.value, node.op, *args, **kwargs) if node.op else node
        if follows:
            nhwc.add(new[node.index].index)
    return new[out.index]


def _lower_convolution(tape: Tape, node: Node, args: tuple, alone: list[int]) -> Node | None:
    x, weight, _, stride, padding, dilation, transposed, _, groups = args
    if not _wants_nhwc(node) or weight.level != STATIC:
        return None
    _, channels, *size = node.value.shape
    kernel = list(weight.value.shape[2:])
    stride, padding, dilation = (_each(t, 2) for t in (stride, padding, dilation))
    fits = list(map(_windows, size, kernel, stride, padding, dilation)) == list(x.value.shape[2:])
    if transposed and groups == 1 and channels <= _FEW_CHANNELS and fits:
        matrix = tape.constant(torch.t, tape.constant(torch.reshape, weight, [weight.value.shape[0], -1]))
        return tape.linear(node.value, _convolve_transposed, matrix, x, size, kernel, dilation, padding, stride)
    return tape.linear(node.value, node.op, tape.linear(x.value, _nhwc, x), *args[1:])


def _lower_add(tape: Tape, node: Node, args: tuple, alone: list[int]) -> Node | None:
    """Both terms in one layout, since what a convolution reads is converted for it anyway."""
    if not (all(map(_is_linear, args)) and _wants_nhwc(node)):
        return None
    converted = [_is_laid_out(a) for a in args]
    if converted[0] == converted[1] or any(a.value.shape != node.value.shape for a in args):
        return None
    args = [a if done else tape.linear(a.value, _nhwc, a) for a, done in zip(args, converted, strict=True)]
    return tape.linear(node.value, node.op, *args)


def _lower_gather(tape: Tape, node: Node, args: tuple, alone: list[int]) -> Node | None:
    """The choice that max pooling makes in forward mode, by places in the layout in which a convolution left `x`."""
    x, dimension, places = args
    source = x.args[0] if x.op is torch.reshape else x
    if not (_is_laid_out(source) and len(source.value) == 1 and dimension in (-1, 2) and _is_constant(places)):
        return None
    channels = source.value.shape[1]
    if x.value.ndim != 3 or x.value.shape[1] != channels or places.value.shape[1] != channels:
        return None
    return tape.linear(node.value, _take_nhwc, source, tape.constant(_places_nhwc, places), channels)


def _places_nhwc(places: Tensor) -> Tensor:
    """Of places within each channel, (1, C, n)."""
    channels = places.shape[1]
    return (places.mT * channels + torch.arange(channels, device=places.device)).reshape(-1)


def _take_nhwc(x: Tensor, places: Tensor, channels: int) -> Tensor:
    """Elements of (1, C, H, W), as (1, C, n)."""
    return x.permute(0, 2, 3, 1).reshape(-1).index_select(0, places).reshape(1, -1, channels).mT


def _lower_threshold(tape: Tape, node: Node, args: tuple, alone: list[int]) -> Node | None:
    """With the mask in the layout of what was taken."""
    x, point, threshold = args
    if x.op is not _take_nhwc or not _is_constant(point):
        return None
    return tape.linear(node.value, node.op, x, tape.constant(_as_taken, point), threshold)


def _as_taken(x: Tensor) -> Tensor:
    """(1, C, n) in the layout of `_take_nhwc`."""
    return x.mT.contiguous().mT


def _is_laid_out(x: Node) -> bool:
    """Whether a convolution made this tensor's layout."""
    seen: set[int] = set()
    stack = [x]
    while stack:
        x = stack.pop()
        if x.op in (_nhwc, aten.convolution.default) and _wants_nhwc(x):
            return True
        if x.op in _KEEP_LAYOUT and x.index not in seen:
            seen.add(x.index)
            stack.extend(filter(_is_linear, x.args))
    return False


def _guard(tape: Tape, out: Node) -> Node:
    """Give a contiguous tensor to operations that may rely on it, where a layout has been changed by `_lay_out`."""
    changed: set[int] = set()
    new: dict[int, Node] = {}
    for node in needed([out], above=IMAGE):
        args, kwargs = _replace(node.args, new), _replace(node.kwargs, new)
        hit = any(p.index in changed or (p.level < LINEAR and _is_nhwc(p.value)) for p in node.parents)
        if hit and not _takes_any_layout(node.op):
            args = tuple(
                tape.linear(a.value, Tensor.contiguous, a) if _is_linear(a) and isinstance(a.value, Tensor) else a
                for a in args
            )
            hit = False
        new[node.index] = tape.linear(node.value, node.op, *args, **kwargs) if node.op else node
        if hit or node.op is _nhwc:
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
    x, indices = (_before_expansion(a) for a in (x, indices))
    if not _is_linear(g) or len(g.value) == 1 or not (len(x.value) == len(indices.value) == 1):
        return None
    return tape.linear(node.value, _unpool, g, x, *geometry, indices)


def _before_expansion(x: Node) -> Node:
    """The constant that was repeated for each vector of a block."""
    shape = [1, *x.value.shape[1:]]
    at = x
    while at.level < LINEAR and at.op in (aten.expand.default, torch.reshape, Tensor.contiguous):
        at = at.args[0]
        if list(at.value.shape) == shape:
            return at
    return x


def _unpool(g: Tensor, *args: Any) -> Tensor:
    return torch.cat([aten.max_pool2d_with_indices_backward.default(one, *args) for one in g.split(1)])


_CLEAN: dict[Callable, Rule] = {
    aten.add.Tensor: _add,
    aten.sub.Tensor: _add,
    aten.mul.Tensor: _mul,
    aten.div.Tensor: _div,
    aten.copy.default: _copy_into,
    aten._to_copy.default: _to_copy,
    aten.expand.default: _same_shape,
    operator.getitem: _getitem,
    torch.reshape: _reshape,
    **dict.fromkeys(
        (
            aten.gelu_backward.default,
            aten.silu_backward.default,
            aten.elu_backward.default,
            aten.mish_backward.default,
            aten.softplus_backward.default,
            aten.hardtanh_backward.default,
            aten.hardswish_backward.default,
            aten.hardsigmoid_backward.default,
            aten.leaky_relu_backward.default,
            aten.log_sigmoid_backward.default,
            aten.sigmoid_backward.default,
            aten.tanh_backward.default,
        ),
        _elementwise,
    ),
}
_JOIN: dict[Callable, Rule] = {
    aten.mul.Tensor: _join_mul,
    aten.convolution.default: _join_convolution,
    aten.gather.default: _join_gather,
    aten.threshold_backward.default: _join_threshold,
}
_KEEP_LAYOUT = {
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.mul.Tensor,
    aten.neg.default,
    aten.threshold_backward.default,
    aten.max_pool2d_with_indices_backward.default,
    aten.avg_pool2d_backward.default,
    aten.avg_pool2d.default,
}
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
    _nhwc,
    _take_nhwc,
    _unpool,
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
