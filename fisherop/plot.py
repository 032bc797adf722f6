"""Figures of finished results."""

from __future__ import annotations

import math
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
from fisherop.pictures import default_scale, short, to_picture, to_pictures, value_range
from fisherop.result import EigenResult
from fisherop.thresholds import amplitudes_at_threshold, are_bounds
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
    width: float | None = None,
    fontsize: float | None = None,
    titles: bool = True,
    colorbar: bool = False,
    pixels_per_degree: float | None = None,
) -> Figure:
    """Show an image, each of its pixels as `zoom` × `zoom` dots of the figure, so that no interpolation lies.

    Parameters
    ----------
    image : Tensor or array_like, shape (..., height, width)
        What comes before height and width are the channels.
    title : str or sequence of str
        For each picture; the values of black and white are added.
    zoom : int, optional
        By default such that a picture is about 260 dots large at the figure's 100 dots per inch. Where `width` is given
        in its place, there are 300 dots per inch or more. Save it with the figure's `dpi`, or a multiple; a PDF holds
        the pixels themselves.
    as_rgb : bool, optional
        Three channels in one colour picture, or each in a grey one of its own; by default in colour where there are
        three.
    channel_idx : int, optional
        Show this channel alone, in grey.
    vrange : (float, float), optional
        Black and white: by default (0, 1) where the image keeps to it; where it has negative values, symmetric about
        zero, which is mid-grey; else its minimum and maximum.
    ax : Axes, optional
        Draw here, where there is one picture; its size decides in the place of `zoom` and `width`.
    width : float, optional
        Of the figure, in inches: 3.3 for a column, 7 for a page. Titles are broken into lines to fit.
    fontsize : float, optional
        Of all text, in points: by default 0.9 of matplotlib's ``font.size``, and 0.7 where `width` is given.
    titles : bool
        False leaves all titles out, for a caption to say what is shown.
    colorbar : bool
        A bar of the greys with their values, in the place of black and white in the title. Of a picture in colour it
        holds for each channel.
    pixels_per_degree : float, optional
        Axes in degrees of visual angle, from the lower left corner, at so many pixels of the image a degree.

    Returns
    -------
    Figure
        Its ``savefig`` writes PDF with TrueType fonts, as that of all figures of this module does; unless it is that of
        your own `ax`. Matplotlib's settings hold for what has no option here, and are not changed.

    Raises
    ------
    ValueError
        An argument doesn't fit the image, or `width` has no room for the pictures.
    IndexError
        There is no such channel.
    """
    pictures = to_pictures(image, as_rgb, channel_idx)
    what = f"a text, or one for each of the {len(pictures)} pictures"
    texts = [title] * len(pictures) if isinstance(title, str) else title
    texts = checks.several("title", texts, str, what, len(pictures))
    limits = value_range(pictures, vrange, symmetric=True)
    return draw(
        [[Panel(pixels, limits, text) for pixels, text in zip(pictures, texts, strict=True)]],
        zoom=zoom,
        ax=ax,
        width=width,
        fontsize=fontsize,
        titles=titles,
        colorbar=colorbar,
        pixels_per_degree=pixels_per_degree,
    )


