"""Sweeps: each task is what `Eigendistortion` finds, is done once, and is lost by nobody's death."""

import contextlib
import csv
import dataclasses
import errno
import functools
import itertools
import multiprocessing
import os
import pathlib
import pickle
import signal
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor

import numpy as np
import pytest
import studies
import torch
from helpers import DEVICES, assert_truthful
from studies import Net, build, images, only_on

import fisherop
from fisherop import Eigendistortion, LayerResponse, SweepError, noise, plot, spaces, sweep
from fisherop.model import recipe
from fisherop.model.engines import traced

HERE = pathlib.Path(__file__).parent


def run(several, models, **options):
    return sweep(several, models, **({"tol": 1e-4, "rng": 0, "progress": False} | options))


def stamps(folder):
    return {path.name: path.stat().st_mtime_ns for path in pathlib.Path(folder).glob("*.npz")}


@contextlib.contextmanager
def no_executor():
    yield None


@contextlib.contextmanager
def threads():
    with ThreadPoolExecutor(2) as pool:
        yield pool


@contextlib.contextmanager
def spawned():
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


@contextlib.contextmanager
def loky():
    module = pytest.importorskip("loky", reason="loky is not installed")
    pool = module.ProcessPoolExecutor(2)
    try:
        yield pool
    finally:
        pool.shutdown(kill_workers=True)


