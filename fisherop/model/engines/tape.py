"""A tape of the tensor operations that a function performs, for functions that are linear in one of their inputs.

What depends on that input is the *linear* part, what remains is constant: *image* where it depends on the point of
linearization, *static* where it depends on nothing but parameters. Constants are computed once, the linear part at
every product. Of all but static tensors a tape holds outlines alone, so that memory is freed as the function frees it.
"""

from __future__ import annotations

import collections
import gc
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from fisherop.model.compat import Mode
from fisherop.model.engines.nodes import (
    IMAGE,
    LINEAR,
    STATIC,
    Node,
    NotLinear,
    device_of,
    key_of,
    leaves,
    level_of,
    outline,
    replace,
    values,
)
from fisherop.model.engines.places import Place, as_slices, put, put_slices, same_layout, shared, take, take_slices
from fisherop.model.engines.writes import functional, written
from fisherop.model.sparse import parts

aten = torch.ops.aten
_COPIES = {aten.alias.default, aten.clone.default, aten.detach.default, aten.lift_fresh.default, aten.positive.default}
_SAYS_NOTHING = {  # what has the same place, or reads shapes alone; dual numbers take many of these
    aten.alias.default,
    aten.detach.default,
    aten.is_same_size.default,
    *(getattr(aten, name).default for name in ("_has_same_storage_numel",) if hasattr(aten, name)),
}
_VIEWS = {aten.view.default, aten._unsafe_view.default, aten._reshape_alias.default}
_LAZY = {aten._conj.default: aten._conj_physical.default, aten._neg_view.default: aten.neg.default}
_UNINITIALISED = {
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.empty_strided.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
}
_BY_SHAPE = {  # operations that read of a tensor nothing but its shape
    aten.full_like.default,
    aten.new_full.default,
    aten.new_ones.default,
    aten.new_zeros.default,
    aten.ones_like.default,
    aten.zeros_like.default,
    *(getattr(aten, name).default for name in ("_new_zeros_with_same_feature_meta",) if hasattr(aten, name)),
}
_ADDING = {aten.add.Tensor, aten.add_.Tensor, aten.sub.Tensor, aten.sub_.Tensor}
_RESIZING = {aten.set_, aten.resize_, aten.resize_as_}
_SMALL = 4096  # elements


