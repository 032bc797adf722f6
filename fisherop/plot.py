"""Figures of finished results."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from fisherop.eigendistortion import Eigendistortion
from fisherop.result import EigenResult, Status

_MARKERS = {
    Status.EIGENPAIR: ("o", "tab:blue"),
    Status.NULL: ("v", "tab:green"),
    Status.NOT_EXTREME: ("s", "tab:orange"),
    Status.UNCONVERGED: ("x", "tab:red"),
}


def eigendistortions(
    ed: Eigendistortion,
    indices: int | Sequence[int] = (0, -1),
    scale: float | None = None,
    vrange: tuple[float, float] | None = None,
    panel: float = 2.6,
) -> Figure:
    """Show eigendistortions: a row each of the image, the distortion alone, and the image plus the scaled distortion.

    Parameters
    ----------
    ed : Eigendistortion
        After `synthesize`, of a grey image ``(..., height, width)`` or a colour one ``(..., 3, height, width)``.
    indices : int or sequence of int
        Positions among the distortions found: 0 for the most noticeable, −1 for the least.
    scale : float, optional
        The distortion's norm in the image's units, one for all rows. By default its RMS is 5 % of `vrange`.
    vrange : (float, float), optional
        Black and white of the image: by default (0, 1) where the image keeps to it, else its minimum and maximum.
    panel : float
        Height of a row, in inches.

    Returns
    -------
    Figure
        What leaves `vrange` is clipped, on the display only. A grey distortion is shown on its own symmetric scale; a
        colour one is centred on mid-grey.

    Raises
    ------
    ValueError
        Nothing has been synthesized yet, or the image has neither of these shapes.
    IndexError
        There is no such distortion.
    """
    distortions, image = _images(ed)
    values = ed.result.eigenvalues
    indices = np.atleast_1d(indices).tolist()
    if not indices:
        raise ValueError("indices is empty: name at least one distortion, as in (0, -1)")
    for i in indices:
        if not -len(values) <= i < len(values):
            raise IndexError(f"indices holds {i}, but there are {len(values)} eigendistortions")
    colour = image.ndim == 3
    low, high = _range([image], vrange)
    if scale is None:
        scale = 0.05 * (high - low) * image.size**0.5

    def shown(pixels: NDArray) -> NDArray:
        return np.clip((pixels - low) / (high - low), 0, 1)

    aspect = image.shape[1] / image.shape[0]
    size = (3 * panel * aspect + 2.4, (panel + 0.75) * len(indices))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(indices), 3, squeeze=False)
    grey = {"cmap": "gray", "interpolation": "nearest"}
    for row, i in zip(axes, indices, strict=True):
        distortion = distortions[i]
        peak = float(np.abs(distortion).max())
        title = f"eigendistortion {ed.result.eigenindex[i]}, λ = {values[i]:.3g}"
        if colour:
            row[1].imshow(0.5 + distortion / (2 * peak), interpolation="nearest")
            title += f"\ncentred on mid-grey, ± {peak:.2g}"
        else:
            drawn = row[1].imshow(distortion, norm=Normalize(-peak, peak), **grey)
            figure.colorbar(drawn, ax=row[1], fraction=0.046, format="%.2g", ticks=(-peak, 0, peak))
        row[0].imshow(shown(image), vmin=0, vmax=1, **grey)
        row[0].set_title(f"image\nblack {low:.3g}, white {high:.3g}", fontsize=9)
        row[1].set_title(title, fontsize=9)
        row[2].imshow(shown(image + scale * distortion), vmin=0, vmax=1, **grey)
        row[2].set_title(f"image + {scale:.3g} × distortion\n(RMS {scale / image.size**0.5:.2g})", fontsize=9)
        for ax in row:
            ax.set_axis_off()
    return figure


def compare(
    eds: Sequence[Eigendistortion],
    names: Sequence[str] | None = None,
    scale: float | None = None,
    vrange: tuple[float, float] | None = None,
    panel: float = 2.6,
) -> Figure:
    """Show what several models, or layers, notice most and least: a row each, all distortions at one scale.

    Parameters
    ----------
    eds : sequence of Eigendistortion
        After `synthesize`, at both ends.
    names : sequence of str, optional
        A title for each row, by default the model's class.
    scale, vrange, panel
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
    names = [type(ed.model).__name__ for ed in eds] if names is None else list(names)
    if not eds or len(names) != len(eds):
        raise ValueError(
            f"eds must hold at least one Eigendistortion, and names one each, got {len(eds)}, {len(names)}"
        )
    for ed, name in zip(eds, names, strict=True):
        if ed.result is not None and not {0, ed.result.image_size - 1} <= set(ed.result.eigenindex.tolist()):
            raise ValueError(f"{name!r} lacks an end of its spectrum: call synthesize(which='both')")
    rows = [_images(ed) for ed in eds]
    low, high = _range([image for _, image in rows], vrange)
    if scale is None:
        scale = 0.05 * (high - low) * max(image.size for _, image in rows) ** 0.5
    aspect = max(image.shape[1] / image.shape[0] for _, image in rows)
    figure = Figure(figsize=(3 * panel * aspect + 0.6, (panel + 0.75) * len(eds)), layout="constrained")
    axes = figure.subplots(len(eds), 3, squeeze=False)
    for row, ed, name, (distortions, image) in zip(axes, eds, names, rows, strict=True):
        panels = [(image, f"{name}\nblack {low:.3g}, white {high:.3g}")]
        for i, which in ((0, "most"), (-1, "least")):
            title = f"+ {scale:.3g} × {which}, index {ed.result.eigenindex[i]}\nλ = {ed.result.eigenvalues[i]:.3g}"
            panels.append((image + scale * distortions[i], title))
        for ax, (pixels, title) in zip(row, panels, strict=True):
            shown = np.clip((pixels - low) / (high - low), 0, 1)
            ax.imshow(shown, vmin=0, vmax=1, cmap="gray", interpolation="nearest")
            ax.set_title(title, fontsize=9)
            ax.set_axis_off()
    return figure


