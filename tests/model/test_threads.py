"""Operators and models that several threads use at the same time."""

import concurrent.futures
import contextlib
import copy
import gc
import os
import random
import threading
import warnings

import numpy as np
import pytest
import torch
from helpers import assert_close, linear_operator, small_image, small_model
from kinds import flat

from fisherop import Eigendistortion, certify, eigenpairs, linearize
from fisherop.model.engines import ENGINES
from fisherop.testing import matrix_with_singular_values


def operator(n=60, seed=0):
    return linear_operator(matrix_with_singular_values(0.8 ** np.arange(n), n + 5, n, rng=seed))


def together(count, function):
    """Results of calls that begin at the same time."""
    barrier = threading.Barrier(count)

    def begin(i):
        barrier.wait()
        return function(i)

    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        return list(pool.map(begin, range(count)))


@pytest.mark.parametrize("method", ["golub_kahan", "exact", "power", "lobpcg"])
def test_each_search_counts_its_own_products(method):
    options = {"method": method, "rng": 0, "progress": True, "tol": 1e-3, "on_failure": "warn"}
    alone = eigenpairs(operator(), which="largest", **options)
    shared = operator()
    heard = []
    shared.linearization.on_product = heard.append
    results = together(4, lambda _: eigenpairs(shared, which="largest", **options))
    counts = [result.n_products for result in results]
    # a thread that comes late finds the dense matrix, of 60 columns, which another has computed
    allowed = {alone.n_products, alone.n_products - 30} if method == "exact" else {alone.n_products}
    assert set(counts) <= allowed and max(counts) == alone.n_products
    assert shared.n_products == sum(heard) == sum(counts)
    assert shared.linearization.on_product == heard.append
    for result in results:
        np.testing.assert_array_equal(result.eigenvectors, alone.eigenvectors)


def test_searches_of_several_kinds_and_certificates_at_once():
    shared = operator()
    vectors = eigenpairs(operator(), which="largest", rng=0, progress=False).eigenvectors
    calls = [
        lambda F: eigenpairs(F, method="golub_kahan", rng=0, progress=False),
        lambda F: eigenpairs(F, which="largest", method="power", rng=0, progress=False),
        lambda F: certify(F, vectors, [0]),
        lambda F: eigenpairs(F.jacobian, 2, which="largest", method="eigsh", rng=0, progress=False),
    ]
    alone = [call(operator()) for call in calls]
    before = shared.n_products
    results = together(4, lambda i: calls[i](shared))
    assert [result.n_products for result in results] == [result.n_products for result in alone]
    assert shared.n_products - before == sum(result.n_products for result in results)
    for one, other in zip(results, alone, strict=True):
        np.testing.assert_array_equal(one.eigenvalues, other.eigenvalues)


def test_totals_lose_nothing():
    """An increment of an attribute is a read and a write."""
    lin = operator().linearization
    v = torch.ones(1, *lin.image_shape, dtype=torch.float64)

    def multiply(_):
        for _ in range(200):
            lin.vjp(lin.jvp(v))

    together(4, multiply)
    assert (lin.n_jvp, lin.n_vjp) == (800, 800)


def test_a_search_goes_on_with_the_count_of_its_own():
    shared, state = operator(), {}
    first = eigenpairs(shared, tol=1e-2, rng=0, progress=False, state=state, method="golub_kahan")
    shared.jacobian.matvec(np.ones(60))
    second = eigenpairs(shared, tol=1e-8, rng=0, progress=False, state=state, method="golub_kahan")
    once = eigenpairs(operator(), tol=1e-8, rng=0, progress=False, method="golub_kahan")
    assert first.n_products < second.n_products <= once.n_products + 12
    with pytest.raises(ValueError, match="another operator"):
        eigenpairs(operator(), rng=0, progress=False, state=state, method="golub_kahan")


def test_a_dense_jacobian_is_kept():
    F = operator()
    assert F.jacobian.dense is None
    eigenpairs(F, method="exact", progress=False)
    assert F.jacobian.dense is not None
    before = F.n_products
    F.jacobian.to_dense()
    assert F.n_products == before
    ed = Eigendistortion(small_image(), small_model())
    assert ed.compute_jacobian(progress=False) is not None and ed.jacobian is not None


