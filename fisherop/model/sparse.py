"""Products with sparse matrices that PyTorch can differentiate in both modes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from fisherop.model.compat import is_wrapped

_PRODUCTS = {torch.matmul, torch.mm, torch.mv, torch.sparse.mm, Tensor.matmul, Tensor.__matmul__, Tensor.mm, Tensor.mv}


class SparseProducts(TorchFunctionMode):
    """A sparse constant times a dense tensor, where PyTorch's own product has no forward mode."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _PRODUCTS and len(args) == 2 and not kwargs:
            a, b = args
            if is_sparse(a) and not a.requires_grad and isinstance(b, Tensor) and not is_sparse(b) and b.ndim <= 2:
                return _Product.apply(a, b) if b.ndim == 2 else _Product.apply(a, b[:, None])[:, 0]
        return func(*args, **kwargs)


_PLAIN: Any = Tensor


def is_sparse(x: Any) -> bool:
    return isinstance(x, Tensor) and x.layout != torch.strided


def is_opaque(tensor: Tensor) -> bool:
    """Whether a tensor's memory can't be read as a dense tensor's, or crashes the process.

    Of a lazy or a nested tensor, of a subclass that does its operations itself, as quantized weights and fake tensors
    do, and of one whose storage has been freed.
    """
    kind: Any = type(tensor)
    if kind.__torch_dispatch__ is not _PLAIN.__torch_dispatch__ or is_lazy(tensor) or tensor.is_nested:
        return True
    return (
        tensor.layout == torch.strided
        and tensor.device.type != "meta"
        and not is_wrapped(tensor)
        and tensor.numel() > 0
        and tensor.untyped_storage().nbytes() == 0
    )


def parts(tensor: Tensor) -> list[Tensor]:
    """The dense tensors that a tensor is made of; none where PyTorch has no names for them."""
    if is_opaque(tensor):
        return []
    if tensor.layout == torch.strided:
        return [tensor]
    if tensor.layout == torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return []


class _Product(torch.autograd.Function):
    """A x of a constant sparse A (M, N) and a dense x (N, k)."""

    @staticmethod
    def forward(a: Tensor, x: Tensor) -> Tensor:
        return torch.sparse.mm(a, x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.matrix = inputs[0]

    @staticmethod
    def jvp(ctx, _, tangent):  # pyright: ignore[reportIncompatibleMethodOverride]
        return torch.sparse.mm(ctx.matrix, tangent)

    @staticmethod
    def backward(ctx, gradient):  # pyright: ignore[reportIncompatibleMethodOverride]
        transposed = ctx.matrix.to_sparse_coo().t()  # PyTorch multiplies few other layouts
        return None, _Product.apply(transposed, gradient)
