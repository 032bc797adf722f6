"""What differs between versions of PyTorch, and the switches of PyTorch that linearizing sets and puts back."""

from __future__ import annotations

import contextlib
import functools
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint
from torch.utils._python_dispatch import TorchDispatchMode

VERSION = tuple(int(part) for part in torch.__version__.split(".")[:2])
_REDUCED = "tf32", "bf16"


def prepare_recording() -> None:
    """Import what PyTorch would import while operations are being recorded.

    Up to 2.10, forward mode loads ``torch._dynamo`` at the first operation that is decomposed. Inside a recording that
    import breaks half-way, and leaves `torch.func` unusable in the process.
    """
    with warnings.catch_warnings():  # of these imports, which are none of the user's
        warnings.simplefilter("ignore")
        import torch._decomp.decompositions_for_jvp

        if VERSION < (2, 11):
            import torch._dynamo  # noqa: F401


def compute_exactly(device: str, undo: list[Callable[[], object]]) -> None:
    """Have float32 computed as such, not in TF32 or bfloat16, which are allowed in convolutions by cuDNN, for one.

    And have cuDNN give the same bits again. What undoes a change, in reverse order, is put into `undo` before the
    change is made. From 2.9 on, an operation has a precision of its own or its backend's, and a backend its own or the
    general one; "none" is the default, by which some operations are reduced. Going from the general to the special,
    what is still reduced is so by itself. While it lasts, PyTorch's old switch of cuDNN does not agree with the new
    ones, and `torch.backends.cudnn.flags` says so.
    """
    if device == "cuda" and not torch._C._get_cudnn_deterministic():
        undo.append(functools.partial(torch._C._set_cudnn_deterministic, False))
        torch._C._set_cudnn_deterministic(True)
    if VERSION < (2, 9):
        if torch._C._get_float32_matmul_precision() != "highest":
            undo.append(functools.partial(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision()))
            torch.set_float32_matmul_precision("highest")
        if device == "cuda" and torch._C._get_cudnn_allow_tf32():
            undo.append(functools.partial(torch._C._set_cudnn_allow_tf32, True))
            torch._C._set_cudnn_allow_tf32(False)
        return
    get, put = torch._C._get_fp32_precision_getter, torch._C._set_fp32_precision_setter
    backend = "mkldnn" if device == "cpu" else "cuda"
    for place in (("generic", "all"), *((backend, name) for name in ("all", "conv", "rnn", "matmul"))):
        value = get(*place)
        if value in _REDUCED or (device == "cuda" and place[0] == "generic" and value == "none"):
            undo.append(functools.partial(put, *place, value))
            put(*place, "ieee")


@contextlib.contextmanager
def differentiable() -> Iterator[None]:
    """A model's operations by their formulas, uncompiled; PyTorch's switches are as before afterwards.

    The fused kernels of attention and of recurrent layers have no forward mode. What `torch.compile` wraps runs as it
    is: compiling it would record the modes that are active here, and not compile it again for the user. Up to 2.5, a
    function compiled with ``fullgraph=True`` can't be told to.
    """
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), uncompiled(), _Formulas(), _checkpoints():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """What `torch.compile` wraps runs as it is; 2.12 would warn of it, where that was to be with ``fullgraph=True``."""
    eager = contextlib.nullcontext()
    if "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance"):
        eager = torch.compiler.set_stance("force_eager")
    with eager, warnings.catch_warnings() if VERSION == (2, 12) else contextlib.nullcontext():
        if VERSION == (2, 12):
            warnings.filterwarnings("ignore", "torch.compile with fullgraph=True found no compiled frames")
        yield


