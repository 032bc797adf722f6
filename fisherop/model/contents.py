"""What a model holds at one time, by value, to tell later whether it has changed."""

from __future__ import annotations

import argparse
import array
import collections
import copy
import functools
import hashlib
import sys
import types
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fisherop.model.compat import is_wrapped
from fisherop.model.guard import _names, root
from fisherop.model.sparse import is_opaque, parts

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size, np.generic)
_SIMPLE = {bool, int, float, complex, str}
_FOREIGN = sys.stdlib_module_names | {"torch", "numpy", "scipy", "matplotlib", "fisherop"}
_SMALL = 2**12  # elements whose values are looked at
_LONG = 200  # characters
_MANY = 1000  # things in a container, of which no more than their number is looked at
_OWN = ("_parameters", "_buffers", "_modules")  # of a module, whose names are left out of paths


class Contents:
    """What a model can read when it is called, by the path that leads there.

    It reaches the attributes of modules and of any other object, containers, closures, default arguments, hooks, the
    methods of the model's own classes, and the globals that its functions name; not what libraries keep for themselves.
    Of numbers, strings, NumPy arrays and small tensors it holds the values; of a larger tensor its identity, its place
    in memory and PyTorch's count of changes in place, which a change through ``.data`` does not move; of a container of
    more than 1000 things its identity and their number.

    Attributes
    ----------
    found : dict
        What lies at each path.
    storages : dict
        Where in memory the tensors lie, by path.
    """

    def __init__(self, model: Callable) -> None:
        self.found: dict[str, Hashable] = {"default dtype": torch.get_default_dtype()}
        self.storages: dict[str, list[int]] = {}
        self._watched: list[tuple[Tensor, int | None, int]] = []
        self._slots: list[tuple[dict[str, Any], str, Any]] = []
        self._seen: dict[int, Any] = {}  # holds what it has seen, so that no id is used twice
        stack: list[tuple[str, Any]] = [("", model)]
        while stack:
            path, here = stack.pop()
            token, inner = self._look(here)
            plain: list[tuple[str, Any]] = []  # with the token, since most is: the empty dicts of hooks, numbers, flags
            for name, x in inner:
                if x is None or type(x) in _SIMPLE or (isinstance(x, dict) and not x):
                    plain.append((name, x))
                else:
                    stack.append((f"{path}.{name}" if path and name[:1] != "[" else f"{path}{name}", x))
            self.found[path or "itself"] = (token, _short(repr(plain))) if plain else token
            if isinstance(here, Tensor) and here.device.type != "meta":
                self.storages[path] = [part.untyped_storage().data_ptr() for part in parts(here)]
        self._seen.clear()

    def changes(self, earlier: Contents, *, but: Collection[str] = ()) -> list[str]:
        """The paths at which another thing lies than did, in order."""
        now, then = self.found, earlier.found
        return [path for path in {**then, **now} if path not in but and now.get(path, now) != then.get(path, now)]

    def released(self) -> Contents:
        """The same for a comparison alone, which keeps nothing of the model alive."""
        other = copy.copy(self)
        other._watched, other._slots = [], []
        return other

    def moved(self) -> bool:
        """Whether a tensor has been replaced or changed in place, as far as that is seen at once."""
        for tensor, version, place in self._watched:
            if tensor._version != version or tensor.data_ptr() != place:
                return True
        return any(slots.get(name) is not value for slots, name, value in self._slots)

    def _look(self, here: Any) -> tuple[Hashable, Iterable[tuple[str, Any]]]:
        """What is told of a thing itself, and what it holds."""
        kind = type(here)
        if isinstance(here, _PLAIN):
            return (kind, _short(repr(here))), []
        if id(here) in self._seen:
            return (kind, "again"), []
        self._seen[id(here)] = here
        if isinstance(here, Tensor) and is_opaque(here):
            return (id(here), kind), self._of_object(here)
        if isinstance(here, Tensor):
            return self._tensor(here), []
        if isinstance(here, np.ndarray):
            inner = [(f"[{i}]", x) for i, x in enumerate(here.flat)] if here.dtype == object else []
            return (here.dtype.str, here.shape, b"" if inner else _hash(np.ascontiguousarray(here))), inner
        if isinstance(here, bytearray | memoryview | array.array):
            return (kind, _hash(np.frombuffer(bytes(here), np.uint8))), []
        if isinstance(here, dict | list | tuple | set | frozenset | collections.deque) and len(here) > _MANY:
            return (kind, id(here), len(here)), []
        if isinstance(here, dict | types.MappingProxyType):
            return (kind, len(here)), [*((_key(k), v) for k, v in list(here.items())), *self._of_object(here)]
        if isinstance(here, list | tuple | set | frozenset | collections.deque):
            items = list(here)
            if all(isinstance(x, _PLAIN) for x in items):
                return (kind, _short(repr(items))), []
            return (kind, len(items)), [*((f"[{i}]", x) for i, x in enumerate(items)), *self._of_object(here)]
        if isinstance(here, types.FunctionType):
            return (id(here.__code__), root(here)), self._of_function(here)
        if isinstance(here, functools.partial):
            return kind, [("func", here.func), ("args", here.args), ("keywords", here.keywords)]
        if isinstance(here, types.MethodType):
            return kind, [("self", here.__self__), ("method", here.__func__)]
        if isinstance(here, types.CellType):
            return kind, [("content", x) for x in _cell(here)]
        if isinstance(here, staticmethod | classmethod):
            return kind, [("function", here.__func__)]
        if isinstance(here, property):
            return kind, [("getter", here.fget)]
        if isinstance(here, type):
            return id(here), _of_class(here)
        if isinstance(here, types.ModuleType):
            return id(here), []
        return id(here), self._of_object(here)

    def _tensor(self, here: Tensor) -> Hashable:
        version = None if here.is_inference() else here._version
        dense = here.layout == torch.strided and here.device.type != "meta"
        if dense and version is not None and not is_wrapped(here):
            self._watched.append((here, version, here.data_ptr()))
        small = b""
        if dense and here.numel() <= _SMALL and here.device.type == "cpu":
            flat = here.detach().resolve_conj().resolve_neg().contiguous().view(-1)
            small, version = _hash(flat.view(torch.uint8).numpy()) if flat.numel() else b"", None
        places = tuple(part.data_ptr() for part in parts(here)) if here.device.type != "meta" else ()
        return id(here), places, version, here.shape, here.dtype, small

    def _of_function(self, here: types.FunctionType) -> Iterator[tuple[str, Any]]:
        free = here.__code__.co_freevars
        for name, cell in zip(free, here.__closure__ or (), strict=True):
            for value in _cell(cell):
                yield name, value
        if root(here) in _FOREIGN:
            return
        yield "defaults", (here.__defaults__, here.__kwdefaults__)
        names = list(_names(here.__code__))
        for name in names:
            value = here.__globals__.get(name)
            if isinstance(value, types.ModuleType) and root(value) not in _FOREIGN:
                yield from ((f"{name}.{n}", vars(value)[n]) for n in names if n in vars(value))
            elif value is not None:
                yield name, value

    def _of_object(self, here: Any) -> Iterator[tuple[str, Any]]:
        is_module = isinstance(here, nn.Module)
        if root(here) not in _FOREIGN:
            yield "<class>", type(here)
        elif not is_module and not isinstance(here, types.SimpleNamespace | argparse.Namespace):
            return  # what libraries keep for themselves
        for cls in type(here).__mro__:
            names = cls.__dict__.get("__slots__", ())
            yield from (
                (n, getattr(here, n)) for n in ([names] if isinstance(names, str) else names) if hasattr(here, n)
            )
        if isinstance(here, torch.jit.ScriptModule):
            yield from ((name, getattr(here, name)) for name in here._concrete_type.get_attributes())
        for name, value in list(getattr(here, "__dict__", {}).items()):
            if is_module and name in _OWN:
                slots = value if isinstance(value, dict) else {}  # of a scripted module they are no dicts
                self._slots += [(slots, key, x) for key, x in slots.items() if isinstance(x, Tensor)]
                yield from list(value.items())
            else:
                yield name, value


