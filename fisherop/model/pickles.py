"""Copies and pickles of eigendistortions, and what can't be pickled is said before anything is sent."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import sys
import types
from typing import Any

import torch
from torch import Tensor

_being_tried: set[int] = set()  # models


class _DryRun(pickle.Pickler):
    """Pickles to nowhere, and leaves out tensors, which can be pickled and may be large."""

    def __init__(self) -> None:
        nowhere: Any = types.SimpleNamespace(write=len)
        super().__init__(nowhere, pickle.HIGHEST_PROTOCOL)

    def reducer_override(self, obj: Any) -> Any:
        return (int, ()) if isinstance(obj, Tensor) and obj.grad_fn is None else NotImplemented


def check_picklable(model: Any, what: str, instead: str) -> None:
    """Raise PicklingError where a model can't be pickled: a pickler names only what it fails at.

    What plain pickle refuses is left to cloudpickle or dill, where one of these is at work.

    Parameters
    ----------
    model : callable
    what : str
        That is pickled with its model.
    instead : str
        What to send in its place.
    """
    if id(model) in _being_tried:  # it refers to what it is pickled with
        return
    _being_tried.add(id(model))
    try:
        _DryRun().dump(model)
    except Exception as error:
        if _at_work("cloudpickle", "dill"):
            return
        named = getattr(model, "__qualname__", type(model).__qualname__)
        raise pickle.PicklingError(
            f"{what} is pickled with its model, but the model {named} can't be pickled: {error}. Let it be an instance "
            f"of a class, or a function, that is defined at the top level of a module; or {instead}"
        ) from error
    finally:
        _being_tried.discard(id(model))


def _at_work(*packages: str) -> bool:
    """Whether the caller's caller, or any further up, is of one of these packages, or of a copy inside another."""
    frame = sys._getframe(1)
    while frame is not None:
        if set(packages) & set(frame.f_globals.get("__name__", "").split(".")):
            return True
        frame = frame.f_back
    return False


class BuiltAnew:
    """An object whose copies linearize the model anew: they take the image, the model, the options and all else.

    `_build(image, model, products)` makes what it consists of, and not `__init__`, since a subclass's own may take
    anything; `result`, if there is one, is a frozen dataclass. The model may refer to the object.
    """

    image: Any
    model: Any
    result: Any
    _products: Any
    _build: Any

    def __reduce__(self) -> tuple:
        check_picklable(self.model, "an Eigendistortion", "save(path), then Eigendistortion.from_file(path, model)")
        return _blank, (type(self),), self._parts()

    def _parts(self) -> tuple:
        built = ("operator", "model", "_products", "_state")
        rest = {name: value for name, value in vars(self).items() if name not in built}
        return (self.image, self.model, self._products), rest

    def __setstate__(self, state: tuple) -> None:
        parts, rest = state
        vars(self).update(rest)  # the model may need them
        self._build(*parts)
        vars(self).update(rest)
        if self.result is not None:
            self.result = dataclasses.replace(self.result)  # its arrays are read-only again

    def __copy__(self) -> BuiltAnew:
        new = _blank(type(self))
        vars(new).update(vars(self), _state={})  # a search belongs to one object
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> BuiltAnew:
        new = memo[id(self)] = _blank(type(self))
        with torch.inference_mode(False):  # or PyTorch could not differentiate the copy
            new.__setstate__(copy.deepcopy(self._parts(), memo))  # also of a model that can't be pickled
        return new


def _blank(kind: Any) -> Any:
    return kind.__new__(kind)
