"""Pictures for an experiment: what is read back from the files is what the table says."""

import csv

import numpy as np
import pytest
import torch
from PIL import Image

from fisherop import Eigendistortion, noise, spaces, stimuli
from fisherop.images import load_image
from fisherop.pictures import levels_of, picture_of
from fisherop.testing import matrix_with_singular_values

MATRIX = torch.as_tensor(matrix_with_singular_values(np.geomspace(3, 0.05, 48), 60, 48))


def synthesized(shape=(1, 1, 6, 8), dtype=torch.float64, **options):
    n = int(np.prod(shape))
    image = torch.as_tensor(np.random.default_rng(0).uniform(0.3, 0.7, shape), dtype=dtype)
    matrix = MATRIX[:, :n].to(dtype)
    return Eigendistortion(image, lambda x: torch.exp(matrix @ x.flatten() / 3), **options).synthesize(
        progress=False, rng=0
    )


def table(path):
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == stimuli.COLUMNS
    return rows


def moved(ed, image, weight=1.0):
    model, dtype = ed.model, ed.image.dtype
    image = torch.as_tensor(image, dtype=dtype).reshape(ed.image.shape)
    return float(((model(image) - model(ed.image)) * weight).norm())


@pytest.mark.parametrize(
    ("shape", "format", "bits", "dither"),
    [
        ((1, 1, 6, 8), "png", 8, None), ((1, 1, 6, 8), "png", 8, 0), ((1, 1, 6, 8), "png", 16, None),
        ((1, 1, 6, 8), "tiff", 16, 3), ((1, 3, 4, 4), "png", 8, 1), ((3, 4, 4), "tiff", 8, None),
        ((48,), "npy", 8, None), ((6, 8), "png", 8, None),
    ],
)  # fmt: skip
def test_files_are_what_the_table_says(tmp_path, shape, format, bits, dither):
    ed = synthesized(shape)
    path = stimuli.export(ed, tmp_path / "new", amplitudes=[0.1, -0.3], format=format, bits=bits, dither=dither)
    rows = table(path)
    assert [int(row["eigenindex"]) for row in rows] == [-1, 0, 0, 47, 47]
    assert {row["file"] for row in rows} | {"stimuli.csv"} == {p.name for p in (tmp_path / "new").iterdir()}
    step = 0 if format == "npy" else 1 / (2**bits - 1)
    for row in rows:
        file = path.parent / row["file"]
        image = np.load(file) if format == "npy" else load_image(file, dtype=torch.float64).numpy()
        image = image.reshape(shape)
        change = image - ed.image.numpy()
        np.testing.assert_allclose(np.sqrt((change**2).mean()), float(row["rms"]), rtol=1e-9, atol=1e-15)
        np.testing.assert_allclose(moved(ed, image), float(row["actual"]), rtol=1e-9, atol=1e-12)
        index, amplitude = int(row["eigenindex"]), float(row["amplitude"])
        if index >= 0:
            wanted = amplitude * ed.eigendistortions[[0, -1][index > 0]].numpy().reshape(shape)
            assert np.abs(change - wanted).max() <= (step if dither is not None else step / 2) + 1e-12
            np.testing.assert_allclose(
                float(row["predicted"]), abs(amplitude) * float(row["eigenvalue"]) ** 0.5, rtol=1e-6
            )
        assert float(row["clipped"]) == 0


def test_dither_keeps_the_mean():
    """A change of a fifth of a level survives."""
    image = torch.full((1, 1, 100, 100), 100.2 / 255, dtype=torch.float64)
    levels = levels_of(image, 0, 1, 255, torch.rand(image.shape, generator=torch.Generator().manual_seed(0)))
    assert set(levels.unique().tolist()) == {100, 101} and abs(float(levels.double().mean()) - 100.2) < 0.02
    assert levels_of(image, 0, 1, 255, None).unique().tolist() == [100]