@contextlib.contextmanager
def cluster():
    distributed = pytest.importorskip("distributed", reason="dask.distributed is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of sockets that a killed worker left, and of ports in use
        with (
            distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as workers,
            distributed.Client(workers) as client,
        ):
            yield client


@contextlib.contextmanager
def dask():
    with cluster() as client:
        yield client.get_executor()


class Elsewhere:
    """An executor whose tasks are sent, as if to another process."""

    def submit(self, fn, task):
        future = Future()
        future.set_result(fn(pickle.loads(pickle.dumps(dataclasses.replace(task, home=(0, "elsewhere"))))))
        return future


def pids(pool):
    if hasattr(pool, "_client"):
        return sorted(pool._client.run(os.getpid).values())
    return sorted(pool._processes)


slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize("where", [no_executor, threads, slow(spawned), slow(loky), slow(dask)])
def test_every_task_is_done_wherever_it_runs(where, tmp_path):
    several, models = images(3), [(build, "first"), build, (Net(3).eval(), "first")]
    own = [LayerResponse(build(), "first"), build(), LayerResponse(Net(3).eval(), "first")]
    before = torch.get_num_threads()
    with where() as pool:
        table = run(several, models, executor=pool)
        kept = run(several, models, executor=pool, store=tmp_path)
    assert torch.get_num_threads() == before
    wanted = [(i, m, layer) for i in range(3) for m, layer in [("build", "first"), ("build", ""), ("Net", "first")]]
    for found in (table, kept):
        assert [(one.image, one.model, one.layer) for one in found] == wanted
        assert not found.failed
        for one, (i, model) in zip(found, [(i, model) for i in range(3) for model in own], strict=True):
            dense = torch.func.jacrev(model)(several[i]).reshape(-1, 64)
            ed = found.load(one)
            assert_truthful(ed.result, dense.detach().double().numpy())
            np.testing.assert_array_equal(one.eigenvalues, ed.result.eigenvalues)
            np.testing.assert_array_equal(one.thresholds, ed.detection_thresholds()[0])
            assert one.status == tuple(ed.result.status.astype(str)) and one.seconds > 0
    assert len(stamps(tmp_path)) == len({one.file for one in kept}) == 9


@pytest.mark.slow  # each task starts a process, which imports PyTorch
def test_each_task_may_be_a_job_of_its_own(tmp_path, monkeypatch):
    submitit = pytest.importorskip("submitit", reason="submitit is not installed")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")])))
    several, executor = images(2), submitit.AutoExecutor(tmp_path / "jobs", cluster="local")
    several[1] = torch.full_like(several[1], -1)
    table = run(several, [build], executor=executor, store=tmp_path)
    assert [one.error for one in table] == ["", "ValueError: this image is rejected"]
    np.testing.assert_allclose(table[0].eigenvalues, run(several[:1], [build])[0].eigenvalues, rtol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("where", [no_executor, slow(spawned)])
def test_workers_compute_on_the_device_that_is_asked_for(device, where):
    several, there = images(2), functools.partial(only_on, device)
    with where() as pool:
        table = run(several, [there, (there, "first")], executor=pool, device=device)
    right = run(several, [build, (build, "first")])
    assert not table.failed
    for one, other in zip(table, right, strict=True):
        np.testing.assert_allclose(one.eigenvalues, other.eigenvalues, rtol=1e-3, atol=1e-4 * other.eigenvalues[0])


def test_what_is_there_is_not_done_again(tmp_path):
    several, models = images(2), [build, (build, "first")]
    first = run(several, models, store=tmp_path)
    before = stamps(tmp_path)
    again = run(several, models, store=tmp_path, maxiter=500)
    assert stamps(tmp_path) == before
    for one, other in zip(first, again, strict=True):
        assert one.file == other.file and one.seconds == other.seconds and one.n_products == other.n_products
        np.testing.assert_array_equal(one.eigenvalues, other.eigenvalues)
    more = run([*several, *images(3)[2:]], models, store=tmp_path)
    assert len(stamps(tmp_path)) == len(more) == 6
    assert before.items() <= stamps(tmp_path).items()


def cut(path):
    path.write_bytes(path.read_bytes()[:-200])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def swap(path):
    other = next(p for p in path.parent.glob("*.npz") if p != path)
    path.write_bytes(other.read_bytes())


@pytest.mark.parametrize("damage", [cut, flip, swap, lambda path: path.write_bytes(b""), pathlib.Path.unlink])
def test_a_damaged_file_is_done_again(damage, tmp_path):
    several = images(3)
    first = run(several, [build], store=tmp_path)
    before, path = stamps(tmp_path), pathlib.Path(first[1].file)
    damage(path)
    again = run(several, [build], store=tmp_path)
    now = stamps(tmp_path)
    assert [name for name in now if now[name] != before[name]] == [path.name]
    np.testing.assert_allclose(again[1].eigenvalues, first[1].eigenvalues)
    assert again.load(again[1]).result.converged.all()


class Slope(torch.nn.Module):
    """Attributes, closures, defaults and globals that a response may depend on, and no parameter shows."""

    def __init__(self, attribute=1.0, inner=1.0, buffer=1.0):
        super().__init__()
        self.attribute, self.inner = attribute, lambda x, factor=inner: factor * x
        self.register_buffer("hidden", torch.tensor(buffer), persistent=False)

    def forward(self, x):
        return torch.sin(self.inner(x) * self.attribute * self.hidden * GLOBAL)


class Other(Slope):
    def forward(self, x):
        return torch.cos(self.inner(x) * self.attribute * self.hidden)


GLOBAL = 1.0


def test_a_name_stands_for_all_that_a_result_depends_on(tmp_path, monkeypatch):
    image = images(1)
    kinds = [
        ([Slope()], {}),
        ([Slope(2.0)], {}),
        ([Slope(1.0, 2.0)], {}),
        ([Slope(1.0, 1.0, 2.0)], {}),
        ([Other()], {}),
        ([torch.sin], {}),
        ([torch.cos], {}),
        ([lambda x: x**2], {}),
        ([lambda x: x**3], {}),
        ([Slope()], {"k": 2}),
        ([Slope()], {"tol": 1e-5}),
        ([Slope()], {"rng": 1}),
        ([Slope()], {"which": "largest"}),
        ([Slope()], {"noise": noise.Gaussian(2.0)}),
        ([Slope()], {"noise": noise.Gaussian(3.0)}),
        ([Slope()], {"noise": noise.Gaussian(torch.full((64,), 2.0))}),
        ([Slope()], {"noise": noise.Gaussian(torch.full((64,), 3.0))}),
        ([Slope()], {"subspace": spaces.zero_mean()}),
        ([Slope()], {"metric": torch.full((8, 8), 2.0)}),
        ([Slope()], {"method": "exact"}),
        ([Slope()], {"maxiter": 400, "max_basis": 30}),
    ]
    for count, (models, options) in enumerate(kinds, 1):
        assert not run(image, models, store=tmp_path, **options).failed
        assert len(stamps(tmp_path)) == count, options
    run([image[0].double()], [Slope()], store=tmp_path)
    run([image[0].reshape(1, 64)], [Slope()], store=tmp_path)
    assert len(stamps(tmp_path)) == len(kinds) + 2
    monkeypatch.setattr(sys.modules[__name__], "GLOBAL", 2.0)
    run(image, [Slope()], store=tmp_path)
    assert len(stamps(tmp_path)) == len(kinds) + 3
    before = stamps(tmp_path)
    for models in ([Slope()], {"a name": pickle.loads(pickle.dumps(Net()))}, {"another": Net()}):
        run(image, models, store=tmp_path)
    assert len(stamps(tmp_path)) == len(before) + 1  # a new name is the same model


def test_names_are_the_same_in_every_process(tmp_path):
    run(images(2), [build, (build, "first")], store=tmp_path, noise=noise.Poisson())
    before = stamps(tmp_path)
    code = "from test_sweep import *; import sys; run(images(2), [build, (build, 'first')], store=sys.argv[1], "
    code += "noise=noise.Poisson())"
    env = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env=env)
    assert stamps(tmp_path) == before


def test_a_failed_task_ends_nothing(tmp_path):
    several = images(3)
    several[1] = several[1].clone()
    several[1][..., 0, 0] = -1
    table = run(several, {"net": build, "none": (build, "nowhere")}, store=tmp_path)
    assert [bool(one.error) for one in table] == [False, True, True, True, False, True]
    assert "this image is rejected" in table[2].error and "studies.py" in table[2].traceback
    assert "has no layer 'nowhere'" in table[1].error
    assert len(table.failed) == 4 and "2 of 6 tasks done" in repr(table) and "rejected" in repr(table)
    assert len(stamps(tmp_path)) == 2
    with pytest.raises(ValueError, match="its task failed"):
        table.load(table[1])
    unfinished = run(several[:1], [build], maxiter=1, method="golub_kahan")
    assert "ConvergenceError" in unfinished[0].error
    path = tmp_path / "table.csv"
    table.to_csv(path)
    rows = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
    assert [row["image"] for row in rows] == list("00011222")
    assert float(rows[0]["eigenvalue"]) == table[0].eigenvalues[0] and rows[0]["file"] == table[0].file
    assert "rejected" in rows[3]["error"] or "nowhere" in rows[3]["error"]


def test_the_first_failure_may_end_it(tmp_path):
    several = images(3)
    several[1] = torch.full_like(several[1], -1)
    with pytest.raises(SweepError, match="this image is rejected") as caught:
        run(several, [build], on_error="raise", store=tmp_path)
    assert isinstance(caught.value.__cause__, ValueError)
    assert len(caught.value.result.failed) == 1
    assert len(caught.value.result) - 1 == len(stamps(tmp_path))
    with pytest.raises(SweepError, match=r"(?s)rejected.*Traceback.*studies.py"):
        run(several, [build], on_error="raise", executor=Elsewhere())


@pytest.mark.parametrize("store", [False, True])
def test_builders_that_fail_and_models_that_leave(store, tmp_path):
    def broken():
        raise OSError("no such weights")

    def leaving(x):
        raise SystemExit(3)

    options = {"store": tmp_path} if store else {}
    table = run(images(2), {"net": build, "broken": broken, "leaving": leaving}, **options)
    assert [bool(one.error) for one in table] == [False, True, True] * 2
    assert "no such weights" in table[1].error and "SystemExit" in table[2].error
    with pytest.raises(SweepError, match="no such weights"):
        run(images(2), {"broken": broken}, on_error="raise", **options)


class Unlike(Elsewhere):
    """In which what builds models gives others than here."""

    def submit(self, fn, task):
        torch.manual_seed(len(self.seen))
        self.seen.append(task)
        recipe._received.clear()
        return super().submit(fn, task)

    def __init__(self):
        self.seen = []


@pytest.mark.parametrize("store", [False, True])
def test_a_builder_that_is_not_reproducible(store, tmp_path):
    options = {"store": tmp_path} if store else {}
    table = run(images(3), {"net": studies.unseeded}, executor=Unlike(), **options)
    assert len(table.failed) == 3 if store else len(table.failed) == 2
    assert all("or not at each call of what builds it: let that set a seed" in one.error for one in table.failed)
    assert len(stamps(tmp_path)) == 0


def trained(path, factor):
    torch.save({name: factor * x for name, x in build().state_dict().items()}, path)
    return path


@pytest.mark.parametrize("store", [False, True])
def test_a_pool_that_lives_on_builds_anew_for_each_sweep(store, tmp_path):
    pool, builder = Elsewhere(), {"net": functools.partial(studies.from_file, tmp_path / "weights.pt")}
    for factor in (1, 2):
        trained(tmp_path / "weights.pt", factor)
        options = {"store": tmp_path / "store"} if store else {}
        found = run(images(2), builder, executor=pool, **options)
        right = run(images(2), {"net": builder["net"]()})
        assert not found.failed
        np.testing.assert_array_equal([one.eigenvalues for one in found], [one.eigenvalues for one in right])


def test_a_model_that_is_built_anew_and_the_same_keeps_its_programs(monkeypatch):
    pool, built = Elsewhere(), []
    trace = traced._trace
    monkeypatch.setattr(traced, "_trace", lambda *args: built.append(args) or trace(*args))
    found = [run(images(2), {"net": studies.smooth, "first": (studies.smooth, "0")}, executor=pool) for _ in range(3)]
    assert len(built) == 2
    for one, other in zip(*found[1:], strict=True):
        np.testing.assert_array_equal(one.eigenvalues, other.eigenvalues)


class OldCode(Elsewhere):
    """In which a module was imported before it was changed."""

    def submit(self, fn, task):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Net, "forward", lambda self, x: torch.relu(self.first(x)))
            return super().submit(fn, task)


