"""What a model holds, so that it can be as it was: parameters, attributes, what its hooks and closures keep."""

from __future__ import annotations

import collections
import functools
import random
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fisherop.model.compat import is_wrapped
from fisherop.model.sparse import is_opaque, parts

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size, np.ndarray, type)
_FOREIGN = sys.stdlib_module_names | {"torch", "numpy", "scipy", "matplotlib", "fisherop"}
_SMALL = 2**16  # elements
_GENERATORS = (np.random.Generator, np.random.RandomState, random.Random, torch.Generator)


class Guard:
    """The state of a model, or of any callable, at one time.

    What modules hold is put back. Elsewhere, in a dict that a hook fills or a global list, other threads may be at
    work: there only tensors are put back, or taken out.

    It reaches what attributes, containers, hooks and closures of the model hold, and the globals that its functions
    name; not what objects of other libraries hold.

    Parameters
    ----------
    model : callable
    values : bool
        Keep copies of the tensors that modules hold, and of small ones elsewhere, so that a change of their elements
        is found and undone. Without, only what was replaced is.
    like : Guard, optional
        One with copies, of an earlier time; those that still hold are shared with it.
    """

    def __init__(self, model: Callable, *, values: bool = False, like: Guard | None = None) -> None:
        self._model = model
        self._containers: list[tuple[Any, Any, bool]] = []  # with a copy, and whether a module holds it
        self._tensors: dict[int, _Kept] = {}
        self._generators: list[tuple[Any, Any]] = []
        earlier = {} if like is None else like._tensors
        roots = {root(model)}  # of the libraries whose objects belong to the model
        seen: dict[int, Any] = {}  # holds what it has seen, so that no id is used twice
        stack: list[tuple[Any, bool]] = [(model, False)]
        if isinstance(model, nn.Module):  # those of a scripted module are in no attribute
            stack += [(tensor, True) for tensor in (*model.parameters(), *model.buffers())]
        while stack:
            here, own = stack.pop()
            if isinstance(here, _PLAIN) or id(here) in seen or is_lazy(here):
                continue
            seen[id(here)] = here
            if isinstance(here, Tensor):
                copies = (values or like is not None) and (own or here.numel() <= _SMALL)
                self._tensors[id(here)] = _Kept(here, copies, earlier.get(id(here)))
            elif isinstance(here, _GENERATORS):
                self._generators.append((here, _state(here)))
            else:
                if isinstance(here, nn.Module | types.FunctionType):
                    roots.add(root(here))
                content = _content(here)
                if content is not None:
                    self._containers.append((here, content, own))
                own = isinstance(here, nn.Module) or (own and (content is not None or isinstance(here, tuple)))
                stack.extend((part, own) for part in _within(here, content, roots))

    @property
    def holds_sparse(self) -> bool:
        return any(kept.tensor.layout != torch.strided for kept in self._tensors.values())

    def drawn(self) -> list[str]:
        """The generators among what it holds that have gone on since."""
        return [f"a {type(g).__name__} that the model holds" for g, state in self._generators if _state(g) != state]

    def settle(self) -> None:
        """Make ordinary what has joined since: a tensor that a call left with a graph."""
        for container, content, _ in self._containers:
            for name, value in list(container.items()) if isinstance(container, dict) else ():
                if isinstance(value, Tensor) and content.get(name) is not value and not value.is_leaf:
                    container[name] = value.detach()

    def restore(self) -> list[str]:
        """Put everything back; return the names of parameters, buffers and other tensors whose elements had changed."""
        changed: list[str] = []
        with torch.inference_mode(False), torch.no_grad():
            for container, content, own in self._containers:
                for name, old, new in _refill(container, content, own):
                    if isinstance(old, Tensor) and self._is_state(container) and not _equal(old, new):
                        changed.append(f"buffer {name!r}")
            changed += [self._name(kept.tensor) for kept in self._tensors.values() if kept.restore()]
        return changed

    def _is_state(self, container: Any) -> bool:
        modules = self._model.modules() if isinstance(self._model, nn.Module) else ()
        return any(container is m._buffers or container is m._parameters for m in modules)

    def _name(self, tensor: Tensor) -> str:
        if isinstance(self._model, nn.Module):
            for kind, named in (("buffer", self._model.named_buffers()), ("parameter", self._model.named_parameters())):
                for name, one in named:
                    if one is tensor:
                        return f"{kind} {name!r}"
        return f"tensor of shape {tuple(tensor.shape)}"


class _Kept:
    """A tensor that a model holds, as it is."""

    def __init__(self, tensor: Tensor, values: bool, earlier: _Kept | None) -> None:
        self.tensor = tensor
        self.data = tensor.detach()
        self.has_graph = tensor.grad_fn is not None
        self.requires_grad = tensor.requires_grad
        self.grad = tensor.grad if tensor.is_leaf else None
        self.copy = None
        if values and not is_opaque(tensor):
            same = earlier is not None and earlier.copy is not None and _equal(earlier.copy, self.data)
            self.copy = earlier.copy if same and earlier is not None else self.data.clone()

    def restore(self) -> bool:
        """Give the tensor its memory and its elements back; whether an element differed."""
        tensor, changed = self.tensor, False
        if tensor.grad_fn is not None and not self.has_graph:
            tensor.detach_()
        if is_wrapped(tensor) or not _same_memory(tensor, self.data):
            changed = is_wrapped(tensor) or not _equal(tensor.detach(), self.data)
            tensor.data = self.data
        if self.copy is not None and not _equal(self.data, self.copy):
            changed = True
            for part, value in zip(parts(self.data), parts(self.copy), strict=True):
                part.copy_(value)
        if tensor.is_leaf:
            if tensor.requires_grad != self.requires_grad:
                tensor.requires_grad_(self.requires_grad)
            if tensor.grad is not self.grad:
                tensor.grad = self.grad
        return changed


