"""One ``.npz`` file for what was found: written atomically, checked as a whole when it is read, with no pickle."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import pickle
import sys
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import scipy
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

import fisherop
from fisherop.linearize import Linearization
from fisherop.result import EigenResult, Status

_FORMAT = 1  # the highest that is read


def write(path: str | os.PathLike, fields: Mapping[str, ArrayLike]) -> None:
    """Write arrays, with the versions of the libraries and a checksum; `path` holds the old file or the new one."""
    arrays = {name: np.asarray(value) for name, value in fields.items()} | {"versions": np.array(versions())}
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            np.savez(file, format=np.array(_FORMAT), checksum=np.array(_checksum(arrays)), **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read(path: str | os.PathLike) -> dict[str, NDArray]:
    """The arrays of a file, as `write` was given them, and "versions".

    Raises
    ------
    ValueError
        The file is damaged, of another kind or of a newer format.
    """
    with open(path, "rb") as file:
        start = file.read(4)
        file.seek(0)
        if not b"PK\3\4".startswith(start):
            raise ValueError(f"{path} is no file of eigendistortions: it is no .npz file")
        try:
            with zipfile.ZipFile(file) as archive:
                fields, names = {}, archive.namelist()
                by_torch = any(name.endswith("/data.pkl") for name in names)
                for name in [] if by_torch else names:
                    with archive.open(name) as part:
                        fields[name.removesuffix(".npy")] = np.lib.format.read_array(part, allow_pickle=False)
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, KeyError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path} is damaged or was cut short, so that nothing was loaded: {error}") from error
    if by_torch:
        raise ValueError(
            f"{path} is no file of eigendistortions by fisherop: torch.save wrote it, as plenoptic does. Open it with "
            "plenoptic; fisherop.certify judges the distortions that it holds"
        )
    version = fields.pop("format", None)
    if version is None or "checksum" not in fields:
        raise ValueError(f"{path} is no file of eigendistortions: it holds {', '.join(fields) or 'nothing'}")
    if version.ndim or version.dtype.kind != "i" or version < 1:
        raise ValueError(f"{path} is damaged: its format is {version!r}")
    if version > _FORMAT:
        raise ValueError(
            f"{path} has format {version}, this version of fisherop reads up to {_FORMAT}: update fisherop"
        )
    if fields.pop("checksum") != _checksum(fields):
        raise ValueError(f"{path} is damaged: its checksum doesn't fit what it holds")
    return fields


def check_same(path: str | os.PathLike, fields: Mapping[str, NDArray], image: Tensor, response: Tensor) -> None:
    """Raise ValueError unless a file belongs to this image and to a model with this response to it."""
    stored, own = fields["image"], image.cpu().numpy()
    if (stored.shape, stored.dtype) != (own.shape, own.dtype):
        raise ValueError(
            f"{path} holds the eigendistortions of an image {stored.shape} of {stored.dtype}, this one is "
            f"{own.shape} of {own.dtype}: use Eigendistortion.from_file(path, model)"
        )
    if not np.array_equal(stored, own):
        raise ValueError(
            f"{path} holds the eigendistortions of another image, which differs from this one by up to "
            f"{np.abs(stored - own).max():.3g}: use Eigendistortion.from_file(path, model)"
        )
    if response.numel() != fields["response_size"]:
        raise ValueError(
            f"{path} holds the eigendistortions of another model, with {fields['response_size']} responses; this "
            f"one has {response.numel()}"
        )
    difference, norm = response_difference(fields, response)
    if not difference <= same_response(fields) * norm:
        raise ValueError(
            f"{path} holds the eigendistortions of another model: its response to the image differs from this "
            f"one's by {difference / norm if norm else difference:.2g} of its norm"
        )


def response_difference(fields: Mapping[str, NDArray], response: Tensor) -> tuple[float, float]:
    """The norm of a response minus the file's, and that of the file's, both by their fingerprints."""
    stored = fields["response_fingerprint"]
    return float(np.linalg.norm(fingerprint(response) - stored)), float(np.linalg.norm(stored))


def same_response(fields: Mapping[str, NDArray]) -> float:
    """How far, relative to its norm, rounding may move the response of the same model."""
    return float(np.finfo(fields["image"].dtype).eps) ** 0.5


def versions() -> list[str]:
    """Each library's name and version, as the library itself gives it: "torch 2.14.1+cu130" says which build it is."""
    return [f"{library.__name__} {library.__version__}" for library in (fisherop, torch, np, scipy)]


