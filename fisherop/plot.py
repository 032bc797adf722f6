"""Figures of finished results."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from fisherop import checks
from fisherop.curves import convergence, density, response_change, spectrum, sweep
from fisherop.eigendistortion import Eigendistortion
from fisherop.panels import Panel, draw
from fisherop.pictures import default_scale, describe, to_picture, to_pictures, value_range
from fisherop.result import EigenResult
from fisherop.webpage import page

__all__ = [
    "compare",
    "convergence",
    "density",
    "distortions",
    "eigendistortions",
    "imshow",
    "page",
    "response_change",
    "spectrum",
    "sweep",
]


def imshow(
    image: Tensor | ArrayLike,
    title: str | Sequence[str] = "",
    *,
    zoom: int | None = None,
    as_rgb: bool | None = None,
    channel_idx: int | None = None,
    vrange: tuple[float, float] | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Show an image, each of its pixels as `zoom` × `zoom` dots of the figure, so that no interpolation lies.

    Parameters
    ----------
    image : Tensor or array_like, shape (..., height, width)
        What comes before height and width are the channels.
    title : str or sequence of str
        For each picture; the values of black and white are added.
    zoom : int, optional
        By default such that a picture is about 260 dots large. The figure has 100 dots per inch: save it with this
        `dpi`, or a multiple.
    as_rgb : bool, optional
        Three channels in one colour picture, or each in a grey one of its own; by default in colour where there are
        three.
    channel_idx : int, optional
        Show this channel alone, in grey.
    vrange : (float, float), optional
        Black and white: by default (0, 1) where the image keeps to it, else its minimum and maximum.
    ax : Axes, optional
        Draw here, where there is one picture; its size decides in the place of `zoom`.

    Returns
    -------
    Figure

    Raises
    ------
    ValueError
        An argument doesn't fit the image.
    IndexError
        There is no such channel.
    """
    pictures = to_pictures(image, as_rgb, channel_idx)
    what = f"a text, or one for each of the {len(pictures)} pictures"
    titles = [title] * len(pictures) if isinstance(title, str) else title
    titles = checks.several("title", titles, str, what, len(pictures))
    limits = value_range(pictures, vrange)
    titled = zip(pictures, titles, strict=True)
    row = [Panel(pixels, limits, f"{text}\n{describe(limits)}".lstrip()) for pixels, text in titled]
    return draw([row], zoom=zoom, ax=ax)


def eigendistortions(
    ed: Eigendistortion,
    indices: int | Sequence[int] = (0, -1),
    scale: float | None = None,
    vrange: tuple[float, float] | None = None,
    zoom: int | None = None,
) -> Figure:
    """Show eigendistortions: a row each of the image, the distortion alone, and the image plus the scaled distortion.

    Parameters
    ----------
    ed : Eigendistortion
        After `synthesize`, of a grey image ``(..., height, width)`` or a colour one ``(..., 3, height, width)``.
    indices : int or sequence of int
        Positions among the distortions found: 0 for the most noticeable, −1 for the least.
    scale : float, optional
        What distortions are multiplied by, one for all rows: their norm in the image's units, unless there is a metric
        or a mask of soft edge. By default the RMS of a unit norm is 5 % of `vrange`.
    vrange : (float, float), optional
        Black and white of the image: by default (0, 1) where the image keeps to it, else its minimum and maximum.
    zoom : int, optional
        Dots for each pixel, as in `imshow`.

    Returns
    -------
    Figure
        What leaves `vrange` is clipped, on the display only. A distortion is shown on its own symmetric scale, so that
        mid-grey is no change.

    Raises
    ------
    ValueError
        Nothing has been synthesized yet, or the image has neither of these shapes.
    IndexError
        There is no such distortion.
    """
    result, image, distortions = _pictures(ed)
    values = result.eigenvalues
    indices = checks.integers("indices", indices)
    indices = [checks.position("indices", i, len(values), "eigendistortions found") for i in indices]
    limits = value_range([image], vrange)
    scale = _scale(scale, limits, image.size)
    rows = []
    for i in indices:
        peak = float(np.abs(distortions[i]).max())
        rms = abs(scale) * float(np.linalg.norm(distortions[i])) / image.size**0.5
        name = f"eigendistortion {result.eigenindex[i]}"
        alone = f"{name}\nλ = {values[i]:.3g}, {describe((-peak, peak))}"
        added = f"image + {scale:.3g} × {name} (RMS {rms:.2g})\nλ = {values[i]:.3g}, {describe(limits)}"
        rows.append(
            [
                Panel(image, limits, f"image\n{describe(limits)}"),
                Panel(distortions[i], (-peak, peak), alone),
                Panel(image + scale * distortions[i], limits, added),
            ]
        )
    return draw(rows, zoom=zoom)


