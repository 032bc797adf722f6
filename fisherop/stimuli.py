"""Pictures for an experiment: an image plus a distortion at chosen amplitudes, as files with a table of facts."""

from __future__ import annotations

import csv
import io
import os
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from PIL import Image
from torch import Tensor

from fisherop import checks
from fisherop.atomic import replacing
from fisherop.distortions import Distortions
from fisherop.model.slopes import norm

_UNITS = ("norm", "rms", "threshold")
_FORMATS = {"png": "PNG", "tiff": "TIFF", "npy": ""}
COLUMNS = ("file", "eigenindex", "eigenvalue", "amplitude", "rms", "predicted", "actual", "clipped")


@dataclass(frozen=True, eq=False)
class Stimulus:
    """An image plus a distortion.

    Attributes
    ----------
    image : Tensor, shape ``image_shape``
        Within the gamut.
    eigenindex : int
        Of the distortion, among all N; −1 for the image itself.
    eigenvalue : float
    amplitude : float
        By what the distortion, and the window, was multiplied; its sign is the direction.
    rms : float
        The root mean square, per element, of the change that the image has.
    predicted : float
        What F predicts of how far the response moves, in units of its noise (d′): ‖J v‖ for the change v that was asked
        for, before it was clipped.
    actual : float
        How far the response to `image` is from that to the original, in the same units.
    clipped : float
        The share of elements that left the gamut, and were set to its ends.
    """

    image: Tensor
    eigenindex: int
    eigenvalue: float
    amplitude: float
    rms: float
    predicted: float
    actual: float
    clipped: float


def max_amplitude(
    ed: Distortions, index: int, gamut: tuple[float, float] = (0.0, 1.0), *, window: ArrayLike | None = None
) -> float:
    """The largest amplitude, of either sign, at which image ± amplitude · distortion stays within the gamut.

    Parameters
    ----------
    ed : Eigendistortion
        After `synthesize`.
    index : int
        Position among the distortions found: 0 for the most noticeable, −1 for the least.
    gamut : (float, float)
        The least and the largest value that can be shown.
    window : array_like, optional
        Weights of the image's shape, or of its last dimensions, by which the distortion is multiplied.

    Returns
    -------
    float
        0 where an element that the distortion changes is at an end of the gamut already.

    Raises
    ------
    ValueError
        Nothing has been synthesized yet, or the image isn't within the gamut.
    IndexError
        There is no such distortion.
    """
    change, _ = _change(ed, index, window)
    low, high = _gamut(ed, gamut)
    image, size = ed.image.double(), change.double().abs()
    room = torch.minimum(image - low, high - image)
    moved = size > 0
    return float((room[moved] / size[moved]).min()) if bool(moved.any()) else float("inf")


def series(
    ed: Distortions,
    index: int,
    amplitudes: ArrayLike,
    *,
    unit: str = "norm",
    gamut: tuple[float, float] = (0.0, 1.0),
    window: ArrayLike | None = None,
    clip: bool = False,
) -> list[Stimulus]:
    """An image with a distortion at several amplitudes.

    Parameters
    ----------
    ed : Eigendistortion
        After `synthesize`.
    index : int
        Position among the distortions found: 0 for the most noticeable, −1 for the least.
    amplitudes : array_like, shape (p,)
        Negative ones take the distortion away.
    unit : {"norm", "rms", "threshold"}
        What amplitudes are: what the distortion is multiplied by; the root mean square of the change per element; or
        multiples of the model's own threshold, at which F predicts that the response moves by 1 (d′ = 1).
    gamut : (float, float)
        The least and the largest value that can be shown.
    window : array_like, optional
        Weights of the image's shape, or of its last dimensions, by which the distortion is multiplied.
    clip : bool
        Set what leaves the gamut to its ends, in place of an error.

    Returns
    -------
    list of Stimulus
        One for each amplitude.

    Raises
    ------
    ValueError
        Some of it would leave the gamut, the threshold is infinite, or an argument can't be used.
    IndexError
        There is no such distortion.
    """
    change, place = _change(ed, index, window)
    low, high = _gamut(ed, gamut)
    checks.choice("unit", unit, _UNITS)
    clip = checks.flag("clip", clip)
    sizes = checks.array("amplitudes", amplitudes, ("p",)).astype(np.float64)
    length = norm(change.double())
    slope = _slope(ed, change)
    if unit == "rms":
        sizes = sizes * change.numel() ** 0.5 / length
    elif unit == "threshold":
        if slope == 0:
            raise ValueError("the threshold of this distortion is infinite: give amplitudes in another unit")
        sizes = sizes / slope
    result, found = ed.result, []
    assert result is not None  # or there were no change
    for amplitude in sizes.tolist():
        wanted = ed.image.double() + amplitude * change.double()
        rounding = 4 * torch.finfo(ed.image.dtype).eps * max(abs(low), abs(high), 1.0)
        share = float(((wanted < low - rounding) | (wanted > high + rounding)).double().mean())
        if share and not clip:
            most = max_amplitude(ed, index, gamut, window=window)
            raise ValueError(
                f"at amplitude {amplitude:.4g}, {100 * share:.2g} % of the elements leave the gamut: stay below "
                f"{most:.4g} (max_amplitude), or pass clip=True"
            )
        image = wanted.clamp(low, high).to(ed.image.dtype)
        found.append(
            Stimulus(
                image=image,
                eigenindex=int(result.eigenindex[place]),
                eigenvalue=float(result.eigenvalues[place]),
                amplitude=amplitude,
                rms=norm(image.double() - ed.image.double()) / image.numel() ** 0.5,
                predicted=slope * abs(amplitude),
                actual=_moved(ed, image),
                clipped=share,
            )
        )
    return found


