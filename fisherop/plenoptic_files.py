"""What plenoptic's `load` checks, and what its `examine_saved_synthesis` prints, for the files of `fisherop.files`."""

from __future__ import annotations

import os
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fisherop import checks
from fisherop.eigendistortion import Eigendistortion
from fisherop.files import name_of, read, response_difference, result_from, same_response, versions
from fisherop.operators import FisherOperator
from fisherop.result import EigenResult
from fisherop.solve import transfer

_OWN_TYPES = {"fisherop.eigendistortion.Eigendistortion", "fisherop.plenoptic.Eigendistortion"}


class LoadWarning(UserWarning):
    """What a `load` with ``raise_on_checks=False`` warns of, where plenoptic's own warning isn't installed."""


def load_checked(
    ed: Eigendistortion,
    path: str | os.PathLike,
    map_location: str | torch.device | None,
    category: type[Warning] | None,
    atol: float,
    rtol: float,
    attributes: set[str],
) -> tuple[FisherOperator, EigenResult]:
    """The operator at the file's image and the result, after plenoptic's checks of `ed`, whose class calls this.

    A check that fails raises if `category` is None, and else warns of that category.
    """
    for name, value in {"tensor_equality_atol": atol, "tensor_equality_rtol": rtol}.items():
        checks.number(name, value, "a finite number from 0", lambda value: value >= 0)
    fields = read(path)
    # a file of an earlier version of fisherop lacks some of these
    types = {"object": name_of(type(ed)), "model": name_of(ed.model), "attributes": np.array(sorted(attributes))}
    fields = types | fields
    look = f"po.io.examine_saved_synthesis({os.fspath(path)!r}) shows what the file holds"

    def differ(problem: str, taken: str) -> None:
        if category is None:
            raise ValueError(
                f"{problem}\n{look}. If you are sure that both are the same, call load with raise_on_checks=False"
            )
        warnings.warn(f"{problem}\nTaken: {taken}. {look}", category, stacklevel=4)

    for problem in _other_type(ed, fields, attributes):
        differ(problem, "what the file found, and the attributes of the initialized object")
    _check_arithmetic(ed, fields, map_location)
    image = torch.from_numpy(fields["image"]).to(ed.image.device)
    for problem in _other_image(image, ed.image, atol, rtol):
        differ(problem, "the image of the file")
    operator = ed.operator if torch.equal(image, ed.image) else FisherOperator(image, ed.model, **ed._products)

    result = result_from(fields)
    problem, same = _other_response(fields, operator, atol, rtol)
    if (problem and category is not None) or not (problem or same):
        with warnings.catch_warnings():
            if problem:  # of which the one warning below is enough
                warnings.simplefilter("ignore", RuntimeWarning)
            result = transfer(operator, result)
    if problem:
        held = f"{np.count_nonzero(result.converged)} of the file's {len(result.eigenvalues)} pairs"
        differ(problem, f"the model of the initialized object, by whose products {held} hold to tol={result.tol:g}")

    saved, own = str(fields["model"]).split(".")[-1], name_of(ed.model).split(".")[-1]
    if saved != own:
        differ(
            f"Saved and initialized model have different names!\nSaved: {saved}\nInitialized: {own}",
            "the model of the initialized object",
        )
    return operator, result


def _other_type(ed: Eigendistortion, fields: Mapping[str, Any], attributes: set[str]) -> Iterator[str]:
    saved, own = str(fields["object"]), name_of(type(ed))
    if saved != own and not {saved, own} <= _OWN_TYPES:
        yield f"Saved object was a {_shown(saved)}, but initialized object is a {_shown(own)}!"
    names = set(fields["attributes"].tolist())
    missing = ("Initialized", "saved", attributes - names), ("Saved", "initialized", names - attributes)
    for here, there, extra in missing:
        if extra:
            listed = ", ".join(sorted(extra))
            yield f"{here} object has {len(extra)} attribute(s) not present in the {there} object! {listed}"


def _shown(name: str) -> str:
    """A type's name as it stands in a script that imports `fisherop.plenoptic` in plenoptic's place."""
    return name.replace("fisherop.plenoptic.", "plenoptic.")


