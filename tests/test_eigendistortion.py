import copy
import dataclasses
import importlib.metadata
import io
import os
import pickle
import signal
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from helpers import DEVICES, DTYPES, flat_small, small_image, small_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fisherop
from fisherop import ConvergenceError, Eigendistortion
from fisherop.files import fingerprint, name_of
from fisherop.solvers.exact import exact
from fisherop.testing import linear_model, matrix_with_singular_values

MATRIX = matrix_with_singular_values(np.linspace(3, 1, 24), 30, 24)


def linear(shape=(1, 2, 3, 4), dtype=torch.float64):
    return Eigendistortion(torch.linspace(0, 1, 24, dtype=dtype).reshape(shape), linear_model(MATRIX, dtype))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_distortions_are_images(dtype, device):
    image = small_image(dtype, device)
    ed = Eigendistortion(image, small_model(dtype, device))
    assert ed.eigendistortions is None and ed.eigenvalues is None and ed.eigenindex is None and ed.jacobian is None
    assert repr(ed) == "<Eigendistortion of Small at an image (1, 2, 6, 4): not synthesized>"
    assert ed.synthesize(k=2, rng=0, tol=1e-5, progress=False) is ed
    assert repr(ed).endswith("4 eigendistortions>")
    assert ed.eigendistortions.shape == (4, 2, 6, 4) and list(ed.eigenindex) == [0, 1, 46, 47]
    for tensor in (ed.eigendistortions, ed.eigenvalues):
        assert tensor.device == image.device
    assert ed.eigendistortions.dtype == dtype and ed.eigenvalues.dtype == torch.float64
    assert torch.equal(ed.image, image)
    # a step along each changes the response by √λ, in an independent float64 product
    truth = Eigendistortion(image.double(), small_model(device=device)).operator.linearization
    lengths = torch.linalg.vector_norm(truth.jvp(ed.eigendistortions[:, None].double()), dim=1)
    torch.testing.assert_close(lengths**2, ed.eigenvalues.double(), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((24,), (2, 24)), ((1, 24), (2, 24)), ((4, 6), (2, 4, 6)), ((1, 4, 6), (2, 4, 6)), ((1, 1, 4, 6), (2, 1, 4, 6))],
)
def test_leading_one_is_dropped(shape, expected):
    assert linear(shape).synthesize(rng=0, progress=False).eigendistortions.shape == expected


def test_image_of_one_pixel():
    ed = Eigendistortion(torch.tensor([2.0]).double(), lambda x: 3 * x).synthesize("exact", progress=False)
    assert ed.eigendistortions.shape == (1, 1) and ed.eigenvalues == 9


def test_exact_gives_everything_and_keeps_the_jacobian():
    ed = linear().synthesize("exact", progress=False)
    assert ed.eigendistortions.shape == (24, 2, 3, 4)
    np.testing.assert_allclose(ed.jacobian, MATRIX, atol=1e-13)
    assert linear().synthesize("exact", k=1, progress=False).eigenvalues.shape == (2,)
    ed = linear()
    assert torch.equal(ed.compute_jacobian(progress=False), ed.jacobian)


def test_the_established_arguments():
    ed = linear().synthesize("power", 2, 3000, stop_criterion=1e-5, rng=0, progress=False)
    assert list(ed.eigenindex) == [0, 1, 22, 23] and ed.result.tol == 1e-5 and ed.result.method == "power"
    ed = linear()
    with pytest.warns(RuntimeWarning, match="did not reach tol"):
        ed.synthesize("randomized_svd", k=2, p=4, q=3, rng=0, on_failure="warn", progress=False)
    assert list(ed.eigenindex) == [0, 1]
    with pytest.raises(ValueError, match="tol=1e-06 and stop_criterion=1e-07 mean the same: give one of them"):
        ed.synthesize(tol=1e-6, stop_criterion=1e-7)
    with pytest.raises(TypeError, match="method 'power' has no option 'p'; its options: none"):
        ed.synthesize("power", p=3)


