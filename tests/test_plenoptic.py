import sys
import types

import numpy as np
import pytest
import torch
from matplotlib import pyplot

import fisherop
import fisherop.plenoptic as po
from fisherop.testing import linear_model, matrix_with_singular_values

MATRIX = matrix_with_singular_values(np.linspace(3, 1, 60), 70, 60)


@pytest.fixture(autouse=True)
def close_figures():
    yield
    pyplot.close("all")


def ed_of(shape, low=0.2, high=0.8):
    image = torch.linspace(low, high, 60, dtype=torch.float64).reshape(shape)
    return po.Eigendistortion(image, linear_model(MATRIX)).synthesize("exact", k=2, progress=False)


def shown(figure):
    return [np.asarray(ax.images[0].get_array()) for ax in figure.axes]


def titles(figure):
    return [ax.get_title() for ax in figure.axes]


def test_one_eigendistortion_by_its_rank():
    ed = ed_of((1, 1, 6, 10))
    image = ed.image[0, 0].numpy()
    for index, column in ((0, 0), (1, 1), (-2, 2), (58, 2), (-1, 3), (59, 3), (-60, 0)):
        figure = po.display_eigendistortion(ed, index, alpha=2.0)
        whole = image + 2 * ed.eigendistortions[column, 0].numpy()
        expected = np.clip(whole, 0, 1)
        np.testing.assert_allclose(shown(figure)[0], expected)
        rank, value = ed.result.eigenindex[column], ed.result.eigenvalues[column]
        clipped = np.ceil(100 * np.mean(whole != expected))
        title = f"image + 2 × eigendistortion {rank}\nλ = {value:.3g}\nblack 0, white 1, {clipped:.0f} % clipped"
        assert titles(figure) == [title]
        assert pyplot.gcf() is figure
    own, ax = pyplot.subplots()
    assert po.display_eigendistortion(ed, ax=ax) is own and len(ax.images) == 1


def test_all_in_two_rows():
    ed = ed_of((1, 3, 4, 5))
    figure = po.display_eigendistortion_all(ed, (0, -1), alpha=[1.0, 3.0], suptitle="both ends", zoom=4)
    image, (first, *_, last) = (np.moveaxis(x.numpy(), -3, -1) for x in (ed.image[0], ed.eigendistortions))
    expected = [0.5 + 0.5 * d / np.abs(d).max() for d in (first, last)]
    expected += [np.clip(x, 0, 1) for x in (image, image + first, image + 3 * last)]
    for panel, pixels in zip(shown(figure), expected, strict=True):
        np.testing.assert_allclose(panel, pixels)
    assert titles(figure)[2] == "image\nblack 0, white 1" and "+ 3 × eigendistortion 59\n" in titles(figure)[4]
    assert [text.get_text() for text in figure.texts] == ["both ends"]
    boxes = [ax.get_window_extent() for ax in figure.axes]
    assert {(round(b.width), round(b.height)) for b in boxes} == {(20, 16)}
    centres = [(b.x0 + b.x1) / 2 for b in boxes]
    np.testing.assert_allclose(centres[:2], centres[3:], atol=1)  # each sum is below its distortion
    assert min(b.y0 for b in boxes[:2]) > max(b.y1 for b in boxes[2:])


def test_channels():
    ed = ed_of((1, 3, 4, 5))
    figure = po.display_eigendistortion_all(ed, 0, as_rgb=False)
    assert len(figure.axes) == 9 and titles(figure)[4].startswith("channel 1: image")
    peak = ed.eigendistortions[0].abs().max().item()
    np.testing.assert_allclose(shown(figure)[1], 0.5 + 0.5 * ed.eigendistortions[0, 1].numpy() / peak)
    figure = po.display_eigendistortion(ed, channel_idx=2, alpha=0)
    np.testing.assert_allclose(shown(figure)[0], ed.image[0, 2].numpy())


def test_what_is_processed_to_other_channels_and_numbers_as_tensors():
    ed = ed_of((1, 3, 4, 5))
    figure = po.display_eigendistortion_all(
        ed, ed.eigenindex[0], torch.tensor(2.0), lambda x: x.mean(1, keepdim=True), as_rgb=False
    )
    assert len(figure.axes) == 3 + 2 and titles(figure)[-1].startswith("image + 2 × eigendistortion 0")


