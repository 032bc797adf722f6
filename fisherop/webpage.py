"""A page to look at: an image and its distortions in one HTML file, with a slider for their amplitude."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from importlib import resources
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import fisherop
from fisherop import checks, markup
from fisherop.atomic import replacing
from fisherop.distortions import Distortions
from fisherop.model.slopes import norm
from fisherop.pictures import to_picture, value_range
from fisherop.result import EigenResult
from fisherop.sweeps import SweepResult
from fisherop.thresholds import amplitudes_at_threshold, are_bounds

_MOST = 256 * 10**6  # bytes of a page: browsers open no text of more than 512 MB, and are slow long before


class Entry(NamedTuple):
    """What a page shows of an image: of its result the pairs at `places`, as changes (K, *image_shape)."""

    label: str
    image: Tensor
    result: EigenResult
    places: list[int]
    changes: Tensor


def page(
    source: Any,
    path: str | os.PathLike,
    *,
    indices: int | Sequence[int] | None = None,
    vrange: tuple[float, float] | None = None,
    title: str = "Eigendistortions",
) -> pathlib.Path:
    """Write a page to look at distortions: one HTML file, which opens from the disk and asks nothing of a network.

    The image and the distorted image are shown in place. There is a slider for the amplitude, which is given as a
    multiple of the model's threshold (d′ = 1) and as RMS; the two pictures blink on demand; and below stands the
    certified table. The tasks of a sweep that failed are listed at the end.

    Parameters
    ----------
    source : Eigendistortion, SweepResult, or iterable
        After `synthesize`, of a grey image ``(..., height, width)`` or a colour one ``(..., 3, height, width)``. Of
        several, each Eigendistortion stands alone or as ``(label, Eigendistortion)``; the label is by default the
        model's class.
    path : str or path-like
        The file; it holds the old page or the new one at every moment.
    indices : int or sequence of int, optional
        Positions among the distortions found, by default all: 0 for the most noticeable, −1 for the least.
    vrange : (float, float), optional
        Black and white: by default (0, 1) where the image keeps to it, else its minimum and maximum.
    title : str
        The heading.

    Returns
    -------
    pathlib.Path
        Of the file.

    Raises
    ------
    ValueError
        Nothing has been synthesized yet, an image can't be shown, or the page would take more than 256 MB.
    IndexError
        There is no such distortion.
    OSError
        The file can't be written.

    Notes
    -----
    The file holds the numbers themselves. The pixels shown are those that ``stimuli.export(..., clip=True)`` writes
    with ``gamut=vrange`` and without dither: image + amplitude · distortion, clipped, and rounded to the nearest of 256
    levels. The image and each distortion take 16/3 bytes an element in float32 and 32/3 in float64: 0.7 MB or 1.4 MB
    for 256 × 256 grey pixels and one distortion. Beside them there are 25 kB.
    """
    target = checks.path("path", path, new=True)
    checks.instance("title", title, str, "a text")
    if vrange is not None:
        vrange = value_range([], vrange)
    places = None if indices is None else checks.integers("indices", indices)
    head, tail = _template(title)
    size = 0
    with replacing(target) as file:
        file.write(_encoded(head))
        for entry in _entries(source, places):
            size += sum(4 * -(-x.numel() * x.element_size() // 3) for x in (entry.image, entry.changes))
            if size > _MOST:
                raise ValueError(
                    f"the page would take more than {_MOST / 1e6:.0f} MB, which browsers hardly open: choose a few "
                    "`indices`, fewer or smaller images, or float32"
                )
            file.write(_encoded(_section(entry, vrange)))
        if isinstance(source, SweepResult) and source.failed:
            items = "".join(f"<li>{escape(f'{one.image}: {one.name}: {one.error}')}</li>" for one in source.failed)
            file.write(_encoded(f"<section><h2>Tasks that failed</h2><ul>{items}</ul></section>\n"))
        file.write(_encoded(tail))
    return pathlib.Path(os.fsdecode(target))


def _encoded(text: str) -> bytes:
    """In UTF-8, also what a file's name holds that is none."""
    return text.encode(errors="backslashreplace")


