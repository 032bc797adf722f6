"""Models on their way to other processes: sent as they are, or as what builds them, and built there once."""

from __future__ import annotations

import collections
import contextlib
import copy
import hashlib
import importlib
import inspect
import multiprocessing
import os
import pickle
import secrets
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from numpy.typing import NDArray
from torch import nn

from fisherop.model.identity import identity
from fisherop.model.layers import LayerResponse

_KEPT = 4  # models in a worker's process
_START = secrets.token_hex(8)
_received: collections.OrderedDict[str, Recipe] = collections.OrderedDict()
_lock = threading.RLock()


def here() -> tuple[int, str]:
    """What names this process, and no other, on any machine; a fork is another."""
    return os.getpid(), _START


@contextlib.contextmanager
def threads_in_worker(home: tuple[int, str], threads: int | None) -> Iterator[None]:
    """So many of PyTorch's threads, in a process other than the one at home, which keeps what its user has set."""
    before = torch.get_num_threads()
    if threads is None or home == here():
        yield
        return
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def device_in_worker(device: str) -> torch.device:
    """A device by name; of several GPUs, if the worker has chosen none, the one of its own number in its pool."""
    found = torch.device(device)
    if found.type != "cuda" or found.index is not None:
        return found
    chosen = torch.cuda.current_device()
    numbers = multiprocessing.current_process()._identity  # pyright: ignore[reportAttributeAccessIssue]
    if chosen == 0 and numbers:
        chosen = (numbers[-1] - 1) % torch.cuda.device_count()
    return torch.device("cuda", chosen)


class Recipe:
    """A model, or a callable without arguments that builds it.

    Where it is unpickled, it is the one that this process received before, if there is one, with what that has built:
    so that the program of a model serves all images. What builds a model does so anew for each recipe, since the files
    that it reads may have changed; where that gives the model that was there, this one is kept, with its programs.

    Parameters
    ----------
    given : nn.Module or callable
    name : str
        For messages.
    """

    def __init__(self, given: Any, name: str, data: bytes | None = None, token: str | None = None) -> None:
        self.given, self.name = given, name
        self._data = data
        self._token = secrets.token_hex(8) * is_builder(given) if token is None else token
        self._models: dict[Any, Any] = {}
        self._earlier: Recipe | None = None  # of the same builder

    def model(self, layer: str | None = None, device: torch.device | None = None) -> Any:
        """The model, or its response at a layer, on a device; the same object each time."""
        with _lock:
            for key in ((None, None), (layer, device)):  # with the first may come the others, of an earlier recipe
                if key not in self._models:
                    self._models[key] = self._make(*key)
            return self._models[layer, device]

    def _make(self, layer: str | None, device: torch.device | None) -> Any:
        if layer is not None:
            return LayerResponse(self.model(None, device), layer)
        if device is not None:
            return _moved(self.model(), device)
        if self.given is None:  # the task is here already: where it failed, the pool would end
            assert self._data is not None
            self.given = unpacked(self._data, f"the model {self.name}")
        if not is_builder(self.given):
            return self.given
        model = self.given()
        if not callable(model) or isinstance(model, type):
            raise TypeError(
                f"the model {self.name} can be called without arguments, so that it is taken to build a model, but it "
                f"gave a {type(model).__name__}: let it return a model, or let its image be a required argument"
            )
        return model if self._data is None else self._as_before(model)

    def _as_before(self, model: Any) -> Any:
        """In a worker: the model that an earlier recipe has built, if this is the same."""
        earlier, self._earlier = self._earlier, None
        try:
            self._models["identity"] = identity(model)
        except TypeError:  # it can't be told
            return model
        if earlier is not None and earlier._models.get("identity") == self._models["identity"]:
            self._models.update(earlier._models)
        return self._models.get((None, None), model)

    def identity(self) -> str:
        """What the model is, as it was before it was first asked.

        Raises
        ------
        TypeError
            It can't be told what an object in it stands for.
        """
        return self._told("identity", identity)

    def weights(self) -> str:
        """The identity of the tensors that a module holds; of another callable, of nothing."""
        return self._told("weights", _weights)

    def _told(self, name: str, tell: Callable[[Any], str]) -> str:
        with _lock:
            if name not in self._models:
                self._models[name] = tell(self.model())
            return self._models[name]

    def check(self, told: str, expected: str) -> None:
        """Raise RuntimeError where the identity, or the weights, of the model aren't those of another process."""
        if told != expected:
            raise RuntimeError(
                f"the model {self.name} is not the same in all processes, or not at each call of what builds it: let "
                "that set a seed, or load the weights from a file that all see; and start new workers after a change "
                "of code"
            )

    def forget(self) -> None:
        """Drop what was built."""
        with _lock:
            self._models.clear()

    def pack(self) -> int:
        """Make what is sent, and tell how many bytes it has.

        Raises
        ------
        TypeError
            It can't be pickled.
        """
        if self._data is None:
            cure = "give a function that builds it, defined at the top level of a module that the workers can import"
            self._data = packed(self.given, f"the model {self.name}", cure)
        return len(self._data)

    def __reduce__(self) -> tuple:
        self.pack()
        return _receive, (self._data, self.name, self._token)


