"""Pictures of images, drawn so that no interpolation lies: what figures are made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from fisherop import checks

_DPI, _GAP, _PANEL = 100, 16, 260  # dots per inch; between panels and for a panel of usual size, in dots
_HAIR = 1e-6  # of a dot: up to matplotlib 3.10, a size that rounding leaves just above whole dots takes one more
_MOST = 2**16  # dots that a figure may have in a direction, as Agg draws it


class Panel(NamedTuple):
    """A picture, grey (height, width) or colour (height, width, 3), its values of black and white, and its title."""

    pixels: NDArray
    vrange: tuple[float, float]
    title: str


def draw(
    rows: Sequence[Sequence[Panel | None]],
    *,
    zoom: int | None = None,
    suptitle: str = "",
    ax: Axes | None = None,
    new_figure: Callable[..., Figure] = Figure,
) -> Figure:
    """Draw rows of panels, each pixel as `zoom` × `zoom` dots, and each column as wide as its titles need."""
    zoom = checks.integer("zoom", zoom, what="an integer from 1 (crop the image where it is too large)", optional=True)
    rows = [[None if panel is None else _clipped(panel) for panel in row] for row in rows]
    panels = [panel for row in rows for panel in row if panel is not None]
    if ax is not None:
        checks.instance("ax", ax, Axes, "a matplotlib Axes, or None")
        if len(panels) != 1 or zoom is not None:
            raise ValueError(f"ax takes one picture, at its own size, but there are {len(panels)} and zoom is {zoom}")
        _fill(ax, panels[0])
        return cast(Figure, ax.figure)
    if zoom is None:
        zoom = max(1, round(_PANEL / max(max(p.pixels.shape[:2]) for p in panels)))
    width = max(len(row) for row in rows)
    rows = [[*row, *[None] * (width - len(row))] for row in rows]
    figure = new_figure(dpi=_DPI)
    sizes = [[(0, 0, 0) if panel is None else _size(figure, panel, zoom) for panel in row] for row in rows]
    columns = [max(max(width, text) for width, _, text in column) for column in zip(*sizes, strict=True)]
    lines = max(panel.title.count("\n") + 1 for panel in panels)
    above, heights = 20 * lines, [max(height for _, height, _ in row) for row in sizes]
    head = _text_width(figure, suptitle, 12) if suptitle else 0
    width = max(sum(columns) + _GAP * (len(columns) + 1), head + 2 * _GAP)
    height = sum(heights) + (above + _GAP) * len(rows) + _GAP + (40 if suptitle else 0)
    if max(width, height) >= _MOST:
        what = f"so small that the figure takes fewer than {_MOST} dots each way, and not {width} × {height}"
        checks.refuse(ValueError, "zoom", what, zoom, "crop the image")
    figure.set_size_inches(width / _DPI, height / _DPI)
    if suptitle:
        figure.text(0.5, 1 - 14 / height, suptitle, fontsize=12, ha="center", va="top")
    left, bottom = (width - sum(columns) - _GAP * (len(columns) - 1)) // 2, height - (40 if suptitle else 0)
    for row, row_sizes, row_height in zip(rows, sizes, heights, strict=True):
        x, bottom = left, bottom - above - row_height - _GAP
        for panel, (w, h, _), column in zip(row, row_sizes, columns, strict=True):
            if panel is not None:
                edge, w, h = x + (column - w) // 2, w - _HAIR, h - _HAIR
                _fill(figure.add_axes((edge / width, bottom / height, w / width, h / height)), panel)
            x += column + _GAP
    return figure


def _clipped(panel: Panel) -> Panel:
    """What keeps to its range, and a title that says how much of it did not."""
    low, high = panel.vrange
    pixels = np.clip(panel.pixels, low, high)
    share = np.mean(np.abs(pixels - panel.pixels) > 1e-6 * (high - low))
    return Panel(pixels, panel.vrange, panel.title + (f", {math.ceil(100 * share)} % clipped" if share else ""))


def _size(figure: Figure, panel: Panel, zoom: int) -> tuple[int, int, int]:
    """Width and height of the picture, and width of its title, in dots."""
    height, width = panel.pixels.shape[:2]
    return width * zoom, height * zoom, max(_text_width(figure, line, 9) for line in panel.title.split("\n"))


def _text_width(figure: Figure, text: str, fontsize: float) -> int:
    drawn = figure.text(0, 0, text, fontsize=fontsize)
    width = int(np.ceil(drawn.get_window_extent().width))
    drawn.remove()
    return width


def _fill(ax: Axes, panel: Panel) -> None:
    low, high = panel.vrange
    ax.imshow((panel.pixels - low) / (high - low), vmin=0, vmax=1, cmap="gray", interpolation="nearest", origin="upper")
    ax.set_title(panel.title, fontsize=9)
    ax.set_axis_off()
