"""Runs during which settings of PyTorch change: one at a time, and afterwards all is as before, whatever ended them.

PyTorch's own context managers don't survive an interrupt everywhere: one that comes between the change of a setting and
the body of its ``with`` leaves it changed. So each run notes all settings before it begins, and puts back at its end
what differs. `Thread` are the settings of one thread, `Process` those that all threads share. How precisely PyTorch
computes, which products in several threads at once depend on, is kept by `_Arithmetic`.
"""

from __future__ import annotations

import contextlib
import gc
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
import torch
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch.autograd import forward_ad
from torch.utils import checkpoint

from fisherop.model.compat import clear_frames, compute_exactly

T = TypeVar("T")
_SDP = [n for n in ("flash", "mem_efficient", "math", "cudnn") if hasattr(torch._C, f"_get_{n}_sdp_enabled")]
_WARNINGS = [n for n in ("filters", "showwarning", "_showwarnmsg_impl") if hasattr(warnings, n)]


class Thread:
    """What PyTorch does in this thread: gradients, inference, autocast, modes, transforms."""

    def __init__(self, device: torch.device) -> None:
        self.thread = threading.get_ident()
        self.device = device.type
        self._gradients = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        self._autocast = torch.is_autocast_enabled(self.device)
        self._modes = _modes()
        self._transforms = _functorch.get_dynamic_layer_stack_depth()

    def restore(self) -> None:
        _ARITHMETIC.leave(self)
        _keep_modes(self._modes)
        if _functorch.get_dynamic_layer_stack_depth() > self._transforms:
            _functorch.pop_dynamic_layer_stack_and_undo_to_depth(self._transforms)
        if torch.is_autocast_enabled(self.device) != self._autocast:
            torch.set_autocast_enabled(self.device, self._autocast)
        if (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) != self._gradients:
            torch._C._set_grad_enabled(self._gradients[0])


class Process(Thread):
    """What all threads share, too: kernels, anomaly detection, forward mode's level, warnings, garbage collection."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.interrupted = False  # by Ctrl-C, or any error
        self._settings = _settings()
        self._level = forward_ad._current_level

    def restore(self) -> None:
        super().restore()
        self.leave_levels()
        if self.interrupted:
            self.restore_settings()

    def restore_settings(self) -> None:
        """Those of the process alone, by nothing that computes.

        Where nothing was raised, the context managers of PyTorch have put back what they changed; what differs then has
        been changed by another thread.
        """
        now = _settings()
        for name, (value, put) in self._settings.items():
            if now[name][0] is not value and now[name][0] != value:
                put(value)

    def leave_levels(self) -> None:
        while forward_ad._current_level > self._level:
            forward_ad.exit_dual_level()
        if self.interrupted and self._level < 0:
            with contextlib.suppress(RuntimeError):  # there is one already, if it came within PyTorch's way in or out
                torch._C._enter_dual_level()
            torch._C._exit_dual_level(level=0)


class _Arithmetic:
    """PyTorch computes exactly from when the first run enters until the last has left, in any thread."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.runs: set[Thread] = set()
        self._undo: list[Callable[[], object]] = []

    def enter(self, run: Thread) -> None:
        with self.lock:
            self.runs.add(run)
            compute_exactly(run.device, self._undo)

    def leave(self, run: Thread) -> None:
        """May be done twice, since an interrupt on the way makes it begin again."""
        with self.lock:
            self.runs.discard(run)
            while self._undo and not self.runs:
                self._undo[-1]()
                self._undo.pop()


