"""Operations that write into their arguments: which, and the operations that return what these write."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fisherop.model.engines.nodes import leaves

aten = torch.ops.aten
_COMPARING = {"eq_", "ne_", "lt_", "le_", "gt_", "ge_", "logical_and_", "logical_or_", "logical_not_", "logical_xor_"}


def written(op: Any, args: tuple, kwargs: dict) -> dict[int | str, Tensor]:
    """The tensors that an operation writes to, by position or name."""
    if not op._schema.is_mutable:
        return {}
    found = {}
    for i, a in enumerate(op._schema.arguments):
        where = a.name if a.name in kwargs else i
        value = kwargs.get(a.name, args[i] if i < len(args) else None)
        if a.alias_info is not None and a.alias_info.is_write:
            found |= {(where if len(leaves(value)) == 1 else (where, j)): t for j, t in enumerate(leaves(value))}
    return {where: t for where, t in found.items() if isinstance(t, Tensor)}


@functools.cache
def functional(op: Any, where: int | str, same: bool) -> Callable:
    """The operation that returns what `op` writes into its argument `where`: PyTorch's own, or `op` on a copy.

    PyTorch's own gives another dtype where it compares, or where its arguments don't have the `same`.
    """
    name = op._schema.name.removeprefix("aten::")
    packet = getattr(aten, name.removesuffix("_"), None)
    keeps = name in ("copy_", "fill_", "zero_") or (same and torch.Tag.pointwise in op.tags and name not in _COMPARING)
    keeps = keeps or torch.Tag.inplace_view in op.tags
    if keeps and where == 0 and name.endswith("_") and packet and op._overloadname in packet.overloads():
        return getattr(packet, op._overloadname)

    def on_a_copy(*args: Any, **kwargs: Any) -> Tensor:
        given: Any = list(args) if isinstance(where, int) else kwargs
        given[where] = given[where].clone()
        op(*(given if isinstance(where, int) else args), **kwargs)
        return given[where]

    return on_a_copy
