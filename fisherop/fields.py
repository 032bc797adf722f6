"""What the fields of a file may be: how large, before they are read, and of which type, shape and value, after."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import statistics
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fisherop import checks
from fisherop.certificate import check_index, check_orthonormal
from fisherop.density import Quadrature
from fisherop.result import Evidence, Nullity, Status

TEXT = "text"
_FLOAT, _INT = np.dtype(np.float64), np.dtype(np.int64)


class Field(NamedTuple):
    """A type, None for the image's, and a shape, whose letters stand for sizes and whose None for any size."""

    dtype: np.dtype | str | None
    shape: tuple[int | str | None, ...] = ()
    most_bytes: int = 2**20  # of text
    is_optional: bool = False  # earlier versions of fisherop left it out


class Header(NamedTuple):
    """What a file says of an array before that is read."""

    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


_K_FIELDS = {"eigenvalues": Field(_FLOAT, ("K",)), "residual_norms": Field(_FLOAT, ("K",))}
_K_FIELDS |= {"eigenindex": Field(_INT, ("K",)), "status": Field(TEXT, ("K",))}
RESULT: dict[str, Field] = _K_FIELDS | {
    "eigenvectors": Field(None, ("d", "K")),
    "tol": Field(_FLOAT),
    "method": Field(TEXT),
    "n_products": Field(_FLOAT),
    "image_size": Field(_INT),
    "response_size": Field(_INT),
    "lambda_max_bounds": Field(_FLOAT, (2,)),
    "lambda_min_bounds": Field(_FLOAT, (2,)),
    "noise": Field(_FLOAT),
    "ground": Field(TEXT, is_optional=True),  # of earlier versions, which had no evidence
    "evidence": Field(TEXT, is_optional=True),
    "details": Field(TEXT, most_bytes=2**28),
    "response_fingerprint": Field(_FLOAT, (256,)),
    "response_shape": Field(_INT, (None,), is_optional=True),
    "engine_report": Field(TEXT, (None,)),
    "object": Field(TEXT, is_optional=True),
    "model": Field(TEXT, is_optional=True),
    "observed": Field(TEXT, is_optional=True),  # where there is noise, a subspace or a metric
    "attributes": Field(TEXT, (None,), is_optional=True),
    "seconds": Field(_FLOAT, is_optional=True),  # that a task of a sweep took
}
_EACH_PAIR = 2**24  # bytes of text that details, with their history, and states may take for each pair
_ANY = 10_000  # entries of a field of any length


def check_sizes(
    path: str | os.PathLike, headers: Mapping[str, Header], table: Mapping[str, Field], sizes: Mapping[str, int]
) -> None:
    """Raise ValueError where a field is unknown or larger than the sizes allow, whatever its type and shape."""
    for name, header in headers.items():
        if name not in table:
            raise ValueError(f"{path} is damaged or was altered: it holds an unknown field {name!r}")
        field = table[name]
        count = math.prod(_ANY if s is None else sizes[s] if isinstance(s, str) else s for s in field.shape)
        each_pair = _EACH_PAIR * sizes.get("K", 0)
        most = field.most_bytes + each_pair if field.dtype is TEXT else 8 * count
        if header.size > count or header.nbytes > most:
            raise ValueError(
                f"{path} is damaged or was altered: its {name} takes {header.nbytes} bytes for {header.size} entries; "
                f"at most {most} for {count} belong to this image and this number of pairs"
            )


def check_result_sizes(path: str | os.PathLike, headers: Mapping[str, Header], image: Tensor | None) -> None:
    """`check_sizes` of a file of eigendistortions, of an image that is known or of the file's own."""
    if "checkpoint" in headers:
        raise ValueError(
            f"{path} is no file of eigendistortions: it holds a search that isn't finished. Pass it to "
            "synthesize(checkpoint=path)"
        )
    stored = headers.get("image")
    if stored is not None:
        n = stored.size
        if image is not None and n != image.numel():
            check_image(path, stored, image)
    elif image is not None:
        n = image.numel()
    else:
        raise ValueError(f"{path} is damaged or was altered: it lacks image")
    k = min(n, max((headers[name].size for name in _K_FIELDS if name in headers), default=0))
    sizes = {"N": n, "d": n, "K": k}
    check_sizes(path, headers, RESULT | {"image": Field(None, ("N",)), "versions": Field(TEXT, (None,))}, sizes)


def check_image(path: str | os.PathLike, stored: Header | NDArray, image: Tensor) -> None:
    """Raise ValueError unless the file's image has this one's shape and type."""
    own = Header(np.dtype(str(image.dtype).removeprefix("torch.")), tuple(image.shape))
    if (stored.shape, stored.dtype) != (own.shape, own.dtype):
        raise ValueError(
            f"{path} holds the eigendistortions of an image {stored.shape} of {stored.dtype}, this one is "
            f"{own.shape} of {own.dtype}: use Eigendistortion.from_file(path, model)"
        )


def wrong(path: str | os.PathLike, name: str, problem: str) -> ValueError:
    return ValueError(f"{path} is damaged or was altered: its {name} {problem}")


