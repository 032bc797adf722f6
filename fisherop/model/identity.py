"""What a model is, as one text that is the same in every process: models that share it compute the same."""

from __future__ import annotations

import array
import collections
import contextvars
import copyreg
import functools
import hashlib
import io
import itertools
import logging
import sys
import threading
import types
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
import torch.utils.hooks
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fisherop.model.contents import _FOREIGN, _cell
from fisherop.model.guard import _names, root
from fisherop.model.sparse import is_opaque, parts

_PIECE = 2**22  # elements of a tensor at a time
_EXACT = {bool, int, float, complex, str, bytes, type(None), type(...), range, slice}
_PLAIN = (torch.dtype, torch.layout, torch.memory_format, np.dtype)
_NUMBERS = {kind for kind in np.sctypeDict.values() if kind is not np.void and kind is not np.object_}
_CONTAINERS = (dict, types.MappingProxyType, list, tuple, collections.deque, set, frozenset)
_WRAPPERS: dict[type, tuple[str, ...]] = {
    functools.partial: ("func", "args", "keywords", "__dict__"),
    types.MethodType: ("__self__", "__func__"),
    staticmethod: ("__func__",),
    classmethod: ("__func__",),
    property: ("fget", "fset"),
}
_SILENT = (  # of which no response can depend on what they are, or that hold nothing
    *(type(threading.Lock()), type(threading.RLock()), threading.Thread, threading.local),
    torch.utils.hooks.RemovableHandle,
    *(logging.Logger, logging.Handler, io.IOBase, types.GetSetDescriptorType, types.MemberDescriptorType),
)
_HOOKS = {name for name in vars(nn.Module()) if "hook" in name}  # numbered through the process
_OF_CLASSES = {"__dict__", "__weakref__", "__doc__", "__module__", "__annotations__", "__firstlineno__"}
_OF_CLASSES |= {"__static_attributes__", "__slots__", "__match_args__", "__parameters__", "__orig_bases__"}
_OF_CLASSES |= {"__abstractmethods__", "_abc_impl", "__dataclass_params__", "__annotate__", "__annotate_func__"}


def identity(*things: Any) -> str:
    """SHA-256, in hexadecimal, of all that things hold, by value.

    Of a model and of its functions: tensors, attributes, closures, default arguments, hooks, the globals and modules
    that are named, and the code, as far as it isn't a library's. Of a library's objects: what a pickle of them would
    hold. What is read by other means is not seen: files, the environment, what is local to a thread, a Python module
    that an attribute holds.

    Raises
    ------
    TypeError
        It can't be told what an object stands for.
    """
    digest = hashlib.sha256(str(torch.get_default_dtype()).encode())
    seen: dict[int, tuple[int, Any]] = {}  # holds what it has seen, so that no id is used twice
    stack: list[Any] = [things]
    while stack:
        here = stack.pop()
        if type(here) in _EXACT or isinstance(here, _PLAIN) or type(here) in _NUMBERS:
            digest.update(f"{type(here).__name__} {here!r}\n".encode(errors="backslashreplace"))
        elif isinstance(here, torch.device):
            digest.update(b"device\n")  # a worker may have another, and compute the same there
        elif id(here) in seen:
            digest.update(f"again {seen[id(here)][0]}\n".encode())
        else:
            seen[id(here)] = len(seen), here
            token, inner = _look(here)
            held = list(inner)
            digest.update(f"{type(here).__qualname__} {len(held)} {token}\n".encode(errors="backslashreplace"))
            stack.extend(reversed(held))
    return digest.hexdigest()


def _look(here: Any) -> tuple[Any, Iterable[Any]]:
    """What is told of a thing itself, and what it holds."""
    kind = type(here)
    if isinstance(here, Tensor):
        return _of_tensor(here), _of_rest(here) if kind in (Tensor, nn.Parameter) else _reduced(here)
    if kind is np.ndarray:
        return (here.dtype.str, here.shape, "" if here.dtype.hasobject else _hash(here)), (
            here.flat if here.dtype.hasobject else ()
        )
    if isinstance(here, bytearray | memoryview | array.array):
        return (getattr(here, "typecode", ""), _hash(np.frombuffer(bytes(here), np.uint8))), ()
    if isinstance(here, _CONTAINERS):
        return "", itertools.chain(_items(here), () if kind.__module__ == "builtins" else _of_object(here))
    if isinstance(here, contextvars.ContextVar):
        return here.name, [here.get(None)]
    if isinstance(here, types.FunctionType) and "_torchdynamo_orig_callable" in vars(here):  # compiled
        return "", [vars(here)["_torchdynamo_orig_callable"]]
    if isinstance(here, types.FunctionType):
        return (_module(here), here.__qualname__, _of_code(here.__code__)), _of_function(here)
    if isinstance(here, types.CellType):
        return "", _cell(here)
    for wrapper, names in _WRAPPERS.items():
        if isinstance(here, wrapper):
            return "", [getattr(here, name) for name in names]
    if isinstance(here, type):
        return (_module(here), here.__qualname__), () if root(here) in _FOREIGN else _of_class(here)
    if isinstance(here, types.ModuleType):
        return here.__name__, ()
    if isinstance(here, weakref.ref):
        return "", [here()]
    if isinstance(here, torch.jit.ScriptModule):
        names = here._concrete_type.get_attributes()
        inner = [dict(here.state_dict()), list(here.children()), [getattr(here, name) for name in names]]
        return _of_graph(getattr(here, "inlined_graph", None)), inner
    if isinstance(here, torch.jit.ScriptFunction):
        return _of_graph(here.inlined_graph), ()
    if isinstance(here, int | float | complex | str | bytes):  # subclasses, as of enumerations
        return repr(here), _of_object(here)
    original = getattr(here, "_orig_mod", None) if isinstance(here, nn.Module) else None
    return "", [original] if isinstance(original, nn.Module) else _of_object(here)


