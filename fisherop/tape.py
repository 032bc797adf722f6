"""A tape of the tensor operations that a function performs, for functions that are linear in one of their inputs.

What depends on that input is the *linear* part, what remains is constant: *image* where it depends on the point of
linearisation, *static* where it depends on nothing but parameters. Constants are computed once, the linear part at
every product.
"""

from __future__ import annotations

import collections
import gc
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
STATIC, IMAGE, LINEAR = range(3)
_COPIES = {aten.alias.default, aten.clone.default, aten.detach.default, aten.lift_fresh.default, aten.positive.default}
_VIEWS = {aten.view.default, aten._unsafe_view.default, aten._reshape_alias.default}
_UNINITIALISED = {aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default, aten.empty_strided.default}
_SMALL = 4096  # elements


class NotLinear(RuntimeError):
    """The operations recorded can't be replayed as a linear function."""


class Node:
    """One operation. `args` and `kwargs` hold nodes in the place of tensors; an input has the operation None."""

    __slots__ = ("args", "index", "kwargs", "level", "op", "parents", "value")

    def __init__(self, index: int, op: Callable | None, args: tuple, kwargs: dict, level: int, value: Any) -> None:
        self.index = index
        self.op = op
        self.args = args
        self.kwargs = kwargs
        self.level = level
        self.value = value  # at the image of the recording
        self.parents = [leaf for leaf in _leaves((args, kwargs)) if isinstance(leaf, Node)]