class Tape:
    """Operations in the order of their execution, each distinct one once.

    A tensor is known by its place in memory. An operation in place is recorded as the one that returns what it writes;
    tensors that share that memory are given their new elements when they are next read.

    Attributes
    ----------
    reads_image : bool
        Whether Python saw a value that depends on the image, so that the tape may hold for this image alone.
    external : set of int
        The addresses of the tensors that no operation made: parameters, buffers.
    count : int
        Of nodes so far, the index of the last one.
    zeros : set of int
        The indices of nodes that depend on the image and are zero, of those that are added to the linear part.
    """

    def __init__(self) -> None:
        self.reads_image = False
        self.external: set[int] = set()
        self.zeros: set[int] = set()
        self._known: dict[Any, Node] = {}
        self.count = 0
        self._inputs: list[tuple[Tensor, Node]] = []
        self._forget()

    def _forget(self) -> None:
        """Nothing is known of any tensor, but of the inputs."""
        self._seen: list[Any] = []  # references, weak ones if possible, or another tensor might get the same place
        self._at: dict[Place, tuple[Node, int]] = {}  # the node of a place, and how many writes it knows
        self._places: collections.defaultdict[int, list[Place]] = collections.defaultdict(list)  # by storage
        self._writes: collections.defaultdict[int, list[tuple[Place, Node]]] = collections.defaultdict(list)
        self._holding: collections.defaultdict[int, dict[int, Node]] = collections.defaultdict(dict)
        for tensor, node in self._inputs:
            self._remember(tensor, node)

    def input(self, value: Tensor, level: int) -> Node:
        node = self._node(None, (), {}, level, value)
        self._inputs.append((value, node))
        return self._remember(value, node)

    def constant(self, op: Callable, *args: Any, like: Tensor | None = None, **kwargs: Any) -> Node:
        """The node of an operation on constants; it is executed here where they are static.

        `like` outlines the result of an elementwise one, for which PyTorch would first load ``torch._dynamo``, in
        seconds.
        """
        key = key_of(op, args, kwargs)
        node = self._known.get(key)
        if node is None:
            level, given = level_of((args, kwargs)), values((args, kwargs))
            if level == STATIC:
                return self._known.setdefault(key, self.static(op(*given[0], **given[1])))
            device = next(device_of(leaf) for leaf in leaves(given) if isinstance(leaf, Tensor))
            given = replace(given, Tensor, outline)
            value = op(*given[0], **given[1]) if like is None else like
            value = replace(value, Tensor, lambda t: outline(t, device))
            node = self._known[key] = self._node(op, args, kwargs, level, value)
        return node

    def linear(self, like: Any, op: Callable, *args: Any, **kwargs: Any) -> Node:
        """The node of an operation on the linear part, whose result has the shape and dtype of `like`."""
        key = key_of(op, args, kwargs)
        node = self._known.get(key)
        if node is None:
            node = self._known[key] = self._node(op, args, kwargs, LINEAR, like)
        return node

    def record(self, function: Callable[[], Any]) -> Any:
        """Run a function; its operations go on the tape. Return its result with nodes in the place of tensors."""
        collects = gc.isenabled()
        gc.disable()  # nodes hold no cycles, and their number would start a search through all that PyTorch holds
        try:
            with _Recorder(self):
                out = function()
            return replace(out, Tensor, self.of)
        finally:
            if collects:
                gc.enable()
            self._forget()

    def _node(self, op: Callable | None, args: tuple, kwargs: dict, level: int, value: Any) -> Node:
        self.count += 1
        if level > STATIC:
            value = replace(value, Tensor, lambda t: t if hasattr(t, "home") else outline(t))
        return Node(self.count, op, args, kwargs, level, value)

    def _remember(self, tensor: Tensor, node: Node) -> Node:
        place = Place.of(tensor)
        if place not in self._at:
            strided = tensor.layout == torch.strided
            self._seen.append(StorageWeakRef(tensor.untyped_storage()) if strided else tensor)
            self._places[place.storage].append(place)
        self._at[place] = node, len(self._writes[place.storage])
        if node.level == STATIC and isinstance(node.value, Tensor) and node.value.layout == torch.strided:
            self._holding[node.value.untyped_storage()._cdata][node.index] = node
        return node

    def of(self, tensor: Tensor) -> Node:
        """The node of a tensor; what no operation on the tape made is a constant."""
        place = Place.of(tensor)
        writes = self._writes[place.storage]
        if place not in self._at:
            if not self._places[place.storage]:
                if not tensor._is_zerotensor() and tensor.device.type != "meta":
                    self.external |= {part.untyped_storage().data_ptr() for part in parts(tensor)}
                return self._remember(tensor, self.static(tensor.detach()))
            # the same memory in another shape, by what no operation shows, such as an assignment to .data
            self._remember(tensor, self._seen_through(tensor, place, *self._widest(place)))
        node, seen = self._at[place]
        if seen < len(writes):
            for where, written in writes[seen:]:
                node = self._overwritten(tensor, place, node, where, written)
            self._remember(tensor, node)
        return node

    def _is_known(self, tensor: Tensor) -> bool:
        place = Place.of(tensor)
        return place in self._at and self._at[place][1] == len(self._writes[place.storage])

    def _widest(self, place: Place) -> tuple[Place, Node]:
        """The place in this storage that reaches furthest, with its node as it is now."""
        known = [p for p in self._places[place.storage] if p.kind == place.kind]
        if not known:
            raise NotLinear("memory is read as of another dtype")
        widest = max(known, key=lambda p: math.prod(p.shape))
        node, seen = self._at[widest]
        if seen < len(self._writes[place.storage]):
            raise NotLinear("memory that was changed in place is read in another shape")
        return widest, node

    def _seen_through(self, view: Tensor, place: Place, base: Place, node: Node) -> Node:
        """The node of a view of what lies at `base`."""
        if place == base:
            return node
        if node.level == STATIC:
            return self.static(view.detach())
        slices, shape = as_slices(base, place), list(place.shape)
        if slices is not None:
            return self._made(view, node.level, take_slices, node, slices, shape)
        here, there = shared(place, base)
        if len(here) < view.numel():
            raise NotLinear("a view reaches beyond what it is a view of")
        return self._made(view, node.level, take, node, self.static(there.to(view.device)), shape)

    def _overwritten(self, now: Tensor, place: Place, node: Node, where: Place, written: Node) -> Node:
        """The node of the tensor `now`, which was `node`, after `written` was written to the place `where`."""
        if place == where:
            return written
        (first, last), (start, stop) = place.extent, where.extent
        if place.kind == where.kind and (last < start or stop < first):
            return node
        if node.level == written.level == STATIC:
            return self.static(now.detach().clone())
        if place.kind != where.kind:
            raise NotLinear("a tensor is read that was changed in place through a view of another dtype")
        level, shape = max(node.level, written.level), list(place.shape)
        if (slices := as_slices(place, where)) is not None:
            box = list(place.shape)
            for d, start, stop, step in slices:
                box[d] = len(range(start, stop, step))
            return self._made(now, level, put_slices, node, written, slices, box)
        if (slices := as_slices(where, place)) is not None:
            return self._made(now, written.level, take_slices, written, slices, shape)
        here, there = (i.to(now.device) for i in shared(place, where))
        if len(here) == 0:
            return node
        if len(here) == now.numel():
            return self._made(now, written.level, take, written, self.static(there), shape)
        return self._made(now, level, put, node, written, self.static(here), self.static(there))

    def _made(self, value: Tensor, level: int, op: Callable, *args: Any) -> Node:
        """The node of an operation that was not executed, whose result is `value`."""
        key = key_of(op, args, {})
        node = self._known.get(key)
        if node is None:
            node = self._known[key] = self._node(op, args, {}, level, value)
        return node

    def static(self, value: Tensor) -> Node:
        """The node of a constant; equal ones share it, by place, or by value if they are small."""
        if value._is_zerotensor():
            value = torch.zeros((), dtype=value.dtype, device=value.device).expand(value.shape)
        if value.numel() <= _SMALL and value.device.type == "cpu" and value.layout == torch.strided:
            value = value.clone()  # of its own, in case the operation after next changes it in place
            flat = value.resolve_conj().resolve_neg().reshape(-1)
            flat = torch.empty(flat.shape, dtype=flat.dtype, device="cpu").copy_(flat)  # one may keep any stride
            key = value.dtype, value.device, value.shape, flat.view(torch.uint8).numpy().tobytes()
        else:
            key = Place.of(value), value.device
        node = self._known.get(key)
        if node is None:
            node = self._known[key] = self._node(None, (), {}, STATIC, value)
        return node

    def keep_values(self, tensor: Tensor) -> None:
        """Before an operation in place: give nodes whose value lies in this memory a copy of their own."""
        held = self._holding.pop(Place.of(tensor).storage, {})
        for node in held.values():
            key = Place.of(node.value), node.value.device
            if self._known.get(key) is node:
                del self._known[key]
            node.value = node.value.clone()

    def append(self, op: Any, args: tuple, kwargs: dict, nodes: tuple, out: Any) -> None:
        """Record an operation that was executed; `nodes` are those of its arguments, from before."""
        level = level_of(nodes)
        tensors = [leaf for leaf in leaves(out) if isinstance(leaf, Tensor)]
        if torch.Tag.nondeterministic_seeded in op.tags:
            if level > STATIC:
                raise NotLinear(f"{op} draws random numbers by values of the image")
            for tensor in tensors:  # the same at every call, since a model that is random is refused
                self._write(tensor, self.static(tensor.detach().clone()))
            return
        seen = _level_seen(op, args, nodes[0], level, tensors)
        if seen == LINEAR:
            raise NotLinear(f"{op} reads values of the derivative")
        self.reads_image = self.reads_image or seen == IMAGE
        if op in _ADDING and level == LINEAR:
            self._note_zeros(nodes[0], args)
        if not tensors and not op._schema.is_mutable:  # what works in place may return nothing
            return
        if op in _BY_SHAPE or op in _UNINITIALISED:
            if op in _UNINITIALISED or level == STATIC:
                value = out
            else:  # all elements are the same
                value = out.reshape(-1)[0].clone().expand(out.shape) if out.numel() else out
            self._remember(out, self._node(None, (), {}, STATIC, value))
            return
        if op._schema.is_mutable:
            self._append_in_place(op, args, kwargs, nodes, level, out)
            return
        if (
            (op in _COPIES or (op.is_view and op not in _LAZY))
            and isinstance(out, Tensor)
            and same_layout(args[0], out)
        ):
            self._remember(out, nodes[0][0])
            return
        if op.is_view and isinstance(out, Tensor) and self._is_known(out):
            return
        if op is aten.as_strided.default:
            self._remember(out, self._seen_through(out, Place.of(out), Place.of(args[0]), nodes[0][0]))
            return
        if op in _LAZY:  # done at once, so that no operation meets what is left to do
            op = _LAZY[op]
        elif op in _VIEWS:  # a view may not fit where a copy before it is left out
            op, nodes = torch.reshape, ((nodes[0][0], list(out.shape)), {})
        elif op is aten.clone.default and out.is_contiguous():
            op, nodes = Tensor.contiguous, ((nodes[0][0],), {})
        node = self._result(op, nodes, level, out)
        if isinstance(out, Tensor):
            self._remember(out, node)
            return
        for i, part in enumerate(out):
            if isinstance(part, Tensor):
                self._remember(part, self._result(operator.getitem, ((node, i), {}), level, part, known=True))

    def _result(self, op: Callable, nodes: tuple[Any, Any], level: int, out: Any, known: bool = False) -> Node:
        key = key_of(op, *nodes)
        node = self._known.get(key)
        if node is None:
            static = level == STATIC and isinstance(out, Tensor) and not known
            # of its own, since an operation in place may change the shape of `out`
            node = self.static(out.resolve_conj().resolve_neg().detach()) if static else None
            node = self._known[key] = node or self._node(op, *nodes, level, out)
        return node

    def _note_zeros(self, nodes: tuple, args: tuple) -> None:
        for node, value in zip(nodes, args, strict=True):
            if isinstance(node, Node) and node.level == IMAGE and not value.any():
                self.zeros.add(node.index)

    def _append_in_place(self, op: Any, args: tuple, kwargs: dict, nodes: tuple, level: int, out: Any) -> None:
        """Record the operation that returns what this one writes into one of its arguments."""
        targets = written(op, args, kwargs)
        if len(targets) != 1 or op.overloadpacket in _RESIZING:
            raise NotLinear(f"{op} works in place, in a way that can't be followed")
        ((where, target),) = targets.items()
        if (args[where] if isinstance(where, int) else kwargs[where]) is not target:
            raise NotLinear(f"{op} works in place on a list, which can't be followed")
        if level == STATIC:
            node = self.static(target.detach().clone())
        else:
            same = all(t.dtype == target.dtype for t in leaves((args, kwargs)) if isinstance(t, Tensor))
            node = self._result(functional(op, where, same), nodes, level, target)
        if torch.Tag.inplace_view in op.tags:
            self._remember(target, node)
        else:
            self._write(target, node)

    def _write(self, target: Tensor, node: Node) -> None:
        place = Place.of(target)
        self._writes[place.storage].append((place, node))
        self._remember(target, node)