def check_types(
    path: str | os.PathLike, fields: Mapping[str, NDArray], table: Mapping[str, Field], sizes: dict[str, int]
) -> None:
    """Raise ValueError where a field is missing, or has another type or shape, or numbers are NaN.

    Parameters
    ----------
    sizes : dict
        What the letters in shapes stand for. Those that are not there yet are added, as the first field has them.
    """
    image = fields["image"].dtype
    for name, (dtype, shape, _, is_optional) in table.items():
        if name not in fields:
            if is_optional:
                continue
            raise ValueError(f"{path} is damaged or was altered: it lacks {name}")
        array = fields[name]
        if array.dtype.kind != "U" if dtype is TEXT else array.dtype != (image if dtype is None else dtype):
            raise wrong(path, name, f"has the type {array.dtype}, not {image if dtype is None else dtype}")
        if array.ndim == len(shape):
            sizes |= {s: n for s, n in zip(shape, array.shape, strict=True) if isinstance(s, str) and s not in sizes}
        expected = tuple(sizes.get(str(size), size) for size in shape)
        if array.ndim != len(shape) or any(s not in (None, n) for s, n in zip(expected, array.shape, strict=True)):
            raise wrong(path, name, f"has the shape {array.shape}, not {expected}")
        if array.dtype.kind == "f" and np.isnan(array).any():
            raise wrong(path, name, "holds NaN")


def check_common(path: str | os.PathLike, fields: Mapping[str, NDArray]) -> int:
    """Raise ValueError unless the image and the versions, which every file holds, can be right; the image's N."""
    for name in ("image", "versions"):
        if name not in fields:
            raise ValueError(f"{path} is damaged or was altered: it lacks {name}")
    image = fields["image"]
    if image.dtype not in (np.float32, np.float64):
        raise wrong(path, "image", f"has the type {image.dtype}, not float32 or float64")
    if image.size == 0 or not np.isfinite(image).all():
        raise wrong(path, "image", f"of shape {image.shape} is empty or holds NaN or infinity")
    versions = fields["versions"]
    if versions.dtype.kind != "U" or versions.ndim != 1 or not all(" " in text for text in versions.tolist()):
        raise wrong(path, "versions", f"must be a name and a version each, not {_shown(versions)}")
    return image.size


def check_result(path: str | os.PathLike, fields: Mapping[str, NDArray]) -> None:
    """Raise ValueError, which names the field, unless `certify` can have given these fields for an image like that."""
    n = check_common(path, fields)
    lengths = [len(fields[name]) for name in _K_FIELDS if name in fields and fields[name].ndim]
    size = fields.get("image_size", np.empty(0))
    d = int(size) if size.ndim == 0 and size.dtype == _INT else n
    if d != n and not ("observed" in fields and 1 <= d <= n):
        raise wrong(path, "image_size", f"is {d}, but its image has {n} elements")
    check_types(path, fields, RESULT, {"N": n, "d": d} | ({"K": statistics.mode(lengths)} if lengths else {}))
    values, residuals, noise = fields["eigenvalues"], fields["residual_norms"], fields["noise"]
    for name in ("eigenvalues", "residual_norms", "n_products", "noise", "response_fingerprint"):
        array = fields[name]
        if not np.isfinite(array).all() or (name != "response_fingerprint" and (array < 0).any()):
            raise wrong(path, name, f"must be finite and not negative, not {_shown(array)}")
    if (np.diff(values) > 0).any():
        raise wrong(path, "eigenvalues", f"must be in descending order, not {_shown(values)}")
    if noise > 1:
        raise wrong(path, "noise", f"is relative to the products, and can't be {noise}")
    for name, check in {
        "tol": lambda tol: checks.tolerance(tol.item()),
        "eigenindex": lambda index: _check_stored_index(index, d),
        "eigenvectors": lambda v: check_orthonormal(v, np.finfo(v.dtype).eps),
        "details": lambda text: _check_details(text.item(), fields["method"].item()),
        "evidence": lambda text: parse_evidence(text.item()),
    }.items():
        try:
            if name in fields:
                check(fields[name])
        except (ValueError, TypeError) as error:
            raise wrong(path, name, f"can't be right: {error}") from error
    if not {"evidence", "ground"} & fields.keys():
        raise ValueError(f"{path} is damaged or was altered: it lacks evidence")
    for name in ("lambda_max_bounds", "lambda_min_bounds"):
        low, high = fields[name].tolist()
        if not (0 <= low <= high and low < np.inf):
            raise wrong(path, name, f"must be an interval of numbers from 0, not {(low, high)}")
    if fields["lambda_min_bounds"][1] > fields["lambda_max_bounds"][1]:
        raise wrong(path, "lambda_min_bounds", "lie above those of λ_max")
    if not size_of(fields["response_fingerprint"]) < np.inf:
        raise wrong(path, "response_fingerprint", "must have a finite norm")
    eps = float(np.finfo(fields["eigenvectors"].dtype).eps)
    # the bound has the rounding of products in it, which an eigenvalue has not
    largest = float(fields["lambda_max_bounds"][0] / max(1 - 2 * max(noise, eps), eps) ** 2)
    if values.max(initial=0.0) > largest * (1 + 1e-9):
        raise wrong(path, "lambda_max_bounds", f"say that λ_max ≥ {largest}, but {values.max()} is an eigenvalue")
    allowed = float(fields["tol"]) * largest
    _check_status(path, fields["status"].tolist(), values, residuals, allowed)
    _check_response(path, fields)