class Tape:
    """Operations in the order of their execution, each distinct one once.

    Attributes
    ----------
    reads_image : bool
        Whether Python saw a value that depends on the image, so that the tape may hold for this image alone.
    external : set of int
        The addresses of the tensors that no operation made: parameters, buffers.
    """

    def __init__(self) -> None:
        self.reads_image = False
        self.external: set[int] = set()
        self._known: dict[Any, Node] = {}
        self._of_tensor: dict[int, Node] = {}
        self._sharing: collections.defaultdict[int, set[int]] = collections.defaultdict(set)
        self._stale: set[int] = set()
        self._inputs: list[tuple[Tensor, Node]] = []
        self._alive: list[Tensor] = []
        self._count = 0

    def input(self, value: Tensor, level: int) -> Node:
        node = self._node(None, (), {}, level, value)
        self._inputs.append((value, node))
        return self._remember(value, node)

    def constant(self, op: Callable, *args: Any, **kwargs: Any) -> Node:
        """The node of an operation on constants, executed here."""
        key = _key(op, args, kwargs)
        if key not in self._known:
            value, level = op(*_values(args), **_values(kwargs)), _level((args, kwargs))
            if level == STATIC:
                return self._known.setdefault(key, self.static(value))
            self._known[key] = self._node(op, args, kwargs, level, value)
        return self._known[key]

    def linear(self, like: Any, op: Callable, *args: Any, **kwargs: Any) -> Node:
        """The node of an operation on the linear part, whose result has the shape and dtype of `like`."""
        key = _key(op, args, kwargs)
        if key not in self._known:
            self._known[key] = self._node(op, args, kwargs, LINEAR, like)
        return self._known[key]

    def record(self, function: Callable[[], Any]) -> Any:
        """Run a function; its operations go on the tape. Return its result with nodes in the place of tensors."""
        collects = gc.isenabled()
        gc.disable()  # nodes hold no cycles, and their number would start a search through all that PyTorch holds
        try:
            with _Recorder(self):
                out = function()
            return replace(out, Tensor, self._of)
        finally:
            if collects:
                gc.enable()
            self._of_tensor = {id(t): node for t, node in self._inputs}
            self._alive.clear()
            self._sharing.clear()
            self._stale.clear()

    def _node(self, op: Callable | None, args: tuple, kwargs: dict, level: int, value: Any) -> Node:
        self._count += 1
        return Node(self._count, op, args, kwargs, level, value)

    def _remember(self, tensor: Tensor, node: Node) -> Node:
        if id(tensor) not in self._of_tensor:
            self._alive.append(tensor)  # or another tensor might get its id
            self._sharing[tensor.untyped_storage()._cdata].add(id(tensor))
        self._of_tensor[id(tensor)] = node
        return node

    def _of(self, tensor: Tensor) -> Node:
        """The node of a tensor; one that no operation on the tape made is a constant."""
        if id(tensor) in self._stale:
            raise NotLinear("a tensor is read that was changed in place through a view of it")
        if id(tensor) not in self._of_tensor:
            if not tensor._is_zerotensor() and tensor.device.type != "meta":
                self.external.add(tensor.untyped_storage().data_ptr())
            self._remember(tensor, self.static(tensor.detach()))
        return self._of_tensor[id(tensor)]

    def static(self, value: Tensor) -> Node:
        """The node of a constant; equal ones share it, by place, or by value if they are small."""
        if value._is_zerotensor():
            value = torch.zeros((), dtype=value.dtype, device=value.device).expand(value.shape)
        if value.numel() <= _SMALL and value.device.type == "cpu" and value.layout == torch.strided:
            value = value.clone()  # of its own, in case the operation after next changes it in place
            flat = value.resolve_conj().resolve_neg().contiguous().view(-1)
            place = flat.view(torch.uint8).numpy().tobytes() if value.numel() else b""
        else:
            place = id(value) if value.layout != torch.strided else (value.data_ptr(), value.stride())
        key = value.dtype, value.device, value.shape, place
        if key not in self._known:
            self._known[key] = self._node(None, (), {}, STATIC, value)
        return self._known[key]

    def _append(self, op: Callable, args: tuple, kwargs: dict, out: Any) -> None:
        nodes = replace((args, kwargs), Tensor, self._of)
        level = _level(nodes)
        tensors = [leaf for leaf in _leaves(out) if isinstance(leaf, Tensor)]
        if torch.Tag.nondeterministic_seeded in op.tags:
            raise NotLinear(f"{op} draws random numbers")
        seen = _level_seen(op, args, nodes[0], level, tensors)
        if seen == LINEAR:
            raise NotLinear(f"{op} reads values of the derivative")
        self.reads_image = self.reads_image or seen == IMAGE
        if not tensors:
            return
        if (op in _COPIES or op.is_view) and isinstance(out, Tensor) and _same_layout(args[0], out):
            self._remember(out, nodes[0][0])
            return
        changes = op._schema.is_mutable
        if op in _VIEWS:  # a view may not fit where a copy before it is left out
            op, nodes = torch.reshape, ((nodes[0][0], list(out.shape)), {})
        elif op is aten.clone.default and out.is_contiguous() and not (args[0].is_conj() or args[0].is_neg()):
            op, nodes = Tensor.contiguous, ((nodes[0][0],), {})
        elif op in (aten.as_strided.default, aten.as_strided_scatter.default):
            op, nodes = self._as_strided(op, args, nodes[0], out)
        elif changes:
            op = self._functional(op, args)
        key = _key(op, *nodes)
        node = self._known.get(key)
        if node is None:
            static = level == STATIC and isinstance(out, Tensor) and op not in _UNINITIALISED
            node = self._known[key] = self.static(out.detach()) if static else self._node(op, *nodes, level, out)
        if isinstance(out, Tensor):
            self._remember(out, node)
            if changes:
                self._change_views(out, node)
        else:
            for i, part in enumerate(out):
                if isinstance(part, Tensor):
                    key = _key(operator.getitem, (node, i), {})
                    if key not in self._known:
                        self._known[key] = self._node(operator.getitem, (node, i), {}, level, part)
                    self._remember(part, self._known[key])

    def _as_strided(
        self, op: Callable, tensors: tuple, args: tuple, out: Tensor
    ) -> tuple[Callable, tuple[tuple, dict]]:
        """By indices what `as_strided` and its inverse do by places in memory, which may differ in another layout."""
        had, parts = tensors[0], 1 if op is aten.as_strided.default else 2
        size, stride, *offset = args[parts:]
        start = had.storage_offset()
        n = torch.arange(had.numel(), device=had.device)
        try:  # where in memory each element lies, and the reverse
            in_memory, elements = n.as_strided(had.shape, had.stride()).reshape(-1).sort()
            places = elements[n.as_strided(size, stride, (start if offset in ([], [None]) else offset[0]) - start)]
        except RuntimeError as error:
            raise NotLinear(f"{op} reaches beyond its argument") from error
        if not torch.equal(in_memory, n):
            raise NotLinear(f"{op} of a tensor with gaps")
        places = places.reshape(-1)
        whole = torch.equal(places, n)
        shape = list(out.shape)
        if whole:
            return torch.reshape, ((args[parts - 1], shape), {})
        return (_take if parts == 1 else _put), ((*args[:parts], self.static(places), shape), {})

    def _change_views(self, changed: Tensor, node: Node) -> None:
        """After a change in place: constants are what they are now, other views must not be read."""
        sharing = self._sharing[changed.untyped_storage()._cdata]
        for tensor in [t for t in self._alive if id(t) in sharing and t is not changed]:
            if node.level == STATIC and self._of_tensor[id(tensor)].level == STATIC:
                self._of_tensor[id(tensor)] = self.static(tensor.detach().clone())
            else:
                self._stale.add(id(tensor))

    def _functional(self, op: Callable, args: tuple) -> Callable:
        """The operation that returns what `op` writes in place."""
        changed = [i for i, a in enumerate(op._schema.arguments) if a.alias_info is not None and a.alias_info.is_write]
        if changed != [0]:
            raise NotLinear(f"{op} writes into its arguments")
        packet = getattr(aten, op._schema.name.removeprefix("aten::").removesuffix("_"), None)
        if packet is None or op._overloadname not in packet.overloads():
            raise NotLinear(f"{op} works in place")
        return getattr(packet, op._overloadname)


