"""A search in a file: what a killed process loses, and what is refused."""

import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import DTYPES

import fisherop.checkpoint
import fisherop.solve
from fisherop import ConvergenceError, Eigendistortion
from fisherop.files import _checksum
from fisherop.testing import linear_model, matrix_with_singular_values

N = 150
SIGMA = np.r_[3, 3, 3, 2.6, 2.3, np.linspace(2, 1, N - 10), 0.5, 0.4, 0.3, 0.3, 0.3]
MATRIX = matrix_with_singular_values(SIGMA, N + 20, N)


class Killed(BaseException):
    """What no code catches."""


def distortion(dtype=torch.float64, matrix=MATRIX, image=None):
    image = torch.linspace(0, 1, N, dtype=dtype) if image is None else image
    return Eigendistortion(image, linear_model(matrix, dtype))


def killed(path, products, k=1, error=Killed, dtype=torch.float64, **options):
    """A search that ends at that many products, at a step of it; how many there were in truth."""
    ed = distortion(dtype)
    lin, start = ed.operator.linearization, ed.operator.n_products

    def on_product(_):
        if lin.n_products - start >= products:
            lin.on_product = None
            raise error

    lin.on_product = on_product
    with pytest.raises(error):
        ed.synthesize(k=k, rng=0, progress=False, checkpoint=path, checkpoint_seconds=0, **options)
    return lin.n_products - start


def cost(ed, **options):
    before = ed.operator.n_products
    ed.synthesize("golub_kahan", progress=False, **options)
    return ed.operator.n_products - before


@pytest.fixture
def at_every_step(monkeypatch):
    monkeypatch.setattr(fisherop.checkpoint, "_RARELY", 0)


@pytest.mark.usefixtures("at_every_step")
@pytest.mark.parametrize("options", [{}, {"max_basis": 45}], ids=["whole", "restarted"])
@pytest.mark.parametrize(("dtype", "tol"), [pytest.param(DTYPES[0], 1e-4, marks=pytest.mark.slow), (DTYPES[1], 1e-6)])
def test_any_product_goes_on(tmp_path, dtype, tol, options):
    """In the first run, in the look for missed eigenvalues, and where those join: at most a tenth more products."""
    path, whole = tmp_path / "search.npz", distortion(dtype)
    total = cost(whole, k=3, rng=0, tol=tol, **options)
    searched = whole.result.details["history"][-1]["n_products"]
    for products in np.linspace(3, searched, 9):
        spent = killed(path, products, 3, tol=tol, dtype=dtype, **options)
        ed = distortion(dtype)
        more = cost(ed, k=3, rng=7, tol=tol, checkpoint=path, **options)
        assert spent + more <= 1.1 * total + 2
        assert 0 <= spent + more - ed.result.n_products <= 9  # since the last step that was written
        assert ed.result.converged.all() and not path.exists()
        np.testing.assert_allclose(ed.result.eigenvalues, whole.result.eigenvalues, atol=9 * tol)
        counts = [entry["n_products"] for entry in ed.result.details["history"]]
        assert counts == sorted(counts) and counts[0] == whole.result.details["history"][0]["n_products"]


@pytest.mark.usefixtures("at_every_step")
@pytest.mark.parametrize("phase", ["main", "probe", "join"])
def test_the_first_step_of_each_phase_goes_on(tmp_path, monkeypatch, phase):
    path, whole, seen = tmp_path / "search.npz", distortion(), []
    total = cost(whole, k=3, rng=0)
    offer = fisherop.checkpoint.Checkpoint.offer

    def stop(self, search, at_once=False):
        offer(self, search, at_once)
        if search.phase == phase and not seen:
            seen.append(search.J.n_products - search.log.before)
            raise Killed

    monkeypatch.setattr(fisherop.checkpoint.Checkpoint, "offer", stop)
    with pytest.raises(Killed):
        cost(distortion(), k=3, rng=0, checkpoint=path, checkpoint_seconds=0)
    with np.load(path) as archive:
        assert archive["phase"] == phase
    ed = distortion()
    assert seen[0] + cost(ed, k=3, checkpoint=path) <= total + 2
    np.testing.assert_allclose(ed.result.eigenvalues, whole.result.eigenvalues, atol=9e-6)


