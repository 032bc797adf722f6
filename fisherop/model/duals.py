"""Layers by dual numbers in one step each, where PyTorch's own formula takes many and as many tensors beside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fisherop.model.compat import is_wrapped

_CONVOLUTIONS = {torch.conv1d, torch.conv2d, torch.conv3d}


class Duals(TorchFunctionMode):
    """Convolutions, and batch norm in evaluation mode, whose parameters don't depend on the image.

    PyTorch takes their parameters' derivatives for tensors of zeros, which it adds. The response keeps its bits.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        known = func is F.batch_norm or func in _CONVOLUTIONS
        if known and args and isinstance(args[0], Tensor) and not any(map(_has_tangent, (*args[1:], *kwargs.values()))):
            x, tangent = (args[0], None) if is_wrapped(args[0]) else forward_ad.unpack_dual(args[0])
            if tangent is not None:
                apply = _normalized if func is F.batch_norm else _convolved
                after = apply(func, tangent, *args[1:], **kwargs)
                if after is not None:
                    return forward_ad.make_dual(func(x, *args[1:], **kwargs), after)
        return func(*args, **kwargs)


def _has_tangent(x: Any) -> bool:
    """A parameter has none: a dual number made of it is another tensor."""
    if not isinstance(x, Tensor) or type(x) is nn.Parameter:
        return False
    return is_wrapped(x) or forward_ad.unpack_dual(x).tangent is not None


def _convolved(func: Callable, tangent: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any):
    return func(tangent, weight, None, *args, **kwargs)


def _normalized(
    func: Callable,
    tangent: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    """None where the scale depends on x, or dtypes are mixed."""
    if training or var is None or tangent.dtype not in (var.dtype, torch.float64):
        return None
    shape = [1, -1] + [1] * (tangent.ndim - 2)
    scale = (var + eps).rsqrt()
    return tangent * (scale if weight is None else scale * weight).reshape(shape)
