import pickle
import re
import sys
import types

import numpy as np
import pytest
import torch
from matplotlib import pyplot

import fisherop
import fisherop.plenoptic as po
from fisherop.pictures import short
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
        title = f"image + 2 × eigendistortion {rank}\nλ = {short(float(value))}\n"
        title += f"black 0, white 1, {clipped:.0f} % clipped"
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
    with pytest.raises(IndexError, match="a position among the 4 eigendistortions found, from -4 to 3, got 4"):
        po.plot.eigendistortion_imshow_all(ed, 4)


def test_what_cannot_be_shown():
    ed = ed_of((1, 1, 6, 10))
    for index in (2, 57, 60, -61):
        with pytest.raises(ValueError, match=rf"one of those synthesized, \[0, 1, 58, 59\] of 60, got {index}"):
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


RESPONSE = linear_model(MATRIX)
IMAGE = torch.linspace(0, 1, 60, dtype=torch.float64).reshape(1, 1, 6, 10)


ROWS = torch.linspace(1, 3, 70, dtype=torch.float64)


def model(x):
    return RESPONSE(x)


def named(name, change):
    def changed(x):
        return change(RESPONSE(x))

    changed.__qualname__ = name
    return changed


class Other(po.Eigendistortion):
    pass


def ed_with(image=IMAGE, model=model, kind=po.Eigendistortion, **attributes):
    ed = kind(image, model)
    vars(ed).update(attributes)
    return ed


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "ed.pt"
    ed_with().synthesize("exact", k=1, progress=False).save(path)
    return path


def test_load_takes_what_belongs_to_the_same_image_and_model(saved):
    truth = ed_with().synthesize("exact", k=1, progress=False)
    for options in ({}, {"map_location": "cpu"}, {"map_location": torch.device("cpu", 0)}, {"raise_on_checks": False}):
        for ed in (ed_with(), ed_with(model=named("some.where.model", lambda y: y * (1 + 1e-9)))):
            operator = ed.operator
            assert ed.load(saved, **options) is ed and ed.operator is operator
            assert torch.equal(ed.eigendistortions, truth.eigendistortions) and ed.result.converged.all()
    fisherop.Eigendistortion(IMAGE, model).load(saved)
    fisherop.Eigendistortion.from_file(saved, model).save(saved)
    assert ed_with().load(saved).result.method == "exact"
    ed = ed_with(kind=Other, mine=1).synthesize("exact", k=1, progress=False)
    ed.save(saved)
    assert ed_with(kind=Other, mine=2).load(file_path=saved).mine == 2


def test_load_within_a_tolerance_takes_the_image_of_the_file(saved):
    near = IMAGE + 1e-6
    with pytest.raises(ValueError, match=r"attribute image have different values!\nThey differ by up to 1e-06"):
        ed_with(near).load(saved)
    for options in ({"tensor_equality_atol": 1e-5}, {"tensor_equality_atol": 2e-6, "tensor_equality_rtol": 0}):
        ed = ed_with(near).load(saved, **options)
        assert torch.equal(ed.image, IMAGE) and torch.equal(ed.operator.linearization.response, model(IMAGE))
        assert ed.result.converged.all()
    shifted = named("model", lambda y: y + 1e-3)
    with pytest.raises(ValueError, match=r"model output have different values!\nThey differ by 0\.0\d+ in norm, of "):
        ed_with(model=shifted).load(saved)
    ed = ed_with(model=shifted).load(saved, tensor_equality_atol=1e-2)  # its Jacobian is the same
    assert ed.result.converged.all()
    # a response within a tolerance that the user widened says nothing of the Jacobian: products do
    bent = named("model", lambda y: y + 1e-3 + 1e-2 * (y - RESPONSE(IMAGE)) * ROWS)
    with pytest.warns(RuntimeWarning, match=r"did not reach tol=1e-06"):
        ed_with(model=bent).load(saved, tensor_equality_atol=1e-2)