def compare(
    eds: Sequence[Eigendistortion],
    names: Sequence[str] | None = None,
    scale: float | None = None,
    vrange: tuple[float, float] | None = None,
    zoom: int | None = None,
) -> Figure:
    """Show what several models, or layers, notice most and least: a row each, all distortions at one scale.

    Parameters
    ----------
    eds : sequence of Eigendistortion
        After `synthesize`, at both ends.
    names : sequence of str, optional
        A title for each row, by default the model's class.
    scale, vrange, zoom
        As in `eigendistortions`; one for all rows. By default the RMS of the distortions is 5 % of `vrange` at the
        largest image.

    Returns
    -------
    Figure
        The image, and the image plus the scaled distortion, the most and the least noticeable one.

    Raises
    ------
    ValueError
        There is nothing to compare, `names` has another length, or one of them is refused by `eigendistortions` or
        lacks an end.
    """
    eds = checks.several("eds", eds, Eigendistortion, "a sequence of at least one Eigendistortion")
    names = [type(ed.model).__name__ for ed in eds] if names is None else names
    names = checks.several("names", names, str, f"a text for each of the {len(eds)} eds", len(eds))
    for ed, name in zip(eds, names, strict=True):
        if ed.result is not None and not {0, ed.result.image_size - 1} <= set(ed.result.eigenindex.tolist()):
            raise ValueError(f"{name!r} lacks an end of its spectrum: call synthesize(which='both')")
    pictures = [_pictures(ed) for ed in eds]
    limits = value_range([image for _, image, _ in pictures], vrange)
    scale = _scale(scale, limits, max(image.size for _, image, _ in pictures))
    rows = []
    for name, (result, image, distortions) in zip(names, pictures, strict=True):
        row = [Panel(image, limits, f"{name}\n{describe(limits)}")]
        for i, which in ((0, "most"), (-1, "least")):
            title = f"+ {scale:.3g} × {which} noticeable (index {result.eigenindex[i]})\n"
            title += f"λ = {result.eigenvalues[i]:.3g}, {describe(limits)}"
            row.append(Panel(image + scale * distortions[i], limits, title))
        rows.append(row)
    return draw(rows, zoom=zoom)


def distortions(
    image: Tensor | ArrayLike,
    changes: Tensor | ArrayLike,
    titles: Sequence[str] | None = None,
    scale: float | None = None,
    vrange: tuple[float, float] | None = None,
    zoom: int | None = None,
) -> Figure:
    """Show an image, and the image plus each of some changes, all at one scale, whoever found them.

    Parameters
    ----------
    image : Tensor or array_like, shape image_shape
        Grey, ``(..., height, width)``, or in colour, ``(..., 3, height, width)``.
    changes : Tensor or array_like, shape ``(K, *image_shape)``
        As of `principal_distortions`, or of ``operator.to_tensors(result.eigenvectors)``.
    titles : sequence of str, optional
        For each change.
    scale, vrange, zoom
        As in `eigendistortions`.

    Returns
    -------
    Figure
        Two rows: above the image plus each change, below the changes alone, each on its own symmetric scale.

    Raises
    ------
    ValueError
        The image is neither grey nor in colour, the changes don't fit it, or there isn't a title for each.
    """
    pictures = to_pictures(image)
    if len(pictures) != 1:
        raise ValueError(f"image must be grey or have three channels, got {len(pictures)} channels")
    picture, size = pictures[0], pictures[0].size
    if isinstance(changes, Tensor):
        changes = changes.detach()
    changes = checks.array("changes", changes, what="an array of shape (K, ...), of the image's shape after K")
    if changes.ndim < 3 or len(changes) == 0:
        checks.refuse(ValueError, "changes", "of shape (K, ...), of the image's shape after K", changes)
    alone = [to_pictures(change, name="changes")[0] for change in changes]
    if alone[0].shape != picture.shape:
        what = f"pictures of the image's height, width and channels, {picture.shape}"
        checks.refuse(ValueError, "changes", what, changes)
    titles = [""] * len(alone) if titles is None else titles
    titles = checks.several("titles", titles, str, f"a text for each of the {len(alone)} changes", len(alone))
    limits = value_range([picture], vrange)
    scale = _scale(scale, limits, size)
    above: list[Panel | None] = [Panel(picture, limits, f"image\n{describe(limits)}")]
    below: list[Panel | None] = [None]
    for change, title in zip(alone, titles, strict=True):
        peak = float(np.abs(change).max()) or 1.0
        above.append(Panel(picture + scale * change, limits, f"{title}\nimage + {scale:.3g} × the change below"))
        below.append(Panel(change, (-peak, peak), describe((-peak, peak))))
    return draw([above, below], zoom=zoom)


def _scale(scale: float | None, limits: tuple[float, float], size: int) -> float:
    return default_scale(limits, size) if scale is None else checks.number("scale", scale)


def _pictures(ed: Eigendistortion) -> tuple[EigenResult, NDArray, list[NDArray]]:
    """The result, the image and the distortions, the latter each (height, width) or (height, width, 3)."""
    checks.instance("ed", ed, Eigendistortion, "an Eigendistortion")
    if ed.result is None or len(ed.result.eigenvalues) == 0:
        raise ValueError("there are no eigendistortions to show: call synthesize() first")
    changes = ed.operator.to_tensors(ed.result.eigenvectors)
    return ed.result, to_picture(ed.image), [to_picture(change) for change in changes]
