"""Figures fit for print: their width and size of text, colours and markers, and fonts that journals take."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import pairwise
from typing import Any

from matplotlib import rc_context, rcParams
from matplotlib.figure import Figure

from fisherop import checks

COLOURS = ("#0072B2", "#E69F00", "#000000", "#56B4E9", "#D55E00", "#009E73", "#CC79A7")
"""Of Okabe and Ito (2008), for the colour-blind; those that come first differ in a print without colours, too."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES: Any = ("--", ":", "-.", (0, (8, 2)), (0, (1, 4)), (0, (8, 2, 1, 2, 1, 2)), (0, (3, 6)))
"""Of a line that has no points of its own, in multiples of its width."""
_TRUETYPE: Any = {"pdf.fonttype": 42, "ps.fonttype": 42}  # matplotlib's default is Type 3, which journals refuse
PRINT_DPI = 300
"""Dots per inch, at least, where a width is given."""
_HINTING = 1.05  # how much wider text may be at another resolution, where its letters are fitted to other dots
_LINES = 1.1  # how much taller, where lines take whole dots
_SIZES = ("font.size", "axes.titlesize", "axes.labelsize", "legend.fontsize", "figure.titlesize")


class PrintFigure(Figure):
    """A figure that is saved in its own resolution and with TrueType fonts, whatever matplotlib's settings are then."""

    def savefig(self, fname: Any, **kwargs: Any) -> None:
        if rcParams["savefig.dpi"] == "figure":
            kwargs.setdefault("dpi", self.dpi)  # matplotlib would take the one that it had when it was made
        # PdfPages, which hands itself over, writes its fonts when it is closed, and these must be of one kind
        with rc_context({} if hasattr(fname, "attach_note") else _TRUETYPE):
            super().savefig(fname, **kwargs)


def look(width: Any, fontsize: Any, titles: Any) -> tuple[float | None, float, bool]:
    """These options, checked; the size of text, in points, is smaller where a width is given, as in print."""
    if width is not None:
        what = "a number of inches from 1 to 100, or None"
        width = checks.number("width", width, what, lambda width: 1 <= width <= 100)
    if fontsize is None:
        fontsize = rcParams["font.size"] * (0.9 if width is None else 0.7)
    what = "a number of points from 1 to 100, or None"
    return (
        width,
        checks.number("fontsize", fontsize, what, lambda size: 1 <= size <= 100),
        checks.flag("titles", titles),
    )


def text_of(fontsize: float) -> AbstractContextManager[None]:
    """While this lasts, matplotlib makes text of one size, with true minus signs."""
    settings: Any = dict.fromkeys(_SIZES, fontsize) | {"axes.unicode_minus": True, "text.usetex": False}
    return rc_context(settings)


def cycle(number: int) -> dict[str, Any]:
    """Colour and marker of the line of this number."""
    return {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}


