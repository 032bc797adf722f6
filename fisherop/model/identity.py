"""What a model is, as one text that is the same in every process: models that share it compute the same."""

from __future__ import annotations

import array
import collections
import functools
import hashlib
import itertools
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fisherop.model.contents import _FOREIGN, _PLAIN, _cell, _of_class
from fisherop.model.guard import _names, root
from fisherop.model.sparse import is_opaque, parts

_PIECE = 2**22  # elements of a tensor at a time
_WRAPPERS: dict[type, tuple[str, ...]] = {
    functools.partial: ("func", "args", "keywords"),
    types.MethodType: ("__self__", "__func__"),
    staticmethod: ("__func__",),
    classmethod: ("__func__",),
    property: ("fget",),
}


def identity(*things: Any) -> str:
    """SHA-256, in hexadecimal, of all that things hold, by value.

    Of a model and of its functions: tensors, attributes, closures, default arguments, hooks, the globals that are
    named, and the code, as far as it isn't a library's. Of a library's objects: what a pickle of them would hold.
    """
    digest = hashlib.sha256()
    seen: dict[int, tuple[int, Any]] = {}  # holds what it has seen, so that no id is used twice
    stack: list[Any] = [things]
    while stack:
        here = stack.pop()
        if isinstance(here, _PLAIN):
            digest.update(f"{type(here).__name__} {here!r}\n".encode())
        elif id(here) in seen:
            digest.update(f"again {seen[id(here)][0]}\n".encode())
        else:
            seen[id(here)] = len(seen), here
            token, inner = _look(here)
            held = list(inner)
            digest.update(f"{type(here).__qualname__} {len(held)} {token}\n".encode(errors="replace"))
            stack.extend(reversed(held))
    return digest.hexdigest()


def _look(here: Any) -> tuple[Any, Iterator[Any]]:
    """What is told of a thing itself, and what it holds."""
    if isinstance(here, Tensor):
        return _of_tensor(here), _reduced(here) if is_opaque(here) else iter(())
    if isinstance(here, np.ndarray):
        held = here.flat if here.dtype.hasobject else ()
        return (here.dtype.str, here.shape, "" if here.dtype.hasobject else _hash(here)), iter(held)
    if isinstance(here, bytearray | memoryview | array.array):
        return _hash(np.frombuffer(bytes(here), np.uint8)), iter(())
    if isinstance(here, dict | types.MappingProxyType):
        return "", itertools.chain.from_iterable(here.items())
    if isinstance(here, list | tuple | collections.deque):
        return "", iter(here)
    if isinstance(here, set | frozenset):
        return "", iter(sorted(here, key=lambda x: (type(x).__qualname__, repr(x))))
    if isinstance(here, types.FunctionType):
        return (here.__module__, here.__qualname__, _of_code(here.__code__)), _of_function(here)
    if isinstance(here, types.CellType):
        return "", iter(_cell(here))
    for kind, names in _WRAPPERS.items():
        if isinstance(here, kind):
            return "", (getattr(here, name) for name in names)
    if isinstance(here, type):
        own = () if root(here) in _FOREIGN else itertools.chain.from_iterable(_of_class(here))
        return (here.__module__, here.__qualname__), iter(own)
    if isinstance(here, types.ModuleType):
        return here.__name__, iter(())
    if isinstance(here, torch.jit.ScriptModule):
        names = here._concrete_type.get_attributes()
        return str(here.inlined_graph), itertools.chain([here.state_dict()], (getattr(here, name) for name in names))
    return "", _of_object(here)


def _of_object(here: Any) -> Iterator[Any]:
    is_own = root(here) not in _FOREIGN
    yield type(here)
    if not is_own and not isinstance(here, nn.Module):
        yield from _reduced(here)
        return
    for cls in type(here).__mro__:
        slots = cls.__dict__.get("__slots__", ())
        slots = [slots] if isinstance(slots, str) else slots
        yield from (getattr(here, n) for n in slots if n != "__dict__" and hasattr(here, n))
    for name, value in getattr(here, "__dict__", {}).items():
        yield name
        # hooks are numbered through the process
        yield list(value.values()) if isinstance(here, nn.Module) and name.endswith("_hooks") else value


def _reduced(here: Any) -> Iterator[Any]:
    """What a pickle of an object would hold; nothing of locks, streams and handles, of which there is none."""
    try:
        found = here.__reduce_ex__(4)
    except Exception:  # whatever its class raises for it
        return
    if isinstance(found, tuple):
        yield from (list(part) if i in (3, 4) and part is not None else part for i, part in enumerate(found))
    else:
        yield found


def _of_function(here: types.FunctionType) -> Iterator[Any]:
    for cell in here.__closure__ or ():
        yield from _cell(cell)
    if root(here) in _FOREIGN:
        return
    yield here.__defaults__
    yield here.__kwdefaults__
    names = list(_names(here.__code__))
    for name in names:
        value = here.__globals__.get(name)
        if isinstance(value, types.ModuleType) and root(value) not in _FOREIGN:
            yield from (vars(value)[n] for n in names if n in vars(value))
        elif value is not None:
            yield value


def _of_code(code: types.CodeType) -> str:
    constants = [_of_code(c) if isinstance(c, types.CodeType) else _constant(c) for c in code.co_consts]
    return hashlib.sha256(repr((code.co_code, code.co_names, constants)).encode()).hexdigest()


def _constant(c: Any) -> str:
    return repr(sorted(map(repr, c))) if isinstance(c, frozenset) else repr(c)


def _of_tensor(here: Tensor) -> tuple[Any, ...]:
    values = [_hash_tensor(part) for part in parts(here)] if here.device.type != "meta" else []
    return str(here.dtype), tuple(here.shape), str(here.layout), values


def _hash_tensor(dense: Tensor) -> str:
    digest = hashlib.sha256()
    flat = dense.detach().resolve_conj().resolve_neg().reshape(-1)
    for piece in flat.split(_PIECE):
        if piece.numel():
            digest.update(piece.contiguous().cpu().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _hash(x: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data).hexdigest() if x.size else ""