CHILD = """
import os, signal, sys, time
import torch
torch.set_num_threads(1)
sys.path[:0] = [sys.argv[1]]
import fisherop.checkpoint
import fisherop.solve
from test_checkpoint import distortion
fisherop.checkpoint._RARELY = 1  # for a disk that is slow beside these products
ed = distortion()
lin, start, end = ed.operator.linearization, ed.operator.n_products, float(sys.argv[3])
def on_product(_):
    time.sleep(0.02)
    if lin.n_products - start >= end:
        os.kill(os.getpid(), signal.SIGKILL)
lin.on_product = on_product
ed.synthesize(k=3, rng=0, progress=False, checkpoint=sys.argv[2], checkpoint_seconds=0.01)
print(lin.n_products - start, ed.result.converged.all())
"""


@pytest.mark.skipif(os.name != "posix", reason="no other system has SIGKILL")
def test_a_killed_process_goes_on_in_another(tmp_path):
    path, here = tmp_path / "search.npz", os.path.dirname(__file__)

    def process(end):
        return subprocess.run([sys.executable, "-c", CHILD, here, str(path), str(end)], capture_output=True, text=True)

    total = cost(distortion(), k=3, rng=0)
    assert process(60).returncode == -signal.SIGKILL and path.exists()
    done = process(np.inf)
    assert done.returncode == 0, done.stderr
    more, converged = done.stdout.split()
    assert 60 + float(more) <= 1.1 * total and converged == "True"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("at_every_step")
def test_an_interrupt_leaves_the_file_as_it_is_then(tmp_path):
    path = tmp_path / "search.npz"
    total = cost(distortion(), rng=0)
    spent = killed(path, 15, error=KeyboardInterrupt)  # which certifies, too
    with np.load(path) as archive:
        assert abs(archive["spent"] - 15) <= 1
    assert cost(distortion(), checkpoint=path) <= total - 14 + 1 and spent > 15


def test_an_interrupt_where_the_file_can_not_be_written(tmp_path):
    """Ctrl-C stays Ctrl-C, and what was found is certified."""
    folder = tmp_path / "gone"
    folder.mkdir()
    ed = distortion()
    lin, start = ed.operator.linearization, ed.operator.n_products

    def on_product(_):
        if lin.n_products - start >= 15:
            lin.on_product = None
            shutil.rmtree(folder)
            raise KeyboardInterrupt

    lin.on_product = on_product
    with pytest.warns(RuntimeWarning, match="could not be written to its checkpoint"), pytest.raises(KeyboardInterrupt):
        ed.synthesize(rng=0, progress=False, checkpoint=folder / "search.npz", checkpoint_seconds=1000)
    assert len(ed.result.eigenvalues) == 2
    assert ed.synthesize(progress=False).result.converged.all()