class _Recorder(TorchDispatchMode):
    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self._tape = tape

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is aten.slice_scatter.default and len(args) > 4 and args[4] is not None:
            args = (*args[:4], min(args[4], args[0].shape[args[2]]), *args[5:])  # vmap overflows at "to the end"
        if func is aten.mul.Scalar and args[0]._is_zerotensor():  # PyTorch would crash
            args = (torch.zeros(args[0].shape, dtype=args[0].dtype, device=args[0].device), *args[1:])
        if func._schema.is_mutable and args and isinstance(args[0], Tensor):
            node = self._tape._of(args[0])
            if node.level < LINEAR and node.value.data_ptr() == args[0].data_ptr():
                node.value = args[0].clone()  # what it was remains a constant of its own
        out = func(*args, **kwargs)
        self._tape._append(func, args, kwargs, out)
        return out


def _level_seen(op: Callable, args: tuple, nodes: tuple, level: int, tensors: list[Tensor]) -> int:
    """The level of the values that Python sees, or that the shape of the result depends on; STATIC where of none."""
    if op is aten.index.Tensor:
        masks = (torch.bool, torch.uint8)
        return _level([node for node, i in zip(nodes[1], args[1], strict=True) if i is not None and i.dtype in masks])
    sees = torch.Tag.dynamic_output_shape in op.tags or (not tensors and torch.Tag.data_dependent_output in op.tags)
    return level if sees else STATIC


def _take(x: Tensor, places: Tensor, shape: list[int]) -> Tensor:
    return x.reshape(-1).index_select(0, places).reshape(shape)


def _put(x: Tensor, source: Tensor, places: Tensor, shape: list[int]) -> Tensor:
    return x.reshape(-1).index_copy(0, places, source.reshape(-1)).reshape(shape)


def _same_layout(x: Any, y: Tensor) -> bool:
    """Whether two tensors of the same elements have them in the same order."""
    if not isinstance(x, Tensor):
        return False
    kinds = [(t.shape, t.dtype, t.device, t.layout, t.is_conj(), t.is_neg()) for t in (x, y)]
    if kinds[0] != kinds[1]:
        return False
    return all(n == 1 or s == t for n, s, t in zip(x.shape, x.stride(), y.stride(), strict=True))


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


def compile_nodes(nodes: Sequence[Node], inputs: Sequence[Node], outputs: Sequence[Node]) -> Callable[..., tuple]:
    """Python source that computes `outputs` from `inputs` by the operations of `nodes`, and frees what is used up."""
    names = {node.index: f"i{n}" for n, node in enumerate(inputs)}
    space: dict[str, Any] = {}
    lines = []
    last = {parent.index: n for n, node in enumerate(nodes) for parent in node.parents if parent.level > STATIC}
    kept = {node.index for node in outputs} | set(names)

    def spell(x: Any) -> str:
        if isinstance(x, Node) and x.index in names:
            return names[x.index]
        if isinstance(x, Node):
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
        space[op := f"k{len(space)}"] = node.op
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


def _leaves(tree: Any) -> list:
    if isinstance(tree, list | tuple):
        return [leaf for part in tree for leaf in _leaves(part)]
    if isinstance(tree, dict):
        return [leaf for part in tree.values() for leaf in _leaves(part)]
    return [tree]


def replace(tree: Any, kind: type, new: Callable[[Any], Any]) -> Any:
    """A nesting of lists, tuples and dicts with ``new(leaf)`` in the place of each leaf of a kind."""
    if isinstance(tree, kind):
        return new(tree)
    if isinstance(tree, list | tuple):
        return type(tree)(replace(part, kind, new) for part in tree)
    if isinstance(tree, dict):
        return {key: replace(part, kind, new) for key, part in tree.items()}
    return tree


def _values(tree: Any) -> Any:
    return replace(tree, Node, operator.attrgetter("value"))


def _level(tree: Any) -> int:
    return max((leaf.level for leaf in _leaves(tree) if isinstance(leaf, Node)), default=STATIC)


def _key(op: Callable, args: Any, kwargs: dict) -> tuple:
    def freeze(x: Any) -> Any:
        if isinstance(x, Node):
            return Node, x.index
        if isinstance(x, list | tuple):
            return tuple(map(freeze, x))
        return type(x), repr(x) if isinstance(x, float) else x  # 0.0 == -0.0, and nan is never found

    return op, freeze(args), tuple(sorted((key, freeze(x)) for key, x in kwargs.items()))