def test_failure_leaves_the_object_as_it_was():
    ed = linear().synthesize(rng=0, progress=False)
    before = ed.result
    with pytest.raises(ConvergenceError) as caught:
        ed.synthesize("power", max_iter=2, rng=0, progress=False)
    assert ed.result is before and caught.value.result.method == "power"


@given(seed=st.integers(0, 2**32 - 1), dtype=st.sampled_from(DTYPES), shape=st.sampled_from([(), (1,), (2, 3)]))
@settings(max_examples=20)
def test_thresholds_and_changes_of_the_response(seed, dtype, shape):
    """A linear model moves by √λ · scale at any scale, so by 1 at the threshold; x ↦ A (x + x²) does so near zero."""
    rng = np.random.default_rng(seed)
    model = linear_model(MATRIX, dtype)
    for image, bent in ((torch.rand(1, 2, 3, 4, dtype=dtype), 0.0), (torch.zeros(1, 2, 3, 4, dtype=dtype), 1.0)):
        ed = Eigendistortion(image, lambda x, bent=bent: model(x + bent * x.square()))
        ed.synthesize(k=2, rng=seed, tol=1e-5, progress=False)
        amplitudes, rms = ed.detection_thresholds()
        np.testing.assert_allclose(amplitudes, [1 / 3, 1 / (3 - 2 / 23), 1 / (1 + 2 / 23), 1], rtol=1e-4)
        np.testing.assert_allclose(rms, amplitudes / 24**0.5)
        scale = rng.uniform(-2, 2, shape)
        for i in (0, 1, -2, -1):
            predicted, actual = ed.response_change(i, scale)
            assert predicted.shape == actual.shape == shape
            np.testing.assert_allclose(predicted, np.abs(scale) / amplitudes[i])
            step = scale[..., None] * ed.eigendistortions[i].double().numpy().ravel()
            truth = np.linalg.norm((step + bent * step**2) @ MATRIX.T, axis=-1)
            np.testing.assert_allclose(actual, truth, rtol=1e-3, atol=1e-5 if dtype == torch.float32 else 1e-12)
            np.testing.assert_allclose(*ed.response_change(i, 1e-4), rtol=2e-2 if dtype == torch.float32 else 1e-3)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float64, 1e-200), (torch.float64, 1e300), (torch.float32, 1e37)])