VALUES, SHAPE, NAMES = (f"have different {what}!" for what in ("values", "shape", "names"))
DIFFERENCES = {
    "image": (
        {"image": IMAGE + 0.25},
        [f"Saved and initialized attribute image {VALUES}\nThey differ by up to 0.25"],
        2,
    ),
    "image's shape": (
        {"image": IMAGE.reshape(1, 1, 10, 6)},
        [f"Saved and initialized attribute image {SHAPE}\nSaved: (1, 1, 6, 10)\nInitialized: (1, 1, 10, 6)"],
        2,
    ),
    "twice": ({"model": named("model", lambda y: 2 * y)}, [f"Saved and initialized model output {VALUES}"], 2),
    "weighted": ({"model": named("model", lambda y: y * ROWS)}, [f"Saved and initialized model output {VALUES}"], 0),
    "response's shape": (
        {"model": named("model", lambda y: y.reshape(7, 10))},
        [f"Saved and initialized model output {SHAPE}\nSaved: (70,)\nInitialized: (7, 10)"],
        2,
    ),
    "response's size": (
        {"model": named("model", lambda y: y[:50])},
        [f"Saved and initialized model output {SHAPE}"],
        0,
    ),
    "name": (
        {"model": named("other", lambda y: 1 * y)},
        [f"Saved and initialized model {NAMES}\nSaved: model\nInitialized: other"],
        2,
    ),
    "type": (
        {"kind": Other},
        ["Saved object was a plenoptic.Eigendistortion, but initialized object is a test_plenoptic.Other!"],
        2,
    ),
    "attribute": ({"mine": 1}, ["Initialized object has 1 attribute(s) not present in the saved object! mine"], 2),
    "all": (
        {"kind": Other, "mine": 1, "image": IMAGE + 1, "model": named("other", lambda y: y * ROWS)},
        [
            "Saved object was",
            "Initialized object has 1",
            "Saved and initialized attribute image",
            "Saved and initialized model output",
            "Saved and initialized model have",
        ],
        0,
    ),
}


@pytest.mark.parametrize("difference", DIFFERENCES)
def test_load_of_what_differs(difference, saved):
    arguments, problems, holding = DIFFERENCES[difference]
    ed = ed_with(**arguments)
    image, operator = ed.image, ed.operator
    with pytest.raises(ValueError, match="^" + re.escape(problems[0])) as caught:
        ed.load(saved)
    assert str(caught.value).endswith("If you are sure that both are the same, call load with raise_on_checks=False")
    assert ed.result is None and ed.operator is operator and ed.image is image
    with pytest.warns() as warned:
        ed.load(saved, raise_on_checks=False)
    for warning, problem in zip(warned, problems, strict=True):
        assert str(warning.message).startswith(problem) and warning.filename == __file__
        assert warning.category is po.io.LoadWarning
    assert torch.equal(ed.image, IMAGE) and ed.model is arguments.get("model", model)
    assert np.count_nonzero(ed.result.converged) == holding
    if "output" in problems[0]:
        assert f"by whose products {holding} of the file's 2 pairs hold to tol=1e-06" in str(warned[0].message)
    step = ed.model(ed.eigendistortions[0])  # the models are linear, and √λ is how far theirs, not the file's, moves
    assert torch.linalg.vector_norm(step).item() ** 2 == pytest.approx(ed.eigenvalues[0].item())


def test_load_with_attributes_of_the_saved_object(saved):
    ed_with(mine=1).synthesize("exact", k=1, progress=False).save(saved)
    with pytest.raises(
        ValueError, match=r"Saved object has 1 attribute\(s\) not present in the initialized object! mine"
    ):
        ed_with().load(saved)


def test_load_of_a_file_without_names(saved):
    """As fisherop wrote it before plenoptic's checks were here."""
    with np.load(saved) as archive:
        fields = {
            name: archive[name] for name in set(archive.files) - {"object", "model", "attributes", "response_shape"}
        }
    fields = {name: array for name, array in fields.items() if name not in ("format", "checksum", "versions")}
    fisherop.files.write(saved, fields)
    assert ed_with(kind=Other, mine=1, model=named("other", lambda y: y.reshape(7, 10))).load(saved).result is not None
    with pytest.raises(ValueError, match="model output have different shape"):
        ed_with(model=named("model", lambda y: y[:50])).load(saved)


