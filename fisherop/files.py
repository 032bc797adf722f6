"""One ``.npz`` file for what was found: written atomically, checked as a whole when it is read, with no pickle."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import io
import json
import math
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import scipy
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

import fisherop
from fisherop.atomic import replacing
from fisherop.fields import (
    RESULT,
    TEXT,
    Header,
    check_image,
    check_result,
    check_result_sizes,
    parse_details,
    parse_evidence,
    size_of,
)
from fisherop.model.linearize import Linearization
from fisherop.operators import FisherOperator
from fisherop.result import EigenResult, Evidence, Nullity, Status

_FORMAT = 1  # the highest that is read
_PART = 2**16  # elements of a response at a time
_PIECE = 2**20  # bytes of a file at a time


def write(path: str | os.PathLike, fields: Mapping[str, ArrayLike]) -> None:
    """Write arrays, with the versions of the libraries and a checksum; `path` holds the old file or the new one."""
    arrays = {name: np.asarray(value) for name, value in fields.items()} | {"versions": np.array(versions())}
    with replacing(path) as file:
        arrays |= {"format": np.array(_FORMAT), "checksum": np.array(_checksum(arrays))}
        np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]


def read(path: str | os.PathLike, image: Tensor | None = None) -> dict[str, NDArray]:
    """The fields of a file of eigendistortions, as `write` was given them, and "versions"; each is what it must be.

    Parameters
    ----------
    path : str or path-like
    image : Tensor, optional
        The image, where it is known: no more is read than belongs to an image of that size.

    Raises
    ------
    ValueError
        The file is damaged, of another kind or of a newer format, or a field, which the message names, can't be right.
    """
    fields = unpack(path, "file of eigendistortions", lambda headers: check_result_sizes(path, headers, image))
    check_result(path, fields)
    return fields


def unpack(path: str | os.PathLike, kind: str, check: Callable[[Mapping[str, Header]], None]) -> dict[str, NDArray]:
    """The arrays of a file by `write`. `check` sees their types and shapes before they are read, and may raise.

    Nothing is decompressed, since `write` compresses nothing: no more is read than the file takes on the disk.

    Raises
    ------
    ValueError
        The file is damaged, of another kind or of a newer format.
    """
    if os.path.exists(path) and not os.path.isfile(path):  # of a pipe, reading might never end
        raise ValueError(f"{path} is no {kind}: it is a folder, a device or a pipe")
    with _Pieces(io.FileIO(os.fspath(path))) as file:
        if not b"PK\3\4".startswith(file.read(4)):
            raise ValueError(f"{path} is no {kind}: it is no .npz file")
        with _damage(path):
            archive = zipfile.ZipFile(file)
            members = archive.infolist()
        if any(member.filename.endswith("/data.pkl") for member in members):
            raise ValueError(
                f"{path} is no {kind} by fisherop: torch.save wrote it, as plenoptic does. Open it with "
                "plenoptic; fisherop.certify judges the distortions that it holds"
            )
        names = [member.filename.removesuffix(".npy") for member in members]
        if not {"format", "checksum"} <= set(names):
            raise ValueError(f"{path} is no {kind}: it holds {', '.join(names[:30]) or 'nothing'}")
        with _damage(path):
            headers = {name: _header(archive, member) for name, member in zip(names, members, strict=True)}
            if len(headers) < len(names) or sum(m.file_size for m in members) > os.fstat(file.fileno()).st_size:
                raise ValueError("its parts overlap")
            _check_format(path, archive, headers)
        known = {name: header for name, header in headers.items() if name not in ("format", "checksum")}
        check(known)
        file.most = os.fstat(file.fileno()).st_size  # one long text is one piece, and all sizes are known to fit
        with _damage(path):
            fields = {name: _array(archive, name) for name in known}
            right = _array(archive, "checksum") if headers["checksum"].nbytes <= 1024 else np.empty(1)
        if right.shape or right.dtype.kind != "U" or right != _checksum(fields):
            raise ValueError(f"{path} is damaged: its checksum doesn't fit what it holds")
    return fields


class _Pieces(io.BufferedReader):
    """A file that is read in small pieces, so that no length that it states costs memory before it is checked."""

    most = _PIECE

    def read(self, size: int | None = -1) -> bytes:
        piece = super().read(self.most + 1 if size is None or size < 0 else min(size, self.most + 1))
        if len(piece) > self.most:
            raise ValueError("its directory is not where it should be, or too long")
        return piece


class _OfFormat(ValueError):
    """Of which the message is complete."""


@contextlib.contextmanager
def _damage(path: str | os.PathLike) -> Iterator[None]:
    try:
        yield
    except _OfFormat as error:
        raise ValueError(str(error)) from None
    except Exception as error:  # of whatever kind the parsers trip over
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno not in (None, errno.EINVAL)):
            raise  # the file may be sound
        raise ValueError(f"{path} is damaged or was cut short, so that nothing was loaded: {error}") from error


def _header(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Header:
    if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
        raise ValueError(f"{member.filename} is compressed, and save compresses nothing")
    with archive.open(member) as part:
        if np.lib.format.read_magic(part) != (1, 0):
            raise ValueError(f"{member.filename} is no array")
        shape, _, dtype = np.lib.format.read_array_header_1_0(part)
        header = Header(dtype, shape)
        if dtype.hasobject or dtype.itemsize == 0 or min(shape, default=0) < 0:
            raise ValueError(f"{member.filename} holds {dtype} of shape {shape}")
        if part.tell() + header.nbytes != member.file_size:
            raise ValueError(f"{member.filename} has {member.file_size} bytes, not {part.tell() + header.nbytes}")
    return header


def _array(archive: zipfile.ZipFile, name: str) -> NDArray:
    with archive.open(f"{name}.npy") as part:
        return np.lib.format.read_array(part, allow_pickle=False)


def _check_format(path: str | os.PathLike, archive: zipfile.ZipFile, headers: Mapping[str, Header]) -> None:
    header = headers["format"]
    version: Any = _array(archive, "format") if header.nbytes <= 1024 else header
    if header.shape or header.dtype.kind != "i" or version < 1:
        raise _OfFormat(f"{path} is damaged: its format is {version!r}")
    if version > _FORMAT:
        raise _OfFormat(f"{path} has format {version}, this version of fisherop reads up to {_FORMAT}: update fisherop")


def check_same(
    path: str | os.PathLike, fields: Mapping[str, NDArray], image: Tensor, response: Tensor, observed: str
) -> None:
    """Raise ValueError unless a file belongs to this image, to a model with this response to it, and to this noise."""
    stored, own = fields["image"], image.cpu().numpy()
    check_image(path, stored, image)
    if not np.array_equal(stored, own):
        raise ValueError(
            f"{path} holds the eigendistortions of another image, which differs from this one by up to "
            f"{np.abs(stored - own).max():.3g}: use Eigendistortion.from_file(path, model)"
        )
    m = math.prod(fields["response_shape"].tolist()) if "response_shape" in fields else int(fields["response_size"])
    if response.numel() != m:
        raise ValueError(
            f"{path} holds the eigendistortions of another model, with {m} responses; this one has {response.numel()}"
        )
    stored = str(fields.get("observed", ""))
    if stored != observed:
        raise ValueError(
            f"{path} holds eigendistortions with {stored or 'no noise, subspace or metric'}, these have "
            f"{observed or 'none'}: make the object as it was"
        )
    difference, norm = response_difference(fields, response)
    if not difference <= same_response(fields) * norm:
        raise ValueError(
            f"{path} holds the eigendistortions of another model: its response to the image differs from this "
            f"one's by {difference / norm if norm else difference:.2g} of its norm"
        )


def check_jacobian(path: str | os.PathLike, result: EigenResult, operator: FisherOperator) -> None:
    """Raise ValueError unless J has the size that a result says on a random combination of its vectors: half a product.

    The response alone doesn't tell another Jacobian.
    """
    y = np.random.default_rng(1).standard_normal(len(result.eigenvalues))
    if not len(y) or not y.any():
        return
    y /= np.linalg.norm(y)
    image = operator.jacobian.matvec(result.eigenvectors @ y.astype(result.eigenvectors.dtype))
    peak = float(np.abs(image).max())
    found = (peak * float(np.linalg.norm(image / peak))) ** 2 if peak else 0.0
    expected = float(result.eigenvalues @ y**2)
    scale = max(result.lambda_max_bounds[0], found)
    allowed = float(np.abs(y) @ result.residual_norms) * np.abs(y).sum()
    allowed += max(float(np.finfo(result.eigenvectors.dtype).eps) ** 0.5, 4 * result.noise) * scale
    if not abs(found - expected) <= allowed:
        raise ValueError(
            f"{path} holds the eigendistortions of another model: ‖J v‖² is {found:.6g} for a combination of its "
            f"vectors, which by the file is {expected:.6g}"
        )


def response_difference(fields: Mapping[str, NDArray], response: Tensor) -> tuple[float, float]:
    """The norm of a response minus the file's, and that of the file's, both by their fingerprints."""
    stored = fields["response_fingerprint"]
    return size_of(fingerprint(response) - stored), size_of(stored)


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
    parts = response.detach().flatten().split(_PART)
    groups, signs = (np.random.default_rng(256) for _ in range(2))
    for part in parts:
        signs.integers(size, size=len(part))  # the signs are drawn after all groups
    sums = np.zeros(size)
    for part in parts:
        values = signs.choice([-1.0, 1.0], len(part)) * part.cpu().double().numpy()
        sums += np.bincount(groups.integers(size, size=len(part)), values, size)
    return sums


def contents(result: EigenResult, lin: Linearization, kind: type, model: Any, observed: str) -> dict[str, ArrayLike]:
    """What a file holds of an object of this kind."""
    return (
        _result_to(result)
        | {
            "image": lin.image.cpu().numpy(),
            "response_fingerprint": fingerprint(lin.response),
            "response_shape": np.array(lin.response_shape, dtype=np.int64),
            "engine_report": lin.engine_report,
            "object": name_of(kind),
            "model": name_of(model),
        }
        | ({"observed": observed} if observed else {})
    )


def _result_to(result: EigenResult) -> dict[str, ArrayLike]:
    fields = {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
    # of the same types on every machine
    numbers = {
        name: field.dtype for name, field in RESULT.items() if name in fields and field.dtype not in (None, TEXT)
    }
    fields |= {name: np.asarray(fields[name], dtype) for name, dtype in numbers.items()}
    fields["status"] = result.status.astype(str)
    fields["details"] = json.dumps(dict(result.details), default=_to_json)
    fields["evidence"] = json.dumps(dataclasses.asdict(result.evidence))
    return fields


def _to_json(x: Any) -> Any:
    if isinstance(x, Nullity):
        return dataclasses.asdict(x)
    if isinstance(x, np.ndarray | np.generic | Tensor):
        return x.tolist()
    raise TypeError(
        f"the result's details hold a {type(x).__name__}, which can't be saved: let the solver give arrays, numbers, "
        "strings, lists and dicts"
    )


def result_from(arrays: Mapping[str, NDArray]) -> EigenResult:
    """The result that `contents` took apart."""
    fields = {field.name: arrays[field.name] for field in dataclasses.fields(EigenResult) if field.name in arrays}
    fields: dict[str, Any] = {name: a if a.ndim else a.item() for name, a in fields.items()}
    for name in ("lambda_max_bounds", "lambda_min_bounds"):
        fields[name] = tuple(fields[name].tolist())
    fields["status"] = np.array([Status(text) for text in fields["status"].tolist()], dtype=object)
    fields["details"] = parse_details(fields["details"])
    if "evidence" in fields:
        fields["evidence"] = parse_evidence(fields["evidence"])
    else:  # earlier versions of fisherop wrote the words alone
        fields["evidence"] = Evidence("stated", text=arrays["ground"].item())
    fields["eigenindex"] = fields["eigenindex"].astype(np.intp)
    return EigenResult(**fields)


def _checksum(arrays: Mapping[str, NDArray]) -> str:
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        rows = np.atleast_1d(array)
        step = max(1, _PIECE * len(rows) // max(1, rows.nbytes))  # so that copies are small
        for i in range(0, len(rows), step):
            digest.update(np.ascontiguousarray(rows[i : i + step]).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