class _Formulas(TorchFunctionMode):
    """Operations whose kernels have no forward mode, or no derivative, by PyTorch's decompositions, which have both.

    Up to 2.14, `grid_sample` has no forward mode, up to 2.10 no second derivative. On CUDA recurrent layers and cells
    have no forward mode, and, by cuDNN in evaluation mode, no derivative; on CPUs, without oneDNN, they have both.
    """

    RECURRENT_ON = "cuda"
    INTERPOLATION, PADDING = ("bilinear", "nearest", "bicubic"), ("zeros", "border", "reflection")

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.grid_sample and VERSION < (2, 15):
            return self._sample(*args, **kwargs)
        if func in _RECURRENT:
            named: dict[str, Any] = {"b_ih": None} | kwargs if "b_hh" in kwargs and len(args) < 5 else kwargs
            ordered = *args, *(named[name] for name in _NAMES if name in named)
            if ordered[0].device.type == self.RECURRENT_ON:
                return self._recur(func, *ordered)
            return _without_mkldnn(func, *args, **kwargs)
        return func(*args, **kwargs)

    def _sample(
        self,
        input: Tensor,
        grid: Tensor,
        mode: str = "bilinear",
        padding_mode: str = "zeros",
        align_corners: bool | None = None,
    ) -> Tensor:
        known = mode in self.INTERPOLATION and padding_mode in self.PADDING
        if not known or input.ndim != 4 or input.dtype != grid.dtype:
            return F.grid_sample(input, grid, mode, padding_mode, align_corners)
        options = self.INTERPOLATION.index(mode), self.PADDING.index(padding_mode), bool(align_corners)
        return torch._decomp.decompositions.grid_sampler_2d(input, grid, *options)  # pyright: ignore[reportAttributeAccessIssue]

    def _recur(self, func: Callable, input: Tensor, second: Any, *rest: Any) -> Any:
        decompositions: Any = torch._decomp.decompositions  # pyright: ignore[reportAttributeAccessIssue]
        whole, packed = (getattr(decompositions, name) for name in _RECURRENT[func])
        if func in (torch.lstm_cell, torch.gru_cell):  # a sequence of length one
            state = tuple(h[None] for h in second) if isinstance(second, tuple | list) else second[None]
            weights = [weight for weight in rest if weight is not None]
            if len(weights) == 3:  # with a bias alone
                weights = [torch.zeros_like(weights[2]) if weight is None else weight for weight in (*rest, None)[:4]]
            _, *last = whole(input[None], state, weights, len(weights) == 4, 1, 0.0, False, False, False)
            return tuple(h[0] for h in last) if len(last) == 2 else last[0][0]
        # a packed sequence's second argument are the sizes of its batches, and its weights come fourth
        return (whole if isinstance(rest[1], bool) else packed)(input, second, *rest)


def _without_mkldnn(function: Callable, *args: Any, **kwargs: Any) -> Any:
    """Recurrent layers of oneDNN, which it has for float32, have no forward mode."""
    enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        return function(*args, **kwargs)
    finally:
        torch._C._set_mkldnn_enabled(enabled)


_RECURRENT = {
    torch.rnn_tanh: ("rnn_tanh_input", "rnn_tanh_data"),
    torch.rnn_relu: ("rnn_relu_input", "rnn_relu_data"),
    torch.lstm: ("lstm_impl", "lstm_data_impl"),
    torch.gru: ("gru_impl", "gru_impl_data"),
    torch.lstm_cell: ("lstm_impl", "lstm_data_impl"),
    torch.gru_cell: ("gru_impl", "gru_impl_data"),
}
_NAMES = ("input", "data", "batch_sizes", "hx", "params", "has_biases", "num_layers", "dropout", "train")
_NAMES += ("bidirectional", "batch_first", "w_ih", "w_hh", "b_ih", "b_hh")  # of their arguments, each in its order


@contextlib.contextmanager
def _checkpoints() -> Iterator[None]:
    """Up to 2.11, the function by which a checkpoint keeps its inputs has no forward mode and no rule for vmap."""
    keeps = getattr(checkpoint, "_NoopSaveInputs", None)
    if keeps is None:
        yield
        return

    class Keeps(keeps):
        @staticmethod
        def jvp(ctx, *tangents):
            return torch.zeros(0)

        @staticmethod
        def vmap(info, in_dims, *args):
            return torch.empty(0), None

    checkpoint._NoopSaveInputs = Keeps  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        checkpoint._NoopSaveInputs = keeps  # pyright: ignore[reportAttributeAccessIssue]


class Mode(TorchDispatchMode):
    """A mode whose operations `torch.compile` may see: nothing is compiled here.

    From 2.11 on PyTorch would wrap each call to hide it, and load ``torch._dynamo`` for that, which takes seconds.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


def is_wrapped(tensor: torch.Tensor) -> bool:
    """Whether a tensor is one of a transform of `torch.func`, which has no memory of its own."""
    return is_functorch_wrapped_tensor(tensor)


@contextlib.contextmanager
def clean_failure() -> Iterator[None]:
    """Something that may fail inside PyTorch: an error leaves the thread's dispatch state as it was.

    PyTorch's guards lie in the frames that an error's traceback keeps. When that is freed, whenever that is, they put
    back a state that is no longer the thread's, and differentiation no longer works. So they are freed here, where
    leaving `inference_mode` restores the state of before.
    """
    enabled = torch.is_grad_enabled()  # which inference_mode(False) sets
    with torch.inference_mode(False), torch.set_grad_enabled(enabled):
        try:
            yield
        except BaseException as error:
            clear_frames(error)
            raise


def clear_frames(error: BaseException | None) -> None:
    """Free what the frames of an error hold: PyTorch's guards, which would put back an old state whenever freed.

    An error that a trace function raises at the end of a call has left that frame out: another goes back to it.
    """
    while error is not None:
        for frame, _ in traceback.walk_tb(error.__traceback__):
            while frame is not None:
                try:
                    frame.clear()
                except RuntimeError:  # it still runs
                    break
                frame = frame.f_back
        error = error.__cause__ or error.__context__