def _module(here: Any) -> str:
    return "__main__" if here.__module__ == "__mp_main__" else str(here.__module__)  # as new processes name it


def _items(here: Any) -> Iterable[Any]:
    if isinstance(here, dict | types.MappingProxyType):
        return itertools.chain.from_iterable(here.items())
    if isinstance(here, set | frozenset):
        return sorted(here, key=lambda x: (type(x).__qualname__, repr(x)))
    return here


def _of_object(here: Any) -> Iterator[Any]:
    kind = type(here)
    if isinstance(here, _SILENT):
        return
    yield kind
    if root(here) in _FOREIGN and not isinstance(here, nn.Module):
        yield from _reduced(here)
        return
    for cls in kind.__mro__:
        slots = cls.__dict__.get("__slots__", ())
        for name in [slots] if isinstance(slots, str) else slots:
            is_private = name.startswith("__") and not name.endswith("__")
            name = f"_{cls.__name__.lstrip('_')}{name}" if is_private else name
            if name != "__dict__" and name in cls.__dict__:
                try:
                    yield from (name, cls.__dict__[name].__get__(here))
                except AttributeError:  # nothing was assigned
                    continue
    yield from _of_rest(here)


def _of_rest(here: Any) -> Iterator[Any]:
    for name, value in list(getattr(here, "__dict__", {}).items()):
        yield name
        is_numbered = name in _HOOKS and isinstance(here, nn.Module) and isinstance(value, dict)
        yield list(value.values()) if is_numbered else value


def _reduced(here: Any) -> Iterator[Any]:
    """What a pickle of a library's object would hold."""
    if hasattr(here, "__wrapped__"):  # of a cache
        yield here.__wrapped__
        return
    if isinstance(here, Tensor) and (is_lazy(here) or is_opaque(here)):
        yield from _of_rest(here)
        return
    try:
        reduce = copyreg.dispatch_table.get(type(here))
        found = here.__reduce_ex__(4) if reduce is None else reduce(here)
    except Exception as error:  # whatever its class raises for it
        kind = f"{type(here).__module__}.{type(here).__qualname__}"
        raise TypeError(
            f"the model holds a {kind}, and none can tell whether that is the same in another run ({error}): leave out "
            "the store, or let the model build it when it is called"
        ) from error
    if isinstance(found, tuple):
        pieces: Any = found
        yield from (list(part) if i in (3, 4) and part is not None else part for i, part in enumerate(pieces))
    else:
        yield found


def _of_class(here: type) -> Iterator[Any]:
    """All that its own classes define, each by itself: what is overridden may be called by super()."""
    for cls in here.__mro__:
        if root(cls) not in _FOREIGN:
            for name, value in list(vars(cls).items()):
                if name not in _OF_CLASSES and not isinstance(value, types.MemberDescriptorType):
                    yield from (name, value)


def _of_function(here: types.FunctionType) -> Iterator[Any]:
    for name, cell in zip(here.__code__.co_freevars, here.__closure__ or (), strict=True):
        yield name
        yield from _cell(cell)
    if root(here) in _FOREIGN:
        return
    yield here.__defaults__
    yield here.__kwdefaults__
    yield {name: value for name, value in vars(here).items() if name != "__wrapped__"}
    names = list(_names(here.__code__))
    modules = {name: sys.modules[name] for name in names if name in sys.modules and name not in here.__globals__}
    yield from _named({**modules, **here.__globals__}, names, set())


def _named(namespace: dict[str, Any], names: list[str], seen: set[int]) -> Iterator[Any]:
    """What names stand for there, and, where that is one of the user's own modules, within it."""
    for name in names:
        if name not in namespace:
            continue
        value = namespace[name]
        yield name
        if isinstance(value, types.ModuleType) and root(value) not in _FOREIGN:
            if id(value) not in seen:
                yield from _named(vars(value), names, seen | {id(value)})
        else:
            yield value


def _of_code(code: types.CodeType) -> str:
    constants = [_of_code(c) if isinstance(c, types.CodeType) else _constant(c) for c in code.co_consts]
    return hashlib.sha256(repr((code.co_code, code.co_names, constants)).encode(errors="backslashreplace")).hexdigest()


def _constant(c: Any) -> str:
    return repr(sorted(map(repr, c))) if isinstance(c, frozenset) else repr(c)


def _of_graph(graph: Any) -> str:
    """A scripted function's operations, and the tensors among its constants."""
    if graph is None:
        return ""
    found, blocks = [str(graph)], [graph]
    while blocks:
        for node in blocks.pop().nodes():
            blocks.extend(node.blocks())
            if node.kind() == "prim::Constant" and node.hasAttribute("value") and node.kindOf("value") == "t":
                found.append(str(_of_tensor(node.t("value"))))
    return hashlib.sha256("\n".join(found).encode()).hexdigest()


def _of_tensor(here: Tensor) -> tuple[Any, ...]:
    if is_lazy(here) or here.device.type == "meta":
        return "without values", str(here.dtype), () if is_lazy(here) else tuple(here.shape)
    return str(here.dtype), tuple(here.shape), str(here.layout), [_hash_tensor(part) for part in parts(here)]


def _hash_tensor(dense: Tensor) -> str:
    digest = hashlib.sha256()
    flat = dense.detach().resolve_conj().resolve_neg().reshape(-1)
    for piece in flat.split(_PIECE):
        if piece.numel():
            digest.update(piece.contiguous().cpu().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _hash(x: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data).hexdigest() if x.size else ""
