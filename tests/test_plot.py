import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fisherop import ConvergenceError, Eigendistortion, eigenpairs, plot
from fisherop.images import load_image
from fisherop.testing import linear_model, matrix_with_singular_values

MATRIX = matrix_with_singular_values(np.r_[np.linspace(3, 1, 20), np.zeros(40)], 70, 60)


def ed_of(shape, low=0.2, high=0.8, **kwargs):
    image = torch.linspace(low, high, 60, dtype=torch.float64).reshape(shape)
    return Eigendistortion(image, linear_model(MATRIX)).synthesize("exact", progress=False, **{"k": 2} | kwargs)


def panels(figure):
    return [ax for ax in figure.axes if ax.get_title()]


def test_grey_panels_show_what_they_say(tmp_path):
    ed = ed_of((1, 1, 6, 10))
    figure = plot.eigendistortions(ed, indices=(0, -1), scale=2.0)
    shown = [np.asarray(ax.images[0].get_array()) for ax in panels(figure)]
    image, (first, *_, last) = ed.image[0, 0].numpy(), ed.eigendistortions[:, 0].numpy()
    np.testing.assert_allclose(shown[0], image)
    for row, distortion in ((shown[1:3], first), (shown[3:], last)):
        np.testing.assert_allclose(row[0], 0.5 + 0.5 * distortion / np.abs(distortion).max())
        np.testing.assert_allclose(row[1], np.clip(image + 2 * distortion, 0, 1))
    titles = [ax.get_title() for ax in panels(figure)]
    peak = np.abs(first).max()
    assert titles[1] == f"eigendistortion 0\nλ = 9, threshold 0.333\nblack −{peak:.3g}, white {peak:.3g}"
    assert re.match("eigendistortion 59\nλ = .*, threshold (∞|≥ )", titles[3])
    assert titles[2] == "image + 2 × eigendistortion 0\nRMS 0.26\n14 % clipped"
    assert titles[0] == "image\nblack 0, white 1"
    figure.savefig(tmp_path / "figure.png")


def test_a_colour_distortion_is_centred_on_mid_grey(tmp_path):
    ed = ed_of((1, 3, 4, 5))
    figure = plot.eigendistortions(ed)
    shown = np.asarray(panels(figure)[1].images[0].get_array())
    distortion = np.moveaxis(ed.eigendistortions[0].numpy(), 0, -1)
    np.testing.assert_allclose(shown, 0.5 + 0.5 * distortion / np.abs(distortion).max())
    assert shown.shape == (4, 5, 3)
    figure.savefig(tmp_path / "figure.png")


def test_range_and_scale_follow_the_image():
    figure = plot.eigendistortions(ed_of((6, 10), -3, 5))
    assert panels(figure)[0].get_title() == "image\nblack −3, white 5"
    assert "RMS 0.4\n" in panels(figure)[2].get_title()
    shown = np.asarray(panels(plot.eigendistortions(ed_of((6, 10)), vrange=(0.2, 0.8)))[0].images[0].get_array())
    assert shown.min() == 0 and shown.max() == 1


def test_nothing_is_changed():
    ed = ed_of((1, 3, 4, 5))
    image, vectors = ed.image.clone(), ed.result.eigenvectors.copy()
    plot.eigendistortions(ed, scale=100)
    plot.spectrum(ed.result)
    assert torch.equal(ed.image, image) and np.array_equal(ed.result.eigenvectors, vectors)


@pytest.mark.parametrize(
    ("shape", "arguments", "error", "message"),
    [
        ((60,), {}, ValueError, r"grey \(..., height, width\) or colour .*, got shape \(60,\)"),
        ((1, 4, 5, 3), {}, ValueError, r"got shape \(1, 4, 5, 3\)"),
        (
            (6, 10),
            {"indices": (4,)},
            IndexError,
            "indices must be a position among the 4 .*, got 4",
        ),
        ((6, 10), {"indices": ()}, ValueError, "indices must be an integer, .* and not empty, got "),
        ((6, 10), {"vrange": (1, 0)}, ValueError, r"vrange must be two ascending numbers .*, got \(1, 0\)"),
        ((6, 10), {"vrange": (0, np.inf)}, ValueError, r"vrange must be two ascending numbers .*, got \(0, inf\)"),
    ],
)
def test_bad_arguments(shape, arguments, error, message):
    with pytest.raises(error, match=message):
        plot.eigendistortions(ed_of(shape), **arguments)