def root(here: Any) -> str:
    """The top-level package of a function, a class, a module, or of an object's class."""
    if isinstance(here, types.ModuleType):
        return here.__name__.split(".")[0]
    source = here if isinstance(here, types.FunctionType | type) else type(here)
    module = getattr(source, "__module__", None)
    return module.split(".")[0] if isinstance(module, str) else ""  # Cython's functions have a descriptor there


def _content(here: Any) -> Any:
    """A copy of what a container holds; None for what is none."""
    if isinstance(here, dict):
        return dict(here)
    if isinstance(here, list | set | collections.deque):
        return list(here)
    if isinstance(here, types.CellType):
        try:
            return [here.cell_contents]
        except ValueError:  # not filled yet
            return []
    return None


def _within(here: Any, content: Any, roots: set[str]) -> Iterable[Any]:
    """What an object holds, to be looked into."""
    if isinstance(here, dict):
        # a thread that uses the same module may have added a hook, and removes it itself: hooks aren't put back
        return [
            tuple(v.values()) if str(k).endswith("_hooks") and isinstance(v, dict) else v for k, v in content.items()
        ]
    if content is not None:
        return content
    if isinstance(here, tuple | frozenset):
        return here
    if isinstance(here, functools.partial):
        return here.func, here.args, here.keywords
    if isinstance(here, types.MethodType):
        return here.__self__, here.__func__
    if isinstance(here, types.FunctionType):
        closure = here.__closure__ or ()
        if root(here) in _FOREIGN:
            return closure
        named = [here.__globals__.get(name) for name in _names(here.__code__)]
        return *closure, here.__defaults__, here.__kwdefaults__, *(x for x in named if _may_be_held(x))
    if isinstance(here, nn.Module) or (root(here) in roots - _FOREIGN and hasattr(here, "__dict__")):
        return (vars(here),)
    return ()


def _may_be_held(value: Any) -> bool:
    """Whether a global that a function names may be a part of the model."""
    if isinstance(value, types.FunctionType):
        return root(value) not in _FOREIGN
    kinds = (nn.Module, Tensor, types.MethodType, functools.partial, dict, list, tuple, *_GENERATORS)
    return isinstance(value, kinds)


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _refill(container: Any, content: Any, own: bool) -> list[tuple[Any, Any, Any]]:
    """Give a container its content back, or, if no module holds it, its tensors.

    Returns what differed of a dict, as (name, old, new).
    """
    if isinstance(container, dict):
        absent = object()
        differ = [(name, content.get(name, absent), container.get(name, absent)) for name in {**content, **container}]
        differ = [row for row in differ if row[1] is not row[2] and (own or isinstance(row[2], Tensor))]
        for name, old, _ in differ:
            if old is absent:
                del container[name]
            else:
                container[name] = old
        return differ
    now = _content(container)
    if len(now) == len(content) and all(a is b for a, b in zip(now, content, strict=True)):
        return []
    if isinstance(container, types.CellType):
        if content and (own or isinstance(now[0], Tensor)):
            container.cell_contents = content[0]
        return []
    if not own:
        before = set(map(id, content))
        content = [value for value in now if not isinstance(value, Tensor) or id(value) in before]
    container.clear()
    (container.update if isinstance(container, set) else container.extend)(content)
    return []


def _same_memory(a: Tensor, b: Tensor) -> bool:
    one, two = ([(p.data_ptr(), p.shape, p.stride(), p.dtype, p.device) for p in parts(t.detach())] for t in (a, b))
    return a.layout == b.layout and one == two


def _equal(a: Any, b: Any) -> bool:
    """Whether two tensors have the same elements, NaN included."""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)) or is_wrapped(b):
        return False
    if (a.shape, a.dtype, a.device, a.layout) != (b.shape, b.dtype, b.device, b.layout):
        return False
    pairs = [(_real(x), _real(y)) for x, y in zip(parts(a), parts(b), strict=True) if x.device.type != "meta"]
    return all(torch.equal(x, y) or bool(((x == y) | (x != x) & (y != y)).all()) for x, y in pairs)


def _real(x: Tensor) -> Tensor:
    """Complex numbers in half precision as pairs, since PyTorch can't compare them."""
    return torch.view_as_real(x.detach().resolve_conj()) if x.dtype == torch.complex32 else x.detach()


def _state(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state().numpy().tobytes()
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, np.random.RandomState):
        return repr([p.tobytes() if isinstance(p, np.ndarray) else p for p in generator.get_state()])
    return repr(generator.bit_generator.state)
