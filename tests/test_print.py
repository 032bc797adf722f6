"""What every figure promises for print: its size, its text, its fonts, and lines told apart without colours."""

import inspect
import io
import itertools
import re

import numpy as np
import pytest
import torch
from helpers import diagonal
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import rc_context, rcParams
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_pdf import PdfPages
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from fisherop import Eigendistortion, eigenpairs, plot, spectral_density, sweep
from fisherop import plenoptic as po
from fisherop.printing import COLOURS
from fisherop.testing import linear_model, matrix_with_singular_values

MATRIX = matrix_with_singular_values(np.r_[np.linspace(3, 1, 20), np.zeros(40)], 70, 60)
COLUMN, PAGE = 3.3, 7.0


def ed_of(shape, k=2):
    image = torch.linspace(-0.2, 0.8, 60, dtype=torch.float64).reshape(shape)
    return Eigendistortion(image, linear_model(MATRIX)).synthesize("exact", k=k, progress=False)


GREY, COLOUR, CURVED = ed_of((1, 1, 10, 6)), ed_of((1, 3, 4, 5)), torch.full((3,), 0.5, dtype=torch.float64)
CURVED = Eigendistortion(CURVED, lambda x: torch.exp(x) * x.new_tensor([3, 2, 1])).synthesize(progress=False)
ITERATED = eigenpairs(GREY.operator, 2, "both", method="golub_kahan", rng=0, progress=False)
DENSITIES = [spectral_density(diagonal(np.geomspace(1, 1e-3, n)), 2, 10, rng=0, progress=False) for n in (40, 900)]
MODELS = {f"a model with a name {i}": linear_model(np.diag(np.arange(i, 60.0 + i))) for i in range(7)}
TABLE = sweep({"a": GREY.image, "b": GREY.image**2}, MODELS, method="exact", progress=False)
CHANGES = torch.cat([GREY.eigendistortions[:2], -GREY.eigendistortions[-1:]])
NAMES = ["a model", "a model-of a-name that is longer than what it names"]
PICTURES = {
    "imshow": lambda **options: plot.imshow(GREY.image, "a title that is wider than the picture itself", **options),
    "eigendistortions": lambda **options: plot.eigendistortions(GREY, **options),
    "compare": lambda **options: plot.compare([GREY, GREY], NAMES, **options),
    "distortions": lambda **options: plot.distortions(GREY.image, CHANGES, **{"titles": [*NAMES, ""]} | options),
}
OTHER_PICTURES = {
    "channels": lambda **options: plot.imshow(COLOUR.image, as_rgb=False, **options),
    "colour": lambda **options: plot.eigendistortions(COLOUR, (0, 1, -1), **options),
    "two images": lambda **options: plot.compare([GREY, COLOUR], NAMES, **options),
    "one image": lambda **options: plot.compare([COLOUR], **options),
    "tall": lambda **options: plot.imshow(np.linspace(0, 1, 60).reshape(60, 1), "tall", **options),
    "wide": lambda **options: plot.imshow(np.linspace(0, 1, 60).reshape(1, 60), "wide", **options),
}
LINES = {
    "spectrum": lambda **options: plot.spectrum([GREY.result, ITERATED], NAMES, **options),
    "convergence": lambda **options: plot.convergence(ITERATED, **options),
    "density": lambda **options: plot.density(DENSITIES, NAMES, **options),
    "response_change": lambda **options: plot.response_change(CURVED, **options),
    "sweep": lambda **options: plot.sweep(TABLE, **options),
}
OTHER_LINES = {
    "one spectrum": lambda **options: plot.spectrum(ed_of((6, 10), 4).result, **options),
    "all of two spectra": lambda **options: plot.spectrum([ed_of((6, 10), 60).result, CURVED.result], **options),
}
ALL_PICTURES, ALL_LINES = PICTURES | OTHER_PICTURES, LINES | OTHER_LINES
FIGURES = ALL_PICTURES | ALL_LINES


