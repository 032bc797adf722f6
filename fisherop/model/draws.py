"""What a call of a model does that its response need not show: what it draws, and in which precision it computes."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import random
from collections.abc import Collection, Iterator
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fisherop.model.compat import Mode

_REAL = {torch.complex32: torch.float16, torch.complex64: torch.float32, torch.complex128: torch.float64}
DETACHING = {torch.Tensor.detach, torch.detach, torch.Tensor.data.__get__}  # pyright: ignore[reportAttributeAccessIssue]


def epsilon(dtype: torch.dtype) -> float:
    """The machine epsilon of a floating-point or complex dtype; 0 for others."""
    dtype = _REAL.get(dtype, dtype)
    return torch.finfo(dtype).eps if dtype.is_floating_point else 0.0


class Draws(NamedTuple):
    """Where the random numbers of a call came from.

    `operations` are PyTorch's, each with the state of its generator; `start` is the state of the global one before;
    `elsewhere` holds the states in which the call left Python's and NumPy's, None where it didn't touch them.
    """

    operations: list[tuple[str, bytes]]
    start: bytes
    elsewhere: dict[str, bytes | None]

    def differ_from(self, other: Draws) -> str | None:
        """What draws on a generator that goes on from call to call, or that one of the calls alone draws on."""
        for name, state in self.elsewhere.items():
            if state != other.elsewhere[name]:
                return name
        for one, two in itertools.zip_longest(self.operations, other.operations):
            if one != two:
                return (one or two)[0]
        return None

    def without(self, names: Collection[str]) -> Draws:
        """Leaving out what another thread has drawn elsewhere."""
        elsewhere = {name: None if name in names else state for name, state in self.elsewhere.items()}
        return self._replace(elsewhere=elsewhere)

    @property
    def none(self) -> bool:
        """Whether nothing was drawn."""
        return not self.operations and not any(self.elsewhere.values())

    @property
    def from_outside(self) -> bool:
        """Whether a number comes from the state that the global generator had before the call."""
        return any(state == self.start for _, state in self.operations)


class Watch(Mode):
    """Notes what a model's call draws, the bytes that it computes, its lowest precision, and whether it detaches."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.precision = 0.0
        self._draws: list[tuple[str, bytes]] = []
        self._start, self._before = _state(None, None), elsewhere()
        self._calls = _Calls()

    @property
    def detaches(self) -> bool:
        return self._calls.detaches

    def draws(self) -> Draws:
        now, before = elsewhere(), self._before
        return Draws(self._draws, self._start, {name: now[name] if now[name] != before[name] else None for name in now})

    def __enter__(self):
        self._calls.__enter__()
        return super().__enter__()

    def __exit__(self, *exception):
        super().__exit__(*exception)
        self._calls.__exit__(*exception)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            out = func(*args, **kwargs)
        else:
            device = next((a.device for a in args if isinstance(a, Tensor)), kwargs.get("device"))
            before = _state(kwargs.get("generator"), device)
            out = func(*args, **kwargs)
            if _state(kwargs.get("generator"), device) != before:  # it may draw with some arguments only
                self._draws.append((str(func), before))
        # no generator, whose end would swallow an interrupt
        numbers = [a for a in args if isinstance(a, Tensor) and a.is_floating_point() | a.is_complex()]
        for part in out if isinstance(out, tuple | list) else (out,):
            if isinstance(part, Tensor) and not func.is_view:
                self.bytes += part.numel() * part.element_size()
                if numbers and part.ndim > 0:
                    self.precision = max(self.precision, epsilon(part.dtype))
        return out


class _Calls(TorchFunctionMode):
    detaches = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.detaches = self.detaches or func in DETACHING
        return func(*args, **(kwargs or {}))


def _state(generator: torch.Generator | None, device: torch.device | None) -> bytes:
    if generator is None and device is not None and torch.device(device).type == "cuda":
        state = torch.cuda.get_rng_state(device)
    else:
        state = (torch.default_generator if generator is None else generator).get_state()
    return hashlib.blake2b(state.numpy().tobytes()).digest()


def elsewhere() -> dict[str, bytes]:
    """The states of Python's generator and of NumPy's."""
    python, numpy = random.getstate(), cast(tuple, np.random.get_state())  # noqa: NPY002
    return {"Python's random": repr(python).encode(), "numpy.random": numpy[1].tobytes() + repr(numpy[2:]).encode()}


@contextlib.contextmanager
def another_seed(device: torch.device) -> Iterator[None]:
    """PyTorch's global generators seeded differently for a while; they are as before afterwards."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(torch.initial_seed() + 20171127)
        yield