def name_of(x: Any) -> str:
    """The full name of a class or a function, or of the type of any other object."""
    named = x if hasattr(x, "__qualname__") else type(x)
    return f"{named.__module__}.{named.__qualname__}"


def fingerprint(response: Tensor, size: int = 256) -> NDArray[np.float64]:
    """Sums of the response's elements with random signs, in random groups; differences keep their norm, within 20 %.

    This is the CountSketch of M. Charikar, K. Chen and M. Farach-Colton, Finding frequent items in data streams, 2002.
    """
    flat = response.detach().cpu().double().flatten().numpy()
    rng = np.random.default_rng(256)
    groups, signs = rng.integers(size, size=len(flat)), rng.choice([-1.0, 1.0], len(flat))
    return np.bincount(groups, signs * flat, size)


def contents(result: EigenResult, lin: Linearization, kind: type, model: Any) -> dict[str, ArrayLike]:
    """What a file holds of an object of this kind."""
    return _result_to(result) | {
        "image": lin.image.cpu().numpy(),
        "response_fingerprint": fingerprint(lin.response),
        "response_shape": np.array(lin.response_shape, dtype=np.int64),
        "engine_report": lin.engine_report,
        "object": name_of(kind),
        "model": name_of(model),
    }


def _result_to(result: EigenResult) -> dict[str, ArrayLike]:
    fields = {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
    fields["status"] = result.status.astype(str)
    fields["details"] = json.dumps(dict(result.details), default=_to_list)
    return fields


def _to_list(x: Any) -> Any:
    if isinstance(x, np.ndarray | np.generic | Tensor):
        return x.tolist()
    raise TypeError(
        f"the result's details hold a {type(x).__name__}, which can't be saved: let the solver give arrays, numbers, "
        "strings, lists and dicts"
    )


def result_from(arrays: Mapping[str, NDArray]) -> EigenResult:
    """The result that `contents` took apart."""
    fields = {field.name: arrays[field.name] for field in dataclasses.fields(EigenResult)}
    fields = {name: a if a.ndim else a.item() for name, a in fields.items()}
    for name in ("lambda_max_bounds", "lambda_min_bounds"):
        fields[name] = tuple(fields[name].tolist())
    fields["status"] = np.array([Status(text) for text in fields["status"].tolist()], dtype=object)
    fields["details"] = json.loads(fields["details"])
    return EigenResult(**fields)


class _Nowhere:
    def write(self, data: bytes) -> int:
        return len(data)


def check_picklable(model: Any) -> None:
    """Raise PicklingError, with what to send instead, where a model can't be pickled.

    A pickler says nothing of the object around what it fails at, so the model is pickled once more, to nowhere. What
    plain pickle refuses is left to cloudpickle, where it is loaded (by joblib or Dask) and takes it.
    """
    try:
        pickle.Pickler(_Nowhere(), pickle.HIGHEST_PROTOCOL).dump(model)
    except Exception as error:
        for name in {"cloudpickle", "joblib.externals.cloudpickle"} & set(sys.modules):
            with contextlib.suppress(Exception):
                sys.modules[name].dumps(model)
                return
        raise pickle.PicklingError(
            f"an Eigendistortion is pickled with its model, but the model {name_of(model)} can't be pickled: {error}. "
            "Send a file in its place, by save(path) here and Eigendistortion.from_file(path, model) there; or let the "
            "model and its parts be functions, and instances of classes, defined at the top level of a module"
        ) from error


def _checksum(arrays: Mapping[str, NDArray]) -> str:
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
