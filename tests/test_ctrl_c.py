"""Ctrl-C: it ends in KeyboardInterrupt, what was found is kept, and the next call is right."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fisherop import Eigendistortion, FisherOperator, eigenpairs
from fisherop.krylov import lanczos
from fisherop.testing import linear_model, matrix_with_singular_values

SIGMA = np.r_[3.5, 3.5, np.linspace(3, 1, 115), 0.3, 0.3, 0.2]
MATRIX = matrix_with_singular_values(SIGMA, 130, 120)


@pytest.fixture(autouse=True)
def sigint_as_python_has_it():
    """A shell starts what runs in the background with SIGINT ignored, and so would be what is started here."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def distortion():
    return Eigendistortion(torch.linspace(0, 1, 120, dtype=torch.float64), linear_model(MATRIX))


def interrupted(ed, at, again=np.inf):
    """Let the product with these numbers, from now on, raise as Ctrl-C does."""
    lin, start = ed.operator.linearization, ed.operator.n_products
    raised = []

    def on_product(_):
        count = lin.n_products - start
        if (not raised and count >= at) or (len(raised) == 1 and count >= at + again):
            raised.append(count)
            raise KeyboardInterrupt

    lin.on_product = on_product


def assert_honest(result):
    """Whatever converged is an eigenpair of the matrix, by the pair's own inequality."""
    v = result.eigenvectors
    residuals = np.linalg.norm(MATRIX.T @ (MATRIX @ v) - v * result.eigenvalues, axis=0)
    holds = (residuals <= 1.01 * result.tol * SIGMA[0] ** 2) | (result.eigenvalues <= result.tol * SIGMA[0] ** 2)
    assert holds[result.converged].all()


def assert_right(ed, k):
    expected = np.r_[SIGMA[:k], SIGMA[-k:]] ** 2
    np.testing.assert_allclose(ed.result.eigenvalues, expected, atol=1e-5 * SIGMA[0] ** 2)
    assert ed.result.converged.all() and "stopped" not in ed.result.details


@given(at=st.floats(0, 160), k=st.integers(1, 3), max_basis=st.sampled_from([None, 45]))
@settings(max_examples=200)
@pytest.mark.slow
def test_at_any_product(at, k, max_basis):
    check_at_any_product(at, k, max_basis)


@given(at=st.floats(0, 160), k=st.integers(1, 3), max_basis=st.sampled_from([None, 45]))
@settings(max_examples=15)
def test_at_some_products(at, k, max_basis):
    check_at_any_product(at, k, max_basis)


def check_at_any_product(at, k, max_basis):
    ed = distortion()
    options = {"rng": 0, "progress": False} | ({} if max_basis is None else {"max_basis": max_basis})
    interrupted(ed, at)
    before = ed.operator.n_products
    try:
        ed.synthesize("golub_kahan", k, **options)
    except KeyboardInterrupt:
        if at > 2:  # the first step has ended
            assert ed.result is not None and ed.result.n_products <= ed.operator.n_products - before
            assert_honest(ed.result)
    else:
        assert ed.operator.n_products - before < at
    ed.operator.linearization.on_product = None
    ed.synthesize("golub_kahan", k, **options)
    assert_right(ed, k)


def test_a_loop_over_images_stops_and_goes_on():
    done = []
    with pytest.raises(KeyboardInterrupt, match=r"golub_kahan was interrupted after \d+"):
        for _ in range(3):
            ed = distortion()
            done.append(ed)
            interrupted(ed, 25)
            ed.synthesize("golub_kahan", on_failure="warn", rng=0, progress=False)
    (ed,) = done
    partial, spent = ed.result, ed.operator.n_products
    start = spent - partial.n_products
    assert 0 <= start <= 1  # the product that was interrupted
    assert not partial.converged.all() and partial.eigenindex.tolist() == [0, 119]
    assert partial.details["stopped"] == "golub_kahan was interrupted"
    ed.synthesize("golub_kahan", rng=0, progress=False)
    cold = distortion()
    before = cold.operator.n_products
    cold.synthesize("golub_kahan", rng=0, progress=False)
    assert ed.operator.n_products - spent <= cold.operator.n_products - before - 20
    assert ed.result.n_products == ed.operator.n_products - start  # the certificate after Ctrl-C counts, too
    assert_right(ed, 1)
    ed.synthesize("golub_kahan", k=2, rng=0, progress=False)
    assert ed.result.n_products == ed.operator.n_products - start


def test_a_second_one_ends_at_once():
    """While the certificate is computed: the result stays as it was, and the search goes on."""
    ed = distortion()
    interrupted(ed, 25, again=10)
    with pytest.raises(KeyboardInterrupt):
        ed.synthesize("golub_kahan", rng=0, progress=False)
    assert ed.result is None and "search" in ed._state
    before = ed.operator.n_products
    ed.synthesize("golub_kahan", rng=0, progress=False)
    assert_right(ed, 1)
    assert ed.result.n_products > ed.operator.n_products - before + 20


def test_in_the_last_certificate_it_is_computed_once_more():
    ed, cold = distortion(), distortion()
    start = cold.operator.n_products
    cold.synthesize("golub_kahan", k=2, which="smallest", rng=0, progress=False)
    interrupted(ed, cold.operator.n_products - start - 5)
    with pytest.raises(KeyboardInterrupt):
        ed.synthesize("golub_kahan", k=2, which="smallest", rng=0, progress=False)
    result = ed.result
    assert result.converged.all() and "stopped" not in result.details
    assert ed.synthesize("golub_kahan", k=2, which="smallest", progress=False).result is result