def of(figures):
    return pytest.mark.parametrize("figure", figures.values(), ids=figures)


def texts(figure):
    """All that is drawn as text."""
    figure.draw_without_rendering()
    axes = [axis for ax in figure.axes for axis in (ax.xaxis, ax.yaxis)]
    of_axes = {id(text) for axis in axes for text in axis.findobj(Text)}
    shown = [text for text in figure.findobj(Text) if id(text) not in of_axes]
    for axis in axes:
        if axis.axes.axison and axis.get_visible():  # ticks beyond the limits are there, and not drawn
            shown += [axis.label, *(tick.label1 for tick in axis._update_ticks())]
    return [text for text in shown if text.get_text() and text.get_visible()]


def test_every_figure_takes_the_options_that_have_a_meaning_for_it():
    names = set(plot.__all__) - {"page"}
    assert names == PICTURES.keys() | LINES.keys()
    options = {"width", "fontsize", "titles", "colorbar", "pixels_per_degree", "percentile"}
    for name in names:
        parameters = inspect.signature(getattr(plot, name)).parameters
        expected = {"width", "fontsize", "titles"} - ({"titles"} if name == "density" else set())
        expected |= {"colorbar", "pixels_per_degree"} if name in PICTURES else set()
        expected |= {"percentile"} if name in ("eigendistortions", "distortions") else set()
        assert options & parameters.keys() == expected
        own = expected - ({"titles"} if name == "distortions" else set())
        assert all(parameters[option].kind is inspect.Parameter.KEYWORD_ONLY for option in own)


