"""Pictures for an experiment: an image plus a distortion at chosen amplitudes, as files with a table of facts."""

from __future__ import annotations

import csv
import io
import os
import pathlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from fisherop import checks
from fisherop.atomic import replacing
from fisherop.distortions import Distortions
from fisherop.model.slopes import norm
from fisherop.pictures import levels_of, picture_of
from fisherop.thresholds import check_response

_UNITS = ("norm", "rms", "threshold")
_FORMATS = {"png": "PNG", "tiff": "TIFF", "npy": ""}
_TABLE = "stimuli.csv"
_NAME = re.compile(r"(image|index\d+_\d{3,})\.(png|tiff|npy)")
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
        About 0 where an element that the distortion changes is at an end of the gamut already: shrink the image's
        contrast, or leave such elements out by ``subspace=spaces.mask(...)`` or `window`.

    Raises
    ------
    ValueError
        Nothing has been synthesized yet, or the image isn't within the gamut.
    IndexError
        There is no such distortion.
    """
    change, *_ = _change(ed, index, window)
    low, high = _gamut(ed, gamut)
    image, size = ed.image.double(), change.double().abs()
    room = torch.minimum(image - low, high - image) + _rounding(ed, low, high) / 2
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
    amplitudes : float or array_like, shape (p,)
        Negative ones take the distortion away.
    unit : {"norm", "rms", "threshold"}
        What amplitudes are: what the distortion is multiplied by; the root mean square of the change per element; or
        multiples of the model's own threshold, at which F predicts that the response moves by 1 (d′ = 1).
    gamut : (float, float)
        The least and the largest value that can be shown.
    window : array_like, optional
        Weights of the image's shape, or of its last dimensions, by which the distortion is multiplied.
    clip : bool
        Set what leaves the gamut to its ends, in place of an error; where that is more than half of an image, with a
        RuntimeWarning.

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
    return _series(ed, index, amplitudes, unit, gamut, window, clip, is_measured=True)


def _series(
    ed: Distortions,
    index: int,
    amplitudes: ArrayLike,
    unit: str,
    gamut: tuple[float, float],
    window: ArrayLike | None,
    clip: bool,
    *,
    is_measured: bool,
) -> list[Stimulus]:
    """`series`; what is not measured lacks the response's true change."""
    change, share_left, place = _change(ed, index, window)
    low, high = _gamut(ed, gamut)
    checks.choice("unit", unit, _UNITS)
    clip = checks.flag("clip", clip)
    given = checks.array("amplitudes", np.atleast_1d(amplitudes) if np.isscalar(amplitudes) else amplitudes, ("p",))
    if len(given) == 0:
        checks.refuse(ValueError, "amplitudes", "at least one number", amplitudes)
    result, found = ed.result, []
    assert result is not None  # or there were no change
    slope, length = _slope(ed, change), norm(change.double())
    factor = 1.0
    if unit == "rms":
        factor = change.numel() ** 0.5 / length
    elif unit == "threshold":
        if slope <= 2 * result.noise * result.lambda_max_bounds[0] ** 0.5 * share_left:
            raise ValueError("the threshold of this distortion is infinite: give amplitudes in another unit")
        factor = 1 / slope
    rounding = _rounding(ed, low, high)
    largest = 0.5 * torch.finfo(ed.image.dtype).max / length
    for amplitude in (factor * size for size in given.astype(np.float64).tolist()):
        if not abs(amplitude) <= largest:
            checks.refuse(ValueError, "amplitudes", f"such that {ed.image.dtype} holds the image", amplitudes)
        wanted = ed.image.double() + amplitude * change.double()
        share = float(((wanted < low - rounding) | (wanted > high + rounding)).double().mean())
        if share and not clip:
            most, of = max_amplitude(ed, index, gamut, window=window), "" if unit == "norm" else f" in units of {unit}"
            raise ValueError(
                f"at amplitude {amplitude / factor:.4g}{of} of distortion {index}, {100 * share:.2g} % of the elements "
                f"leave the gamut: stay below {most / factor:.4g} (max_amplitude gives it as a norm), or pass clip=True"
            )
        image = wanted.to(ed.image.dtype).clamp(low, high)
        found.append(
            Stimulus(
                image=image,
                eigenindex=int(result.eigenindex[place]),
                eigenvalue=float(result.eigenvalues[place]),
                amplitude=amplitude,
                rms=norm(image.double() - ed.image.double()) / image.numel() ** 0.5,
                predicted=slope * abs(amplitude),
                actual=_moved(ed, image) if is_measured else float("nan"),
                clipped=share,
            )
        )
    worst = max(found, key=lambda one: one.clipped)
    if worst.clipped > 0.5:
        what = f"at amplitude {worst.amplitude / factor:.4g} of distortion {index}"
        checks.warn(f"{what}, {100 * worst.clipped:.3g} % of the elements are clipped: take a smaller amplitude")
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
    replace: bool = False,
) -> pathlib.Path:
    """Write an image, and the image with distortions at several amplitudes, as files, with a table of them.

    Each file is whole at every moment, and the table, ``stimuli.csv``, is written last: without it they are incomplete.
    After an error, or Ctrl-C, none of them is left.

    Parameters
    ----------
    ed : Eigendistortion
        After `synthesize`, of a grey image ``(..., height, width)`` or a colour one ``(..., 3, height, width)``; of any
        shape for ``"npy"``.
    folder : str or path-like
        It is made if there is none.
    indices : int or sequence of int
        Positions among the distortions found; one that is named twice is written once.
    amplitudes, unit
        As in `series`.
    format : {"png", "tiff", "npy"}
        The last holds the tensor itself.
    bits : {8, 16}
        Per channel; 16 for grey images alone, since Pillow writes no others.
    dither : int or Generator, optional
        A seed: each value between two levels goes to the upper one with the probability that keeps its mean (L. G.
        Roberts, Picture coding using pseudo-random noise, 1962), so that small distortions survive 8 bits. The draw is
        one for all files, the image's own too: elements that a distortion leaves alone are the same in all of them. It
        adds noise of up to half a level of RMS, which may move the response more than the distortion does: compare
        `actual` with `predicted`. By default values go to the nearest level.
    gamut, window, clip
        As in `series`. The gamut's ends become black and white.
    replace : bool
        Remove what an earlier table in the folder lists, in place of an error.

    Returns
    -------
    pathlib.Path
        Of the table, whose columns are file, eigenindex (−1 for the image itself), eigenvalue, amplitude, rms,
        predicted, actual and clipped, as of `Stimulus`; rms and actual are those of the pixels in the file, after
        rounding, relative to the image before it.

    Raises
    ------
    ValueError
        Some of it would leave the gamut, or an argument can't be used. Nothing is written then.
    FileExistsError
        The folder holds a table already, or a file, which no table lists, of a name that is to be written.
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
    if format == "npy" and (bits != 8 or dither is not None):
        raise ValueError("npy holds the tensor itself: leave out bits and dither")
    rng = None if dither is None else checks.generator(dither, "dither")
    path = pathlib.Path(os.fsdecode(checks.path("folder", folder)))
    if not checks.flag("replace", replace) and os.path.lexists(path / _TABLE):
        raise FileExistsError(f"{path} holds an earlier {_TABLE}: take another folder, or pass replace=True")
    places = [_place(ed, index) for index in checks.integers("indices", indices)]
    stimuli = [("image", Stimulus(ed.image, -1, float("nan"), 0.0, 0.0, 0.0, 0.0, 0.0))]
    for place in dict.fromkeys(places):
        several = _series(ed, place, amplitudes, unit, gamut, window, clip, is_measured=False)
        stimuli += [(f"index{one.eigenindex}_{number:03d}", one) for number, one in enumerate(several)]
    draws = None if rng is None else torch.as_tensor(rng.random(tuple(ed.image.shape)))
    files = [path / f"{name}.{format}" for name, _ in stimuli]
    earlier = _listed(path)
    for file in files:
        if os.path.lexists(file) and file not in earlier:
            raise FileExistsError(f"{file} is there, and no {_TABLE} lists it: take another folder, or move it away")
    path.mkdir(parents=True, exist_ok=True)
    for file in [path / _TABLE, *earlier]:  # the table first, so that none is of other files
        file.unlink(missing_ok=True)
    try:
        rows = []
        for file, (_, one) in zip(files, stimuli, strict=True):
            if format == "npy":
                shown = one.image
                with replacing(file) as out:
                    np.save(out, shown.detach().cpu().numpy())
            else:
                levels = levels_of(one.image, low, high, 2**bits - 1, draws)
                shown = (levels.double() / (2**bits - 1) * (high - low) + low).to(ed.image)
                with replacing(file) as out:
                    picture_of(levels, bits).save(out, format=_FORMATS[format])
            change = norm(shown.double() - ed.image.double()) / shown.numel() ** 0.5
            value = one.eigenvalue if one.eigenindex >= 0 else ""
            facts = (one.eigenindex, value, one.amplitude, change, one.predicted, _moved(ed, shown), one.clipped)
            rows.append((file.name, *facts))
        text = io.StringIO()
        csv.writer(text).writerows([COLUMNS, *rows])
        with replacing(path / _TABLE) as out:
            out.write(text.getvalue().encode())
    except BaseException:
        for file in files:
            file.unlink(missing_ok=True)
        raise
    return path / _TABLE


def _listed(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files of an earlier export, as its table lists them."""
    try:
        text = (folder / _TABLE).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    return [folder / row[0] for row in csv.reader(io.StringIO(text)) if row and _NAME.fullmatch(row[0])]