def as_array(image: torch.Tensor) -> NDArray:
    """A copy, or a view, for NumPy."""
    return image.detach().resolve_conj().resolve_neg().cpu().numpy()


def is_builder(given: Any) -> bool:
    """Whether it is no module, and can be called without arguments: a model needs its image."""
    if isinstance(given, nn.Module):
        return False
    try:
        inspect.signature(given).bind()
    except (TypeError, ValueError):  # it can't be called so, or Python can't tell
        return False
    return True


def packed(thing: Any, name: str, cure: str) -> bytes:
    """Bytes of a pickle, by value where it is of a script or a notebook, if cloudpickle is installed.

    Raises
    ------
    TypeError
        It can't be pickled; the message begins with its name, and ends with the cure.
    """
    data, problem = None, None
    try:
        data = pickle.dumps(thing, 5)
        if b"__main__" not in data:
            return data
    except Exception as error:  # of whatever kind what it holds raises
        problem = error
    try:
        return importlib.import_module("cloudpickle").dumps(thing, 5)
    except ImportError:
        pass
    except Exception as error:
        problem = error
    if data is None:
        raise TypeError(f"{name} can't be sent to other processes ({problem}): {cure}") from problem
    return data


def unpacked(data: bytes, name: str) -> Any:
    try:
        return pickle.loads(data)
    except (AttributeError, ImportError) as error:
        raise RuntimeError(
            f"{name} can't be found by the worker ({error}): define it in a module that the workers can import, or "
            "install cloudpickle there and here"
        ) from error


def _receive(data: bytes, name: str, token: str) -> Recipe:
    builder = hashlib.sha256(data).hexdigest()
    key = builder + token
    with _lock:
        if key not in _received:
            earlier = [recipe for other, recipe in _received.items() if other.startswith(builder)]
            _received[key] = Recipe(None, name, data, token)
            _received[key]._earlier = earlier[-1] if earlier else None
        _received.move_to_end(key)
        while len(_received) > _KEPT:
            _received.popitem(last=False)
        return _received[key]


def _weights(model: Any) -> str:
    held = (*model.named_parameters(), *model.named_buffers()) if isinstance(model, nn.Module) else ()
    return identity(*((name, tensor.detach()) for name, tensor in held))


def _moved(model: Callable, device: torch.device) -> Any:
    """A module on a device: itself, if it is there, else a copy; other callables go where their image is."""
    if not isinstance(model, nn.Module):
        return model
    if all(tensor.device == device for tensor in (*model.parameters(), *model.buffers())):
        return model
    with torch.inference_mode(False):  # or PyTorch could not differentiate the copy
        return copy.deepcopy(model).to(device)


if hasattr(os, "register_at_fork"):  # so that no child begins with a lock that another thread held
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)
