"""Pictures of images, drawn so that no interpolation lies: what figures are made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from fisherop import checks
from fisherop.pictures import describe, ends
from fisherop.printing import PRINT_DPI, PrintFigure, extent, look, text_of, wrapped

_DPI, _PANEL = 100, 260  # dots per inch of a figure for the screen, and dots of its panels of usual size
_PAGE = 9  # the most inches of height that pictures take where a width is given
_GAP, _PRINT_GAP, _BAR = 0.16, 0.08, 0.06  # inches between panels, and that a colour bar is thick
_PAD = 4  # points between a picture and its title
_HAIR = 1e-6  # of a dot: up to matplotlib 3.10, a size that rounding leaves just above whole dots takes one more
_MOST = 2**16  # dots that a figure may have in a direction, as Agg draws it


class Panel(NamedTuple):
    """A picture, grey (height, width) or colour (height, width, 3), its values of black and white, and its title.

    The title goes without black and white, which are added, or a colour bar, once where several panels share them;
    `note` says how they were chosen, where that isn't plain.
    """

    pixels: NDArray
    vrange: tuple[float, float]
    title: str
    note: str = ""
    has_bar: bool = False


class _Style(NamedTuple):
    """What holds for all panels of a figure."""

    fontsize: float
    titles: bool
    colorbar: bool
    pixels_per_degree: float | None


def draw(
    rows: Sequence[Sequence[Panel | None]],
    *,
    lead: Panel | None = None,
    zoom: int | None = None,
    width: float | None = None,
    fontsize: float | None = None,
    titles: bool = True,
    colorbar: bool = False,
    pixels_per_degree: float | None = None,
    suptitle: str = "",
    ax: Axes | None = None,
    new_figure: Callable[..., Figure] = PrintFigure,
) -> Figure:
    """Draw rows of panels, each pixel as `zoom` × `zoom` dots; a `lead`, as large as these, stands before them.

    Without a width, each column is as wide as its titles need; with one, which takes the place of `zoom`, titles are
    broken into lines.
    """
    zoom = checks.integer("zoom", zoom, what="an integer from 1 (crop the image where it is too large)", optional=True)
    width, size, titles = look(width, fontsize, titles)
    if pixels_per_degree is not None:
        what = "a number above 0, or None"
        pixels_per_degree = checks.number("pixels_per_degree", pixels_per_degree, what, lambda pixels: pixels > 0)
    style = _Style(size, titles, checks.flag("colorbar", colorbar), pixels_per_degree)
    if width is not None and zoom is not None:
        got = f"got {zoom} and {width:g}: give one of them"
        raise ValueError(f"zoom is the dots of a pixel, and width the inches of the figure, {got}")
    if lead is not None:
        rows = [[None if r else lead, *row] for r, row in enumerate(rows)]
    ranges: set[tuple[float, float]] = set()
    told = [[None if panel is None else _told(panel, style, ranges) for panel in row] for row in rows]
    with text_of(size):
        if ax is None:
            return _figure(told, lead is not None, zoom, width, style, suptitle, new_figure(dpi=_DPI))
        checks.instance("ax", ax, Axes, "a matplotlib Axes, or None")
        panels = [panel for row in told for panel in row if panel is not None]
        if len(panels) != 1 or zoom is not None:
            raise ValueError(f"ax takes one picture, at its own size, but there are {len(panels)} and zoom is {zoom}")
        if width is not None:
            raise ValueError(f"ax takes one picture, at its own size, but width is {width:g}: leave it out")
        _fill(ax, panels[0], style)
        if style.colorbar:
            _bar(panels[0], style, ax=ax)
    return cast(Figure, ax.figure)


def _figure(
    rows: Sequence[Sequence[Panel | None]],
    has_lead: bool,
    zoom: int | None,
    width: float | None,
    style: _Style,
    suptitle: str,
    figure: Figure,
) -> Figure:
    """All lengths are in whole dots, but for those called inches."""
    cells = [(r, c, panel) for r, row in enumerate(rows) for c, panel in enumerate(row) if panel is not None]
    n_rows, n_columns = len(rows), max(len(row) for row in rows)
    pixels = [max(p.pixels.shape[1] for _, c, p in cells if c == i) for i in range(n_columns)]
    tall = [max(p.pixels.shape[0] for r, _, p in cells if r == i) for i in range(n_rows)]
    inches = _margins(figure, [panel for *_, panel in cells], style, width is not None)
    if width is None:
        zoom = zoom or max(1, round(_PANEL / max(max(p.pixels.shape[:2]) for *_, p in cells)))
        dpi, inner = float(_DPI), [zoom * one for one in pixels]
    else:
        taken = _PRINT_GAP * (n_columns + 1) + (inches[0] + inches[1]) * n_columns
        if width < taken + 0.1 * n_columns:
            what = f"at least {taken + 0.1 * n_columns:.2f}, for {n_columns} pictures beside each other"
            checks.refuse(ValueError, "width", what, width)
        pitch = min((width - taken) / sum(pixels), _PAGE / sum(tall))
        zoom = math.ceil(PRINT_DPI * pitch)
        dpi = zoom / pitch
        inner = [round(one * (width - taken) / sum(pixels) * dpi) for one in pixels]
        _check_zoom(zoom, sum(inner), zoom * sum(tall))
    gap, pad, thick, left, right, ticks, bar = (
        math.ceil(dpi * one) for one in (_GAP if width is None else _PRINT_GAP, _PAD / 72, _BAR, *inches)
    )
    beside = (left + right) * n_columns + gap * (n_columns + 1)
    figure.set_dpi(dpi if width is None else (sum(inner) + beside) / width)
    if width is not None:
        broken = [wrapped(figure, panel.title, inner[c] + 2 * right, style.fontsize) for _, c, panel in cells]
        cells = [(r, c, panel._replace(title=title)) for (r, c, panel), title in zip(cells, broken, strict=True)]
    above, below, heights = [0] * n_rows, [ticks] * n_rows, [zoom * one for one in tall]
    for r, c, panel in cells:
        text_width, text_height = extent(figure, panel.title, style.fontsize) if panel.title else (0, 0)
        above[r] = max(above[r], math.ceil(text_height) + 2 * pad if text_height else 0)
        if width is None:
            inner[c] = max(inner[c], math.ceil(text_width), math.ceil(_bar_width(figure, panel, style)))
        if panel.has_bar and not (has_lead and c == 0 and n_rows > 1):  # where nothing is below the lead
            below[r] = ticks + pad + thick + bar
    head_size = 1.3 * style.fontsize
    head, head_height = map(math.ceil, extent(figure, suptitle, head_size) if suptitle else (0, 0))
    wide = max(sum(inner) + beside, head + 2 * gap)
    high = sum(above) + sum(heights) + sum(below) + gap * (n_rows + 1) + (head_height + gap) * bool(suptitle)
    _check_zoom(zoom, wide, high)
    figure.set_size_inches((wide + _HAIR) / figure.dpi, (high + _HAIR) / figure.dpi)
    y = high - gap
    if suptitle:
        figure.text(0.5, y / high, suptitle, fontsize=head_size, ha="center", va="top")
        y -= head_height + gap
    floors = []
    for r in range(n_rows):
        floors.append(y - above[r] - heights[r])
        y = floors[-1] - below[r] - gap
    spare = (wide - sum(inner) - beside) // 2
    for r, c, panel in cells:
        h, w = (zoom * length for length in panel.pixels.shape[:2])
        x = spare + gap + c * (gap + left + right) + left + sum(inner[:c]) + (inner[c] - w) // 2
        y = (floors[0] + floors[-1]) // 2 if has_lead and c == 0 else floors[r]
        for bottom, length in [(y, h), (y - ticks - pad - thick, thick)][: 1 + panel.has_bar]:
            ax = figure.add_axes((x / wide, bottom / high, (w - _HAIR) / wide, (length - _HAIR) / high))
            if bottom == y:
                _fill(ax, panel, style)
            else:
                _bar(panel, style, cax=ax)
    return figure


def _check_zoom(zoom: int, wide: int, high: int) -> None:
    if max(wide, high) >= _MOST:
        what = f"so small that the figure takes fewer than {_MOST} dots each way, and not {wide} × {high}"
        checks.refuse(ValueError, "zoom", what, zoom, "crop the image")


def _margins(
    figure: Figure, panels: Sequence[Panel], style: _Style, is_narrow: bool
) -> tuple[float, float, float, float]:
    """Inches left of pictures, right of them, of the ticks below them, and below a bar."""
    left = right = below = 0.0
    line = 1.5 * style.fontsize / 72
    if style.pixels_per_degree is not None:
        labels = [text for panel in panels for text in _degrees(panel, style.pixels_per_degree).values()]
        widest = max(extent(figure, text, style.fontsize)[0] for text in labels) / _DPI
        left, right, below = widest + 5 / 72, widest / 2, line + 4 / 72
    return left, right, below, line * (1 + (1 + is_narrow) * any(panel.note for panel in panels)) + 2 / 72


def _told(panel: Panel, style: _Style, ranges: set[tuple[float, float]]) -> Panel:
    """What keeps to its range, and a title with all that is to be said of it but for ranges told before."""
    low, high = panel.vrange
    pixels = np.clip(panel.pixels, low, high)
    share = np.mean(np.abs(pixels - panel.pixels) > 1e-6 * (high - low))
    told, is_new = [f"{math.ceil(100 * share)} % clipped"] if share else [], panel.vrange not in ranges
    if is_new and not style.colorbar:
        told[:0] = [describe(panel.vrange), *filter(None, [panel.note])]
    ranges.add(panel.vrange)
    title = f"{panel.title}\n{', '.join(told)}".strip() if style.titles else ""
    return Panel(pixels, panel.vrange, title, panel.note, is_new and style.colorbar)


def _degrees(panel: Panel, pixels_per_degree: float) -> dict[float, str]:
    """Where the axes of a picture may have ticks, and what these say."""
    size = max(panel.pixels.shape[:2]) / pixels_per_degree
    ticks = MaxNLocator(3, steps=[1, 2, 5, 10]).tick_values(0, size)
    return {float(x): f"{x:.6g}°" for x in ticks if x <= size * (1 + 1e-9)}


def _fill(ax: Axes, panel: Panel, style: _Style) -> None:
    low, high = panel.vrange
    height, width = (length / (style.pixels_per_degree or 1) for length in panel.pixels.shape[:2])
    corners = None if style.pixels_per_degree is None else (0, width, 0, height)
    shown = (panel.pixels - low) / (high - low)
    # "none": dots as by "nearest" on a screen, and the pixels themselves in PDF and SVG
    ax.imshow(shown, vmin=0, vmax=1, cmap="gray", interpolation="none", origin="upper", extent=corners)
    ax.set_title(panel.title, fontsize=style.fontsize, loc="center", pad=_PAD)
    if style.pixels_per_degree is None:
        ax.set_axis_off()
        return
    figure, box = cast(Figure, ax.figure), ax.get_window_extent()
    for side, (axis, length, dots) in enumerate(((ax.xaxis, width, box.width), (ax.yaxis, height, box.height))):
        ticks = [x for x in _degrees(panel, style.pixels_per_degree).items() if x[0] <= length * (1 + 1e-9)]
        taken = 1.2 * max(extent(figure, text, style.fontsize)[side] for _, text in ticks)
        step = math.ceil(taken * length / (dots * ticks[1][0])) if len(ticks) > 1 else 1  # so that labels have room
        axis.set_ticks(*zip(*ticks[::step], strict=True))
    ax.tick_params(length=2, pad=3, width=0.5, labelsize=style.fontsize)
    if ax.get_yticks()[-1] > 0.9 * height:
        ax.get_yticklabels()[-1].set_verticalalignment("top")  # below the title
    ax.spines[:].set_linewidth(0.5)


def _bar(panel: Panel, style: _Style, **place: Any) -> None:
    """A colour bar in axes of its own, `cax`, below a picture, or beside one, in the user's `ax`."""
    (axes,) = place.values()
    figure, is_below, (low, high) = axes.figure, "cax" in place, panel.vrange
    shades = ScalarMappable(Normalize(low, high), "gray")
    bar = figure.colorbar(shades, orientation="horizontal" if is_below else "vertical", **place)
    (black, white), note = ends(panel.vrange), panel.note
    ticks = {low: black} | ({0.0: "0"} if low == -high else {}) | {high: white}
    if is_below:
        room = axes.get_window_extent().width
        note = wrapped(figure, note, room, style.fontsize)
        if _bar_width(figure, panel, style) > room:
            ticks = {(low + high) / 2: f"±{white}" if low == -high else f"{black} … {white}"}
    bar.set_ticks(list(ticks), labels=list(ticks.values()))
    bar.set_label(note, fontsize=style.fontsize)
    bar.ax.tick_params(length=2, pad=1, labelsize=style.fontsize)
    for label, value in zip(bar.ax.get_xticklabels() if is_below else (), ticks, strict=is_below):
        label.set_horizontalalignment("left" if value == low else "right" if value == high else "center")


def _bar_width(figure: Figure, panel: Panel, style: _Style) -> float:
    """Dots that the labels below a bar take."""
    texts = [*ends(panel.vrange), "0" if panel.vrange[0] == -panel.vrange[1] else ""]
    return extent(figure, "  ".join(texts), style.fontsize)[0] if panel.has_bar else 0.0