def spectrum(result: EigenResult) -> Figure:
    """Draw the eigenvalues against their index, on a log scale, with the residuals ‖F v − λ v‖ as bars.

    An eigenvalue below 10⁻¹⁶ λ_max is drawn there, with an arrow down.

    Parameters
    ----------
    result : EigenResult

    Returns
    -------
    Figure
    """
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    ax = figure.subplots()
    top = result.lambda_max_bounds[0] or 1.0
    floor = 1e-16 * top
    below = result.eigenvalues < floor
    heights = np.maximum(result.eigenvalues, floor)
    for status, (marker, colour) in _MARKERS.items():
        chosen = result.status == status
        if chosen.any():
            y, residual = heights[chosen], result.residual_norms[chosen]
            bars = np.vstack([np.minimum(residual, y - floor), residual])
            ax.errorbar(
                result.eigenindex[chosen], y, bars, fmt=marker, color=colour, capsize=3, label=str(status), ms=5
            )
    for x in result.eigenindex[below]:
        ax.annotate("", (x, floor / 20), (x, floor), arrowprops={"arrowstyle": "->"})
    ax.axhline(result.tol * top, color="0.6", lw=1, ls="--", label="tol · λ_max")
    ax.set_yscale("log")
    ax.set_ylim(bottom=floor / 30 if below.any() else None)
    ax.set_xlim(-0.03 * result.image_size - 0.5, 1.03 * result.image_size - 0.5)
    ax.set_xlabel(f"eigenindex (0 … {result.image_size - 1})")
    ax.set_ylabel("eigenvalue of F, bars: residual")
    ax.set_title(f"{result.method}: {len(heights)} eigenvalues, {result.n_products:g} products", fontsize=10)
    ax.legend(fontsize=8)
    return figure


def convergence(result: EigenResult) -> Figure:
    """Draw how far the pairs at each end were from convergence, against products: residuals, values at the smallest.

    Parameters
    ----------
    result : EigenResult
        With a ``history`` in its details, as ``"golub_kahan"`` leaves one.

    Returns
    -------
    Figure
        The largest of the k residuals at each end, relative to λ_max, on a log scale; dashed, the largest of the k
        smallest Ritz values, which proves them null to tol once it is below it. Dots are what the certificate found;
        grey is what products can't resolve.

    Raises
    ------
    ValueError
        The result has no history.
    """
    history = result.details.get("history")
    if not history:
        raise ValueError(f"the result of method {result.method!r} has no history: use method='golub_kahan'")
    top = result.lambda_max_bounds[0] or 1.0
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    ax = figure.subplots()
    products = np.array([entry["n_products"] for entry in history])
    from_top = result.eigenindex == np.arange(len(result.eigenindex))
    for end, colour, chosen in (("largest", "tab:blue", from_top), ("smallest", "tab:green", ~from_top)):
        lines = {"residual": (1, "-", result.residual_norms), "value": (0, "--", result.eigenvalues)}
        for name, (part, style, certified) in lines.items():
            heights = [max(entry[end][part], default=np.nan) for entry in history]
            if not chosen.any() or (name == "value" and end == "largest"):
                continue
            ax.plot(products, np.array(heights) / top, style, color=colour, lw=1.2, label=f"{end}, {name}")
            ax.plot(result.n_products, certified[chosen].max() / top, "o", color=colour, ms=4)
    ax.axhline(result.tol, color="0.6", lw=1, ls=":", label="tol")
    ax.set_yscale("log")
    if result.noise > 0:  # the solver's own residuals, from its small problem, fall further
        ax.axhspan(result.noise / 100, result.noise, color="0.9", label="rounding")
        ax.set_ylim(bottom=result.noise / 10)
    ax.set_xlabel("products")
    ax.set_ylabel("relative to λ_max, the worst of k")
    ax.set_title(f"{result.method}: {result.n_products:g} products, dots by the certificate", fontsize=10)
    ax.legend(fontsize=8)
    return figure


def _range(images: Sequence[NDArray], vrange: tuple[float, float] | None) -> tuple[float, float]:
    """Black and white: (0, 1) where all images keep to it, else their extremes."""
    if vrange is None:
        least, most = min(image.min() for image in images), max(image.max() for image in images)
        vrange = (0.0, 1.0) if least >= 0 and most <= 1 else (float(least), float(most))
    low, high = vrange
    if not high > low:
        raise ValueError(f"vrange must ascend, got {vrange}: pass the values of black and white")
    return low, high


def _images(ed: Eigendistortion) -> tuple[NDArray, NDArray]:
    """The distortions and the image, each (height, width) or (height, width, 3)."""
    if ed.result is None or len(ed.result.eigenvalues) == 0:
        raise ValueError("there are no eigendistortions to show: call synthesize() first")
    shape = [n for n in ed.image.shape if n != 1]
    if len(shape) not in (2, 3) or (len(shape) == 3 and shape[0] != 3):
        raise ValueError(
            f"the image must be grey (..., height, width) or colour (..., 3, height, width), got shape "
            f"{tuple(ed.image.shape)}"
        )

    def arrange(block: Tensor) -> NDArray:
        pixels = block.detach().cpu().numpy().astype(np.float64).reshape(len(block), *shape)
        return np.moveaxis(pixels, 1, -1) if len(shape) == 3 else pixels

    return arrange(ed.eigendistortions), arrange(ed.image[None])[0]
