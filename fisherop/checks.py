"""What arguments must be. Each check gives its argument back, or names it, what it must be, what it was, and the cure.

The wrong kind of thing is a TypeError, the wrong value a ValueError, a position that isn't there an IndexError. NumPy's
integers and real numbers are taken like Python's. True and False are no numbers here: where one is given, another
argument was meant.
"""

from __future__ import annotations

import errno
import math
import os
import sys
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import issparse
from scipy.sparse.linalg import LinearOperator, aslinearoperator
from torch import Tensor

_MOVES = (str, int, torch.device, torch.dtype, torch.memory_format, Tensor, type(None))


def refuse(error: type[Exception], name: str, what: str, value: Any, cure: str = "") -> NoReturn:
    """Raise "`name` must be `what`, got `value`: `cure`"."""
    raise error(f"{name} must be {what}, got {_shown(value)}" + (f": {cure}" if cure else ""))


def _shown(value: Any) -> str:
    """What is short as it prints itself, an array by its shape, all else by its type."""
    if isinstance(value, Tensor | np.ndarray):
        return f"{type(value).__name__} of shape {tuple(value.shape)} and {value.dtype}"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    plain = isinstance(value, str | bytes | complex | Real | Sequence | Mapping | torch.dtype | torch.device | None)
    shown = repr(value) if plain else f"{type(value).__name__} {getattr(value, '__name__', '')}".rstrip()
    return shown if len(shown) <= 100 else type(value).__name__


def instance(name: str, value: Any, kind: type | tuple[type, ...], what: str, cure: str = "") -> Any:
    if not isinstance(value, kind):
        refuse(TypeError, name, what, value, cure)
    return value


def flag(name: str, value: Any) -> bool:
    return bool(instance(name, value, (bool, np.bool_), "True or False"))


def function(name: str, value: Any, what: str = "callable") -> Any:
    if not callable(value):
        refuse(TypeError, name, what, value)
    return value


def choice(name: str, value: Any, names: Collection[str], otherwise: str = "") -> str:
    what = f"one of {', '.join(map(repr, names))}{otherwise}"
    if instance(name, value, str, what) not in names:
        refuse(ValueError, name, what, value)
    return value