def eigendistortions(
    ed: Eigendistortion,
    indices: int | Sequence[int] = (0, -1),
    scale: float | None = None,
    vrange: tuple[float, float] | None = None,
    zoom: int | None = None,
    *,
    percentile: float | None = None,
    width: float | None = None,
    fontsize: float | None = None,
    titles: bool = True,
    colorbar: bool = False,
    pixels_per_degree: float | None = None,
) -> Figure:
    """Show the image, and a row for each eigendistortion: it alone, and the image plus the scaled distortion.

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
    percentile : float, optional
        A distortion alone is scaled by this percentile of its absolute values, in the place of the largest, and its
        title or colour bar says so: it shows what is faint beside a peak.
    width, fontsize, titles, colorbar, pixels_per_degree
        As in `imshow`.

    Returns
    -------
    Figure
        What leaves `vrange` is clipped, on the display only. A distortion is shown on its own symmetric scale, so that
        mid-grey is no change. The threshold, 1 / √λ, is what it must be multiplied by for the response to move by 1,
        as F predicts it: "≥" says that λ may be smaller, and `response_change` how far the prediction holds.

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
        rms = abs(scale) * float(np.linalg.norm(distortions[i])) / image.size**0.5
        name = f"eigendistortion {result.eigenindex[i]}"
        alone = f"{name}\nλ = {short(values[i])}, {_threshold(result, i)}"
        added = Panel(image + scale * distortions[i], limits, f"image + {short(scale)} × {name}\nRMS {short(rms, 2)}")
        rows.append([_alone(distortions[i], alone, percentile), added])
    return draw(
        rows,
        lead=Panel(image, limits, "image"),
        zoom=zoom,
        width=width,
        fontsize=fontsize,
        titles=titles,
        colorbar=colorbar,
        pixels_per_degree=pixels_per_degree,
    )


def compare(
    eds: Sequence[Eigendistortion],
    names: Sequence[str] | None = None,
    scale: float | None = None,
    vrange: tuple[float, float] | None = None,
    zoom: int | None = None,
    *,
    width: float | None = None,
    fontsize: float | None = None,
    titles: bool = True,
    colorbar: bool = False,
    pixels_per_degree: float | None = None,
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
    width, fontsize, titles, colorbar, pixels_per_degree
        As in `imshow`.

    Returns
    -------
    Figure
        The image, once where all have the same, and the image plus the scaled distortion, the most and the least
        noticeable one. The threshold, 1 / √λ, is what the distortion must be multiplied by for the response to move by
        1, as F predicts it: "≥" says that λ may be smaller, and `response_change` how far the prediction holds.

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
    same = len(eds) > 1 and all(np.array_equal(image, pictures[0][1]) for _, image, _ in pictures)
    rows = []
    for name, (result, image, distortions) in zip(names, pictures, strict=True):
        row = [] if same else [Panel(image, limits, name)]
        for i, which in ((0, "most"), (-1, "least")):
            title = f"{name}\n" * same + f"+ {short(scale)} × {which} noticeable\n{_threshold(result, i)}"
            row.append(Panel(image + scale * distortions[i], limits, title))
        rows.append(row)
    return draw(
        rows,
        lead=Panel(pictures[0][1], limits, "image") if same else None,
        zoom=zoom,
        width=width,
        fontsize=fontsize,
        titles=titles,
        colorbar=colorbar,
        pixels_per_degree=pixels_per_degree,
    )


def distortions(
    image: Tensor | ArrayLike,
    changes: Tensor | ArrayLike,
    titles: Sequence[str] | bool | None = None,
    scale: float | None = None,
    vrange: tuple[float, float] | None = None,
    zoom: int | None = None,
    *,
    percentile: float | None = None,
    width: float | None = None,
    fontsize: float | None = None,
    colorbar: bool = False,
    pixels_per_degree: float | None = None,
) -> Figure:
    """Show an image, and the image plus each of some changes, all at one scale, whoever found them.

    Parameters
    ----------
    image : Tensor or array_like, shape image_shape
        Grey, ``(..., height, width)``, or in colour, ``(..., 3, height, width)``.
    changes : Tensor or array_like, shape ``(K, *image_shape)``
        As of `principal_distortions`, or of ``operator.to_tensors(result.eigenvectors)``.
    titles : sequence of str or bool, optional
        For each change. False leaves all titles out.
    scale, vrange, zoom, percentile
        As in `eigendistortions`.
    width, fontsize, colorbar, pixels_per_degree
        As in `imshow`.

    Returns
    -------
    Figure
        The image, and two rows: above the image plus each change, below the changes alone, each on its own symmetric
        scale.

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
    texts = [""] * len(alone) if titles is None or isinstance(titles, bool | np.bool_) else titles
    texts = checks.several("titles", texts, str, f"a text for each of the {len(alone)} changes", len(alone))
    limits = value_range([picture], vrange)
    scale = _scale(scale, limits, size)
    added = f"image + {short(scale)} × the change below"
    above = [Panel(picture + scale * one, limits, f"{text}\n{added}") for one, text in zip(alone, texts, strict=True)]
    return draw(
        [above, [_alone(change, "", percentile) for change in alone]],
        lead=Panel(picture, limits, "image"),
        zoom=zoom,
        width=width,
        fontsize=fontsize,
        titles=titles is None or titles is not False,
        colorbar=colorbar,
        pixels_per_degree=pixels_per_degree,
    )


def _alone(change: NDArray, title: str, percentile: float | None) -> Panel:
    """A change on its own symmetric scale, so that mid-grey is none."""
    sizes, note = np.abs(change), ""
    peak = float(sizes.max()) or 1.0
    if percentile is not None:
        what = "a number above 0 and up to 100, or None"
        percentile = checks.number("percentile", percentile, what, lambda share: 0 < share <= 100)
        peak, note = float(np.percentile(sizes, percentile)), f"percentile {percentile:g}"
        if peak == 0:
            what = "so large that what is shown isn't all zero"
            checks.refuse(ValueError, "percentile", what, percentile, "much of this distortion is")
    return Panel(change, (-peak, peak), title, note)


def _threshold(result: EigenResult, i: int) -> str:
    """1 / √λ, by what the distortion is multiplied to be noticed; a bound where λ is null to tol."""
    amplitude = amplitudes_at_threshold(result)[i]
    is_bound = bool(are_bounds(result)[i]) and math.isfinite(amplitude)
    return f"threshold {'≥ ' * is_bound}{short(amplitude)}"


def _scale(scale: float | None, limits: tuple[float, float], size: int) -> float:
    return default_scale(limits, size) if scale is None else checks.number("scale", scale)


def _pictures(ed: Eigendistortion) -> tuple[EigenResult, NDArray, list[NDArray]]:
    """The result, the image and the distortions, the latter each (height, width) or (height, width, 3)."""
    checks.instance("ed", ed, Eigendistortion, "an Eigendistortion")
    if ed.result is None or len(ed.result.eigenvalues) == 0:
        raise ValueError("there are no eigendistortions to show: call synthesize() first")
    changes = ed.operator.to_tensors(ed.result.eigenvectors)
    return ed.result, to_picture(ed.image), [to_picture(change) for change in changes]