def test_an_interrupt_while_the_answer_is_certified_removes_the_file(tmp_path, monkeypatch):
    path, ed, certify = tmp_path / "search.npz", distortion(), fisherop.solve.certify

    def interrupted(*args, **kwargs):
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(fisherop.solve, "certify", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ed.synthesize(rng=0, progress=False, checkpoint=path, checkpoint_seconds=0)
    assert ed.result.converged.all() and not path.exists() and fisherop.solve.certify is certify


def test_a_model_that_differs_by_more_than_the_tolerance_leaves(tmp_path):
    """In float32 too: its search would be refuted in the end, and its file be gone."""
    path = tmp_path / "search.npz"
    with pytest.raises(ConvergenceError):
        distortion(torch.float32).synthesize(max_iter=8, tol=1e-5, rng=0, progress=False, checkpoint=path)
    other = MATRIX * (1 + 1e-4 * np.random.default_rng(0).standard_normal(MATRIX.shape))
    with pytest.raises(ValueError, match="of another model: F times a vector differs by"):
        distortion(torch.float32, other).synthesize(tol=1e-5, progress=False, checkpoint=path)
    assert path.exists()


def test_too_few_iterations_leave_it_and_the_end_removes_it(tmp_path):
    path, ed = tmp_path / "search.npz", distortion()
    with pytest.raises(ConvergenceError, match="took 8 steps"):
        ed.synthesize(max_iter=8, rng=0, progress=False, checkpoint=path)
    assert path.exists()
    with pytest.warns(RuntimeWarning, match="took 8 steps"):
        distortion().synthesize(max_iter=8, progress=False, checkpoint=path, on_failure="warn")
    ed.synthesize(progress=False, checkpoint=path)
    assert ed.result.converged.all() and not path.exists() and ed.result.n_products > 16
    path.write_text("mine")
    assert ed.synthesize(progress=False, checkpoint=path).result.converged.all()  # searches nothing
    assert path.read_text() == "mine"


def test_a_link_stays_and_what_it_points_to_goes(tmp_path):
    path, link = tmp_path / "search.npz", tmp_path / "link"
    link.symlink_to(path)
    with pytest.raises(ConvergenceError):
        distortion().synthesize(max_iter=8, rng=0, progress=False, checkpoint=link)
    assert path.exists() and link.is_symlink()
    distortion().synthesize(progress=False, checkpoint=link)
    assert not path.exists() and link.is_symlink()


@pytest.mark.parametrize("stream", ["PCG64", "PCG64DXSM", "MT19937", "Philox", "SFC64"])
def test_every_stream_goes_on(tmp_path, stream):
    """With the same draws: after convergence, the look for missed eigenvalues takes random vectors."""
    path = tmp_path / "search.npz"

    def rng():
        return np.random.Generator(getattr(np.random, stream)(5))

    whole, ed = distortion(), distortion()
    cost(whole, k=2, rng=rng())
    with pytest.raises(ConvergenceError):
        distortion().synthesize(k=2, max_iter=20, rng=rng(), progress=False, checkpoint=path)
    cost(ed, k=2, checkpoint=path)
    np.testing.assert_allclose(ed.result.eigenvectors, whole.result.eigenvectors, atol=1e-4)


def test_arguments_that_no_checkpoint_takes(tmp_path):
    path, ed = tmp_path / "search.npz", distortion()
    for arguments, message in (
        ({"method": "power"}, r"checkpoint needs method='golub_kahan' or 'auto', got 'power': leave checkpoint out"),
        ({"v0": np.ones(N)}, "checkpoint can't be combined with v0"),
        ({"orthogonal_to": np.eye(N)[:, :1]}, "checkpoint can't be combined with orthogonal_to"),
        ({"checkpoint_seconds": -1}, "checkpoint_seconds must be a number of seconds from 0, got -1"),
        ({"checkpoint_seconds": "1"}, "checkpoint_seconds must be a number of seconds from 0, got '1'"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            ed.synthesize(checkpoint=path, progress=False, **arguments)
    with pytest.raises(FileNotFoundError):
        ed.synthesize(checkpoint=tmp_path / "nothing" / "search.npz", progress=False)
    assert ed.result is None and ed.synthesize(rng=0, progress=False).result.converged.all()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A file in the look for missed eigenvalues."""
    path = tmp_path_factory.mktemp("checkpoint") / "search.npz"
    whole = distortion()
    cost(whole, k=3, rng=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fisherop.checkpoint, "_RARELY", 0)
        killed(path, whole.result.details["history"][-1]["n_products"] - 15, 3)
    return path


def test_what_differs_is_named(written, tmp_path):
    other = torch.linspace(0, 1, N, dtype=torch.float64)
    images = {"other": other + 0.25, "shape": other[None], "float32": other.float()}
    bent = matrix_with_singular_values(SIGMA, N + 20, N, rng=5)
    f = linear_model(MATRIX)
    # the same response at the image, and another Jacobian
    same = Eigendistortion(other, lambda x: f(other) + f((x - other) * torch.linspace(1, 2, N, dtype=torch.float64)))
    before = written.read_bytes()
    for ed, arguments, message in (
        (distortion(image=images["other"]), {}, r"is of another image, which differs from this one by up to 0\.25"),
        (distortion(image=images["shape"]), {}, rf"is of an image \({N},\), this one is \(1, {N}\)"),
        (distortion(torch.float32, image=images["float32"]), {}, "is of an image of float64, this one is of float32"),
        (distortion(matrix=bent), {}, "is of another model, whose response to the image is another"),
        (same, {}, "is of another model: F times a vector differs by"),
        (distortion(), {"k": 2}, "is of a search with k=3, not 2"),
        (distortion(), {"which": "largest"}, "is of a search with which=both, not largest"),
        (distortion(), {"tol": 1e-5}, "is of a search with tol=1e-06, not 1e-05"),
        (distortion(), {"max_basis": 60}, f"is of a search with max_basis={N}, not 60"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            ed.synthesize("golub_kahan", **{"k": 3} | arguments, progress=False, checkpoint=written)
        assert str(written) in str(caught.value)
        assert str(caught.value).endswith("To begin anew delete that file, or give another path as checkpoint")
        assert ed.result is None and written.read_bytes() == before and "search" not in ed._state
    with pytest.raises(ValueError, match="is no file of eigendistortions: it holds a search that isn't finished"):
        distortion().load(written)
    finished = tmp_path / "ed.npz"
    distortion().synthesize(rng=0, progress=False).save(finished)
    with pytest.raises(ValueError, match="is no checkpoint: it holds "):
        distortion().synthesize(checkpoint=finished, progress=False)
    assert finished.exists()


def test_a_search_in_memory_stays_where_the_file_is_refused(written):
    ed = distortion().synthesize("golub_kahan", rng=0, progress=False)
    search, result = ed._state["search"], ed.result
    with pytest.raises(ValueError, match="is of a search with k=3, not 2"):
        ed.synthesize(k=2, progress=False, checkpoint=written)
    assert ed._state["search"] is search and ed.result is result and "checkpoint" not in ed._state


def alterations(name, x):
    yield "missing", None
    yield "0-d or not", x[None] if x.ndim == 0 else np.zeros((), x.dtype)
    if x.dtype.kind == "U":
        yield "bytes", np.char.encode(x, "utf-8")
        yield "another text", np.array("nothing")
        yield "nested", np.array("[" * 50_000)
        yield "no entries", np.array("[{}]" if name == "history" else "{}")
        return
    yield "text", x.astype(str)
    yield "complex", x.astype(complex)
    yield "another width", x.astype({"f8": "f4", "i8": "i4"}[x.dtype.str[1:]])
    if x.dtype.kind == "i" and name != "max_basis":
        yield "negative", -1 - x
        if name not in ("restarts", "probes", "seen", "is_restarted"):
            yield "huge", x + 2**62
    elif x.dtype.kind == "f" and x.size:
        for value in (np.nan, np.inf):
            y = x.copy()
            y[(0,) * x.ndim] = value
            if not (name == "bounds" and value == np.inf):
                yield str(value), y
        if x.ndim == 2 and name not in ("random", "t", "c", "shares"):
            yield "longer", 2 * x
        if x.ndim == 2:
            yield "shorter", x[:, :-1]
        if name == "t":
            yield "not symmetric", x + np.eye(len(x), k=1)
        if x.ndim == 0:
            yield "negative", -1 - x


def test_every_wrong_field_is_refused(written, tmp_path):
    """With a right checksum; each message names the file and says what to do, and each field is named."""
    with np.load(written) as archive:
        right = {name: archive[name] for name in archive.files if name not in ("format", "checksum")}
    path, ed, seen = tmp_path / "search.npz", distortion(), 0

    def put(fields):
        np.savez(path, format=np.array(1), checksum=np.array(_checksum(fields)), **fields)

    for name in right:
        for kind, wrong in alterations(name, right[name]):
            fields = dict(right)
            if wrong is None:
                del fields[name]
            else:
                fields[name] = wrong
            put(fields)
            with pytest.raises(ValueError) as caught:
                ed.synthesize(k=3, progress=False, checkpoint=path)
            message = str(caught.value)
            named = {name} | {
                "image": {"an image"},
                "response_fingerprint": {"another model"},
                "response_size": {"another model"},
                "checkpoint": {"is no checkpoint", "of format"},
                "v": {" t ", " w "},
                "w": {" c ", " v "},
                "c": {" t "},
                "t": {" v "},
                "shares": {" shares"},
                "fixed": {" v ", "fixed_values"},
                "found_vectors": {"found_values"},
            }.get(name, set())
            assert str(path) in message and message.endswith("give another path as checkpoint"), (name, kind, message)
            assert any(text in message for text in named), (name, kind, message)
            assert ed.result is None and "search" not in ed._state
            seen += 1
    for name in ("v", "t", "c", "w", "scale"):  # consistent in itself, but no search of this model
        x = right[name]
        put(right | {name: 1.5 * x if name in ("t", "scale") else x[:, ::-1].copy() if name != "c" else 2 * x + 1})
        with pytest.raises(ValueError, match=r"F times a vector differs|orthonormal"):
            ed.synthesize(k=3, progress=False, checkpoint=path)
    for name, large in (("v", np.zeros((10 * N, N))), ("rng", np.array("x" * 2**22)), ("more", np.zeros(3))):
        put(right | {name: large})
        with pytest.raises(ValueError, match=name):
            ed.synthesize(k=3, progress=False, checkpoint=path)
    path.write_bytes(written.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"(?s)is damaged or was cut short.*give another path as checkpoint"):
        ed.synthesize(k=3, progress=False, checkpoint=path)
    put(right)
    assert ed.synthesize(k=3, progress=False, checkpoint=path).result.converged.all()
    assert seen > 150


def test_writes_are_rare_where_they_take_long(tmp_path, monkeypatch):
    """No clock: one that the test moves on."""
    now, at = [0.0], []

    def write(path, fields):
        at.append(now[0])
        now[0] += 2.0

    monkeypatch.setattr(fisherop.checkpoint, "write", write)
    monkeypatch.setattr(fisherop.checkpoint.time, "monotonic", lambda: now[0])
    ed = distortion()

    def on_product(count):
        now[0] += count

    ed.operator.linearization.on_product = on_product
    ed.synthesize("golub_kahan", k=3, rng=0, progress=False, checkpoint=tmp_path / "a", checkpoint_seconds=1)
    assert len(at) > 1 and np.diff(at).min() >= 42
    at.clear()
    ed = distortion()
    ed.operator.linearization.on_product = on_product
    ed.synthesize("golub_kahan", k=3, rng=0, progress=False, checkpoint=tmp_path / "a", checkpoint_seconds=50)
    assert len(at) > 1 and 52 <= np.diff(at).min() <= 60


def test_it_holds_no_pickle(written):
    with np.load(written, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    assert json.loads(arrays["rng"].item())["bit_generator"] == "PCG64"
    v, w, t, c, fixed = (arrays[name] for name in ("v", "w", "t", "c", "fixed"))
    f = MATRIX.T @ MATRIX / arrays["scale"] ** 2
    product = v @ f
    product -= product @ fixed.T @ fixed
    np.testing.assert_allclose(product, t @ v + c.T @ w, atol=1e-12)
