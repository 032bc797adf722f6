"""The programs of traced products that are kept with a module, for later images."""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from typing import Any, NamedTuple

from torch import Tensor, nn

from fisherop.model.contents import Contents
from fisherop.model.engines.traced import Program

_MAX_KINDS = 4  # of images, for each module


class Kept(NamedTuple):
    """A program, and what the module held when it was recorded.

    `ignored` are the paths of tensors that the program doesn't read; `precision` is the machine epsilon of its least
    precise step; `error` how far its J v was from PyTorch's; `draws` whether the model draws random numbers.
    """

    program: Program
    contents: Contents
    ignored: frozenset[str]
    precision: float
    error: float
    draws: bool


_KEPT: weakref.WeakKeyDictionary[nn.Module, dict[Hashable, Kept]] = weakref.WeakKeyDictionary()


def has(image: Tensor, model: Any) -> bool:
    """Whether there is a program for images of this kind, of the model as it is or was."""
    return _can_be_kept(model) and _kind(image) in _KEPT.get(model, {})


def recall(image: Tensor, model: Any, contents: Contents) -> Kept | None:
    """The program for images of this kind, where the module holds what it did."""
    kinds = _KEPT.get(model, {}) if _can_be_kept(model) else {}
    kept = kinds.get(_kind(image))
    if kept is None or contents.changes(kept.contents, but=kept.ignored):
        return None
    kinds[_kind(image)] = kinds.pop(_kind(image))  # the last one used
    return kept


def keep(
    image: Tensor, model: Any, program: Program, contents: Contents, precision: float, error: float, draws: bool
) -> None:
    """Let later images of this kind resume the program, once it has been found right."""
    if not _can_be_kept(model) or program.reads_image:
        return
    ignored = frozenset(path for path, places in contents.storages.items() if not program.reads & set(places))
    kinds = _KEPT.setdefault(model, {})
    kinds.pop(_kind(image), None)
    for old in [kind for kind, kept in kinds.items() if contents.changes(kept.contents, but=kept.ignored)]:
        del kinds[old]  # of the module as it was
    for old in list(kinds)[: max(0, len(kinds) + 1 - _MAX_KINDS)]:
        del kinds[old]
    kinds[_kind(image)] = Kept(program, contents.released(), ignored, precision, error, draws)


def forget(image: Tensor, model: Any) -> None:
    """Keep no program for images of this kind."""
    _KEPT.get(model, {}).pop(_kind(image), None)


def _can_be_kept(model: Any) -> bool:
    return isinstance(model, nn.Module) and isinstance(model, Hashable)


def _kind(image: Tensor) -> Hashable:
    return image.shape, image.dtype, image.device