@pytest.mark.parametrize("raise_on_checks", [True, False])
def test_load_refuses_another_arithmetic_whatever_is_asked(saved, raise_on_checks):
    single = po.Eigendistortion(IMAGE.float(), linear_model(MATRIX, torch.float32))
    for ed, options, message in (
        (
            single,
            {},
            r"have different dtype!\nSaved: torch\.float64\nInitialized: torch\.float32\nLoad it for an image",
        ),
        (ed_with(), {"map_location": "cuda:1"}, r"different device!\nmap_location: cuda:1\nInitialized: cpu\nWhat is"),
        (
            ed_with(),
            {"map_location": "gpu"},
            r"map_location must be a device, like 'cpu' or 'cuda:0', or None, got 'gpu'",
        ),
        (ed_with(), {"map_location": {"cuda:0": "cpu"}}, r"map_location must be a device, .* no devices that could be"),
        (ed_with(), {"tensor_equality_atol": -1.0}, r"tensor_equality_atol must be a finite number from 0, got -1\.0"),
        (ed_with(), {"tensor_equality_rtol": "1"}, "tensor_equality_rtol must be a finite number from 0, got '1'"),
        (ed_with().load(saved), {}, r"load can only be called with a just-initialized .*\.from_file\(path, model\)"),
    ):
        before = ed.result
        with pytest.raises((TypeError, ValueError), match=message):
            ed.load(saved, raise_on_checks=raise_on_checks, **options)
        assert ed.result is before


def test_copies_know_what_was_added(saved):
    ed = pickle.loads(pickle.dumps(ed_with()))
    assert ed.load(saved).result.converged.all()
    ed.mine = 1
    ed.save(saved)
    with pytest.raises(ValueError, match=r"not present in the initialized object! mine\n"):
        ed_with().load(saved)


def test_what_a_file_holds(saved, capsys, tmp_path, monkeypatch):
    po.io.examine_saved_synthesis(saved, map_location="cpu")
    out = capsys.readouterr().out
    for line in (
        f"fisherop version  : {fisherop.__version__} (installed: {fisherop.__version__})",
        f"torch version     : {torch.__version__} (installed: {torch.__version__})",
        "Saved object type : plenoptic.Eigendistortion",
        "model : test_plenoptic.model, (1, 1, 6, 10) -> (70,)",
        "image                : float64, shape (1, 1, 6, 10)",
        "eigenvectors         : float64, shape (60, 2)",
        "tol           : 1e-06",
    ):
        assert f"{line}\n" in out
    saved.write_bytes(saved.read_bytes()[:-9])
    with pytest.raises(ValueError, match="is damaged or was cut short"):
        po.io.examine_saved_synthesis(saved)
    saved.write_text("eigendistortions")
    with pytest.raises(ValueError, match=r"it is no \.npz file"):
        po.io.examine_saved_synthesis(saved)
    with pytest.raises(FileNotFoundError):
        po.io.examine_saved_synthesis(tmp_path / "nothing")

    torch.save({}, saved)  # as plenoptic does, to whose function it goes
    module, seen = types.ModuleType("plenoptic.io"), []
    module.examine_saved_synthesis = lambda *arguments: seen.append(arguments)
    monkeypatch.setitem(sys.modules, "plenoptic", types.ModuleType("plenoptic"))
    monkeypatch.setitem(sys.modules, "plenoptic.io", module)
    po.io.examine_saved_synthesis(saved, "cpu")
    assert seen == [(saved, "cpu")]


def test_warnings_of_load_are_plenoptics_where_it_is_installed(saved, monkeypatch):
    for name in ("plenoptic", "plenoptic.io"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.warns(UserWarning, match="different names") as warned:
        ed_with(model=named("other", lambda y: 1 * y)).load(saved, raise_on_checks=False)
    assert [w.category for w in warned] == [po.io.LoadWarning] and po.io.LoadWarning.__module__.startswith("fisherop")
    with pytest.raises(ImportError, match=r"looks up what isn't its own there, `pip install plenoptic`"):
        po.io.no_such_name  # noqa: B018
    module = types.ModuleType("plenoptic.io")
    module.LoadWarning = type("LoadWarning", (UserWarning,), {})
    monkeypatch.setitem(sys.modules, "plenoptic", types.ModuleType("plenoptic"))
    monkeypatch.setitem(sys.modules, "plenoptic.io", module)
    with pytest.warns(module.LoadWarning, match="different names"):
        ed_with(model=named("other", lambda y: 1 * y)).load(saved, raise_on_checks=False)


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