def _entries(source: Any, places: list[int] | None) -> Iterator[Entry]:
    """Each thing to show, with a label of its own, one at a time."""
    what = "an Eigendistortion, or several, each alone or as (label, Eigendistortion), or a SweepResult"
    several: Any = [source] if isinstance(source, Distortions) else source
    if isinstance(source, SweepResult):
        if not source.done:
            raise ValueError(f"there is nothing to show: no task of the sweep is done, {source!r}")
        several = ((f"{one.image}: {one.name}", source.load(one)) for one in source.done)
    if isinstance(several, str | bytes | Mapping | Tensor | np.ndarray) or not isinstance(several, Iterable):
        checks.refuse(TypeError, "source", what, source, "use its items()" if isinstance(source, Mapping) else "")
    seen: dict[str, int] = {}
    for one in several:
        label, ed = one if isinstance(one, tuple) and len(one) == 2 else ("", one)
        ed = checks.instance("what source holds", ed, Distortions, "an Eigendistortion, or (label, Eigendistortion)")
        label = checks.instance("a label in source", label, str, "a text") or type(ed.model).__name__
        seen[label] = seen.get(label, 0) + 1
        label += f" ({seen[label]})" if seen[label] > 1 else ""
        result = ed.result
        if result is None or len(result.eigenvalues) == 0:
            raise ValueError(f"there are no eigendistortions of {label!r} to show: call synthesize() first")
        count = len(result.eigenvalues)
        found = range(count) if places is None else places
        chosen = [checks.position("indices", i, count, "eigendistortions found") % count for i in found]
        chosen = list(dict.fromkeys(chosen))
        yield Entry(label, ed.image, result, chosen, ed.operator.to_tensors(result.eigenvectors[:, chosen]))
    if not seen:
        checks.refuse(ValueError, "source", what, source)


def _section(entry: Entry, vrange: tuple[float, float] | None) -> str:
    """The table of an image, and its numbers."""
    label, image, result, places, changes = entry
    picture = to_picture(image)
    low, high = value_range([picture], vrange)
    amplitudes = amplitudes_at_threshold(result)[places]
    norms = np.array([norm(change.double()) for change in changes])
    facts = {
        "label": label,
        "height": picture.shape[0],
        "width": picture.shape[1],
        "channels": picture.size // (picture.shape[0] * picture.shape[1]),
        "low": low,
        "high": high,
        "single": image.dtype == torch.float32,
        # of a sum in the image's precision, as `stimuli.series` allows for it
        "margin": 4 * torch.finfo(image.dtype).eps * max(abs(low), abs(high)),
        "distortions": [
            {
                "eigenindex": int(result.eigenindex[i]),
                "eigenvalue": float(result.eigenvalues[i]),
                "status": str(result.status[i]),
                "threshold": float(amplitude) if np.isfinite(amplitude) else None,
                "norm": float(length),
            }
            for i, amplitude, length in zip(places, amplitudes, norms, strict=True)
        ],
    }
    rms = amplitudes * norms / picture.size**0.5
    more = markup.thresholds(amplitudes.tolist(), rms.tolist(), are_bounds(result)[places].tolist())
    table = result._html(places, more)
    blocks = [_block("image", picture, image.dtype)]
    blocks += [_block("distortion", to_picture(change), image.dtype) for change in changes]
    text = json.dumps(facts, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    return (
        f'<section class="entry"><h2>{escape(label)}</h2>{table}\n'
        f'<script type="application/json" class="facts">{text}</script>\n{"".join(blocks)}</section>\n'
    )


def _block(name: str, picture: NDArray, dtype: torch.dtype) -> str:
    """Numbers as they are in memory, little-endian, row by row, the colours of a pixel side by side."""
    numbers = picture.astype("<f4" if dtype == torch.float32 else "<f8").tobytes()
    return f'<script type="application/octet-stream" class="{name}">{base64.b64encode(numbers).decode()}</script>\n'


def _template(title: str) -> tuple[str, str]:
    """What comes before the entries, and what after them."""
    text = resources.files("fisherop").joinpath("webpage.html").read_text(encoding="utf-8")
    head, tail = text.split("{{entries}}")
    policy = ["default-src 'none'", "img-src data:"]
    for tag, part in (("style", head), ("script", tail)):
        (inside,) = re.findall(rf"<{tag}>(.*?)</{tag}>", part, re.DOTALL)
        policy.append(f"{tag}-src 'sha256-{base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()}'")
    head = head.replace("{{policy}}", "; ".join(policy)).replace("{{version}}", fisherop.__version__)
    return head.replace("{{title}}", escape(title)), tail
