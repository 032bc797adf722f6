"""A model's operations in float64, whatever the dtype of its parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fisherop.model.compat import Mode
from fisherop.model.engines.nodes import leaves, replace
from fisherop.model.engines.writes import written

aten = torch.ops.aten
_BAND_BYTES = 2**22  # of the columns that PyTorch makes of a convolution in float64: this much is fastest, too
_WIDER = {torch.float16: torch.float64, torch.bfloat16: torch.float64, torch.float32: torch.float64}
_WIDER |= {torch.complex32: torch.complex128, torch.complex64: torch.complex128}
_NARROW, _WIDE = frozenset(_WIDER), frozenset(_WIDER.values())


class Promoted(Mode):
    """Every operation in float64, whatever the dtype of its arguments, but for what it writes in place."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.is_view:  # a view of a copy would not be one
            return func(*args, **kwargs)
        targets = {id(t) for t in written(func, args, kwargs).values()}

        def wider(x: Any) -> Any:
            return _WIDER.get(x, x) if isinstance(x, torch.dtype) else x if id(x) in targets else _widened(x)

        args, kwargs = replace((args, kwargs), (Tensor, torch.dtype), wider)
        if func in (torch.ops.aten._softmax.default, torch.ops.aten._log_softmax.default):
            args = (*args[:2], False)  # from half to single precision, which there is none of
        given: Any = args
        if func is aten.convolution.default and not kwargs and _is_plain(*given):
            func = _convolved
        out = func(*given, **kwargs)
        return out if targets else replace(out, Tensor, _widened)

    def __enter__(self):
        self._arguments = _PromotedArguments()
        self._arguments.__enter__()
        return super().__enter__()

    def __exit__(self, *exception):
        super().__exit__(*exception)
        self._arguments.__exit__(*exception)


class _PromotedArguments(TorchFunctionMode):
    """Functions that check that their arguments have one dtype are given the wider one."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        writes = name in ("__setitem__", "__set__") or "out" in kwargs or (name.endswith("_") and name[-2:] != "__")
        if not writes and not name.startswith("__"):
            dtypes = {leaf.dtype for leaf in leaves((args, kwargs)) if isinstance(leaf, Tensor)}
            if len(dtypes) > 1 and dtypes & _NARROW and dtypes & _WIDE:
                args, kwargs = replace((args, kwargs), Tensor, _widened)
        return func(*args, **kwargs)


def _widened(x: Tensor) -> Tensor:
    return x.to(_WIDER[x.dtype]) if x.dtype in _WIDER else x


def _is_plain(x: Tensor, weight: Tensor, *rest: Any) -> bool:
    """Whether a convolution is one in 2-D on the CPU, and not transposed."""
    return x.ndim == 4 and x.device.type == "cpu" and x.dtype == torch.float64 and not rest[4]


def _convolved(x: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
    """By bands of rows, since PyTorch makes columns of the whole image, which take many times its memory."""
    stride, padding, dilation, *rest = options
    like = aten.convolution.default(x.to("meta"), weight.to("meta"), None, *options)
    bytes_ = len(x) * weight[0].numel() * like.shape[-1] * x.element_size()  # of the columns of a row
    if like.shape[2] * bytes_ <= _BAND_BYTES:
        return aten.convolution.default(x, weight, bias, *options)
    out, done = x.new_empty(like.shape), 0
    for part in out.split(max(1, _BAND_BYTES // bytes_), 2):
        first = done * stride[0] - padding[0]
        rows = (part.shape[2] - 1) * stride[0] + dilation[0] * (weight.shape[2] - 1) + 1
        band = x.new_zeros(*x.shape[:2], rows, x.shape[3])
        inside = x[:, :, max(first, 0) : max(first + rows, 0)]
        band[:, :, max(-first, 0) :][:, :, : inside.shape[2]] = inside
        part.copy_(aten.convolution.default(band, weight, bias, stride, (0, padding[-1]), dilation, *rest))
        done += part.shape[2]
    return out