def test_units():
    ed = synthesized()
    for index in (0, -1):
        (one,) = stimuli.series(ed, index, [0.01], unit="rms")
        np.testing.assert_allclose(one.rms, 0.01)
        (one,) = stimuli.series(ed, index, [0.2])
        np.testing.assert_allclose((one.image - ed.image).norm(), 0.2)
        (one,) = stimuli.series(ed, index, [0.01], unit="threshold")
        np.testing.assert_allclose(one.predicted, 0.01)
        np.testing.assert_allclose(one.amplitude, 0.01 * ed.detection_thresholds()[0][index])
        np.testing.assert_allclose(one.actual, moved(ed, one.image))


def test_with_noise_and_a_window():
    ed = synthesized(noise=noise.Gaussian(4.0), subspace=spaces.zero_mean())
    window = np.hanning(10)[1:-1]
    (one,) = stimuli.series(ed, 0, [0.2], window=window)
    change = (one.image - ed.image).numpy()
    np.testing.assert_allclose(change, 0.2 * ed.eigendistortions[:1].numpy() * window, atol=1e-12)
    np.testing.assert_allclose(one.actual, moved(ed, one.image, 0.5))
    jacobian = torch.func.jacrev(ed.model)(ed.image).reshape(60, 48)
    np.testing.assert_allclose(
        one.predicted, 0.5 * float((jacobian @ torch.as_tensor(change).flatten()).norm()), rtol=1e-9
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_largest_amplitude(dtype):
    ed = synthesized(dtype=dtype)
    for index in (0, -1):
        most = stimuli.max_amplitude(ed, index)
        for one in stimuli.series(ed, index, [most, -most]):
            assert one.clipped == 0 and one.image.min() >= 0 and one.image.max() <= 1
        with pytest.raises(ValueError, match=r"at amplitude .*, .* % of the elements leave the gamut: stay below"):
            stimuli.series(ed, index, [1.05 * most, -1.05 * most])
        one, other = stimuli.series(ed, index, [3 * most, -3 * most], clip=True)
        assert max(one.clipped, other.clipped) > 0 and one.image.min() >= 0 and one.image.max() <= 1
        np.testing.assert_allclose(one.actual, moved(ed, one.image), rtol=1e-4)


def test_nothing_is_written_where_something_would_clip(tmp_path):
    ed = synthesized()
    with pytest.raises(ValueError, match="leave the gamut"):
        stimuli.export(ed, tmp_path / "new", amplitudes=[0.1, 50.0])
    assert not (tmp_path / "new").exists()
    with pytest.warns(RuntimeWarning, match=r"at amplitude 50 of .*, \d+(\.\d)? % of the elements are clipped"):
        path = stimuli.export(ed, tmp_path / "new", amplitudes=[0.1, 50.0], clip=True)
    assert [float(row["clipped"]) > 0 for row in table(path)] == [False, False, True, False, True]


def test_sixteen_bits_are_sixteen_bits(tmp_path):
    ed = synthesized()
    path = stimuli.export(ed, tmp_path, 0, [0.1], bits=16)
    with Image.open(path.parent / "index0_000.png") as file:
        assert file.mode.startswith("I")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"unit": "d"}, ValueError, "unit must be one of 'norm', 'rms', 'threshold'"),
        ({"format": "jpg"}, ValueError, "format must be one of 'png', 'tiff', 'npy'"),
        ({"bits": 12}, ValueError, "bits must be 8 or 16, got 12"),
        ({"gamut": (0.5, 1)}, ValueError, "gamut must hold the image, whose values are from 0.3"),
        ({"amplitudes": []}, ValueError, "amplitudes must be at least one number"),
        (
            {"amplitudes": [1e308], "unit": "rms", "clip": True},
            ValueError,
            "amplitudes must be such that torch.float64",
        ),
        ({"format": "npy", "dither": 0}, ValueError, "npy holds the tensor itself: leave out bits and dither"),
        ({"window": np.full((6, 8), -1.0)}, ValueError, "window must be an array of weights from 0 to 1"),
        ({"amplitudes": [np.nan]}, ValueError, "amplitudes must be an array .*finite"),
        ({"indices": 2}, IndexError, "index must be a position among the 2 eigendistortions found"),
        ({"window": np.ones(3)}, ValueError, r"window must be of the image's shape \(1, 1, 6, 8\), or of its last"),
        ({"window": np.zeros((6, 8))}, ValueError, "window leaves nothing of the distortion"),
        ({"folder": ""}, ValueError, "folder must be a path"),
        ({"dither": "yes"}, TypeError, "dither must be a seed"),
        ({"ed": 3}, TypeError, "ed must be an Eigendistortion, got 3"),
    ],
)
def test_bad_input(tmp_path, change, error, message):
    options = {"ed": synthesized(), "folder": tmp_path, "amplitudes": [0.1]} | change
    with pytest.raises(error, match=message):
        stimuli.export(**options)
    assert not list(tmp_path.iterdir())


