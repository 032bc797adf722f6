"""Rules by which the linear part of a tape becomes cheaper, its result being the same.

This is algebra: what copies or adds zero goes, products with constants are joined, and the scale of a batch norm goes
into the convolution beside it. `fisherop.model.engines.lower` then chooses the operations that compute this fastest.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor

from fisherop.model.engines.kernels import nhwc
from fisherop.model.engines.nodes import IMAGE, LINEAR, STATIC, Node, NotLinear, device_of, needed, replace
from fisherop.model.engines.tape import Tape

aten = torch.ops.aten
Rule = Callable[[Tape, Node, tuple, list[int]], Node | None]  # tape, old node, new arguments, arguments used here alone


def simplify(tape: Tape, out: Node) -> Node:
    """An equal node, whose linear ancestors are fewer and cheaper."""
    return lay_out(tape, rewrite(tape, rewrite(tape, out, CLEAN), _JOIN))


def rewrite(tape: Tape, out: Node, rules: dict[Callable, Rule]) -> Node:
    """An equal node, each of whose linear ancestors is what the rule of its operation makes of it, if there is one."""
    nodes = needed([out], above=IMAGE)
    users = Counter([parent.index for node in nodes for parent in node.parents])
    new: dict[int, Node] = {}
    for node in nodes:
        args = new_arguments(node, new)
        rule = None if node.op is None else rules.get(node.op)
        better = None
        if rule is not None and node.kwargs.get("alpha", 1) == 1:
            alone = [i for i, a in enumerate(node.args) if isinstance(a, Node) and users[a.index] == 1]
            better = rule(tape, node, args, alone)
        put_instead(tape, node, better, args, new)
    return new.get(out.index, out)


def new_arguments(node: Node, new: dict[int, Node]) -> tuple:
    """A node's arguments, or what stands for them; the same tuple, where nothing does."""
    for parent in node.parents:
        if parent.index in new:
            return replaced(node.args, new)
    return node.args


def put_instead(tape: Tape, node: Node, better: Node | None, args: tuple, new: dict[int, Node]) -> Node:
    """What stands for a linear node from now on: a better one, or the same operation on new arguments; or itself."""
    if better is None and (args is not node.args or (node.kwargs and not args)):
        kwargs = replaced(node.kwargs, new) if node.kwargs else {}
        better = tape.linear(node.value, node.op, *args, **kwargs)  # pyright: ignore[reportArgumentType]
    if better is None or better is node:
        return node
    new[node.index] = better
    return better


def replaced(tree: Any, new: dict[int, Node]) -> Any:
    return replace(tree, Node, lambda node: new.get(node.index, node))


def is_linear(x: Any) -> bool:
    return isinstance(x, Node) and x.level == LINEAR


def is_constant(x: Any) -> TypeGuard[Node]:
    return isinstance(x, Node) and x.level < LINEAR and isinstance(x.value, Tensor)


# ---- cleaning: one operation at a time


def _add(tape: Tape, node: Node, args: tuple, alone: list[int]) -> Node | None:
    """Without a term that is zero; any other constant would not be linear."""
    a, b = args
    if is_linear(a) and is_linear(b):
        return None
    one, other = (a, b) if is_linear(a) else (b, a)
    if not _is_zero(tape, other):
        raise NotLinear(f"{node.op} adds a constant to the derivative")
    if one.value.dtype != node.value.dtype:
        return None
    if one is b and node.op is aten.sub.Tensor:
        one = tape.linear(one.value, aten.neg.default, one)
    return _expand(tape, one, node)


def _is_zero(tape: Tape, x: Any) -> bool:
    if not isinstance(x, Node):
        return x == 0
    return x.index in tape.zeros or (x.level == STATIC and not x.value.any())


def _expand(tape: Tape, x: Node, node: Node) -> Node:
    shape = node.value.shape
    return x if x.value.shape == shape else tape.linear(node.value, aten.expand.default, x, list(shape))


def _to_copy(tape: Tape, node: Node, args: tuple, alone: list[int]) -> Node | None:
    before, after = ((x.dtype, x.layout, device_of(x)) for x in (args[0].value, node.value))
    return args[0] if before == after else None