def export(
    ed: Distortions,
    folder: str | os.PathLike,
    indices: int | Sequence[int] = (0, -1),
    amplitudes: ArrayLike = (1.0,),
    *,
    unit: str = "norm",
    format: str = "png",
    bits: int = 8,
    dither: int | np.random.Generator | None = None,
    gamut: tuple[float, float] = (0.0, 1.0),
    window: ArrayLike | None = None,
    clip: bool = False,
) -> pathlib.Path:
    """Write an image, and the image with distortions at several amplitudes, as files, with a table of them.

    Each file is whole at every moment, and the table, ``stimuli.csv``, is written last. Its numbers are those of the
    pixels in the files, after rounding.

    Parameters
    ----------
    ed : Eigendistortion
        After `synthesize`, of a grey image ``(..., height, width)`` or a colour one ``(..., 3, height, width)``; of any
        shape for ``"npy"``.
    folder : str or path-like
        It is made if there is none; files of the same names in it are replaced.
    indices : int or sequence of int
        Positions among the distortions found.
    amplitudes, unit
        As in `series`.
    format : {"png", "tiff", "npy"}
        The last holds the tensor itself.
    bits : {8, 16}
        Per channel; 16 for grey images alone, since Pillow writes no others.
    dither : int or Generator, optional
        A seed: each value between two levels goes to the upper one with the probability that keeps its mean (L. G.
        Roberts, Picture coding using pseudo-random noise, 1962), so that small distortions survive 8 bits. By default
        values go to the nearest level.
    gamut, window, clip
        As in `series`. The gamut's ends become black and white.

    Returns
    -------
    pathlib.Path
        Of the table, whose columns are file, eigenindex (−1 for the image itself), eigenvalue, amplitude, rms,
        predicted, actual and clipped, as of `Stimulus`; rms, actual and clipped are those of the file.

    Raises
    ------
    ValueError
        Some of it would leave the gamut, or an argument can't be used. Nothing is written then.
    OSError
        The folder or a file can't be written.
    """
    checks.choice("format", format, _FORMATS)
    bits = checks.integer("bits", bits, 8, 16, what="8 or 16")
    if bits not in (8, 16):
        checks.refuse(ValueError, "bits", "8 or 16", bits)
    low, high = _gamut(ed, gamut)
    channels = ed.image.shape[:-2].numel() if ed.image.ndim >= 2 else 0
    if format != "npy" and channels not in (1, 3):
        raise ValueError(
            f"a {format} file takes a grey image, or one of three channels, got shape {tuple(ed.image.shape)}: use "
            "format='npy'"
        )
    if format != "npy" and channels == 3 and bits == 16:
        raise ValueError("16 bits are written of grey images alone: use bits=8 with dither, or format='npy'")
    rng = None if dither is None else checks.generator(dither)
    path = pathlib.Path(os.fsdecode(checks.path("folder", folder)))
    options = {"unit": unit, "gamut": gamut, "window": window, "clip": clip}
    result = ed.result
    original = Stimulus(ed.image, -1, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    stimuli = [("image", original)]
    for index in checks.integers("indices", indices):
        for number, one in enumerate(series(ed, index, amplitudes, **options)):
            stimuli.append((f"index{one.eigenindex}_{number:03d}", one))
    assert result is not None
    path.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, one in stimuli:
        file = path / f"{name}.{format}"
        if format == "npy":
            shown = one.image
            with replacing(file) as out:
                np.save(out, shown.detach().cpu().numpy())
        else:
            levels = _levels(one.image, low, high, 2**bits - 1, rng)
            shown = (levels.double() / (2**bits - 1) * (high - low) + low).to(ed.image.dtype)
            with replacing(file) as out:
                _picture(levels, bits).save(out, format=_FORMATS[format])
        change = norm(shown.double() - ed.image.double()) / shown.numel() ** 0.5
        facts = (one.eigenindex, one.eigenvalue, one.amplitude, change, one.predicted, _moved(ed, shown), one.clipped)
        rows.append((file.name, *facts))
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(COLUMNS)
    table.writerows(rows)
    with replacing(path / "stimuli.csv") as out:
        out.write(text.getvalue().encode())
    return path / "stimuli.csv"


def _change(ed: Distortions, index: int, window: ArrayLike | None) -> tuple[Tensor, int]:
    """The distortion as an image, times the window, and its place among those found."""
    checks.instance("ed", ed, Distortions, "an Eigendistortion")
    if ed.result is None or len(ed.result.eigenvalues) == 0:
        raise ValueError("there are no eigendistortions yet: call synthesize() first")
    place = checks.position("index", index, len(ed.result.eigenvalues), "eigendistortions found")
    ed.operator.linearization.check_current()
    change = ed.operator.to_tensors(ed.result.eigenvectors[:, [place]])[0]
    if window is not None:
        weights = checks.array("window", window, what="an array of weights")
        shape = tuple(ed.image.shape)
        if weights.ndim == 0 or weights.shape != shape[len(shape) - weights.ndim :]:
            checks.refuse(ValueError, "window", f"of the image's shape {shape}, or of its last dimensions", weights)
        change = change * torch.as_tensor(weights, dtype=change.dtype, device=change.device)
        if not bool(change.any()):
            raise ValueError("window leaves nothing of the distortion: take another one")
    return change, place % len(ed.result.eigenvalues)


def _gamut(ed: Distortions, gamut: tuple[float, float]) -> tuple[float, float]:
    checks.instance("ed", ed, Distortions, "an Eigendistortion")
    low, high = checks.array("gamut", gamut, (2,), "the least and the largest value, an array").astype(float).tolist()
    least, most = float(ed.image.min()), float(ed.image.max())
    if not low < high or least < low or most > high:
        raise ValueError(
            f"gamut must hold the image, whose values are from {least:g} to {most:g}, got {low:g} to {high:g}"
        )
    return low, high


def _slope(ed: Distortions, change: Tensor) -> float:
    """‖J v‖ of a change v, in units of the noise."""
    moved = ed.operator.linearization.jvp(change[None])
    return norm(ed.operator.products.to_noise(moved.reshape(1, -1))[0].double())


def _moved(ed: Distortions, image: Tensor) -> float:
    """How far the response is from that to the original, in units of the noise there."""
    lin = ed.operator.linearization
    moved = (lin.respond(image).double() - lin.response.flatten().double()).to(lin.response.dtype)
    return norm(ed.operator.products.to_noise(moved[None])[0].double())


def _levels(image: Tensor, low: float, high: float, most: int, rng: np.random.Generator | None) -> Tensor:
    values = (image.detach().cpu().double() - low) / (high - low) * most
    offset = 0.5 if rng is None else torch.as_tensor(rng.random(tuple(image.shape)))
    return torch.floor(values + offset).clamp(0, most).to(torch.int64)


def _picture(levels: Tensor, bits: int) -> Image.Image:
    pixels = levels.reshape(-1, *levels.shape[-2:]).numpy()
    pixels = pixels[0] if len(pixels) == 1 else np.moveaxis(pixels, 0, -1)
    return Image.fromarray(pixels.astype(np.uint8 if bits == 8 else np.uint16))
