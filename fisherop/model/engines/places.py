"""Where a tensor's elements lie in memory, and what a change of some of them does to tensors that share it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Place(NamedTuple):
    """A strided tensor's place in memory; tensors at the same place have the same elements."""

    storage: int
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    is_conj: bool
    is_neg: bool

    @classmethod
    def of(cls, x: Tensor) -> Place:
        """A tensor that is not strided has no place; its identity stands for one."""
        if x.layout != torch.strided:
            return cls(-id(x), 0, tuple(x.shape), (), x.dtype, False, False)
        # the stride of a dimension of one element says nothing
        stride = tuple(0 if n == 1 else s for n, s in zip(x.shape, x.stride(), strict=True))
        storage = x.untyped_storage()._cdata
        return cls(storage, int(x.storage_offset()), tuple(x.shape), stride, x.dtype, x.is_conj(), x.is_neg())

    @property
    def kind(self) -> tuple[torch.dtype, bool, bool]:
        return self.dtype, self.is_conj, self.is_neg

    @property
    def extent(self) -> tuple[int, int]:
        """The first place in memory, and the last."""
        reach = sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True))
        return self.offset, self.offset + reach

    def positions(self) -> Tensor:
        """The place in memory of each element, (numel,)."""
        places = torch.tensor(self.offset, device="cpu")
        for n, s in zip(self.shape, self.stride, strict=True):
            places = places[..., None] + s * torch.arange(n, device="cpu")
        return places.reshape(-1)


def same_layout(x: Any, y: Tensor) -> bool:
    """Whether two tensors of the same elements have them in the same order."""
    if not isinstance(x, Tensor) or x.layout != torch.strided or y.layout != torch.strided:
        return False
    if (x.shape, x.dtype, x.device) != (y.shape, y.dtype, y.device):
        return False
    return all(n == 1 or s == t for n, s, t in zip(x.shape, x.stride(), y.stride(), strict=True))


Slice = tuple[int, int, int, int]  # dimension, start, stop, step


def as_slices(outer: Place, inner: Place) -> list[Slice] | None:
    """The slices of `outer` that hold the elements of `inner`, in their order; None where slices can't say it."""
    rest = inner.offset - outer.offset
    strides = [s for n, s in zip(outer.shape, outer.stride, strict=True) if n > 1]
    if (
        rest < 0
        or outer.kind != inner.kind
        or 0 in (*outer.shape, *inner.shape)
        or strides != sorted(strides, reverse=True)
    ):
        return None
    wanted = [(n, s) for n, s in zip(inner.shape, inner.stride, strict=True) if n > 1]
    slices = []
    for d, (n, s) in enumerate(zip(outer.shape, outer.stride, strict=True)):
        if n == 1:
            continue
        if s == 0:
            return None
        start, rest = divmod(rest, s)
        length, step = 1, 1
        if wanted and wanted[0][1] >= s and wanted[0][1] % s == 0:
            length, step = wanted[0][0], wanted[0][1] // s
            if start + (length - 1) * step < n:
                del wanted[0]
            else:
                length, step = 1, 1
        if start >= n:
            return None
        stop = start + (length - 1) * step + 1
        if (start, stop, step) != (0, n, 1):
            slices.append((d, start, stop, step))
    return None if rest or wanted else slices


def _is_dense(place: Place) -> bool:
    """Whether each dimension steps over all that the later ones reach, so that a place has one index."""
    reach = 0
    for n, s in reversed([(n, s) for n, s in zip(place.shape, place.stride, strict=True) if n > 1]):
        if s <= reach:
            return False
        reach += (n - 1) * s
    return True


def take_slices(x: Tensor, slices: Sequence[Slice], shape: Sequence[int]) -> Tensor:
    for d, start, stop, step in slices:
        x = torch.ops.aten.slice.Tensor(x, d, start, stop, step)
    return x.reshape(shape)


def put_slices(x: Tensor, source: Tensor, slices: Sequence[Slice], box: Sequence[int]) -> Tensor:
    """x with the elements of `source`, reshaped to `box`, in slices."""
    source = source.reshape(box)
    if not slices:
        return source
    parts = [x]
    for d, start, stop, step in slices[:-1]:
        parts.append(torch.ops.aten.slice.Tensor(parts[-1], d, start, stop, step))
    for part, (d, start, stop, step) in zip(reversed(parts), reversed(slices), strict=True):
        source = torch.ops.aten.slice_scatter.default(part, source, d, start, stop, step)
    return source


def take(x: Tensor, places: Tensor, shape: Sequence[int]) -> Tensor:
    return x.reshape(-1).index_select(0, places).reshape(shape)


def put(x: Tensor, source: Tensor, here: Tensor, there: Tensor) -> Tensor:
    """x whose flat elements `here` are those of `source` that lie `there`."""
    return x.reshape(-1).index_copy(0, here, source.reshape(-1).index_select(0, there)).reshape(x.shape)


def shared(reader: Place, written: Place) -> tuple[Tensor, Tensor]:
    """Which flat elements of `reader` lie where ones of `written` do, and which ones these are."""
    read, (in_memory, order) = reader.positions(), written.positions().sort()
    at = torch.searchsorted(in_memory, read).clamp(max=len(in_memory) - 1)
    hit = in_memory[at] == read
    return hit.nonzero().flatten(), order[at[hit]]