def test_needs_a_synthesis():
    with pytest.raises(ValueError, match=r"no eigendistortions to show: call synthesize\(\) first"):
        plot.eigendistortions(Eigendistortion(torch.ones(6, 10).double(), linear_model(MATRIX)))


def dots(figure):
    """The figure as it is on the screen, in dots (height, width, 3) from 0 to 255."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def inside(figure, ax):
    """The dots of one panel."""
    pixels = dots(figure)
    box = ax.get_window_extent()
    left, right = round(box.x0), round(box.x1)
    return pixels[pixels.shape[0] - round(box.y1) : pixels.shape[0] - round(box.y0), left:right]


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 7), st.booleans(), st.integers(0, 99))
def test_each_pixel_becomes_zoom_by_zoom_dots(height, width, zoom, colour, seed):
    levels = np.random.default_rng(seed).integers(256, size=(3 if colour else 2, height, width))
    figure = plot.imshow(torch.tensor(levels / 255)[None], "a title wider than the picture", zoom=zoom)
    expected = [np.moveaxis(levels, 0, -1)] if colour else [np.stack([c] * 3, -1) for c in levels]
    assert len(figure.axes) == len(expected)
    for ax, pixels in zip(figure.axes, expected, strict=True):
        drawn, replicated = inside(figure, ax).astype(int), pixels.repeat(zoom, 0).repeat(zoom, 1)
        np.testing.assert_allclose(drawn, replicated, atol=1, rtol=0)  # 256 grey levels, rounded down


def assert_nothing_is_clipped(figure):
    """All text lies within the figure, and no title reaches into another."""
    FigureCanvasAgg(figure).draw()
    boxes = [t.get_window_extent() for t in (*figure.texts, *(ax.title for ax in figure.axes))]
    for box in boxes:
        assert min(box.x0, box.y0) >= 0 and box.x1 <= figure.bbox.width and box.y1 <= figure.bbox.height
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:i])
    for ax in figure.axes:
        assert not any(box.overlaps(ax.get_window_extent().padded(-1)) for box in boxes)


@pytest.mark.parametrize("shape", [(1, 1, 2, 30), (1, 3, 4, 5), (1, 3, 10, 2), (60, 1)])
def test_titles_have_room(shape):
    ed = ed_of(shape)
    for zoom in (1, None):
        assert_nothing_is_clipped(plot.eigendistortions(ed, zoom=zoom))
        assert_nothing_is_clipped(plot.compare([ed, ed], ["short", "a name that is longer than the image"], zoom=zoom))
        assert_nothing_is_clipped(plot.imshow(ed.image, "one\ntwo\nthree", zoom=zoom))


def test_imshow_chooses_channels_and_range():
    image = torch.linspace(-1, 2, 60).reshape(1, 3, 4, 5)
    blue = image[0, 2].numpy()
    (ax,) = plot.imshow(image).axes
    assert ax.get_title() == "black −2, white 2" and np.shape(ax.images[0].get_array()) == (4, 5, 3)
    assert ax.get_window_extent().width == pytest.approx(5 * 52, abs=1e-3)  # 260 dots
    figure = plot.imshow(image.numpy(), ["r", "g", "b"], as_rgb=False, vrange=(0, 2))
    assert [ax.get_title() for ax in figure.axes] == ["r\nblack 0, white 2, 100 % clipped", "g", "b"]
    (ax,) = plot.imshow(image, channel_idx=-1).axes
    np.testing.assert_allclose(ax.images[0].get_array(), (blue - blue.min()) / np.ptp(blue), rtol=1e-6)
    own = Figure()
    assert plot.imshow(image, "here", ax=own.subplots()) is own
    assert own.axes[0].get_title().startswith("here")


@pytest.mark.parametrize(
    ("shape", "arguments", "error", "message"),
    [
        ((5,), {}, ValueError, r"image must be of shape \(\.\.\., height, width\), .*, got Tensor of shape \(5,\)"),
        (
            (1, 4, 5),
            {"as_rgb": True},
            ValueError,
            r"as_rgb needs an image of three channels, .*, got shape \(1, 4, 5\)",
        ),
        ((3, 4, 5), {"as_rgb": True, "channel_idx": 0}, ValueError, "as_rgb shows all channels, and channel_idx=0 one"),
        (
            (3, 4, 5),
            {"channel_idx": 3},
            IndexError,
            "channel_idx must be a position among the 3 .*, got 3",
        ),
        ((2, 4, 5), {"title": ["a"]}, ValueError, r"one for each of the 2 pictures, got \['a'\]"),
        ((4, 5), {"zoom": 1.5}, TypeError, "zoom must be an integer from 1 .*crop the image.*, got 1.5"),
        ((4, 5), {"zoom": 0}, ValueError, "zoom must be an integer from 1 .*, got 0"),
        ((2, 4, 5), {"ax": Figure().subplots()}, ValueError, "ax takes one picture, at its own size, but there are 2"),
        ((4, 5), {"ax": Figure().subplots(), "zoom": 2}, ValueError, "there are 1 and zoom is 2"),
    ],
)
def test_what_imshow_refuses(shape, arguments, error, message):
    with pytest.raises(error, match=message):
        plot.imshow(torch.rand(shape, generator=torch.Generator().manual_seed(0)), **arguments)


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        ([[1.0, np.nan]], "image must be .* finite, got .*: it holds NaN or infinity"),
        ([[1.0, -np.inf]], "image must be .* finite, got .*: it holds NaN or infinity"),
        ([[7.0, 7.0]], "what is to be shown is 7 throughout: pass vrange, the values of black and white"),
    ],
)
def test_values_that_have_no_range(pixels, message):
    with pytest.raises(ValueError, match=message):
        plot.imshow(np.array(pixels))


def test_black_and_white_are_told_apart():
    for low, high, title in (
        (1000, 1001, "black 1000, white 1001"),
        (-5, 5.0001, "black −5, white 5"),
        (1e-9, 2e-9, "black 1e−9, white 2e−9"),
        (-12345, 12345, "black −12300, white 12300"),
        (0.99999, 1.00001, "black 0.99999, white 1.00001"),
    ):
        (ax,) = plot.imshow(np.array([[low, high]]), vrange=(low, high)).axes
        assert ax.get_title() == title
    assert plot.imshow(np.ones((2, 2))).axes[0].get_title() == "black 0, white 1"


def test_pixels_are_whole_dots_and_up_is_up_whatever_the_users_settings(tmp_path):
    pixels = np.linspace(0, 1, 6).reshape(3, 2)
    with rc_context({"image.origin": "lower", "figure.dpi": 72}):
        figure = plot.imshow(pixels, zoom=10)
        figure.savefig(tmp_path / "figure.png")
    box = figure.axes[0].get_window_extent()
    drawn = load_image(tmp_path / "figure.png", as_gray=True)[0, 0].flip(0)
    drawn = drawn[round(box.y0) : round(box.y1), round(box.x0) : round(box.x1)]
    assert drawn.shape == (30, 20)
    np.testing.assert_allclose(drawn.flip(0), np.kron(pixels, np.ones((10, 10))), atol=0.01)


def test_spectra_of_several_results(tmp_path):
    one = ed_of((6, 10)).result
    other = Eigendistortion(torch.ones(1, 3).double(), lambda x: 2 * x).synthesize("exact", progress=False).result
    many = ed_of((6, 10), k=4).result
    for results, places, label in (
        ([many, many], [56, 57, 58, 59], "(0 … 59)"),
        ([one, other], [58 / 59, 1], "/ (N − 1)"),
    ):
        figure = plot.spectrum(results, names=["first", "second"])
        figure.savefig(tmp_path / "figure.png")
        (ax,) = figure.axes
        assert ax.get_xlabel() == f"eigenindex {label}" and figure.get_suptitle().count("eigenvalues") == 2
        drawn = {c.get_label(): c.lines[0].get_xydata() for c in ax.containers}
        np.testing.assert_allclose(drawn["first, null to tol"][:, 0], places)
    assert set(drawn) == {"first, eigenpair", "first, null to tol", "second, eigenpair"}
    np.testing.assert_allclose(drawn["second, eigenpair"], [[0, 4], [0.5, 4], [1, 4]])
    for arguments in (([],), ([one], ["a", "b"])):
        with pytest.raises(
            ValueError,
            match=r"(results must be an EigenResult|names must be a text for each of the 1)",
        ):
            plot.spectrum(*arguments)


def test_spectrum_shows_every_status(tmp_path):
    ed = ed_of((6, 10))
    figure = plot.spectrum(ed.result)
    top, bottom = figure.axes
    assert top.get_yscale() == "log"
    assert figure.get_suptitle() == f"exact: 4 eigenvalues, {ed.result.n_products:g} products"
    drawn = [{c.get_label(): c.lines[0] for c in ax.containers} for ax in figure.axes]
    np.testing.assert_allclose(
        drawn[0]["eigenpair"].get_xydata(), [[0, 9], [1, np.linspace(3, 1, 20)[1] ** 2]], atol=1e-9
    )
    np.testing.assert_allclose(drawn[1]["null to tol"].get_xdata(), [-1, 0])
    assert [label.get_text() for label in bottom.get_xticklabels()] == ["58", "59"]
    assert {label.get_rotation() for label in bottom.get_xticklabels()} == {0}
    assert len(drawn[0]) == len(drawn[1]) == 1
    assert [d[s].get_fillstyle() for d, s in zip(drawn, ("eigenpair", "null to tol"), strict=True)] == ["full", "none"]
    with pytest.raises(ConvergenceError) as caught:
        eigenpairs(ed.operator, method="power", maxiter=2, rng=0, progress=False)
    figure = plot.spectrum(caught.value.result)
    assert "not converged" in [c.get_label() for c in figure.axes[0].containers]
    figure.savefig(tmp_path / "figure.png")


def test_spectrum_of_few_pairs_has_a_panel_for_each_end():
    for which, ends in (("both", ["largest", "smallest"]), ("largest", ["largest"]), ("smallest", ["smallest"])):
        for k, n_panels in ((1, len(ends)), (3, len(ends)), (4, 1)):
            figure = plot.spectrum(ed_of((6, 10), k=k, which=which).result)
            assert len(figure.axes) == n_panels
            labels = [ax.get_xlabel() for ax in figure.axes]
            assert labels == ([f"eigenindex, {end}" for end in ends] if k < 4 else ["eigenindex (0 … 59)"])
    small = Eigendistortion(torch.ones(1, 9).double(), lambda x: 2 * x).synthesize("exact", k=1, progress=False).result
    figure = plot.spectrum([ed_of((6, 10)).result, small], ["large", "small"])
    assert [label.get_text() for label in figure.axes[1].get_xticklabels()] == ["N − 2", "N − 1"]
    places = [c.lines[0].get_xdata() for c in figure.axes[1].containers]
    np.testing.assert_allclose(places[0] + 0.075, [-1, 0])
    np.testing.assert_allclose(places[1] - 0.075, [0])


@pytest.mark.parametrize("which", ["both", "largest", "smallest"])
def test_convergence_shows_the_history_and_the_certificate(which, tmp_path):
    ed = ed_of((6, 10))
    result = eigenpairs(ed.operator, 2, which, method="golub_kahan", rng=0, progress=False)
    figure = plot.convergence(result)
    figure.savefig(tmp_path / "figure.png")
    history, top = result.details["history"], result.lambda_max_bounds[0]
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    ends = {"both": ("largest", "smallest")}.get(which, (which,))
    expected = {f"{end}, residual": (end, 1) for end in ends}
    if "smallest" in ends:
        expected["smallest, value"] = ("smallest", 0)
    assert {label for label in lines if "," in label} == set(expected)
    for label, (end, part) in expected.items():
        x, y = lines[label].get_data()
        assert list(x) == [entry["n_products"] for entry in history]
        np.testing.assert_allclose(y[-1], history[-1][end][part].max() / top)
    dots = [line.get_data() for line in figure.axes[0].lines if line.get_marker() == "o"]
    assert {x[0] for x, _ in dots} == {result.n_products} and len(dots) == len(expected)
    from_top = result.eigenindex < 2
    certified = [
        a[c].max() / top for a in (result.residual_norms, result.eigenvalues) for c in (from_top, ~from_top) if c.any()
    ]
    assert {y[0] for _, y in dots} <= set(certified)
    with pytest.raises(ValueError, match="the result of method 'exact' has no history: use method='golub_kahan'"):
        plot.convergence(ed.result)


def test_comparisons_share_one_scale(tmp_path):
    eds = [ed_of((1, 1, 6, 10)), ed_of((1, 3, 4, 5), high=1.8)]
    figure = plot.compare(eds, names=["grey", "colour"], scale=2.0)
    figure.savefig(tmp_path / "figure.png")
    shown = [np.asarray(ax.images[0].get_array()) for ax in panels(figure)]
    assert len(shown) == 6
    for row, ed in zip((shown[:3], shown[3:]), eds, strict=True):
        image, (first, *_, last) = (x.numpy() for x in (ed.image[0], ed.eigendistortions))
        for panel, pixels in zip(row, (image, image + 2 * first, image + 2 * last), strict=True):
            expected = np.clip((np.moveaxis(pixels, 0, -1) - 0.2) / 1.6, 0, 1)  # of the range of both
            np.testing.assert_allclose(panel.reshape(expected.shape), expected, atol=1e-12)
    titles = [ax.get_title() for ax in panels(figure)]
    assert titles[0] == "grey\nblack 0.2, white 1.8" and titles[3] == "colour"
    assert titles[1] == "+ 2 × most noticeable\nthreshold 0.333\n15 % clipped"
    assert re.match("\\+ 2 × least noticeable\nthreshold (∞|≥ )", titles[2])
    assert panels(plot.compare(eds[:1]))[0].get_title() == "function\nblack 0, white 1"
    assert panels(plot.compare(eds[:1]))[1].get_title().startswith(f"+ {0.05 * 60**0.5:.3g} × most noticeable\n")


def test_an_image_that_all_share_is_drawn_once():
    ed = ed_of((1, 1, 6, 10))
    figure = plot.compare([ed, ed], ["one", "other"], scale=2.0)
    titles = [ax.get_title() for ax in figure.axes]
    assert [title.split("\n")[0] for title in titles] == ["image", "one", "one", "other", "other"]
    first, *others = (ax.get_window_extent() for ax in figure.axes)
    assert first.y0 == pytest.approx((others[0].y0 + others[-1].y0) / 2, abs=1)  # in the middle
    image, most = ed.image[0, 0].numpy(), ed.eigendistortions[0, 0].numpy()
    np.testing.assert_allclose(figure.axes[0].images[0].get_array(), image)
    np.testing.assert_allclose(figure.axes[3].images[0].get_array(), np.clip(image + 2 * most, 0, 1))


def test_what_cannot_be_compared():
    with pytest.raises(ValueError, match="at least one Eigendistortion, got "):
        plot.compare([])
    with pytest.raises(ValueError, match="names must be a text for each of the 1 eds, got "):
        plot.compare([ed_of((6, 10))], names=["a", "b"])
    with pytest.raises(ValueError, match=r"no eigendistortions to show: call synthesize\(\) first"):
        plot.compare([Eigendistortion(torch.ones(6, 10).double(), linear_model(MATRIX))])
    with pytest.raises(ValueError, match=r"'one' lacks an end of its spectrum: call synthesize\(which='both'\)"):
        plot.compare([ed_of((6, 10), which="largest")], names=["one"])


def test_distortions():
    image, changes = np.full((1, 3, 8, 6), 0.5), np.random.default_rng(0).standard_normal((2, 1, 3, 8, 6))
    figure = plot.distortions(image, changes, ["one", "other"], scale=0.5)
    titles = [ax.get_title() for ax in figure.axes]
    assert titles[0].startswith("image") and titles[1].startswith("one\nimage + 0.5 × the change below")
    assert len(figure.axes) == 5
    shown = figure.axes[1].images[0].get_array()
    np.testing.assert_allclose(shown, np.clip(0.5 + 0.5 * np.moveaxis(changes[0, 0], 0, -1), 0, 1))
    for wrong, message in (
        (changes[..., :3], "changes must be pictures of the image's height, width and channels"),
        (changes[0, 0, 0], "changes must be of shape"),
        (changes * np.nan, "changes must be an array .*, and finite"),
    ):
        with pytest.raises(ValueError, match=message):
            plot.distortions(image, wrong)
    with pytest.raises(ValueError, match="titles must be a text for each of the 2 changes"):
        plot.distortions(image, changes, ["one"])


def test_response_change():
    model = linear_model(np.diag([2.0, 1.0, 0.0]))
    ed = Eigendistortion(torch.ones(3, dtype=torch.float64), model).synthesize(progress=False)
    figure = plot.response_change(ed)
    labels = [line.get_label() for line in figure.axes[0].lines]
    assert "most, predicted" in labels and "least, + amplitude" in labels
    curved = Eigendistortion(
        torch.full((3,), 0.5, dtype=torch.float64), lambda x: torch.exp(x) * x.new_tensor([3, 2, 1])
    )
    curved.synthesize(progress=False)
    (star,) = [line for line in plot.response_change(curved, 0).axes[0].lines if line.get_marker() == "*"]
    np.testing.assert_allclose(star.get_xdata(), curved.linear_range(0))
    with pytest.raises(IndexError, match="indices must be a position"):
        plot.response_change(ed, 7)
