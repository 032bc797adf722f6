"""Copies and pickles of eigendistortions, and what can't be pickled is said before anything is sent."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import pickle
import sys
import types
from collections.abc import Callable
from typing import Any

from torch import Tensor


class _DryRun(pickle.Pickler):
    """Pickles to nowhere, and leaves out tensors, which can be pickled and may be large."""

    def __init__(self) -> None:
        super().__init__(types.SimpleNamespace(write=len), pickle.HIGHEST_PROTOCOL)

    def reducer_override(self, obj: Any) -> Any:
        return (int, ()) if isinstance(obj, Tensor) and obj.grad_fn is None else NotImplemented


def check_picklable(model: Any, what: str, instead: str) -> None:
    """Raise PicklingError where a model can't be pickled: a pickler names only what it fails at.

    What plain pickle refuses is left to cloudpickle, where joblib or Dask have loaded it and it takes the model.

    Parameters
    ----------
    model : callable
    what : str
        That is pickled with its model.
    instead : str
        What to send in its place.
    """
    try:
        _DryRun().dump(model)
    except Exception as error:
        for name in {"cloudpickle", "joblib.externals.cloudpickle"} & set(sys.modules):
            with contextlib.suppress(Exception):
                sys.modules[name].dumps(model)
                return
        named = getattr(model, "__qualname__", type(model).__qualname__)
        raise pickle.PicklingError(
            f"{what} is pickled with its model, but the model {named} can't be pickled: {error}. Let it be an instance "
            f"of a class, or a function, that is defined at the top level of a module; or {instead}"
        ) from error


class BuiltAnew:
    """An object whose copies linearize the model anew: they take the image, the model, the options and all else.

    `_build(image, model, products)` makes what it consists of; `result`, if there is one, is a frozen dataclass.
    """

    def __reduce__(self) -> tuple:
        check_picklable(self.model, "an Eigendistortion", "save(path), then Eigendistortion.from_file(path, model)")
        return self._parts()

    def _parts(self) -> tuple:
        built = ("operator", "model", "_products", "_state")
        rest = {name: value for name, value in vars(self).items() if name not in built}
        return _rebuild, (type(self), self.image, self.model, self._products), rest

    def __setstate__(self, rest: dict[str, Any]) -> None:
        vars(self).update(rest)
        if self.result is not None:
            self.result = dataclasses.replace(self.result)  # its arrays are read-only again

    def __copy__(self) -> BuiltAnew:
        new = type(self).__new__(type(self))
        vars(new).update(vars(self), _state={})  # a search belongs to one object
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> BuiltAnew:
        _, args, rest = self._parts()  # a model that can't be pickled may be copied all the same
        new = memo[id(self)] = _rebuild(*copy.deepcopy(args, memo))
        new.__setstate__(copy.deepcopy(rest, memo))
        return new


def _rebuild(kind: type, image: Tensor, model: Callable[[Tensor], Any], products: dict[str, Any]) -> BuiltAnew:
    new = kind.__new__(kind)
    new._build(image, model, products)  # and not __init__, since a subclass's own may take anything
    return new
