"""What can't be pickled is said before anything is sent."""

from __future__ import annotations

import contextlib
import pickle
import sys
import types
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