class _Recorder(Mode):
    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self._tape = tape

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _SAYS_NOTHING and all(a.layout == torch.strided for a in args):
            return func(*args, **kwargs)
        if func is aten.slice_scatter.default and len(args) > 4 and args[4] is not None:
            args = (*args[:4], min(args[4], args[0].shape[args[2]]), *args[5:])  # vmap overflows at "to the end"
        if func is aten.mul.Scalar and args[0]._is_zerotensor():  # PyTorch would crash
            args = (torch.zeros(args[0].shape, dtype=args[0].dtype, device=args[0].device), *args[1:])
        nodes = replace((args, kwargs), Tensor, self._tape.of)
        if func._schema.is_mutable:
            for tensor in written(func, args, kwargs).values():
                self._tape.keep_values(tensor)
        out = func(*args, **kwargs)
        self._tape.append(func, args, kwargs, nodes, out)
        return out


def _level_seen(op: Any, args: tuple, nodes: tuple, level: int, tensors: list[Tensor]) -> int:
    """The level of the values that Python sees, or that the shape of the result depends on; STATIC where of none."""
    if op is aten.index.Tensor:
        masks = (torch.bool, torch.uint8)
        return level_of([node for node, i in zip(nodes[1], args[1], strict=True) if i is not None and i.dtype in masks])
    sees = torch.Tag.dynamic_output_shape in op.tags or (not tensors and torch.Tag.data_dependent_output in op.tags)
    return level if sees else STATIC