def _check_arithmetic(
    ed: Eigendistortion, fields: Mapping[str, NDArray], map_location: str | torch.device | None
) -> None:
    own = ed.image.device
    try:
        device = own if map_location is None else torch.device(map_location)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"map_location must be a device, like 'cpu' or 'cuda:0', or None, got {map_location!r}; a file holds no "
            "devices that could be mapped"
        ) from error
    if device.type != own.type or device.index not in (None, own.index or 0):
        raise ValueError(
            f"Saved and initialized attribute image have different device!\nmap_location: {device}\nInitialized: {own}"
            "\nWhat is loaded goes where the image is: leave map_location out, or make an Eigendistortion of an image "
            "and a model there"
        )
    saved = torch.from_numpy(fields["image"]).dtype
    if saved != ed.image.dtype:
        raise ValueError(
            f"Saved and initialized attribute image have different dtype!\nSaved: {saved}\nInitialized: "
            f"{ed.image.dtype}\nLoad it for an image and a model of {saved}, then use to()"
        )


def _other_image(saved: Tensor, own: Tensor, atol: float, rtol: float) -> Iterator[str]:
    if saved.shape != own.shape:
        shapes = f"Saved: {tuple(saved.shape)}\nInitialized: {tuple(own.shape)}"
        yield f"Saved and initialized attribute image have different shape!\n{shapes}"
    elif not torch.allclose(saved, own, atol=atol, rtol=rtol):
        by = float((saved - own).abs().max())
        yield f"Saved and initialized attribute image have different values!\nThey differ by up to {by:.3g}"


def _other_response(
    fields: Mapping[str, NDArray], operator: FisherOperator, atol: float, rtol: float
) -> tuple[str, bool]:
    """What is wrong with the response, or "", and whether it is the file's but for rounding."""
    response = operator.linearization.response
    own = operator.response_shape if "response_shape" in fields else (response.numel(),)
    saved = tuple(np.atleast_1d(fields.get("response_shape", fields["response_size"])).tolist())
    if saved != own:
        return f"Saved and initialized model output have different shape!\nSaved: {saved}\nInitialized: {own}", False
    difference, norm = response_difference(fields, response)
    problem = ""
    if not difference <= atol * response.numel() ** 0.5 + rtol * norm:
        by = f"They differ by {difference:.3g} in norm, of {norm:.3g}"
        problem = f"Saved and initialized model output have different values!\n{by}"
    return problem, difference <= same_response(fields) * norm


def is_torchs(path: str | os.PathLike) -> bool:
    """Whether `torch.save` wrote the file, as plenoptic does."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/data.pkl") for name in archive.namelist())
    except zipfile.BadZipFile:
        return False


def examine(path: str | os.PathLike) -> None:
    """Print what a file holds: versions, names of types, and the shapes of arrays."""
    fields = read(path)
    here = dict(text.split(" ", 1) for text in versions())
    saved = dict(text.split(" ", 1) for text in fields.pop("versions").tolist())
    metadata = {f"{name} version": f"{saved[name]} (installed: {here.get(name, 'no')})" for name in saved}
    metadata["Saved object type"] = _shown(str(fields.pop("object", "?")))
    _print_section("Metadata", metadata)
    shapes = f"{fields['image'].shape} -> {tuple(np.atleast_1d(fields.pop('response_shape', '?')).tolist())}"
    _print_section("Callable attributes", {"model": f"{fields.pop('model', '?')}, {shapes}"})
    arrays = {name: f"{a.dtype}, shape {a.shape}" for name, a in fields.items() if a.ndim and a.dtype.kind != "U"}
    _print_section("Array attributes", arrays)
    others = {name: a.tolist() for name, a in fields.items() if name not in arrays}
    others["details"] = f"JSON, {len(others['details'])} characters"
    _print_section("Other attributes", others)


def _print_section(title: str, rows: Mapping[str, Any]) -> None:
    width = max(map(len, rows), default=0)
    print(title, "-" * len(title), *(f"{name:<{width}} : {value}" for name, value in rows.items()), "", sep="\n")