def _copy_into(tape: Tape, node: Node, args: tuple, alone: list[int]) -> Node | None:
    source = args[1]
    if not is_linear(source) or source.value.dtype != node.value.dtype:
        return None
    if device_of(source.value) != device_of(node.value):
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
    points = [a for a in rest if is_constant(a)]
    if not is_linear(g) or any(map(is_linear, rest)) or not points:
        raise NotLinear(f"{node.op} is not linear")
    ones = tape.constant(aten.ones_like.default, points[0])
    slope = tape.constant(node.op, ones, *rest, like=points[0].value, **node.kwargs)
    return _product(tape, node, g, slope)


def _mul(tape: Tape, node: Node, args: tuple, alone: list[int]) -> Node | None:
    """The constant comes second; the constants of two products in a row are multiplied if they are static."""
    if all(map(is_linear, args)):
        raise NotLinear("the derivative holds a product of two tangents")
    x, c = args if is_linear(args[0]) else args[::-1]
    return _product(tape, node, x, c) if isinstance(c, Node) else None


def _product(tape: Tape, node: Node, x: Node, c: Node) -> Node | None:
    while c.op is aten.expand.default and x.value.shape == node.value.shape:
        c = c.args[0]
    if torch.broadcast_shapes(x.value.shape, c.value.shape) != x.value.shape or x.value.dtype != node.value.dtype:
        return None
    first = x.args[1] if x.op is aten.mul.Tensor else None
    if is_constant(first) and first.level == c.level == STATIC and first.value.shape == c.value.shape:
        return tape.linear(node.value, aten.mul.Tensor, x.args[0], tape.constant(aten.mul.Tensor, first, c))
    return tape.linear(node.value, aten.mul.Tensor, x, c)


def _div(tape: Tape, node: Node, args: tuple, alone: list[int]) -> Node | None:
    if is_linear(args[1]):
        raise NotLinear("the derivative holds a quotient of two tangents")
    if not is_constant(args[1]) or args[0].value.dtype != args[1].value.dtype:
        return None
    return _product(tape, node, args[0], tape.constant(aten.reciprocal.default, args[1], like=args[1].value))


def _getitem(tape: Tape, node: Node, args: tuple, alone: list[int]) -> Node | None:
    rule = {
        aten.convolution_backward.default: _convolution_backward,
        aten.native_batch_norm_backward.default: _batch_norm_backward,
    }.get(args[0].op)
    return rule(tape, node, args[0].args) if rule and args[1] == 0 else None


def _convolution_backward(tape: Tape, node: Node, args: tuple) -> Node | None:
    """With respect to its input: the convolution with the same weights, transposed."""
    g, x, weight, _, stride, padding, dilation, transposed, _, groups, _ = args
    if not is_linear(g) or is_linear(x) or is_linear(weight):
        return None
    sizes = list(
        zip(
            g.value.shape[2:],
            x.value.shape[2:],
            weight.value.shape[2:],
            *(each(t, weight.value.ndim - 2) for t in (stride, padding, dilation)),
            strict=True,
        )
    )
    if transposed:
        beyond = [0] * len(sizes)
        if any(windows(m, *geometry) != n for m, n, *geometry in sizes):
            return None
    else:
        beyond = [n - ((m - 1) * s - 2 * p + d * (size - 1) + 1) for m, n, size, s, p, d in sizes]
    return tape.linear(
        node.value, aten.convolution.default, g, weight, None, stride, padding, dilation, not transposed, beyond, groups
    )