def _of_class(here: type) -> Iterator[tuple[str, Any]]:
    """A class's own attributes; of a module's, which may be many, those that a forward pass names."""
    own: dict[str, Any] = {}
    for cls in reversed(here.__mro__):
        if root(cls) not in _FOREIGN:
            own |= {name: x for name, x in vars(cls).items() if name == "__call__" or not name.startswith("__")}
    if not issubclass(here, nn.Module):
        yield from own.items()
        return
    wanted, seen = ["forward", "__call__"], set()
    while wanted:
        name = wanted.pop()
        if name in own and name not in seen:
            seen.add(name)
            yield name, own[name]
            code = getattr(own[name], "__code__", None) or getattr(getattr(own[name], "fget", None), "__code__", None)
            wanted += [] if code is None else _names(code)


def _cell(cell: types.CellType) -> list[Any]:
    try:
        return [cell.cell_contents]
    except ValueError:  # not filled yet
        return []


def _key(key: Any) -> str:
    return key if isinstance(key, str) else f"[{_short(repr(key))}]"


def _short(text: str) -> str:
    return text if len(text) <= _LONG else hashlib.blake2b(text.encode(errors="replace")).hexdigest()


def _hash(array: np.ndarray) -> bytes:
    return hashlib.blake2b(array.reshape(-1).view(np.uint8).data, digest_size=16).digest() if array.size else b""
