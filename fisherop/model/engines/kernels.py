"""Functions of our own that a program runs where they are faster than PyTorch's operations.

Layout *NHWC* is PyTorch's ``channels_last``: a tensor (k, C, H, W) whose channels lie side by side in memory. What a
block needs for each vector apart is written into its own part of one result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
_MULTIPLE = 8  # of channels, which convolutions work on together
_MANY_CHANNELS = 16  # from which on PyTorch is faster at transposing a matrix than at changing the layout of an image
_LARGE, _LARGE_BACK = 2**16, 2**18  # elements of an image, from which on it is so, on the way there and on the way back


def pair(x: Any, y: Any) -> tuple[Any, Any]:
    """Two results of one program."""
    return x, y


def nhwc(x: Tensor) -> Tensor:
    """The same elements in that layout; by one transposition for each image, where that is faster."""
    if x.is_contiguous(memory_format=torch.channels_last):
        _, c, h, w = x.shape
        return x.as_strided(x.shape, (c * h * w, 1, c * w, c))  # by the stride of one image a convolution knows it
    if not x.is_contiguous() or not _pays(x.shape, _LARGE):
        return x.contiguous(memory_format=torch.channels_last)
    out = torch.empty_like(x, memory_format=torch.channels_last)
    for matrix, target in zip(x.flatten(2), out.permute(0, 2, 3, 1).flatten(1, 2), strict=True):
        target.copy_(matrix.T)
    return out


def nchw(x: Tensor) -> Tensor:
    """The same elements, contiguous: the way back, for (…, C, H, W)."""
    images = x.flatten(0, -4)
    laid_out = images.is_contiguous(memory_format=torch.channels_last)
    if x.is_contiguous() or not laid_out or not _pays(images.shape, _LARGE_BACK):
        return x.contiguous()
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    for matrix, target in zip(images.permute(0, 2, 3, 1).flatten(1, 2), out.view(images.shape).flatten(2), strict=True):
        target.copy_(matrix.T)
    return out


def _pays(shape: torch.Size, large: int) -> bool:
    return shape[1] >= _MANY_CHANNELS and shape[1:].numel() >= large


def places_nhwc(places: Tensor) -> Tensor:
    """The places in (H, W, C), flat, of those within each channel, (1, C, n)."""
    channels = places.shape[1]
    return (places.mT * channels + torch.arange(channels, device=places.device)).reshape(-1)


def take_nhwc(x: Tensor, places: Tensor, channels: int) -> Tensor:
    """Elements of (k, C, H, W), as (k, C, n)."""
    images = x.permute(0, 2, 3, 1).flatten(1)
    out = images.new_empty(len(x), len(places))
    for image, target in zip(images, out, strict=True):
        torch.index_select(image, 0, places, out=target)
    return out.view(len(x), -1, channels).mT


def as_taken(x: Tensor) -> Tensor:
    """(1, C, n) in the layout of `take_nhwc`."""
    return x.mT.contiguous().mT


def unpool(g: Tensor, shape: Sequence[int], is_nhwc: bool, *args: Any) -> Tensor:
    """The backward pass of max pooling; by itself, PyTorch would need the constants once for each vector.

    Of what was pooled it reads the shape (C, H, W) and the layout alone.
    """
    *geometry, indices = args
    layout = torch.channels_last if is_nhwc else torch.contiguous_format
    like = torch.empty((1, *shape), dtype=g.dtype, device=g.device, memory_format=layout)
    out = torch.empty((len(g), *shape), dtype=g.dtype, device=g.device, memory_format=layout)
    places = indices.long()
    for one, target in zip(g.split(1), out.split(1), strict=True):
        aten.max_pool2d_with_indices_backward.grad_input(one, like, *geometry, places, grad_input=target)
    return out


def fold(matrix: Tensor, x: Tensor, size: Sequence[int], *geometry: Any) -> Tensor:
    """A transposed convolution: a matrix product and a sum over windows, whose columns fit the cache."""
    channels = len(matrix) // (geometry[0][0] * geometry[0][1])
    out = x.new_empty(len(x), channels, *size)
    for one, target in zip(x.split(1), out.split(1), strict=True):
        aten.col2im.out(matrix @ one.flatten(2), size, *geometry, out=target)
    return out


def phases(weight: Tensor, stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    """The weights of an ordinary convolution that gives all of what a transposed one gives between two steps.

    For a stride s, y[s i + a] = Σ_d w[a + p - s d] x[i + d]; its channels are those of y times the places a.
    """
    (n_in, n_out, *kernel), (sh, sw) = weight.shape, stride
    (top, bottom), (left, right) = (_reach(*of) for of in zip(kernel, stride, padding, strict=True))
    made = weight.new_zeros(n_out, sh, sw, n_in, bottom - top + 1, right - left + 1)
    rows, columns = (
        [(a, d, a + p - s * d) for a in range(s) for d in range(low, high + 1) if 0 <= a + p - s * d < size]
        for size, s, p, (low, high) in zip(kernel, stride, padding, ((top, bottom), (left, right)), strict=True)
    )
    for a, d, i in rows:
        for b, e, j in columns:
            made[:, a, b, :, d - top, e - left] = weight[:, :, i, j].T
    made = made.flatten(0, 2)
    unused = made.new_zeros(-len(made) % _MULTIPLE, *made.shape[1:])
    return nhwc(torch.cat([made, unused]))


def _reach(kernel: int, stride: int, padding: int) -> tuple[int, int]:
    """The least and the greatest d in `phases`, along one dimension."""
    return -((kernel - 1 - padding) // stride), (stride - 1 + padding) // stride


def phase_geometry(kernel: int, stride: int, padding: int, n_in: int, n_out: int) -> tuple[int, int, int]:
    """Along one dimension: the padding of the convolution of all phases, its first place, its weights in all phases."""
    low, high = _reach(kernel, stride, padding)
    steps = -(-n_out // stride)
    around = max(-low, steps + high - n_in)
    return around, around + low, stride * (high - low + 1)


def convolve_phases(
    x: Tensor, weight: Tensor, shape: Sequence[int], stride: Sequence[int], padding: Sequence[int], start: Sequence[int]
) -> Tensor:
    """A transposed convolution by the weights of `phases`, (k, *shape)."""
    y = aten.convolution.default(x, weight, None, [1, 1], padding, [1, 1], False, [0, 0], 1)
    (sh, sw), (channels, h, w) = stride, shape
    i, j = -(-h // sh), -(-w // sw)
    y = y[:, : channels * sh * sw, start[0] : start[0] + i, start[1] : start[1] + j].unflatten(1, (channels, sh, sw))
    return y.permute(0, 1, 4, 2, 5, 3).reshape(len(x), channels, i * sh, j * sw)[:, :, :h, :w]