def _place(ed: Distortions, index: int) -> int:
    checks.instance("ed", ed, Distortions, "an Eigendistortion")
    if ed.result is None or len(ed.result.eigenvalues) == 0:
        raise ValueError("there are no eigendistortions yet: call synthesize() first")
    count = len(ed.result.eigenvalues)
    return checks.position("index", index, count, "eigendistortions found") % count


def _change(ed: Distortions, index: int, window: ArrayLike | None) -> tuple[Tensor, float, int]:
    """The distortion as an image, times the window; the share of its norm that this leaves; its place among those."""
    place, result = _place(ed, index), ed.result
    assert result is not None  # or there were no place
    check_response(ed.operator)
    change = whole = ed.operator.to_tensors(result.eigenvectors[:, [place]])[0]
    if window is not None:
        weights = checks.array("window", window, what="an array of weights from 0 to 1").astype(np.float64)
        shape = tuple(ed.image.shape)
        if weights.ndim == 0 or weights.shape != shape[len(shape) - weights.ndim :]:
            checks.refuse(ValueError, "window", f"of the image's shape {shape}, or of its last dimensions", weights)
        if weights.min(initial=0.0) < 0 or weights.max(initial=0.0) > 1:
            checks.refuse(ValueError, "window", "an array of weights from 0 to 1", weights)
        change = change * torch.from_numpy(np.ascontiguousarray(weights)).to(change)
        if not bool(change.any()):
            raise ValueError("window leaves nothing of the distortion: take another one")
    return change, norm(change.double()) / norm(whole.double()), place