@pytest.mark.parametrize("model", [build, Net().eval(), (build, "first")])
def test_results_of_older_code_are_not_kept(model, tmp_path):
    table = run(images(2), {"net": model}, executor=OldCode(), store=tmp_path)
    assert all("start new workers after a change of code" in one.error for one in table.failed)
    assert len(table.failed) == 2 and not stamps(tmp_path)
    recipe._received.clear()  # as of new workers
    assert not run(images(2), {"net": model}, executor=Elsewhere(), store=tmp_path).failed


@pytest.mark.parametrize("pool", [None, Elsewhere()])
def test_what_is_done_survives_a_store_that_can_not_be_written(pool, tmp_path, monkeypatch):
    write, count = fisherop.tasks.write, itertools.count()

    def full(path, fields):
        if next(count) >= 2:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, fields)

    monkeypatch.setattr("fisherop.tasks.write", full)
    monkeypatch.setattr("fisherop.plans.write", full)
    with pytest.raises(OSError, match="No space left") as caught:
        run(images(5), [build], executor=pool, store=tmp_path)
    done = caught.value.result
    assert len(done.done) == len(done) == 3 and len(stamps(tmp_path)) == 2
    assert sorted(bool(one.file) for one in done) == [False, True, True]
    for one in done:  # the one that could not be written, too
        np.testing.assert_array_equal(done.load(one).eigenvalues, one.eigenvalues)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO])