def test_what_holds_is_not_replaced_by_less():
    ed = distortion()
    ed.synthesize("golub_kahan", k=1, tol=1e-3, rng=0, progress=False)
    before = ed.result
    interrupted(ed, 3)
    with pytest.raises(KeyboardInterrupt):
        ed.synthesize("golub_kahan", k=3, tol=1e-9, rng=0, progress=False)
    assert ed.result is before and before.converged.all()
    interrupted(ed, 70)
    with pytest.raises(KeyboardInterrupt):
        ed.synthesize("golub_kahan", k=3, tol=1e-4, rng=0, progress=False)
    assert ed.result is not before and ed.result.converged.sum() >= 2
    assert_honest(ed.result)


@pytest.mark.parametrize("method", ["exact", "power", "lobpcg", "eigsh", "svds", "randomized_svd"])
def test_other_methods_leave_the_object_as_it_was(method):
    ed = distortion()
    interrupted(ed, 8)
    with pytest.raises(KeyboardInterrupt):
        ed.synthesize(method, k=1, rng=0, progress=False)
    assert ed.result is None
    ed.operator.linearization.on_product = None
    ed.synthesize("golub_kahan", rng=0, progress=False)
    before = ed.result
    interrupted(ed, 8)
    with pytest.raises(KeyboardInterrupt):
        ed.synthesize(method, k=1, rng=0, progress=False)
    assert ed.result is before


def test_eigenpairs_without_a_state_computes_nothing_more():
    ed = distortion()
    interrupted(ed, 20)
    before = ed.operator.n_products
    with pytest.raises(KeyboardInterrupt):
        eigenpairs(ed.operator, method="golub_kahan", rng=0, progress=False)
    assert ed.operator.n_products - before <= 21


def test_eigenpairs_keeps_it_in_the_state():
    operator = FisherOperator(torch.linspace(0, 1, 120, dtype=torch.float64), linear_model(MATRIX))
    state, count = {}, []

    def callback(entry):
        count.append(entry)
        if len(count) == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        eigenpairs(operator, method="golub_kahan", rng=0, progress=False, state=state, callback=callback)
    assert_honest(state["result"])
    assert "search" in state and "stopped" in state["result"].details
    assert eigenpairs(operator, method="golub_kahan", rng=0, progress=False, state=state).converged.all()


REAL = """
import os, random, signal, sys, time
import numpy as np, torch
torch.set_num_threads(1)
sys.path[:0] = [sys.argv[3]]
from test_ctrl_c import SIGMA, assert_honest, distortion

random.seed(int(sys.argv[2]))
interrupts = kept = 0
longest = 0.0
distortion().synthesize("golub_kahan", 1, rng=0)  # what is imported at the first call
for k in (1, 2):
    start = time.process_time()
    distortion().synthesize("golub_kahan", k, rng=0)
    longest = max(longest, time.process_time() - start)
while interrupts < int(sys.argv[1]):
    k = random.choice([1, 2])
    ed = distortion()
    lin = ed.operator.linearization
    listener = lin.on_product
    try:
        signal.setitimer(signal.ITIMER_REAL, random.uniform(0.0005, longest))
        ed.synthesize("golub_kahan", k, rng=0)
        signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        interrupts += 1
        kept += ed.result is not None
        if ed.result is not None:
            assert_honest(ed.result)
    ed.synthesize("golub_kahan", k, rng=0)
    np.testing.assert_allclose(ed.result.eigenvalues, np.r_[SIGMA[:k], SIGMA[-k:]] ** 2, atol=1e-5 * SIGMA[0] ** 2)
    assert ed.result.converged.all()
print(interrupts, kept)
"""
INSTALL = """
import signal
signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
"""


@pytest.mark.skipif(os.name != "posix", reason="timers that raise signals are of POSIX")
@pytest.mark.parametrize("count", [3, pytest.param(200, marks=pytest.mark.slow)])
def test_signals_at_any_time(count):
    here = os.path.dirname(__file__)
    done = subprocess.run(
        [sys.executable, "-c", INSTALL + REAL, str(count), "0", here], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    interrupts, kept = map(int, done.stdout.split())
    assert interrupts == count and kept >= count // 2


KILLED = """
import signal, sys
sys.path[:0] = [sys.argv[1]]
from test_ctrl_c import distortion
ed = distortion()
lin, start = ed.operator.linearization, ed.operator.n_products
sent = []
def on_product(_):
    if not sent and lin.n_products - start >= 20:
        sent.append(1)
        signal.raise_signal(signal.SIGINT)
lin.on_product = on_product
ed.synthesize("golub_kahan", rng=0)
"""


def test_a_script_ends_as_python_ends_on_ctrl_c():
    run, plain = (
        subprocess.run([sys.executable, "-c", script, os.path.dirname(__file__)], capture_output=True, text=True)
        for script in (KILLED, "import signal; signal.raise_signal(signal.SIGINT)")
    )
    assert run.returncode in (plain.returncode, 1) and run.returncode  # 1, where code runs at Python's end
    assert "KeyboardInterrupt: golub_kahan was interrupted after" in run.stderr


@pytest.mark.skipif(os.name != "posix", reason="signals are of POSIX")
def test_an_interrupt_in_a_restart_waits_for_its_end(monkeypatch):
    """V is changed in place there, so that nothing could be kept."""
    combine, sent = lanczos.combine, []

    def interrupted(rows, y):
        if len(y) > 5 and not sent:  # of a restart
            sent.append(os.kill(os.getpid(), signal.SIGINT))
        return combine(rows, y)

    monkeypatch.setattr(lanczos, "combine", interrupted)
    ed = distortion()
    with pytest.raises(KeyboardInterrupt):
        ed.synthesize(k=3, rng=0, progress=False, method="golub_kahan", max_basis=45)
    assert sent and ed.result is not None and "search" in ed._state
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert ed.synthesize(k=3, rng=0, progress=False, method="golub_kahan", max_basis=45).result.converged.all()