def every(count: int, number: int = 0) -> tuple[int, int]:
    """Which of so many points of a line show its marker: about eight, and others than those of the line before."""
    step = max(1, count // 8)
    return (number * step // 3) % step, step


@contextmanager
def printed(
    width: Any, fontsize: Any, titles: Any, size: tuple[float, float] = (6.4, 3.8), **grid: Any
) -> Iterator[tuple[Figure, Any]]:
    """A figure and its axes, to draw curves on; then all text has one size, and a legend below names what has a label.

    Text doesn't shrink with the figure, so that the height goes with the square root of the width.
    """
    width, fontsize, titles = look(width, fontsize, titles)
    size = size if width is None else (width, size[1] * (width / size[0]) ** 0.5)
    with text_of(fontsize):
        figure = PrintFigure(figsize=size, layout="constrained", dpi=None if width is None else PRINT_DPI)
        yield figure, figure.subplots(**grid)
        for ax in figure.axes:
            ax.tick_params(which="both", labelsize=fontsize)  # matplotlib makes ticks later, by its settings then
        _legend(figure)
        figure.draw_without_rendering()
        _turn_labels(figure, fontsize)
        labels = [(ax, ax.get_xlabel(), ax.get_ylabel()) for ax in figure.axes]
        for _ in range(2):  # broken lines leave less room to the axes
            figure.draw_without_rendering()
            for ax, below, beside in labels:
                box = ax.get_window_extent()
                ax.set_xlabel(wrapped(figure, below, box.width, fontsize))
                ax.set_ylabel(wrapped(figure, beside, box.height, fontsize))


def _legend(figure: Figure) -> None:
    """Below the axes, in as many columns as there is room for; the figure grows by its height."""
    named: dict[str, Any] = {}
    for ax in figure.axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            label = wrapped(figure, label, 0.8 * figure.bbox.width, rcParams["legend.fontsize"])
            named.setdefault(label, handle)
    for columns in range(min(4, len(named)), 0, -1):
        look: dict[str, Any] = {"loc": "outside lower center", "ncols": columns, "frameon": False}
        legend = figure.legend(list(named.values()), list(named), **look)
        box = legend.get_window_extent()
        if columns == 1 or _HINTING * box.width <= figure.bbox.width:
            figure.set_figheight(figure.get_figheight() + box.height / figure.dpi)
            break
        legend.remove()


def _turn_labels(figure: Figure, fontsize: float) -> None:
    """Names along an axis, where they would run into each other, read upwards, each in one line; the figure grows."""
    for ax in figure.axes:
        labels = [label for label in ax.get_xticklabels() if label.get_text()]
        boxes = [label.get_window_extent() for label in labels]
        if any(one.x1 + (_HINTING - 1) * one.width > other.x0 for one, other in pairwise(boxes)):
            if any("\n" in label.get_text() for label in labels):
                ax.set_xticks(ax.get_xticks(), [label.get_text().replace("\n", " ") for label in labels])
            ax.tick_params(axis="x", labelrotation=90)
            longest = max(extent(figure, label.get_text(), fontsize)[0] for label in ax.get_xticklabels())
            taken = max(box.height for box in boxes)
            figure.set_figheight(figure.get_figheight() + max(0.0, longest - taken) / figure.dpi)


def entitle(figure: Figure, title: str, titles: bool) -> None:
    """A title of the whole figure, unless there are to be no titles, broken where it is wider."""
    if titles:
        figure.suptitle(wrapped(figure, title, 0.95 * figure.bbox.width, rcParams["figure.titlesize"]))


def plain(name: str) -> str:
    """A name, as it is: matplotlib would read a formula between two dollars."""
    return name.replace("$", r"\$")


def wrapped(figure: Figure, text: str, width: float, fontsize: float) -> str:
    """The text in lines no wider than so many dots, broken between words, or within one that is wider itself.

    Where it fits, a number stays with the word before, % and × with the number, and a part of a word with its dash.
    """
    if not text:
        return ""
    lines: list[str] = []

    def fits(line: str) -> bool:
        return extent(figure, line, fontsize)[0] <= width

    for line in text.split("\n"):
        lines.append("")
        parts = re.split(r" (?![\d−=≥∞%×])", line)
        for word in (word for part in parts for word in ([part] if fits(part) else part.split(" "))):
            if fits(f"{lines[-1]} {word}".lstrip()):
                lines[-1] = f"{lines[-1]} {word}".lstrip()
                continue
            lines += [""] * bool(lines[-1])
            for part in re.split("(?<=[–-])", word):
                for piece in [part] if fits(part) else part:
                    lines += [""] * (bool(lines[-1]) and not fits(lines[-1] + piece))
                    lines[-1] += piece
    return "\n".join(lines)


def extent(figure: Figure, text: str, fontsize: float) -> tuple[float, float]:
    """Width and height of a text in dots, as much as it takes at any resolution."""
    drawn = figure.text(0, 0, text, fontsize=fontsize)
    box = drawn.get_window_extent()
    drawn.remove()
    return _HINTING * box.width, _LINES * box.height