def test_a_file_that_can_not_be_read_is_neither_damaged_nor_the_end(code, tmp_path, monkeypatch):
    before = run(images(2), [build], store=tmp_path)
    read, seen = fisherop.tasks.read, stamps(tmp_path)

    def denied(path, *rest):
        if str(path) == before[0].file:
            raise OSError(code, os.strerror(code), str(path))
        return read(path, *rest)

    monkeypatch.setattr("fisherop.tasks.read", denied)
    table = run(images(2), [build], store=tmp_path)
    assert [bool(one.error) for one in table] == [True, False] and os.strerror(code) in table[0].error
    assert stamps(tmp_path) == seen


def test_records_of_other_sweeps_are_refused():
    one, other = run(images(1), [build]), run(images(1), [build], k=3)
    with pytest.raises(ValueError, match="record must be of this sweep"):
        one.load(other[0])
    assert len(other.load(pickle.loads(pickle.dumps(other[0]))).eigenvalues) == 6


def test_the_order_and_the_types_of_options_name_no_other_task(tmp_path):
    run(images(1), [build], store=tmp_path, max_basis=50, basis_memory=2**24)
    before = stamps(tmp_path)
    run(images(1), [build], store=tmp_path, basis_memory=np.int64(2**24), max_basis=np.int32(50), k=np.int64(1))
    assert stamps(tmp_path) == before