def _check_stored_index(index: NDArray[np.int64], n: int) -> None:
    if (index < 0).any():
        raise ValueError(f"it must not be negative, got {_shown(index)}")
    check_index(index.tolist(), n)


def _check_status(
    path: str | os.PathLike, status: list[str], values: NDArray, residuals: NDArray, allowed: float
) -> None:
    allowed = allowed * (1 + 1e-6) + np.finfo(np.float64).tiny
    most = {Status.EIGENPAIR: residuals, Status.NOT_EXTREME: residuals, Status.NULL: values}
    for i, text in enumerate(status):
        if text not in list(Status):
            known = ", ".join(repr(str(s)) for s in Status)
            raise wrong(path, "status", f"must be of {known}, not {text[:80]!r}")
        if text in most and most[Status(text)][i] > allowed:
            raise wrong(path, "status", f"says {text!r} of pair {i}, which its residual or its eigenvalue refutes")


def _check_response(path: str | os.PathLike, fields: Mapping[str, NDArray]) -> None:
    m = int(fields["response_size"])
    if m < 1:
        raise wrong(path, "response_size", f"must be positive, not {m}")
    shape = fields["response_shape"].tolist() if "response_shape" in fields else [m]
    if min(shape, default=1) < 0 or (math.prod(shape) != m and "observed" not in fields):
        raise wrong(path, "response_shape", f"is {tuple(shape)}, but its response_size is {m}")


def size_of(x: NDArray[np.float64]) -> float:
    """‖x‖₂, also where the squares of its elements leave float64's range."""
    peak = float(np.abs(x).max(initial=0.0))
    return peak * float(np.linalg.norm(x / peak)) if 0 < peak < np.inf else peak


def parse_json(text: str, kind: type) -> Any:
    """Parsed JSON of this type; ValueError for whatever else is written there."""
    try:
        parsed = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(parsed, kind):
        raise ValueError(f"it must be a {kind.__name__} in JSON, not a {type(parsed).__name__}")
    return parsed


def parse_history(entries: list) -> list[dict[str, Any]]:
    """The entries of golub_kahan's history, as it leaves them; ValueError or TypeError for whatever else is there."""
    return [_entry(**entry) for entry in entries]


def _entry(n_products: float, largest: list, smallest: list) -> dict[str, Any]:
    ends = {}
    for end, pair in (("largest", largest), ("smallest", smallest)):
        values, residuals = map(_numbers, pair)
        if values.shape != residuals.shape:
            raise ValueError(f"an entry has {values.shape} values and {residuals.shape} residuals")
        ends[end] = values, residuals
    return {"n_products": _numbers([n_products]).item()} | ends


def _numbers(listed: list) -> NDArray[np.float64]:
    if not isinstance(listed, list) or not all(type(number) in (int, float) for number in listed):
        raise TypeError("an entry must hold numbers")
    try:
        numbers = np.array(listed, dtype=np.float64)
    except OverflowError as error:
        raise ValueError(str(error)) from error
    if np.isnan(numbers).any():
        raise ValueError("an entry holds NaN")
    return numbers


def parse_evidence(text: str) -> Evidence:
    """What `dataclasses.asdict` made of it, in JSON; ValueError or TypeError for whatever else is there."""
    evidence = Evidence(**parse_json(text, dict))
    for field in dataclasses.fields(Evidence):
        value, kind = getattr(evidence, field.name), type(field.default if field.name != "source" else "")
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise TypeError(f"its {field.name} must be of type {kind.__name__}, not {value!r}")
        if kind in (int, float) and not 0 <= value < math.inf:
            raise ValueError(f"its {field.name} must be a number from 0, not {value!r}")
    try:
        str(evidence)
    except KeyError as error:
        raise ValueError(f"its source can't be {error}") from error
    return evidence


def parse_details(text: str) -> dict[str, Any]:
    """Details, in JSON, with the nullity as what it was."""
    details = parse_json(text, dict)
    if isinstance(details.get("nullity"), dict):
        numbers = details["nullity"]
        if numbers.keys() != {"estimate", "standard_error"}:
            raise ValueError(f"its nullity has {', '.join(numbers)}")
        details["nullity"] = Nullity(*_numbers([numbers["estimate"], numbers["standard_error"]]).tolist())
    return details


def _check_details(text: str, method: str) -> None:
    details = parse_details(text)
    if method == "golub_kahan":  # that of a solver of the user's may be anything
        parse_history(details.get("history", []))
        for run in details.get("quadrature", []):
            Quadrature(**run)


def _shown(array: NDArray | Iterable) -> str:
    """The first entries."""
    flat = np.asarray(array).flatten()
    return str(flat[:4].tolist())[:200] + (" …" if flat.size > 4 else "")