def windows(n: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """How often a kernel fits; not the size that a transposed convolution came from, if its output was padded a lot."""
    return (n + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def each(numbers: Sequence[int], n: int) -> list[int]:
    return list(numbers) * (n if len(numbers) == 1 else 1)


def _batch_norm_backward(tape: Tape, node: Node, args: tuple) -> Node | None:
    """In evaluation mode: a constant scale per channel, made as forward mode makes it, so that they share it."""
    g, _, weight, _, var, _, _, train, epsilon, _ = args
    if not is_linear(g) or train or var is None:
        return None
    shape = [1, -1] + [1] * (g.value.ndim - 2)
    scale = tape.constant(torch.rsqrt, tape.constant(torch.add, var, epsilon))
    if weight is not None:
        scale = tape.constant(torch.mul, scale, weight)
    return _product(tape, node, g, tape.constant(torch.reshape, scale, shape))


# ---- joining: operations that are used once


def _join_mul(tape: Tape, node: Node, args: tuple, alone: list[int]) -> Node | None:
    x, c = args
    if 0 not in alone or not is_constant(c):
        return None
    if x.op is aten.mul.Tensor and is_constant(x.args[1]) and x.args[1].value.shape == c.value.shape:
        pair = sorted((x.args[1], c), key=lambda n: n.index)  # in one order, so that both directions share it
        like = c.value if c.value.dtype == x.args[1].value.dtype else None
        return tape.linear(node.value, aten.mul.Tensor, x.args[0], tape.constant(aten.mul.Tensor, *pair, like=like))
    if x.op is aten.convolution.default and is_linear(x.args[0]) and _is_per_channel(c, x):
        scaled = _scale(tape, x.args[1], c, 1 if x.args[6] else 0, x.args[8] if x.args[6] else 1)
        return scaled and tape.linear(node.value, x.op, x.args[0], scaled, *x.args[2:])
    return None


def _join_convolution(tape: Tape, node: Node, args: tuple, alone: list[int]) -> Node | None:
    x, weight, bias, *rest = args
    if bias is not None:
        raise NotLinear("a convolution adds a bias to the derivative")
    if not is_constant(weight) or not (x.op is aten.mul.Tensor and is_constant(x.args[1])):
        return None
    if not _is_per_channel(x.args[1], x):
        return None
    scaled = _scale(tape, weight, x.args[1], 0 if rest[3] else 1, 1 if rest[3] else rest[5])
    return scaled and tape.linear(node.value, node.op, x.args[0], scaled, None, *rest)


def _join_gather(tape: Tape, node: Node, args: tuple, alone: list[int]) -> Node | None:
    """A mask after a choice of elements, as max pooling makes it in forward mode, and not before: they are fewer."""
    x, dimension, places = args
    if 0 not in alone or not is_linear(x) or not is_constant(places) or places.value.numel() >= x.value.numel():
        return None
    masked = x.args[0] if x.op is torch.reshape else x
    if masked.op is not aten.threshold_backward.default:
        return None
    g, point, threshold = masked.args
    if not is_constant(point) or point.value.shape != masked.value.shape:
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
    if not is_constant(point) or point.value.shape != x.value.shape:
        return None
    g, places = x.args[0], x.args[-1]
    if not is_linear(g) or not is_constant(places) or g.value.numel() >= x.value.numel():
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


def wants_nhwc(node: Node) -> bool:
    value = node.value
    return (
        isinstance(value, Tensor)
        and value.ndim == 4
        and device_of(value).type == "cpu"
        and value.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
    )


def lay_out(tape: Tape, out: Node) -> Node:
    """Keep weights, and constants that meet the result of a convolution, in the layout ``channels_last``."""
    laid_out: set[int] = set()
    new: dict[int, Node] = {}
    for node in needed([out], above=IMAGE):
        args = new_arguments(node, new)
        follows = node.op in KEEP_LAYOUT and any(is_linear(a) and a.index in laid_out for a in args)
        if node.op is aten.convolution.default and wants_nhwc(node) and args[1].level == STATIC:
            args = (args[0], tape.constant(nhwc, args[1]), *args[2:])
            follows = True
        elif follows:
            args = tuple(
                tape.constant(nhwc, a)
                if is_constant(a) and a.value.ndim == 4 and a.level == IMAGE and a.op is not nhwc
                else a
                for a in args
            )
        here = put_instead(tape, node, None, args, new)
        if follows:
            laid_out.add(here.index)
    return new.get(out.index, out)


CLEAN: dict[Callable, Rule] = {
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
KEEP_LAYOUT = {
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.mul.Tensor,
    aten.neg.default,
    aten.threshold_backward.default,
    aten.max_pool2d_with_indices_backward.default,
    aten.avg_pool2d_backward.default,
    aten.avg_pool2d.default,
}