def _gamut(ed: Distortions, gamut: tuple[float, float]) -> tuple[float, float]:
    checks.instance("ed", ed, Distortions, "an Eigendistortion")
    ends = checks.array("gamut", gamut, (2,), "the least and the largest value, an array").astype(float)
    low, high = torch.from_numpy(ends).to(ed.image.dtype).tolist()  # as the image can hold them
    least, most = float(ed.image.min()), float(ed.image.max())
    rounding = _rounding(ed, low, high)
    if not (low < high < float("inf") and least >= low - rounding and most <= high + rounding):
        raise ValueError(
            f"gamut must hold the image, whose values are from {least:.9g} to {most:.9g}, got {ends[0]:.9g} to "
            f"{ends[1]:.9g}"
        )
    return min(low, least), max(high, most)


def _rounding(ed: Distortions, low: float, high: float) -> float:
    """By how much an element may be beyond the gamut by rounding alone."""
    return 4 * torch.finfo(ed.image.dtype).eps * max(abs(low), abs(high))


def _slope(ed: Distortions, change: Tensor) -> float:
    """‖J v‖ of a change v, in units of the noise."""
    moved = ed.operator.linearization.jvp(change[None])
    return norm(ed.operator.products.to_noise(moved.reshape(1, -1))[0].double())


def _moved(ed: Distortions, image: Tensor) -> float:
    """How far the response is from that to the original, in units of the noise there."""
    lin = ed.operator.linearization
    moved = (lin.respond(image).double() - lin.response.flatten().double()).to(lin.response.dtype)
    return norm(ed.operator.products.to_noise(moved[None])[0].double())