def _is(kind: type, value: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def integer(
    name: str, value: Any, least: int = 1, most: int | None = None, *, what: str = "", optional: bool = False
) -> Any:
    """An integer from `least` to `most`; None, too, where it is optional."""
    what = what or f"an integer from {least}" + ("" if most is None else f" to {most}")
    what += ", or None" if optional else ""
    if optional and value is None:
        return None
    if not _is(Integral, value):
        refuse(TypeError, name, what, value)
    if value < least or (most is not None and value > most):
        refuse(ValueError, name, what, value)
    return int(value)


def number(name: str, value: Any, what: str = "a finite number", fits: Callable[[float], bool] | None = None) -> float:
    """A real number that float64 holds, and that `fits`."""
    if not _is(Real, value):
        refuse(TypeError, name, what, value)
    try:
        found = float(value)
    except OverflowError:  # of an integer
        found = math.inf
    if not math.isfinite(found) or (fits is not None and not fits(found)):
        refuse(ValueError, name, what, value)
    return found


def tolerance(tol: Any) -> float:
    return number("tol", tol, "a number between 0 and 1, relative to λ_max", lambda tol: 0 < tol < 1)


def memory(name: str, value: Any) -> int:
    return int(number(name, value, "a number of bytes", lambda value: value >= 0))


def machine_memory(device: torch.device | None = None) -> int:
    """Bytes of memory that the machine, or a GPU, has."""
    if device is not None and device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # not a POSIX system
        return 16 * 2**30


def dense_size(operator: Any, max_bytes: int) -> None:
    """Raise ValueError where the dense matrix of an operator would take more."""
    needed = operator.shape[0] * operator.shape[1] * operator.dtype.itemsize
    if needed > memory("max_bytes", max_bytes):
        raise ValueError(
            f"the dense matrix of {operator!r} takes {needed / 2**30:.3g} GiB, over the limit of "
            f"{max_bytes / 2**30:.3g} GiB: use products instead, or pass max_bytes={needed}"
        )


def position(name: str, value: Any, count: int, things: str) -> int:
    """A place among `count` things, where −1 is the last, as in Python."""
    what = f"a position among the {count} {things}, from {-count} to {count - 1}"
    if not _is(Integral, value):
        refuse(TypeError, name, what, value)
    if not -count <= value < count:
        refuse(IndexError, name, what, value)
    return int(value)


def integers(name: str, value: Any, least: int = 1) -> list[int]:
    """One integer, or a sequence of at least so many."""
    what = "an integer, or a sequence of integers" + (", and not empty" if least else "")
    what = what if least <= 1 else f"a sequence of at least {least} integers"
    holds = isinstance(value, np.ndarray) or (isinstance(value, Tensor) and _holds(value))
    found: Any = value.tolist() if holds else value
    found = [found] if _is(Integral, found) else found
    if isinstance(found, str | bytes) or not isinstance(found, Sequence) or not all(_is(Integral, i) for i in found):
        refuse(TypeError, name, what, value)
    if len(found) < least:
        refuse(ValueError, name, what, value)
    return [int(one) for one in found]


def several(name: str, value: Any, kind: type, what: str, count: int | None = None) -> list[Any]:
    """At least one thing of a kind, or so many, as a list."""
    found = value.tolist() if isinstance(value, np.ndarray) else value
    if isinstance(found, str | bytes | Mapping | Tensor) or not isinstance(found, Collection):
        refuse(TypeError, name, what, value)
    for one in found:
        instance(f"what {name} holds", one, kind, f"of type {kind.__name__}")
    if len(found) != count if count is not None else not found:
        refuse(ValueError, name, what, value)
    return list(found)


def array(name: str, value: Any, shape: tuple[int | str, ...] | None = None, what: str = "an array") -> NDArray:
    """Finite real numbers, as an array of their own dtype; in `shape`, a word stands for any length."""
    if shape is not None:
        what += f" of shape ({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})"
    if issparse(value) or (isinstance(value, Tensor) and not _holds(value)):
        refuse(TypeError, name, f"{what}, dense and with values", value, "use its toarray(), or to_dense()")
    found = value
    if isinstance(value, Tensor):
        if value.requires_grad:
            refuse(TypeError, name, f"{what}, without a gradient", value, f"use {name}.detach()")
        found = (value.float() if value.dtype == torch.bfloat16 else value).resolve_neg().resolve_conj().cpu()
    try:
        found = np.asarray(found)
    except ValueError:
        refuse(ValueError, name, what, value, "its parts have different lengths")
    if found.dtype.kind not in ("biuf" if found.ndim else "iuf"):  # a mask may be an image
        refuse(TypeError, name, f"{what} of real numbers", value if found.ndim == 0 else found)
    given = value if found.size < 5 else found  # of what is larger, the shape says more
    if shape is not None and not _fits(found.shape, shape):
        refuse(ValueError, name, what, given)
    if not np.isfinite(found).all():
        refuse(ValueError, name, f"{what}, and finite", given, "it holds NaN or infinity")
    return found


def operator(name: str, value: Any, what: str) -> LinearOperator:
    """What SciPy makes a LinearOperator of, but for a tensor, of which some versions of SciPy make one that fails."""
    if isinstance(value, Tensor):
        refuse(TypeError, name, what, value, f"use {name}.numpy()")
    try:
        return aslinearoperator(value)
    except (TypeError, ValueError):
        refuse(TypeError, name, what, value)


def square(name: str, value: Any, n: int) -> None:
    """An operator of shape (n, n), as SciPy takes one."""
    what = f"a matrix or a LinearOperator of shape ({n}, {n})"
    if operator(name, value, what).shape != (n, n):
        refuse(ValueError, name, what, value)


def tensor(name: str, value: Any, shape: tuple[int | str, ...], like: Tensor) -> Tensor:
    """Finite, of a shape, and of the dtype and on the device of another; in `shape`, a word stands for any length."""
    what = f"a tensor of shape ({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})"
    if not _fits(instance(name, value, Tensor, what).shape, shape):
        refuse(ValueError, name, what, value)
    if value.dtype != like.dtype or value.device != like.device or value.layout != like.layout:
        raise TypeError(
            f"{name} must be {like.dtype} on {like.device} like the image, and dense, "
            f"got {value.dtype} on {value.device}, {value.layout}"
        )
    if not is_finite(value):
        refuse(ValueError, name, f"{what}, and finite", value, "it holds NaN or infinity")
    return value


def is_finite(x: Tensor) -> bool:
    """Whether all elements are. A finite sum, a hundred times as fast as a look at each, shows it in most cases."""
    return math.isfinite(x.sum().item()) or bool(torch.isfinite(x).all())


def _holds(value: Tensor) -> bool:
    """Whether the values are there, and NumPy takes them."""
    return value.layout == torch.strided and not value.is_meta


def _fits(shape: Sequence[int], wanted: tuple[int | str, ...]) -> bool:
    return len(shape) == len(wanted) and all(isinstance(w, str) or n == w for n, w in zip(shape, wanted, strict=True))


def floating(name: str, dtype: Any) -> torch.dtype:
    what = "a floating-point dtype, as torch.float32 is"
    if not instance(name, dtype, torch.dtype, what).is_floating_point:
        refuse(ValueError, name, what, dtype)
    return dtype


def path(name: str, value: Any, *, new: bool = False) -> str:
    """A path; where a file is to be written, in a folder that exists."""
    try:
        found = os.fsdecode(value)
    except TypeError:
        refuse(TypeError, name, "a str, bytes or path-like object", value)
    if not found or "\0" in found:
        refuse(ValueError, name, "a path, not empty and without null bytes", found)
    folder = os.path.dirname(found) or "."
    if new and not os.path.isdir(folder):
        raise FileNotFoundError(errno.ENOENT, f"{name} must lie in a folder that exists: make this one", folder)
    if new and os.path.isdir(found):
        raise IsADirectoryError(errno.EISDIR, f"{name} must be a file's, and this is a folder", found)
    return value if isinstance(os.fspath(value), str) else found


def moved(name: str, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """``tensor.to(*args, **kwargs)``, where that is a device of this machine, and a dtype that an image may have."""
    what = "a device of this machine, float32 or float64, or both, as torch.Tensor.to takes them"
    given = (*args, *kwargs.values())
    given = given[0] if len(given) == 1 else given
    for one in (*args, *kwargs.values()):  # PyTorch takes a number for a tensor, and its dtype
        if not isinstance(one, _MOVES):
            refuse(TypeError, name, what, given)
    try:
        tensor = tensor.to(*args, **kwargs)
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        refuse(kind, name, what, given, str(error).splitlines()[0])
    if tensor.is_meta:
        refuse(ValueError, name, what, given, "a meta tensor holds no values")
    if tensor.dtype not in (torch.float32, torch.float64):
        refuse(TypeError, name, what, given)
    return tensor


def generator(rng: Any, name: str = "rng") -> np.random.Generator:
    what = "a seed, an integer from 0, or a Generator by numpy.random.default_rng"
    if isinstance(rng, bool | np.bool_ | np.random.RandomState):
        refuse(TypeError, name, what, rng)
    try:
        return np.random.default_rng(rng)
    except (TypeError, ValueError) as error:
        refuse(type(error), name, what, rng)


def spawned(rng: Any) -> np.random.Generator:
    """A generator of a stream of its own, so that a start vector never repeats data drawn from the same seed."""
    rng = generator(rng)
    try:
        return rng.spawn(1)[0]
    except TypeError:  # of a bit generator that was made of a state
        refuse(TypeError, "rng", "a seed, or a Generator that can spawn others", rng, "make it by default_rng(seed)")


def warn(message: str) -> None:
    """As from the line that called this package."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] == "fisherop":
        frame, level = frame.f_back, level + 1
    warnings.warn(message, RuntimeWarning, stacklevel=level)