def test_names_that_are_no_text_and_no_formulas(tmp_path):
    """As `os.listdir` gives them, and as LaTeX has them."""
    several = dict(zip([os.fsdecode(b"caf\xe9.png"), "b"], images(2), strict=True))
    table = run(several, {"m $\\frac$ x": build, "$": build, "$a$": build})
    table.to_csv(tmp_path / "table.csv")
    page = plot.page(table, tmp_path / "page.html").read_text(encoding="utf-8")
    assert "caf\\udce9.png" in page
    figure = plot.sweep(table)
    figure.savefig(tmp_path / "sweep.png")
    shown = [text.get_text() for text in figure.axes[0].get_xticklabels()]
    assert shown == ["m\n\\$\\frac\\$\nx", "\\$", "\\$a\\$"]


def test_a_sweep_without_results_has_no_page(tmp_path):
    with pytest.raises(ValueError, match=r"there is nothing to show: no task of the sweep is done, .* 1 failed"):
        plot.page(run([torch.full((1, 1, 8, 8), -1.0)], [build]), tmp_path / "page.html")


def test_after_ctrl_c_what_is_done_is_kept(tmp_path):
    calls = []

    def solver(operator, k, which, *, tol, maxiter, rng):
        calls.append(operator)
        if len(calls) == 3:
            raise KeyboardInterrupt
        values, vectors = np.linalg.eigh(operator.to_dense())
        return values[[-1, 0]], vectors[:, [-1, 0]]

    with pytest.raises(KeyboardInterrupt) as caught:
        run(images(5), {"sine": torch.sin}, method=solver)
    result = caught.value.result
    assert len(result) == 2 and "2 of 5 tasks done, 3 not" in repr(result)
    assert result.load(result[0]).result.converged.all()


def test_the_models_in_this_process_stay_as_they_are():
    model = Net().train()
    run(images(1), [model])
    assert model.training
    model.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert not run(images(2), [model, (model, "first")]).failed
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not model.first._forward_hooks


@pytest.mark.slow
@pytest.mark.parametrize("where", [spawned, loky])
def test_a_pool_that_has_lost_a_worker_loses_no_record(where, tmp_path):
    """The pool is broken then: its records say so, and a sweep with a new one does what is missing."""
    several, models = images(4), [(studies.slow, "first"), studies.slow]

    def kill(pool):
        while len(stamps(tmp_path)) < 2:
            time.sleep(0.01)
        os.kill(pids(pool)[0], signal.SIGKILL)

    with where() as pool:
        killer = threading.Thread(target=kill, args=(pool,), daemon=True)
        killer.start()
        table = run(several, models, executor=pool, store=tmp_path)
        killer.join()
    assert len(table) == 8 and 0 < len(table.failed) < 8
    assert all("Broken" in one.error or "Terminated" in one.error for one in table.failed)
    before = stamps(tmp_path)
    with where() as pool:
        table = run(several, models, executor=pool, store=tmp_path)
    assert len(table) == 8 and not table.failed
    assert before.items() <= stamps(tmp_path).items() and len(stamps(tmp_path)) == 8