def test_changes_whose_squares_leave_the_range(dtype, size):
    image = torch.full((4,), size, dtype=dtype)
    gains = torch.tensor([1.0, 0.5, 0.2, 0.1], dtype=dtype)
    ed = Eigendistortion(image, lambda x: x * gains).synthesize("exact", progress=False)
    np.testing.assert_allclose(*ed.response_change(1, [size, -3 * size]), rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_step_from_a_large_image_is_the_scale_s_fault(dtype):
    image = torch.tensor([0.9, 0.2], dtype=dtype) * torch.finfo(dtype).max
    ed = Eigendistortion(image, lambda x: x * torch.tensor([1.0, 0.5], dtype=dtype)).synthesize("exact", progress=False)
    with pytest.raises(ValueError, match=f"scale must be steps that {dtype} can hold"):
        ed.response_change(0, torch.finfo(dtype).max / 4)


def test_thresholds_of_what_is_not_noticed_at_all():
    ed = Eigendistortion(torch.ones(1, 4, dtype=torch.float64), lambda x: x[:, :2]).synthesize("exact", progress=False)
    np.testing.assert_array_equal(ed.detection_thresholds()[0], [1, 1, np.inf, np.inf])
    with pytest.raises(IndexError, match="a position among the 4 eigendistortions found, from -4 to 3, got 4"):
        ed.response_change(4, 1.0)
    for method in (linear().detection_thresholds, lambda: linear().response_change(0, 1.0)):
        with pytest.raises(ValueError, match=r"no eigendistortions yet: call synthesize\(\) first"):
            method()


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "ed.npz"
    linear().synthesize("golub_kahan", k=2, rng=0, progress=False).save(path)
    return path


ENDS = st.sampled_from(["both", "largest", "smallest"])


@given(
    st.integers(0, 999),
    st.lists(st.tuples(st.integers(1, 4), ENDS, st.floats(-8, -3)), min_size=2, max_size=4),
    st.sampled_from(["gaps", "cluster", "repeated", "null", "gapless"]),
)
@settings(max_examples=40)
def test_what_is_asked_for_last_is_the_answer(seed, steps, kind):
    """Whatever was there before."""
    sigma = {
        "gaps": np.linspace(3, 1, 40),
        "cluster": np.r_[3.0, np.linspace(2, 1, 34), 1e-3 + 1e-6 * np.arange(5)[::-1]],
        "repeated": np.r_[np.full(3, 3.0), np.linspace(2, 1, 34), np.full(3, 0.5)],
        "null": np.r_[np.linspace(3, 1, 30), np.zeros(10)],
        "gapless": np.r_[
            np.linspace(3, 1, 10), 0.03 * np.linspace(1, 0, 30)
        ],  # what is null apart may not be so jointly
    }[kind]
    matrix = matrix_with_singular_values(sigma, 50, 40, rng=seed)
    ed = Eigendistortion(torch.linspace(0, 1, 40, dtype=torch.float64), linear_model(matrix))
    for k, which, decades in steps:
        ed.synthesize("golub_kahan", k, which=which, tol=10**decades, rng=seed, progress=False)
        result, top = ed.result, 9.0
        expected = np.r_[: k if which != "smallest" else 0, 40 - k if which != "largest" else 40 : 40]
        assert result.eigenindex.tolist() == expected.tolist() and result.converged.all() and result.tol == 10**decades
        np.testing.assert_allclose(result.eigenvalues, sigma[expected] ** 2, rtol=0, atol=6 * result.tol * top)
        again = ed.synthesize("golub_kahan", k, which=which, tol=10**decades, progress=False)
        assert again.result is result


def test_what_holds_costs_no_search():
    matrix = matrix_with_singular_values(np.linspace(3, 1, 300), 320, 300)
    ed = Eigendistortion(torch.linspace(0, 1, 300, dtype=torch.float64), linear_model(matrix))
    first = ed.synthesize(k=2, rng=0, progress=False).result
    assert first.method == "golub_kahan"
    for arguments in ({"k": 1}, {"k": 2, "tol": 1e-4}, {"k": 2, "which": "smallest", "tol": 1e-6}):
        ed.result, before = first, ed.operator.n_products
        assert ed.synthesize(rng=1, progress=False, **arguments).result.converged.all()
        assert ed.operator.n_products - before <= 4 / 2 + 4 + 2 + 30  # rotation, certificate, noise, probe
    ed.result = first
    assert ed.synthesize(k=2, progress=False).result is first
    before = ed.operator.n_products
    ed.synthesize(k=2, rng=1, v0=first.eigenvectors, progress=False)  # which says where to begin
    assert ed.operator.n_products - before > 40


@pytest.mark.parametrize("device", DEVICES)
def test_another_precision(device):
    model = small_model()
    ed = Eigendistortion(small_image(), model)
    ed.synthesize(k=2, rng=0, tol=1e-4, progress=False)
    ed.compute_jacobian(progress=False)
    before = ed.result
    assert ed.to(torch.float64) is ed and ed.model is model and ed.result is before
    assert ed.to(device, torch.float32) is ed
    assert ed.image.dtype == ed.eigendistortions.dtype == ed.jacobian.dtype == torch.float32
    assert ed.image.device.type == device and ed.model is not model
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    result = ed.result
    assert result.converged.all() and result.eigenvectors.dtype == np.float32 and 1e-9 < result.noise < 1e-4
    np.testing.assert_allclose(result.eigenvalues, before.eigenvalues, rtol=1e-4)
    np.testing.assert_allclose(result.eigenvectors, before.eigenvectors, atol=1e-2)
    ed.to(dtype=torch.float64)
    assert ed.result.eigenvectors.dtype == np.float64 and ed.result.noise < 1e-12
    ed.result = None
    assert ed.to(torch.float32).result is None


def test_what_does_not_hold_in_another_precision_warns():
    ed = Eigendistortion(small_image(torch.float64), small_model()).synthesize("exact", k=1, tol=1e-11, progress=False)
    with pytest.warns(RuntimeWarning, match=r"did not reach tol=1e-11 .*(?s:.*)rounding alone gives residuals"):
        ed.to(torch.float32)
    assert not ed.result.converged.all()
    before = ed.result
    for bad in (torch.float16, torch.int64):
        with pytest.raises((TypeError, ValueError), match=r"float32 or float64|floating"):
            ed.to(bad)
    assert ed.image.dtype == torch.float32 and ed.result is before


@pytest.mark.parametrize("dtype", DTYPES)
def test_files_hold_everything(dtype, tmp_path):
    ed = linear(dtype=dtype).synthesize("golub_kahan", k=2, rng=0, tol=1e-5, progress=False)
    ed.save(tmp_path / "no ending")
    assert [path.name for path in tmp_path.iterdir()] == ["no ending"]
    for other in (
        linear(dtype=dtype).load(tmp_path / "no ending"),
        Eigendistortion.from_file(tmp_path / "no ending", linear_model(MATRIX, dtype)),
    ):
        assert torch.equal(other.image, ed.image) and torch.equal(other.eigendistortions, ed.eigendistortions)
        for field in dataclasses.fields(ed.result):
            if field.name != "details":
                np.testing.assert_array_equal(getattr(other.result, field.name), getattr(ed.result, field.name))
        assert str(other.result) == str(ed.result) and other.result.converged.all()
        np.testing.assert_array_equal(
            other.result.details["history"][-1]["largest"], ed.result.details["history"][-1]["largest"]
        )
    with np.load(tmp_path / "no ending", allow_pickle=False) as archive:
        assert set(archive["versions"].tolist()) > {f"torch {torch.__version__}", f"numpy {np.__version__}"}


def test_files_name_the_libraries_as_these_name_themselves(tmp_path, monkeypatch):
    """Also where a package can be imported but isn't installed, and with the build, which an installer leaves out."""

    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(torch, "__version__", "9.8.7+cu999")
    ed = linear().synthesize("exact", k=1, progress=False)
    ed.save(tmp_path / "ed.npz")
    with np.load(tmp_path / "ed.npz") as archive:
        first, second, *rest = archive["versions"].tolist()
        assert archive["model"] == "fisherop.testing.linear_model.<locals>.model"
        assert archive["object"] == "fisherop.eigendistortion.Eigendistortion"
        assert archive["response_shape"].tolist() == [30]
    assert (first, second) == (f"fisherop {fisherop.__version__}", "torch 9.8.7+cu999")
    assert [text.split()[0] for text in rest] == ["numpy", "scipy"]
    assert name_of(nn.ReLU()) == "torch.nn.modules.activation.ReLU" and name_of(torch.relu).endswith("relu")


@pytest.mark.parametrize("every", [23, pytest.param(1, marks=pytest.mark.slow)])
def test_files_cut_short_anywhere(saved, every):
    whole, ed = saved.read_bytes(), linear()
    for n in range(0, len(whole), every):
        saved.write_bytes(whole[:n])
        with pytest.raises(ValueError, match="is damaged or was cut short, so that nothing was loaded"):
            ed.load(saved)
    assert ed.result is None
    saved.write_bytes(whole)
    ed.load(saved)


def test_files_altered_in_any_field(saved):
    with np.load(saved) as archive:
        fields = dict(archive)

    def alter(array):
        return np.char.add(array, "x") if array.dtype.kind == "U" else array + array.dtype.type(1)

    for name in fields:
        np.savez(saved, **fields | {name: alter(fields[name])})
        expected = "has format 2, this version of fisherop reads up to 1" if name == "format" else "its checksum"
        with pytest.raises(ValueError, match=expected):
            linear().load(saved)
        if name != "checksum":
            np.savez(saved, **fields | {name: fields[name][None]})
            with pytest.raises(ValueError, match=r"is damaged: its (format is|checksum)"):
                linear().load(saved)
        np.savez(saved, **{other: array for other, array in fields.items() if other != name})
        kind = "is no file of eigendistortions: it holds " if name in ("format", "checksum") else "its checksum"
        with pytest.raises(ValueError, match=kind):
            linear().load(saved)


@pytest.mark.parametrize("wrong", [0, 1.0, np.array([1]), "1"])
def test_files_of_an_impossible_format(saved, wrong):
    with np.load(saved) as archive:
        np.savez(saved, **dict(archive) | {"format": wrong})
    with pytest.raises(ValueError, match="is damaged: its format is"):
        linear().load(saved)


def test_files_of_another_kind_image_or_model(saved):
    image, model = linear().image, linear().model
    for other, message in (
        (
            Eigendistortion(image.float(), linear_model(MATRIX, torch.float32)),
            r"image \(1, 2, 3, 4\) of float64, this",
        ),
        (linear((1, 2, 4, 3)), r"this one is \(1, 2, 4, 3\) of float64: use Eigendistortion.from_file"),
        (Eigendistortion(image + 0.25, model), r"another image, which differs from this one by up to 0\.25: use"),
        (Eigendistortion(image, lambda x: model(x)[:-1]), "another model, with 30 responses; this one has 29"),
        (Eigendistortion(image, lambda x: 1.5 * model(x)), r"another model: its response .* by 0\.5 of its norm"),
    ):
        with pytest.raises(ValueError, match=message):
            other.load(saved)
        assert other.result is None
    with pytest.raises(ValueError, match="another model"):
        Eigendistortion.from_file(saved, lambda x: 1.5 * model(x))
    Eigendistortion(image, lambda x: (1 + 1e-12) * model(x)).load(saved)  # rounding
    np.save(saved.with_suffix(".npy"), MATRIX)
    saved.with_suffix(".txt").write_text("eigendistortions")
    np.savez(saved, MATRIX)
    for path, message in ((".npy", "it is no .npz file"), (".txt", "it is no .npz file"), (".npz", "it holds arr_0")):
        with pytest.raises(ValueError, match=f"is no file of eigendistortions: {message}"):
            linear().load(saved.with_suffix(path))
    torch.save({"image": image}, saved)
    with pytest.raises(ValueError, match=r"torch\.save wrote it, as plenoptic does\. Open it with plenoptic"):
        linear().load(saved)
    with pytest.raises(FileNotFoundError):
        linear().load(saved.with_name("nothing"))
    with pytest.raises(ValueError, match=r"no eigendistortions yet: call synthesize\(\) first"):
        linear().save(saved)


def test_details_that_no_file_can_hold(saved):
    def solver(operator, k, which, **options):
        return dataclasses.replace(exact(operator, k, which, **options), details={"graph": object()})

    old = saved.read_bytes()
    with pytest.raises(TypeError, match="details hold a object, which can't be saved: let the solver give arrays"):
        linear().synthesize(solver, k=1, progress=False).save(saved)
    assert saved.read_bytes() == old and list(saved.parent.iterdir()) == [saved]


def test_a_crash_while_saving_leaves_the_old_file(saved, monkeypatch):
    old = saved.read_bytes()

    def crash(file):
        assert saved.read_bytes() == old and len(list(saved.parent.iterdir())) == 2
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(KeyboardInterrupt):
        linear().synthesize(rng=0, progress=False).save(saved)
    assert saved.read_bytes() == old and list(saved.parent.iterdir()) == [saved]


KILLED = """
import os, signal, sys
import numpy as np, torch
from fisherop import Eigendistortion

def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def half(file, **arrays):
    whole(file, **arrays)
    file.truncate(file.tell() // 2)
    kill()

path, where = sys.argv[1:]
whole = np.savez
ed = Eigendistortion(torch.ones(1, 24).double(), lambda x: 2 * x).synthesize("exact", progress=False)
np.savez, os.fsync, os.replace = (f if where == name else g for name, f, g in (
    ("savez", half, np.savez), ("fsync", kill, os.fsync), ("replace", kill, os.replace)))
ed.save(path)
"""


@pytest.mark.skipif(os.name != "posix", reason="no other system has SIGKILL")
@pytest.mark.parametrize("where", ["savez", "fsync", "replace"])
def test_a_kill_while_saving_leaves_the_old_file(saved, where):
    old = saved.read_bytes()
    done = subprocess.run([sys.executable, "-c", KILLED, str(saved), where], check=False)
    assert done.returncode == -signal.SIGKILL
    assert saved.read_bytes() == old
    linear().load(saved)
    linear().synthesize(rng=0, progress=False).save(saved)
    linear().load(saved)


@settings(deadline=None)
@given(
    size=st.integers(1, 2000), difference=st.floats(1e-3, 1e3), seed=st.integers(0, 2**32 - 1), one=st.booleans()
)  # fmt: skip
def test_fingerprints_keep_distances(size, difference, seed, one):
    rng = np.random.default_rng(seed)
    a, change = rng.standard_normal(size), np.eye(size)[seed % size] if one else rng.standard_normal(size)
    change *= difference / np.linalg.norm(change)
    a, b = (fingerprint(torch.as_tensor(x)) for x in (a, a + change))
    assert 0.5 * difference <= np.linalg.norm(b - a) <= 1.6 * difference


WAYS = {
    **{f"pickle {p}": lambda ed, p=p: pickle.loads(pickle.dumps(ed, p)) for p in range(2, pickle.HIGHEST_PROTOCOL + 1)},
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
}


class Named(Eigendistortion):
    """A class of a user's own, which takes other arguments."""

    def __init__(self, name):
        super().__init__(small_image(), small_model(), engine="functional", chunk_size=5)
        self.name = name


@pytest.mark.parametrize("way", WAYS)
def test_copies_hold_everything(way):
    ed = Named("mine")
    assert WAYS[way](ed).result is None
    ed.synthesize("golub_kahan", k=2, rng=0, tol=1e-5, progress=False)
    other = WAYS[way](ed)
    assert type(other) is Named and other.name == "mine" and torch.equal(other.image, ed.image)
    assert str(other.result) == str(ed.result) and other.result.converged.all()
    for field in dataclasses.fields(ed.result):
        if field.name != "details":
            np.testing.assert_array_equal(getattr(other.result, field.name), getattr(ed.result, field.name))
    assert not other.result.eigenvectors.flags.writeable
    assert other.operator.linearization.engine_report[0].startswith("functional: in use, 5 vectors")
    v = np.random.default_rng(0).standard_normal(48)
    np.testing.assert_array_equal(other.operator @ v, ed.operator @ v)

    before = flat_small(ed.model, ed.image)
    with torch.no_grad():
        next(other.model.parameters()).zero_()
    assert torch.equal(flat_small(ed.model, ed.image), before) == (way != "copy")  # a shallow copy shares the model
    other.result = None
    assert ed.result is not None


@pytest.mark.parametrize("way", WAYS)
def test_a_search_stays_with_its_object(way):
    """A copy searches anew, and changes nothing of the search that the object can go on from."""
    ed = Eigendistortion(small_image(), small_model())
    ed.synthesize("golub_kahan", rng=0, tol=1e-2, progress=False)
    other = WAYS[way](ed)
    for one in (other, ed):
        one.synthesize("golub_kahan", k=3, rng=1, tol=1e-6, progress=False)
        assert one.result.converged.all() and list(one.eigenindex) == [0, 1, 2, 45, 46, 47]
    np.testing.assert_allclose(other.result.eigenvalues, ed.result.eigenvalues, atol=1e-5 * ed.result.eigenvalues[0])


ELSEWHERE = """
import pickle, sys
ed = pickle.load(sys.stdin.buffer)
print(ed, (ed.operator @ ed.result.eigenvectors).sum() / (ed.result.eigenvalues * ed.result.eigenvectors).sum())
"""


def test_another_process_takes_a_pickle():
    model = nn.Linear(24, 30).double()
    ed = Eigendistortion(torch.linspace(0, 1, 24).double(), model).synthesize("exact", k=1, progress=False)
    done = subprocess.run([sys.executable, "-c", ELSEWHERE], input=pickle.dumps(ed), capture_output=True, check=True)
    head, ratio = done.stdout.decode().rsplit(None, 1)
    assert head == "<Eigendistortion of Linear at an image (24,): 2 eigendistortions>" and abs(float(ratio) - 1) < 1e-9


class HoldsALambda(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = lambda x: 2 * x

    def forward(self, x):
        return self.scale(x)


class Gained(Eigendistortion):
    """Its model is a method of its own."""

    def __init__(self, image, gain):
        self.gain = gain
        super().__init__(image, self.respond)

    def respond(self, x):
        return self.gain * x.sin()


def test_a_model_that_refers_to_its_eigendistortion():
    ed = Gained(torch.linspace(0, 1, 24).double()[None], 3.0).synthesize(rng=0, progress=False)
    for other in (copy.deepcopy(ed), pickle.loads(pickle.dumps(ed))):
        assert other.model.__self__ is other and other.gain == 3.0
        assert np.array_equal(other.result.eigenvectors, ed.result.eigenvectors)
    operator = pickle.loads(pickle.dumps(ed.operator))
    np.testing.assert_array_equal(operator @ np.ones(24), ed.operator @ np.ones(24))


def test_a_copy_in_inference_mode():
    ed = Eigendistortion(small_image(), small_model()).synthesize("exact", k=1, progress=False)
    with torch.inference_mode():
        other = copy.deepcopy(ed)
    assert np.array_equal(other.operator @ np.ones(48), ed.operator @ np.ones(48))


@pytest.mark.parametrize(("model", "name"), [(lambda x: 2 * x, "<lambda>"), (HoldsALambda(), "HoldsALambda")])
def test_models_that_cannot_be_pickled(model, name, monkeypatch):
    ed = Eigendistortion(torch.ones(1, 24).double(), model).synthesize("exact", k=1, progress=False)
    advice = rf"the model .*{name} can't be pickled: .*<lambda>.*save\(path\), then Eigendistortion\.from_file\(path"
    monkeypatch.setitem(sys.modules, "cloudpickle", types.SimpleNamespace(dumps=pickle.dumps))  # as joblib loads it
    with pytest.raises(pickle.PicklingError, match=advice) as caught:
        pickle.dumps(ed)
    assert caught.value.__cause__ is not None
    assert copy.deepcopy(ed).result.converged.all() and copy.copy(ed).model is model

    class Cloud(pickle.Pickler):  # takes functions by value, as cloudpickle does
        def reducer_override(self, x):
            return (eval, ("lambda x: 2 * x",)) if getattr(x, "__name__", "") == "<lambda>" else NotImplemented

    cloudpickle = {"__name__": "cloudpickle", "Cloud": Cloud}
    exec("def dump(x, file):\n    Cloud(file).dump(x)\n", cloudpickle)
    cloudpickle["dump"](ed, file := io.BytesIO())
    other = pickle.loads(file.getvalue())
    np.testing.assert_array_equal(other.operator.matvec(np.ones(24)), 4 * np.ones(24))