@pytest.mark.parametrize("engine", ENGINES)
def test_one_module_is_linearized_and_multiplied_by_all(engine):
    model = small_model()
    truth = torch.autograd.functional.jacobian(lambda x: flat(model(x)), small_image()).reshape(-1, 48)
    lin = linearize(small_image(), model, engine=engine)
    v = torch.randn(5, *lin.image_shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def use(i):
        for k in (1, 3, 4, 5):
            for one in (lin, linearize(small_image(), model, engine=engine)) if i % 2 else (lin,):
                assert_close(one.jvp(v[:k]), v[:k].flatten(1) @ truth.T, torch.float64)
                assert_close(one.vjp(one.jvp(v[:k])).flatten(1), v[:k].flatten(1) @ truth.T @ truth, torch.float64)
        return True

    before = {name: t.clone() for name, t in model.state_dict().items()}
    assert all(together(4, use))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert torch.is_grad_enabled() and torch.backends.mha.get_fastpath_enabled()


@contextlib.contextmanager
def another_thread(step):
    """Calls `step` again and again, with pauses, while the block runs."""
    stop = threading.Event()

    def loop():
        while not stop.wait(5e-3):
            step()

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("draw", [lambda: torch.rand(2).tolist(), lambda: np.random.rand(2).tolist(), random.random])  # noqa: NPY002
@pytest.mark.parametrize("engine", list(ENGINES))
def test_random_numbers_of_another_thread_stay_its_own(engine, draw):
    """They were rewound with those of the model; and a model that draws none was refused for them."""
    seen, model = [], small_model()  # which seeds PyTorch's generator when it is made
    with another_thread(lambda: seen.append(str(draw()))):
        for _ in range(3):
            linearization = linearize(small_image(), copy.deepcopy(model), engine=engine)
            linearization.jvp(linearization.image[None])
            linearization.respond(linearization.image)
    assert len(seen) > 5 and len(set(seen)) == len(seen)


def test_randomness_is_refused_beside_a_thread_that_draws_nothing():
    """As that of a progress bar."""

    def model(x):
        return x * (2 if np.random.rand() < 1e-9 else 1)  # noqa: NPY002

    with another_thread(lambda: None), pytest.raises(ValueError, match=r"draws random numbers \(numpy.random\)"):
        linearize(small_image(), model)


def test_settings_that_another_thread_changes_stay_as_it_leaves_them():
    enter, leave = threading.Event(), threading.Event()

    def model(x):
        enter.set()  # the other thread's settings change, and are back before linearizing ends
        assert leave.wait(60)
        return x.sin()

    def other():
        assert enter.wait(60)
        with torch.backends.mkldnn.flags(enabled=False), torch.autograd.set_detect_anomaly(True), gc_disabled():
            leave.set()
            done.wait(60)

    done = threading.Event()
    before = torch._C._get_mkldnn_enabled(), torch.is_anomaly_enabled(), gc.isenabled()
    thread = threading.Thread(target=other)
    thread.start()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of anomaly detection
        linearize(small_image(), model, engine="functional")
    done.set()
    thread.join()
    assert (torch._C._get_mkldnn_enabled(), torch.is_anomaly_enabled(), gc.isenabled()) == before


@contextlib.contextmanager
def gc_disabled():
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this system")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_fork_within_a_forward_mode_level():
    """The child has none of the levels of a thread that it doesn't have."""
    inside, leave = threading.Event(), threading.Event()
    calls = []

    def model(x):
        calls.append(1)
        if torch.autograd.forward_ad._current_level >= 0:
            inside.set()
            leave.wait(60)
        return x.sin()

    thread = threading.Thread(target=lambda: linearize(torch.rand(3), model, engine="functional"))
    thread.start()
    assert inside.wait(60)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            found = linearize(torch.zeros(3), lambda x: 2 * x.sin(), engine="functional").jvp(torch.ones(1, 3))
            code = 0 if torch.equal(found, torch.full((1, 3), 2.0)) else 2
        except RuntimeError as error:
            code = 3 if "fork-based multiprocessing" in str(error) else 4
        finally:
            os._exit(code)
    leave.set()
    thread.join()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code == 3:
        pytest.skip("on a machine with a GPU, PyTorch refuses backward passes in forks of a process that has made some")
    assert code == 0