def test_processing_acts_on_what_is_shown():
    ed = ed_of((1, 3, 4, 5), -1, 1)
    image, vectors = ed.image.clone(), ed.result.eigenvectors.copy()

    def unnormalize(x):
        return x.mul_(0.25).add_(0.5)  # in place, as a careless user might

    figure = po.display_eigendistortion_all(ed, [0], 2.0, unnormalize, lambda x: x.abs_())
    pixels = np.moveaxis(image[0].numpy(), 0, -1)
    first = np.moveaxis(ed.eigendistortions[0].numpy(), 0, -1)
    expected = [np.abs(first), 0.5 + pixels / 4, np.clip(0.5 + (pixels + 2 * first) / 4, 0, 1)]
    for panel, wanted in zip(shown(figure), expected, strict=True):
        np.testing.assert_allclose(panel, wanted)
    assert all("processed" in title for title in titles(figure))
    assert torch.equal(ed.image, image) and np.array_equal(ed.result.eigenvectors, vectors)


def test_by_position_as_in_version_2():
    ed = ed_of((1, 1, 6, 10))
    figure = po.plot.eigendistortion_imshow_all(ed, [1, 2, -1], None, 0.5, zoom=1)
    assert [title.split("\n")[0] for title in titles(figure)[:3]] == [f"eigendistortion {i}" for i in (1, 58, 59)]
    with pytest.raises(ValueError, match=r"positions among the 4 eigendistortions found, got \[4\]"):
        po.plot.eigendistortion_imshow_all(ed, 4)


def test_what_cannot_be_shown():
    ed = ed_of((1, 1, 6, 10))
    for index in (2, 57, 60, -61):
        with pytest.raises(ValueError, match=rf"eigenindex {index} is none of those synthesized, \[0, 1, 58, 59\] of"):
            po.display_eigendistortion(ed, index)
    with pytest.raises(ValueError, match=r"alpha must be one number, or one for each of \[0, -1\], got \[1\]"):
        po.display_eigendistortion_all(ed, alpha=[1])
    for show in (po.display_eigendistortion, po.display_eigendistortion_all, po.eigendistortion_imshow_all):
        with pytest.raises(ValueError, match=r"no eigendistortions to show: call synthesize\(\) first"):
            show(po.Eigendistortion(ed.image, ed.model))
    assert not pyplot.get_fignums()


def test_what_did_not_converge_warns():
    """At the user's own line, and without blaming rounding, which is far below the residuals."""
    ed = po.Eigendistortion(torch.linspace(0, 1, 60), linear_model(MATRIX, torch.float32))
    with pytest.warns(RuntimeWarning, match=r"did not reach tol=1e-07 (?s:.*)synthesize max_iter.*golub_kahan'\Z") as w:
        ed.synthesize(method="power", max_iter=2, tol=1e-7, progress=False, rng=0)
    assert [warning.filename for warning in w] == [__file__] and not ed.result.converged.all()
    assert ed.result.noise > ed.result.tol / 4
    with pytest.raises(fisherop.ConvergenceError, match="or use method='golub_kahan'"):
        ed.synthesize(method="power", max_iter=2, progress=False, rng=0, on_failure="raise")


def test_all_other_names_are_plenoptics(monkeypatch):
    assert po.synth is po.synthesize and issubclass(po.synth.Eigendistortion, fisherop.Eigendistortion)
    assert po.synth.eigendistortion.display_eigendistortion_all is po.display_eigendistortion_all
    theirs = {name: types.ModuleType(name) for name in ("plenoptic", "plenoptic.synthesize", "plenoptic.plot")}
    theirs["plenoptic"].tools = "their tools"
    theirs["plenoptic.synthesize"].Metamer = "their Metamer"
    theirs["plenoptic.plot"].imshow = "their imshow"
    for name, module in theirs.items():
        monkeypatch.setitem(sys.modules, name, module)
    assert (po.tools, po.synth.Metamer, po.plot.imshow) == ("their tools", "their Metamer", "their imshow")
    for name in theirs:
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    for look_up in (lambda: po.tools, lambda: po.synth.Metamer):
        with pytest.raises(ImportError, match=r"fisherop\.plenoptic looks up what isn't its own there, `pip install"):
            look_up()
    assert not hasattr(po, "__no_such_name__")