@pytest.mark.slow
def test_a_cluster_that_loses_a_worker_does_all(tmp_path):
    several, models = images(4), [(studies.slow, "first"), studies.slow]
    with dask() as pool:

        def kill():
            while len(stamps(tmp_path)) < 2:
                time.sleep(0.01)
            os.kill(pids(pool)[0], signal.SIGKILL)

        killer = threading.Thread(target=kill, daemon=True)
        killer.start()
        table = run(several, models, executor=pool, store=tmp_path)
        killer.join()
    assert not table.failed
    assert len(table) == 8 == len({one.file for one in table}) == len(stamps(tmp_path))


@pytest.mark.slow
def test_after_the_death_of_its_client_only_what_is_missing_is_done(tmp_path):
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}
    script = [sys.executable, "-c", "import sys, studies; studies.study(sys.argv[1])", str(tmp_path)]
    with subprocess.Popen(script, env=env) as client:
        while len(stamps(tmp_path)) < 4:
            assert client.poll() is None
            time.sleep(0.01)
        client.kill()
    before = stamps(tmp_path)
    assert 4 <= len(before) < 16
    table = run(images(8), [(studies.slow, "first"), studies.slow], store=tmp_path)
    assert not table.failed and len(table) == 16 == len(stamps(tmp_path))
    assert before.items() <= stamps(tmp_path).items()


def test_two_sweeps_may_share_a_folder(tmp_path):
    """At the same time: what one has done, the other takes."""
    several = images(6)
    found = []
    workers = [threading.Thread(target=lambda: found.append(run(several, [build], store=tmp_path))) for _ in range(2)]
    for one in workers:
        one.start()
    for one in workers:
        one.join()
    assert [len(table) - len(table.failed) for table in found] == [6, 6] and len(stamps(tmp_path)) == 6
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one.eigenvalues, other.eigenvalues, rtol=1e-3)


def test_a_worker_that_does_not_see_the_folder_sends_what_it_found(tmp_path, monkeypatch):
    monkeypatch.setattr(fisherop.tasks, "mark_of", lambda folder: "of another folder")
    monkeypatch.setattr(fisherop.plans, "open_store", lambda folder: folder.mkdir(exist_ok=True) or "of this folder")
    table = run(images(2), [build], store=tmp_path / "new")
    assert not table.failed and len(stamps(tmp_path / "new")) == 2
    assert table.load(table[0]).result.converged.all()


