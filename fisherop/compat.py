"""What differs between versions of PyTorch, and the switches of PyTorch that linearizing sets and puts back."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

VERSION = tuple(int(part) for part in torch.__version__.split(".")[:2])


def prepare_recording() -> None:
    """Import what PyTorch would import while operations are being recorded.

    Up to 2.10, forward mode loads ``torch._dynamo`` at the first operation that is decomposed. Inside a recording that
    import breaks half-way, and leaves `torch.func` unusable in the process.
    """
    if VERSION < (2, 11):
        import torch._dynamo  # noqa: F401


@contextlib.contextmanager
def differentiable() -> Iterator[None]:
    """A model's operations by their formulas, uncompiled; PyTorch's switches are as before afterwards.

    The fused kernels of attention have no forward mode. What `torch.compile` wraps runs as it is: compiling it would
    record the modes that are active here, and not compile it again for the user. Up to 2.5, a function compiled with
    ``fullgraph=True`` can't be told to.
    """
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    eager = contextlib.nullcontext()
    if "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance"):
        eager = torch.compiler.set_stance("force_eager")
    try:
        with sdpa_kernel(SDPBackend.MATH), eager:
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


def is_wrapped(tensor: torch.Tensor) -> bool:
    """Whether a tensor is one of a transform of `torch.func`, which has no memory of its own."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)