OPTIONS = [
    {},
    pytest.param({"fontsize": 8}, marks=pytest.mark.slow),  # what journals ask for at most
    {"fontsize": 11},
    pytest.param({"colorbar": True}, marks=pytest.mark.slow),
    pytest.param({"pixels_per_degree": 3}, marks=pytest.mark.slow),
    {"colorbar": True, "pixels_per_degree": 40, "titles": False},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("width", [COLUMN, *(pytest.param(width, marks=pytest.mark.slow) for width in (PAGE, None))])
@of(FIGURES)
def test_text_has_room(figure, width, options):
    if not options.keys() <= {"fontsize"} and figure not in ALL_PICTURES.values():
        pytest.skip("a figure of lines")
    drawn = figure(width=width, **options)
    for dpi in (drawn.dpi, 110, 150):  # in which it may be saved, too; letters are of other widths there
        drawn.set_dpi(dpi)
        assert_text_has_room(drawn)


def assert_text_has_room(drawn):
    shown = texts(drawn)
    boxes = [text.get_window_extent() for text in shown]
    for text, box in zip(shown, boxes, strict=True):
        assert min(box.x0, box.y0) > -1, text
        assert box.x1 < drawn.bbox.width + 1 and box.y1 < drawn.bbox.height + 1, text
    for (i, one), (j, other) in itertools.combinations(enumerate(boxes), 2):
        assert not one.padded(-0.5).overlaps(other.padded(-0.5)), (shown[i], shown[j])
    titles = [text for text in shown if text in (drawn._suptitle, *(ax.title for ax in drawn.axes))]
    for title, ax in itertools.product([*titles, *drawn.legends], drawn.axes):
        assert not title.get_window_extent().overlaps(ax.get_window_extent().padded(-1)), (title, ax)
    box = drawn.get_tightbbox()
    assert min(box.x0, box.y0) > -0.01
    assert box.x1 < drawn.get_figwidth() + 0.01 and box.y1 < drawn.get_figheight() + 0.01


@of(FIGURES)
def test_width_and_fontsize_are_what_is_asked_for(figure):
    for width, fontsize in ((COLUMN, 6), (None, None)):
        with rc_context({"font.size": 11, "axes.titlesize": "xx-large", "legend.fontsize": 3}):
            drawn = figure(width=width, fontsize=fontsize)
        assert width is None or drawn.get_figwidth() == pytest.approx(width, abs=1e-6)
        expected = fontsize or 11 * (0.7 if width else 0.9)
        assert [text.get_fontsize() for text in texts(drawn)] == pytest.approx([expected] * len(texts(drawn)))


@of({name: figure for name, figure in FIGURES.items() if name != "density"})
def test_titles_can_be_left_out(figure):
    drawn = figure(titles=False)
    assert not drawn.get_suptitle() and not any(ax.get_title() for ax in drawn.axes)
    plain = figure()
    assert plain.get_suptitle() or all(ax.get_title() or not ax.images for ax in plain.axes[:1])
    assert plot.distortions(GREY.image, CHANGES, True).axes[1].get_title().startswith("image + ")


@of(FIGURES)
def test_a_png_has_the_resolution_of_the_figure(figure):
    drawn = figure(width=COLUMN)
    assert drawn.dpi >= 300
    with Image.open(io.BytesIO(saved(drawn, "png"))) as picture:
        assert picture.width == pytest.approx(COLUMN * drawn.dpi, abs=2)
    with rc_context({"savefig.dpi": 50}), Image.open(io.BytesIO(saved(drawn, "png"))) as picture:
        assert picture.width == pytest.approx(COLUMN * 50, abs=2)


def saved(figure, kind="pdf"):
    file = io.BytesIO()
    figure.savefig(file, format=kind)
    return file.getvalue()


@of(FIGURES)
def test_settings_and_what_is_drawn_are_unchanged_and_fonts_are_truetype(figure):
    before, vectors, image = dict(rcParams), GREY.result.eigenvectors.copy(), GREY.image.clone()
    file = saved(figure(width=COLUMN))
    assert b"/Type3" not in file and b"/FontFile2" in file
    assert dict(rcParams) == before
    assert np.array_equal(GREY.result.eigenvectors, vectors) and torch.equal(GREY.image, image)


def test_fonts_of_other_formats_and_figures():
    plain = Figure()
    plain.text(0, 0, "text")
    assert b"/Type3" in saved(plain)  # what matplotlib does by itself
    assert b"Type 42" in saved(plot.imshow(GREY.image), "eps")
    assert b"/Type3" not in saved(po.display_eigendistortion_all(GREY))
    assert b"/Type3" not in saved(po.display_eigendistortion(GREY))
    for kind in (3, 42):  # PdfPages writes its fonts later, by the user's settings
        file = io.BytesIO()
        with rc_context({"pdf.fonttype": kind}), PdfPages(file) as pages:
            pages.savefig(plot.imshow(GREY.image))
        assert (b"/Type3" in file.getvalue()) == (kind == 3)


@of(FIGURES)
def test_minus_signs_are_true(figure):
    with rc_context({"axes.unicode_minus": True}):
        shown = [text.get_text() for text in texts(figure(width=PAGE))]
    assert not [text for text in shown if re.search(r"(?<![a-z])-\d|e-", text) and "$" not in text]


def test_titles_and_bars_have_minus_signs():
    for figure in (plot.imshow(GREY.image), plot.imshow(GREY.image, colorbar=True)):
        assert any("−0.8" in text.get_text() for text in texts(figure))
    ed = Eigendistortion(torch.ones(1, 2).double(), linear_model(np.diag([1.0, 1e-2]))).synthesize(progress=False)
    assert "λ = 0.0001" in plot.eigendistortions(ed).axes[3].get_title()
    assert plot.imshow(np.array([[-2e-9, 1e-9]])).axes[0].get_title() == "black −2e−9, white 2e−9"


@pytest.mark.parametrize("percentile", [None, 90])
def test_signed_data_are_symmetric_about_grey(percentile):
    figures = [plot.eigendistortions(GREY, 0, percentile=percentile)]
    figures += [plot.distortions(GREY.image, CHANGES[:1], percentile=percentile)]
    change = CHANGES[0, 0].numpy()
    peak = np.abs(change).max() if percentile is None else np.percentile(np.abs(change), percentile)
    for figure, place in zip(figures, (1, 2), strict=True):
        shown = np.asarray(figure.axes[place].images[0].get_array())
        np.testing.assert_allclose(shown, 0.5 + 0.5 * np.clip(change / peak, -1, 1), atol=1e-12)
        title = figure.axes[place].get_title()
        assert ("percentile 90" in title) == (percentile is not None) and f"white {peak:.3g}" in title
    (ax,) = plot.imshow(np.array([[-3.0, 0, 1]])).axes
    np.testing.assert_allclose(ax.images[0].get_array(), [[0, 0.5, 2 / 3]])


def test_a_percentile_stands_at_the_bar_where_there_is_one():
    figure = plot.eigendistortions(GREY, percentile=90, colorbar=True, titles=False)
    assert [ax.get_xlabel() for ax in figure.axes].count("percentile 90") == 2
    sparse = np.zeros((1, 4, 5))
    sparse[0, 1, 1] = 1
    with pytest.raises(ValueError, match=r"percentile must be so large that .*, got 50.0: much of this distortion is"):
        plot.distortions(np.ones((4, 5)), sparse, percentile=50)


@of(ALL_PICTURES)
def test_a_bar_for_each_range(figure):
    plain, drawn = figure(), figure(colorbar=True)
    ranges = dict.fromkeys(re.findall("black (.*), white ([^,\n]*)", "\n".join(ax.get_title() for ax in plain.axes)))
    bars = [ax for ax in drawn.axes if not ax.images]
    assert len(bars) == len(ranges) == len(drawn.axes) - len(plain.axes)
    for ax, (low, high) in zip(bars, ranges, strict=True):
        low, high = float(low.replace("−", "-")), float(high.replace("−", "-"))
        assert ax.get_xlim() == pytest.approx((low, high), rel=0.01)
        labels = [text.get_text() for text in ax.get_xticklabels()]
        assert labels[0].startswith(("±", "−", "0"))
    assert not any("black" in ax.get_title() for ax in drawn.axes)


@of(ALL_PICTURES)
def test_degrees_of_visual_angle(figure):
    drawn = figure(pixels_per_degree=4)
    for ax in drawn.axes:
        height, width = np.shape(ax.images[0].get_array())[:2]
        assert (ax.get_xlim(), ax.get_ylim()) == ((0, width / 4), (0, height / 4))
        for axis in (ax.xaxis, ax.yaxis):
            for place, label in zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True):
                assert label.get_text() == f"{place:.6g}°"
        assert len(ax.get_xticks()) >= 2 or width < 6


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from([1.7, COLUMN]), st.integers(0, 99))
def test_each_pixel_is_a_square_of_dots_at_any_width(height, width, inches, seed):
    levels = np.random.default_rng(seed).integers(256, size=(2, height, width))
    figure = plot.imshow(levels / 255, "two titles that are broken", width=inches)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    dots = np.asarray(canvas.buffer_rgba())[..., 0]
    for ax, pixels in zip(figure.axes, levels, strict=True):
        box = ax.get_window_extent()
        zoom = round(box.width / width)
        drawn = dots[len(dots) - round(box.y1) : len(dots) - round(box.y0), round(box.x0) : round(box.x1)]
        margin = zoom // 256  # up to matplotlib 3.10 the border of two pixels is known to 1/256 of one
        places = np.arange(zoom * max(height, width)) % zoom
        told = np.flatnonzero((places >= margin) & (places < zoom - margin))
        rows, columns = told[told < zoom * height], told[told < zoom * width]
        assert drawn.shape == (zoom * height, zoom * width)
        expected = pixels[rows[:, None] // zoom, columns // zoom]
        np.testing.assert_allclose(drawn[rows[:, None], columns].astype(int), expected, atol=1, rtol=0)
        assert ax.images[0].get_interpolation() == "none"  # a PDF holds the pixels themselves


def test_print_has_300_dots_an_inch():
    for inches in (COLUMN, PAGE):
        figure = plot.imshow(GREY.image, width=inches)
        assert figure.dpi >= 299


def looks(figure):
    """Of each line that a legend names: its label, and how it looks without its colour."""
    for ax in figure.axes:
        lines = [(line.get_label(), line) for line in ax.lines]
        lines += [(container.get_label(), container.lines[0]) for container in ax.containers]
        for label, line in lines:
            if not label.startswith("_"):
                hollow = line.get_fillstyle() == "none" or line.get_markerfacecolor() == "none"
                dashes = tuple(line._dash_pattern[1] or ())  # matplotlib calls all patterns of one's own "--"
                yield label, (line.get_marker(), line.get_linestyle(), dashes, hollow), line.get_color()


@of(ALL_LINES)
def test_lines_are_told_apart_without_colour(figure):
    drawn = figure()
    found = {label: look for label, look, _ in looks(drawn)}
    assert len(set(found.values())) == len(found) > 1 or figure is LINES["density"]
    named = [text.get_text() for text in drawn.legends[0].get_texts()]
    assert set(found) <= set(named) and len(set(named)) == len(named)
    assert {colour for *_, colour in looks(drawn)} <= {*COLOURS, "0.6"}


def test_colours_differ_in_grey():
    grey = [np.dot([0.299, 0.587, 0.114], to_rgb(colour)) for colour in COLOURS[:3]]
    assert min(abs(one - other) for one, other in itertools.combinations(grey, 2)) > 0.2


def test_an_axes_of_the_users_own():
    with rc_context({"axes.titlesize": 20}):
        own = Figure()
        ax = own.subplots()
    assert plot.imshow(GREY.image, "here", ax=ax, fontsize=5, colorbar=True, pixels_per_degree=2) is own
    assert ax.title.get_fontsize() == 5 and len(own.axes) == 2
    assert [text.get_text() for text in own.axes[1].get_yticklabels()] == ["−0.8", "0", "0.8"]
    with pytest.raises(ValueError, match="ax takes one picture, at its own size, but width is 3: leave it out"):
        plot.imshow(GREY.image, ax=ax, width=3)


WRONG = {
    "width": [(0, ValueError), (1e3, ValueError), (float("nan"), ValueError), ("a", TypeError), (True, TypeError)],
    "fontsize": [(0, ValueError), (-3, ValueError), (1e3, ValueError), ("small", TypeError)],
    "titles": [("no", TypeError), (3, TypeError)],
    "colorbar": [(1, TypeError), (None, TypeError)],
    "pixels_per_degree": [(0, ValueError), (-1, ValueError), ("a", TypeError)],
    "percentile": [(0, ValueError), (100.5, ValueError), ("a", TypeError)],
}


@pytest.mark.parametrize("option", WRONG)
@of(PICTURES | LINES)
def test_wrong_options(figure, option, request):
    name = request.node.callspec.id.split("-")[0]
    if option not in inspect.signature(getattr(plot, name)).parameters:
        pytest.skip("it has no such option")
    for value, error in WRONG[option]:
        with pytest.raises(error, match=rf"{option} must be .*, got "):
            figure(**{option: value})


def test_a_width_without_room():
    many = torch.zeros(20, 4, 5)
    with pytest.raises(ValueError, match=r"width must be at least 3\.68, for 20 pictures beside each other, got 3\.3"):
        plot.imshow(many, width=3.3)
    with pytest.raises(ValueError, match=r"zoom is the dots of a pixel, .*, got 2 and 3.3: give one of them"):
        plot.imshow(GREY.image, width=3.3, zoom=2)