def test_pools_of_what_can_not_be_sent():
    with pytest.raises(TypeError, match="an argument of the sweep can't be sent to other processes"):
        run(images(1), [build], executor=Elsewhere(), noise=threading.Lock())
    model = Net().eval()
    model.lock = threading.Lock()
    with pytest.raises(TypeError, match=r"the model Net can't be sent .*give a function that builds it"):
        run(images(1), [model], executor=Elsewhere())


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((torch.zeros(2, 1, 4, 4), [build]), TypeError, r"images must be .*: use images.split\(1\)"),
        (([], [build]), ValueError, "images must be a sequence of at least one image"),
        (([1.0], [build]), TypeError, "what images holds must be of type Tensor"),
        ((images(1), build), TypeError, r"models must be a sequence of at least one model.*: use \[model\]"),
        ((images(1), []), ValueError, "models must be a sequence of at least one model"),
        ((images(1), ["resnet18"]), TypeError, r"models\[0\] must be a sequence of at least"),
        ((images(1), {"a": (build, 3)}), TypeError, "the layer of models\\['a'\\] must be the name of a submodule"),
        (
            (images(1), [(build, "")]),
            ValueError,
            "the layer of models.* must be the name of .*, and not empty",
        ),
        (({1: images(1)[0], "1": images(1)[0]}, [build]), ValueError, "the names of images must differ"),
        ((images(1), [build, build]), ValueError, "'build' is there twice"),
    ],
)
def test_bad_images_and_models(arguments, error, message):
    with pytest.raises(error, match=message):
        run(*arguments)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"executor": 3}, TypeError, "executor must be None, or of the interface of concurrent.futures.Executor"),
        ({"executor": type("Client", (), {"get_executor": 1, "submit": 1})()}, TypeError, "pass client.get_executor"),
        ({"k": 0}, ValueError, "k must be"),
        ({"tol": 2.0}, ValueError, "tol must be"),
        ({"which": "all"}, ValueError, "which must be"),
        ({"method": "arpack"}, ValueError, "method must be one of"),
        ({"rng": np.random.default_rng(0)}, TypeError, "rng must be a seed"),
        ({"on_error": "ignore"}, ValueError, "on_error must be one of"),
        ({"threads": 0}, ValueError, "threads must be"),
        ({"checkpoint": "file"}, TypeError, "sweep has no option 'checkpoint'"),
        ({"on_failure": "warn"}, TypeError, "sweep has no option 'on_failure': a task that doesn't converge"),
        ({"tolx": 3}, TypeError, "sweep has no option 'tolx': options of 'auto' are basis_memory"),
        ({"store": 3}, TypeError, "store must be"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        run(images(1), [build], **options)


def test_a_builder_that_builds_no_model():
    table = run(images(1), {"b": lambda: torch.zeros(3)})
    assert "the model b can be called without arguments" in table[0].error and "gave a Tensor" in table[0].error


def test_images_have_names_and_models_of_one_name_are_told_apart():
    table = run(dict(zip("ab", images(2), strict=True)), [Net().eval(), Net(3).eval(), (Net(5).eval(), "first")])
    assert [(one.image, one.model) for one in table] == [(i, m) for i in "ab" for m in ("Net", "Net 2", "Net 3")]
    assert isinstance(table.load(table[-1]), Eigendistortion)
    with pytest.raises(ValueError, match="record must be of this sweep"):
        table.load(run(images(1), {"other": build})[0])


def test_a_figure_and_a_page_of_a_sweep(tmp_path):
    several = images(4)
    several[3] = torch.full_like(several[3], -1)
    table = run(several, {"net": build, "first": (build, "first"), "two": lambda x: 3 * x.flatten()[:2]})
    figure = plot.sweep(table)
    ax, above = figure.axes
    assert [label.get_text() for label in ax.get_xticklabels()] == ["net", "first", "two"]
    drawn = [line.get_ydata() for line in ax.get_lines()]
    done = {name: [one for one in table.done if one.model == name] for name in ("net", "first", "two")}
    wanted = [[one.thresholds[end] for one in done[name]] for name in done for end in (0, -1)]
    shown = sorted(height for line in ax.get_lines() for height in line.get_ydata())
    finite = sorted(x for several in wanted for x in several if np.isfinite(x))
    np.testing.assert_allclose(shown[: len(finite)], finite)
    hollow = sum(len(heights) for heights, line in zip(drawn, ax.get_lines(), strict=True) if line.get_mfc() == "none")
    assert hollow == sum(one.status[end] == "null to tol" for one in table.done for end in (0, -1))
    assert [text.get_text() for text in above.get_xticklabels()] == [f"∞: {len(done['two'])} of {len(done['two'])}"]
    assert above.get_xticks() == pytest.approx([2.2]) and above.get_xlim() == ax.get_xlim()
    assert f"{len(table.failed)} tasks failed" in figure.get_suptitle()
    top = plot.sweep(run(images(2), [build], which="largest"))
    assert len(top.axes[0].get_lines()) == 1
    with pytest.raises(ValueError, match="no task of the sweep is done"):
        plot.sweep(run(several[3:], [build]))
    text = plot.page(run(images(2), {"a & b": build}), tmp_path / "page.html").read_text(encoding="utf-8")
    assert "0: a &amp; b" in text and "1: a &amp; b" in text and "failed" not in text
    some = run([several[0], several[3]], {"a & b": build})
    text = plot.page(some, tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<h2>Tasks that failed</h2>" in text and "<li>1: a &amp; b: ValueError: this image is rejected</li>" in text