def test_one_dither_for_all_files(tmp_path):
    """What a distortion leaves alone is the same in every file; a level that float32 holds is moved by none."""
    ed = synthesized(subspace=spaces.mask(np.arange(48).reshape(6, 8) % 2))
    path = stimuli.export(ed, tmp_path, amplitudes=[0.0, 0.1], dither=0)
    original, *others = (np.asarray(Image.open(tmp_path / row["file"]).copy()) for row in table(path))
    alone = np.arange(48).reshape(6, 8) % 2 == 0
    for pixels, row in zip(others, table(path)[1:], strict=True):
        same = pixels == original
        assert same.all() if float(row["amplitude"]) == 0 else same[alone].all() and not same[~alone].all()
    image = torch.arange(256, dtype=torch.float32).reshape(1, 1, 16, 16) / 255
    draws = torch.rand(image.shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(levels_of(image, 0, 1, 255, draws).flatten(), torch.arange(256))


def test_a_second_export_takes_the_place_of_the_first(tmp_path, monkeypatch):
    ed = synthesized()
    (tmp_path / "mine.png").write_bytes(b"mine")
    stimuli.export(ed, tmp_path, [0, -1], [0.1, 0.2])
    with pytest.raises(FileExistsError, match="take another folder, or pass replace=True"):
        stimuli.export(ed, tmp_path, [0, -2, 0], 0.05)
    path = stimuli.export(ed, tmp_path, [0, -2, 0], 0.05, replace=True)
    assert {row["file"] for row in table(path)} == {"image.png", "index0_000.png"}
    assert {p.name for p in tmp_path.iterdir()} == {"image.png", "index0_000.png", "stimuli.csv", "mine.png"}
    monkeypatch.setattr(stimuli, "picture_of", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        stimuli.export(ed, tmp_path, dither=0, replace=True)
    assert {p.name for p in tmp_path.iterdir()} == {"mine.png"}  # no table of files that aren't there


@pytest.mark.parametrize("is_link", [False, True])
@pytest.mark.parametrize("replace", [False, True])
def test_a_file_that_no_table_lists_stays(tmp_path, is_link, replace):
    folder, own = tmp_path / "folder", tmp_path / "photograph.png"
    folder.mkdir()
    if is_link:
        own.write_bytes(b"mine")
        (folder / "index0_000.png").symlink_to(own)
    else:
        own = folder / "index0_000.png"
        own.write_bytes(b"mine")
    with pytest.raises(FileExistsError, match=r"index0_000.png is there, and no stimuli.csv lists it"):
        stimuli.export(synthesized(), folder, [0], [0.1], replace=replace)
    assert own.read_bytes() == b"mine" and [p.name for p in folder.iterdir()] == ["index0_000.png"]


@pytest.mark.parametrize("after", range(4))
def test_an_interrupted_export_leaves_nothing(tmp_path, monkeypatch, after):
    done = []

    def interrupted(*args):
        if len(done) == after:
            raise KeyboardInterrupt
        done.append(args)
        return picture_of(*args)

    monkeypatch.setattr(stimuli, "picture_of", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stimuli.export(synthesized(), tmp_path, [0], [0.1, 0.2, 0.3])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("scale", [1 / 255**2, 1.0, 1e6])
@pytest.mark.parametrize("smallest", [0.0, 1e-9, 1e-3])
def test_thresholds_in_a_metric_are_those_of_the_table(scale, smallest):
    """In float32, where the smallest can be told from zero, or can't."""
    matrix = torch.diag(torch.linspace(1, 0.5, 48)).float()
    matrix[-1, -1] = smallest
    image = torch.full((6, 8), 0.5)
    ed = Eigendistortion(image, lambda x: matrix @ x.flatten(), metric=np.full((6, 8), scale))
    ed.synthesize("exact", progress=False)
    for index, amplitude in ((0, ed.detection_thresholds()[0][0]), (-1, ed.detection_thresholds()[0][-1])):
        if np.isinf(amplitude):
            with pytest.raises(ValueError, match="the threshold of this distortion is infinite"):
                stimuli.series(ed, index, [1.0], unit="threshold", clip=True)
        else:
            (one,) = stimuli.series(ed, index, [1.0], unit="threshold", clip=True)
            assert one.amplitude == pytest.approx(amplitude, rel=1e-4)


def test_the_gamut_is_what_the_dtype_holds():
    raw = torch.rand(1, 1, 6, 8, generator=torch.Generator().manual_seed(0))
    raw[0, 0, 0, :2] = torch.tensor([0.0, 1.0])
    ed = Eigendistortion((raw - 0.485) / 0.229, torch.sin).synthesize(progress=False, rng=0)
    ends = ((0 - 0.485) / 0.229, (1 - 0.485) / 0.229)
    (one,) = stimuli.series(ed, 0, [0.3], gamut=ends, clip=True)
    assert one.image.min() >= ed.image.min() and one.image.max() <= ed.image.max()
    small = Eigendistortion(raw * 1e-6, torch.sin).synthesize(progress=False, rng=0)
    with pytest.raises(ValueError, match="leave the gamut"):
        stimuli.series(small, 0, [2e-6], gamut=(0, 1e-6))


def test_a_threshold_that_rounding_made():
    matrix = torch.as_tensor(np.random.default_rng(0).standard_normal((10, 48)))
    ed = Eigendistortion(torch.full((6, 8), 0.5, dtype=torch.float64), lambda x: torch.tanh(matrix @ x.flatten() / 9))
    ed.synthesize(progress=False, rng=0)
    for window in (None, np.hanning(8)[::-1]):
        if window is None:
            with pytest.raises(ValueError, match="the threshold of this distortion is infinite"):
                stimuli.series(ed, -1, [1.0], unit="threshold", clip=True, window=window)
        assert stimuli.series(ed, 0, [0.1], unit="threshold", clip=True, window=window)[0].predicted > 0.09


@pytest.mark.filterwarnings("ignore:.*has changed")
def test_a_model_that_has_changed():
    model = torch.nn.Sequential(torch.nn.Linear(8, 5), torch.nn.Tanh()).double()
    ed = Eigendistortion(torch.full((6, 8), 0.5, dtype=torch.float64), model).synthesize(progress=False, rng=0)
    with torch.no_grad():
        model[0].weight.mul_(3)
    for ask in (lambda: stimuli.series(ed, 0, [0.0]), lambda: ed.response_change(0, 0.1), lambda: ed.linear_range(0)):
        with pytest.raises(RuntimeError, match="the model has changed since the distortions were found"):
            ask()


def test_shapes_that_are_no_pictures(tmp_path):
    with pytest.raises(ValueError, match="16 bits are written of grey images alone"):
        stimuli.export(synthesized((3, 4, 4)), tmp_path, bits=16)
    with pytest.raises(ValueError, match=r"a png file takes a grey image, or one of three channels, got shape \(48,\)"):
        stimuli.export(synthesized((48,)), tmp_path)
    with pytest.raises(ValueError, match=r"call synthesize\(\) first"):
        stimuli.max_amplitude(Eigendistortion(torch.rand(4), torch.sin), 0)
    null = Eigendistortion(torch.full((4,), 0.5), lambda x: x[:2] * 2).synthesize(progress=False)
    with pytest.raises(ValueError, match="the threshold of this distortion is infinite"):
        stimuli.series(null, -1, [1.0], unit="threshold")