class Generators:
    """The global generators of random numbers; put back where something has drawn on them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._states = self._now()

    def _now(self) -> dict[str, Any]:
        cuda = torch.cuda.get_rng_state(self._device) if self._device.type == "cuda" else None
        return {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()} | (  # noqa: NPY002
            {} if cuda is None else {"cuda": cuda}
        )

    def restore(self) -> None:
        now, before = self._now(), self._states
        if now["python"] != before["python"]:
            random.setstate(before["python"])
        if any(not np.array_equal(a, b) for a, b in zip(now["numpy"], before["numpy"], strict=True)):
            np.random.set_state(before["numpy"])  # noqa: NPY002
        if not torch.equal(now["torch"], before["torch"]):
            torch.set_rng_state(before["torch"])
        if "cuda" in now and not torch.equal(now["cuda"], before["cuda"]):
            torch.cuda.set_rng_state(before["cuda"], self._device)


def alone(
    function: Callable[[list[Callable[[], Any]]], T], device: torch.device, draws: Callable[[], bool] = lambda: False
) -> T:
    """Call `function` while no other thread does this; afterwards all settings and generators are as before.

    Parameters
    ----------
    function : callable
        It is given a list, to which it adds what is to be done at the end, in order, when PyTorch is as before. Each
        must be such that it may be done twice, since an interrupt on the way makes it begin again.
    device : torch.device
        Whose generator of random numbers is kept, beside those of the CPU.
    draws : callable
        Whether the function has drawn on these: else they stay as they are, since other threads may have.
    """
    global _running
    with _LOCK:  # acquired and entered without a point between where Python would look for signals
        last: list[Callable[[], Any]] = []
        outer, process = _running, None
        try:
            process = Process(device)
            generators = Generators(device)
            last = [process.restore, lambda: generators.restore() if draws() else None]
            _running = outer or process
            _ARITHMETIC.enter(process)
            return function(last)
        except BaseException as error:
            if process is not None:
                process.interrupted = True
            if not isinstance(error, Exception):
                clear_frames(error)
            raise
        finally:
            try:
                _undo(last, outer)
            except BaseException:  # Ctrl-C, or whatever a handler of another signal raises
                _undo(last, outer)
                raise


def keeping_settings(function: Callable[[], T], device: torch.device) -> T:
    """Call `function`; afterwards the settings of this thread are as before."""
    before = Thread(device)
    try:
        _ARITHMETIC.enter(before)
        return function()
    except KeyboardInterrupt as error:
        clear_frames(error)
        raise
    finally:
        try:
            before.restore()
        except BaseException:
            before.restore()
            raise


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C waits until the end of the block, which should be short; the user's own handler gets it then."""
    handler = signal.getsignal(signal.SIGINT) if threading.current_thread() is threading.main_thread() else None
    if not callable(handler):  # another thread, which gets no signals, or one that isn't handled in Python
        yield
        return
    waiting: list[tuple[int, Any]] = []
    signal.signal(signal.SIGINT, lambda number, frame: waiting.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if waiting:
            handler(*waiting[-1])


def _undo(last: list[Callable[[], Any]], outer: Process | None) -> None:
    """Each step, also where one fails."""
    global _running
    with contextlib.ExitStack() as stack:
        for undo in reversed(last):
            stack.callback(undo)
    _running = outer


def _modes() -> tuple[list[Any], list[Any]]:
    functions = [torch._C._get_function_stack_at(i) for i in range(torch._C._len_torch_function_stack())]
    return functions, [torch._C._get_dispatch_stack_at(i) for i in range(torch._C._len_torch_dispatch_stack())]


def _keep_modes(wanted: tuple[list[Any], list[Any]]) -> None:
    now = _modes()
    for have, keep, pop, push in (
        (now[0], wanted[0], torch._C._pop_torch_function_stack, torch._C._push_on_torch_function_stack),
        (now[1], wanted[1], lambda: torch._C._pop_torch_dispatch_stack(None), torch._C._push_on_torch_dispatch_stack),
    ):
        if len(have) == len(keep) and all(a is b for a, b in zip(have, keep, strict=True)):
            continue
        for _ in have:
            pop()
        for mode in keep:
            push(mode)


def _settings() -> dict[str, tuple[Any, Callable[[Any], Any]]]:
    """Each setting of the process as it is, and how it is set."""
    found: dict[str, tuple[Any, Callable[[Any], Any]]] = {
        "mkldnn": (torch._C._get_mkldnn_enabled(), torch._C._set_mkldnn_enabled),
        "mha": (torch.backends.mha.get_fastpath_enabled(), torch.backends.mha.set_fastpath_enabled),
        "anomaly": (
            (torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()),
            lambda value: torch.set_anomaly_enabled(*value),
        ),
        "gc": (gc.isenabled(), lambda value: gc.enable() if value else gc.disable()),
        "checkpoint": (
            getattr(checkpoint, "_NoopSaveInputs", None),
            lambda value: setattr(checkpoint, "_NoopSaveInputs", value),
        ),
        "warnings": ([getattr(warnings, name) for name in _WARNINGS], _put_warnings),
    }
    for name in _SDP:
        found[name] = getattr(torch._C, f"_get_{name}_sdp_enabled")(), getattr(torch._C, f"_set_sdp_use_{name}")
    eval_frame = sys.modules.get("torch._dynamo.eval_frame")
    if eval_frame is not None and hasattr(eval_frame, "_set_stance"):
        found["stance"] = eval_frame._stance, eval_frame._set_stance
    return found


def _put_warnings(values: list[Any]) -> None:
    for name, value in zip(_WARNINGS, values, strict=True):
        setattr(warnings, name, value)
    if hasattr(warnings, "_filters_mutated"):  # what modules remember of filters holds no longer
        warnings._filters_mutated()  # pyright: ignore[reportAttributeAccessIssue]


def _in_child() -> None:
    """A fork while another thread runs: here it never comes to its end."""
    global _LOCK, _running
    _ARITHMETIC.lock = threading.RLock()
    for run in [run for run in _ARITHMETIC.runs if run.thread != threading.get_ident()]:
        _ARITHMETIC.leave(run)
    if not _LOCK._is_owned():  # pyright: ignore[reportAttributeAccessIssue]
        _LOCK = threading.RLock()
        if _running is not None:
            _running.interrupted = True
            _running.leave_levels()
            _running.restore_settings()
            _running = None


_ARITHMETIC = _Arithmetic()
_LOCK = threading.RLock()
_running: Process | None = None
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
