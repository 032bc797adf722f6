"""Operations as nodes of a graph, and Python functions made of them."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

STATIC, IMAGE, LINEAR = range(3)
_ATOMS = {int, bool, float, str, type(None)}  # most of what arguments hold, and nothing that is ever replaced


class NotLinear(RuntimeError):
    """The operations recorded can't be replayed as a linear function."""


class Node:
    """One operation. `args` and `kwargs` hold nodes in the place of tensors; an input has the operation None."""

    __slots__ = ("args", "index", "kwargs", "level", "op", "parents", "value")

    def __init__(self, index: int, op: Any, args: tuple, kwargs: dict, level: int, value: Any) -> None:
        self.index = index
        self.op = op  # an operation of PyTorch's, or a function of ours
        self.args = args
        self.kwargs = kwargs
        self.level = level
        self.value = value  # of a constant; otherwise outlines of tensors
        self.parents = [leaf for leaf in leaves((args, kwargs) if kwargs else args) if type(leaf) is Node]


def needed(outputs: Iterable[Node], above: int = -1) -> list[Node]:
    """The nodes that the outputs are computed from, in order, of levels greater than `above`."""
    found: dict[int, Node] = {}
    stack = [node for node in outputs if node.level > above]
    while stack:
        node = stack.pop()
        if node.index not in found:
            found[node.index] = node
            stack.extend(parent for parent in node.parents if parent.level > above)
    return [found[index] for index in sorted(found)]


def early(nodes: Iterable[Node], recorded: int) -> list[Node]:
    """Nodes in an order by which what rules made after the recording comes as soon as it can, so that memory is freed.

    Parameters
    ----------
    nodes : iterable of Node
        In the order of their indices.
    recorded : int
        The last index of the recording.
    """
    places: dict[int, int] = {}
    for node in nodes:
        made = max((places.get(parent.index, 0) for parent in node.parents), default=0)
        places[node.index] = node.index if node.index <= recorded else made
    return sorted(nodes, key=lambda node: (places[node.index], node.index))


def compile_nodes(
    nodes: Sequence[Node],
    inputs: Sequence[Node],
    outputs: Sequence[Node],
    instead: Mapping[int, Callable] | None = None,
) -> Callable[..., tuple]:
    """Python source that computes `outputs` from `inputs` by the operations of `nodes`, and frees what is used up.

    `instead` are the operations to use for some of the nodes, by index.
    """
    instead = instead or {}
    names = {node.index: f"i{n}" for n, node in enumerate(inputs)}
    space: dict[str, Any] = {}
    lines = []
    last = {parent.index: n for n, node in enumerate(nodes) for parent in node.parents if parent.level > STATIC}
    kept = {node.index for node in outputs} | set(names)

    def spell(x: Any) -> str:
        if type(x) is Node:
            if x.index in names:
                return names[x.index]
            x = x.value
        if isinstance(x, list | tuple):
            inner = "".join(spell(y) + ", " for y in x)
            return f"[{inner}]" if isinstance(x, list) else f"({inner})"
        if x is None or isinstance(x, bool | int | str) or (isinstance(x, float) and math.isfinite(x)):
            return repr(x)
        space[name := f"k{len(space)}"] = x
        return name

    for n, node in enumerate(nodes):
        if node.index in names:
            continue
        space[op := f"k{len(space)}"] = instead.get(node.index, node.op)
        names[node.index] = f"t{n}"
        arguments = [spell(a) for a in node.args] + [f"{key}={spell(a)}" for key, a in node.kwargs.items()]
        lines.append(f"t{n} = {op}({', '.join(arguments)})")
        dead = sorted({names[p.index] for p in node.parents if last.get(p.index) == n and p.index not in kept})
        if dead:
            lines.append(f"del {', '.join(dead)}")
    lines.append(f"return {spell(tuple(outputs))}")
    source = f"def run({', '.join(names[node.index] for node in inputs)}):\n    " + "\n    ".join(lines)
    exec(source, space)  # made of the names above alone
    return space["run"]


def leaves(tree: Any) -> list:
    found: list = []
    _gather(tree, found)
    return found


def _gather(tree: Any, found: list) -> None:
    cls = type(tree)
    if cls in _ATOMS or cls is Node:
        found.append(tree)
    elif cls is tuple or cls is list or isinstance(tree, list | tuple):
        for part in tree:
            _gather(part, found)
    elif isinstance(tree, dict):
        for part in tree.values():
            _gather(part, found)
    else:
        found.append(tree)


def replace(tree: Any, kind: type | tuple[type, ...], new: Callable[[Any], Any]) -> Any:
    """A nesting of lists, tuples and dicts with ``new(leaf)`` in the place of each leaf of a kind."""
    cls = type(tree)
    if cls in _ATOMS:
        return tree
    if cls is tuple or cls is list or isinstance(tree, list | tuple):
        return cls([part if type(part) in _ATOMS else replace(part, kind, new) for part in tree])
    if isinstance(tree, kind):
        return new(tree)
    if isinstance(tree, dict):
        return {key: replace(part, kind, new) for key, part in tree.items()}
    return tree


def values(tree: Any) -> Any:
    return replace(tree, Node, operator.attrgetter("value"))


def outline(x: Tensor, device: torch.device | None = None) -> Tensor:
    """A tensor without elements that has the shape, the strides and the dtype of another; see `device_of`."""
    if x.layout != torch.strided:
        return x
    made: Any = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
    made.home = device or device_of(x)
    return made


def device_of(x: Tensor) -> torch.device:
    """Where a tensor is, or the one that this is an outline of."""
    return getattr(x, "home", x.device)


def level_of(tree: Any) -> int:
    return max((leaf.level for leaf in leaves(tree) if type(leaf) is Node), default=STATIC)


def key_of(op: Callable, args: Any, kwargs: dict) -> tuple:
    named = tuple(sorted((key, _freeze(x)) for key, x in kwargs.items())) if kwargs else ()
    return op, tuple(map(_freeze, args)), named


def _freeze(x: Any) -> Any:
    cls = type(x)
    if cls is Node:
        return x
    if cls is int or cls is bool:
        return cls, x
    if cls is float:
        return cls, repr(x)  # 0.0 == -0.0, and nan is never found
    return tuple(map(_freeze, x)) if isinstance(x, list | tuple) else (cls, x)
