"""One task of a sweep, wherever it runs, and the folder in which its result is kept."""

from __future__ import annotations

import os
import pathlib
import secrets
import time
import traceback
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from fisherop.atomic import replacing
from fisherop.eigendistortion import Eigendistortion
from fisherop.files import read, result_from, write
from fisherop.model.recipe import Recipe, as_array, device_in_worker, here, threads_in_worker, unpacked
from fisherop.thresholds import amplitudes_at_threshold

_MARK = ".fisherop-store"  # a file whose text tells whether two processes see the same folder
MODEL = ("noise", "subspace", "metric", "engine", "chunk_size")  # the others are those of `synthesize`


@dataclass(frozen=True, eq=False)
class Facts:
    """What the table of a sweep tells of a task that is done.

    Attributes
    ----------
    eigenindex : ndarray of int, shape (K,)
    eigenvalues, residual_norms, thresholds : ndarray, shape (K,)
    status : tuple of str
    n_pixels : int
    n_products, seconds : float
    """

    eigenindex: NDArray
    eigenvalues: NDArray
    residual_norms: NDArray
    thresholds: NDArray
    status: tuple[str, ...]
    n_pixels: int
    n_products: float
    seconds: float


@dataclass(frozen=True, eq=False)
class Outcome:
    """What comes back from a task.

    Attributes
    ----------
    facts : Facts or None
    weights : str
        The identity of the weights that the model had where the task ran, where nothing is known of it elsewhere.
    fields : mapping or None
        Of the file, where it is still to be written, or kept.
    error, trace : str
        What went wrong, in one line and in full.
    cause : Exception or None
        What was raised, where it was raised in the same process.
    """

    facts: Facts | None = None
    fields: dict[str, Any] | None = None
    weights: str = ""
    error: str = ""
    trace: str = ""
    cause: BaseException | None = field(default=None, repr=False)

    @classmethod
    def of_error(cls, error: BaseException, *, is_here: bool = True) -> Outcome:
        trace = "".join(traceback.format_exception(error))
        line = f"{type(error).__name__}: {error}".splitlines()[0]
        return cls(error=line, trace=trace, cause=error if is_here else None)


@dataclass(frozen=True, eq=False)
class Task:
    """One image, one model, one layer.

    Attributes
    ----------
    image : Tensor, or ndarray where it was sent
    recipe : Recipe
    layer : str or None
    settings : dict or bytes
        Of `Eigendistortion` and its `synthesize`; as bytes where they are sent.
    device : str or None
        Where it is to be computed; None: where the image is.
    threads : int or None
        Of PyTorch, in a worker's process.
    file : str
        Where the result belongs; empty: nowhere.
    mark : str
        Of the folder, which a worker on another machine may not see.
    home : (int, str)
        The process that made it.
    identity : str
        Of the model, if its file's name stands for it.
    """

    image: Any
    recipe: Recipe
    layer: str | None
    settings: Any
    device: str | None
    threads: int | None
    file: str
    mark: str
    home: tuple[int, str]
    identity: str = ""

    def __reduce__(self) -> tuple:
        image = self.image if isinstance(self.image, np.ndarray) else as_array(self.image)
        rest = (self.recipe, self.layer, self.settings, self.device, self.threads, self.file, self.mark, self.home)
        rest += (self.identity,)
        return type(self), (image, *rest)


def run(task: Task) -> Outcome:
    """Do a task, unless its file is there; whatever it raises is told and not raised, but for interrupts."""
    is_here = task.home == here()
    try:
        with threads_in_worker(task.home, task.threads):
            is_seen = bool(task.file) and mark_of(os.path.dirname(task.file)) == task.mark
            found = kept(task.file, task.image) if is_seen else None
            if found is not None:
                return Outcome(found)
            device = None if task.device is None else device_in_worker(task.device)
            image = task.image if isinstance(task.image, Tensor) else torch.from_numpy(task.image.copy())
            image = image if device is None else image.to(device)
            model = task.recipe.model(task.layer, device)
            weights = ""
            if task.identity:
                task.recipe.check(task.recipe.identity(), task.identity)
            else:
                weights = task.recipe.weights()
            ed, seconds = _found(task, image, model)
            fields = ed._fields() | {"seconds": seconds}
            assert ed.result is not None
            is_kept = is_seen and _is_written(task.file, fields)
            return Outcome(facts_of(fields), None if is_kept else fields, weights)
    except (Exception, SystemExit) as error:
        return Outcome.of_error(error, is_here=is_here)


def _found(task: Task, image: Tensor, model: Any) -> tuple[Eigendistortion, float]:
    settings = task.settings
    if isinstance(settings, bytes):
        settings = unpacked(settings, "what the sweep was given")
    start = time.perf_counter()
    ed = Eigendistortion(image, model, **{name: settings[name] for name in MODEL if name in settings})
    ed.synthesize(progress=False, **{name: value for name, value in settings.items() if name not in MODEL})
    return ed, time.perf_counter() - start


def _is_written(file: str, fields: dict[str, Any]) -> bool:
    """Whether the file could be written: else it is left to the process that made the task."""
    try:
        write(file, fields)
    except OSError:
        return False
    return True


def facts_of(fields: dict[str, Any]) -> Facts:
    """What a file's fields tell."""
    result = result_from({name: np.asarray(value) for name, value in fields.items()})
    seconds = float(fields["seconds"]) if "seconds" in fields else float("nan")
    return Facts(
        result.eigenindex,
        result.eigenvalues,
        result.residual_norms,
        amplitudes_at_threshold(result),
        tuple(result.status.astype(str).tolist()),
        result.image_size,
        result.n_products,
        seconds,
    )


def kept(file: str, image: ArrayLike | Tensor) -> Facts | None:
    """What a file tells, None where there is none, or it is damaged, or of another image."""
    try:
        fields = read(file)
    except (FileNotFoundError, ValueError):
        return None
    own = as_array(image) if isinstance(image, Tensor) else np.asarray(image)
    stored = fields["image"]
    is_same = stored.shape == own.shape and stored.dtype == own.dtype and np.array_equal(stored, own)
    return facts_of(fields) if is_same else None


def open_store(folder: pathlib.Path) -> str:
    """Make a folder, if there is none, and its mark, which is given back.

    Raises
    ------
    OSError
        It can't be made, or written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not mark_of(folder):
        with replacing(folder / _MARK) as file:
            file.write(secrets.token_hex(16).encode())
    return mark_of(folder)


def mark_of(folder: str | os.PathLike) -> str:
    """The mark of a folder, empty where it has none, or isn't seen."""
    try:
        return pathlib.Path(folder, _MARK).read_text(encoding="ascii", errors="replace")
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return ""
