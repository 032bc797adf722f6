"""Whatever of PyTorch is switched around a call, its answer is the same, and the switches are as they were."""

import contextlib
import copy
import pickle
import threading

import numpy as np
import pytest
import torch
from helpers import small_image, small_model
from unharmed import settings

from fisherop import Eigendistortion, FisherOperator, certify, eigenpairs, linearize
from fisherop.model import undisturbed
from fisherop.model.compat import compute_exactly
from fisherop.model.engines import ENGINES


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


CONTEXTS = {
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "anomaly": lambda: torch.autograd.set_detect_anomaly(True),
    "float64 by default": lambda: default_dtype(torch.float64),
    "another device by default": lambda: torch.device("meta"),
    "deterministic": deterministic,
    "saved tensors elsewhere": torch.autograd.graph.save_on_cpu,
}


def linearized(engine):
    def call(model, image):
        lin = linearize(image, model, engine=engine)
        v = torch.ones(3, *lin.image_shape, dtype=image.dtype, device="cpu")
        return lin.vjp(lin.jvp(v)), linearize(image, model, engine=engine).jvp(v)

    return call


def searched(model, image):
    F = FisherOperator(image, model)
    result = eigenpairs(F, rng=0, progress=False)
    return result.eigenvalues, certify(F, result.eigenvectors, result.eigenindex).residual_norms


def synthesized(model, image):
    ed = Eigendistortion(image, model).synthesize(rng=0, progress=False, k=2, method="golub_kahan")
    ed.synthesize(rng=0, progress=False, k=3, method="golub_kahan")
    changes = ed.response_change(0, 0.1)
    ed.to(torch.float32)
    ed.compute_jacobian(progress=False)
    return ed.result.eigenvalues, *changes, ed.jacobian, ed.eigendistortions, *ed.detection_thresholds()


def copied(model, image):
    lin = linearize(image, model)
    v = torch.ones(1, *lin.image_shape, dtype=image.dtype, device="cpu")
    return copy.deepcopy(lin).jvp(v), copy.copy(lin).jvp(v), lin.respond(image)


CALLS = {f"linearize {engine}": linearized(engine) for engine in ENGINES}
CALLS |= {"eigenpairs": searched, "synthesize": synthesized, "copy": copied}


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled:UserWarning")
@pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS.keys())
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_the_answer_is_the_same(call, context):
    expected = call(small_model(), small_image())
    model, image = small_model(), small_image()
    with context():
        before = settings()
        found = call(model, image)
        now = settings()
    assert [k for k in now if now[k] != before[k]] == []
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=1e-6, atol=1e-7)
    for tensor in model.state_dict().values():
        assert not tensor.is_inference() and tensor.device.type == "cpu"


def test_autocast_is_refused_by_linearize_and_changes_no_product():
    image, model = small_image(torch.float32), small_model(torch.float32)
    F = FisherOperator(image, model)
    expected = eigenpairs(F, rng=0, progress=False).eigenvalues
    with torch.autocast("cpu", dtype=torch.bfloat16):
        np.testing.assert_array_equal(eigenpairs(F, rng=0, progress=False).eigenvalues, expected)
        with pytest.raises(TypeError, match="bfloat16"):
            FisherOperator(image, model)


def test_a_pickle_is_read_under_inference_mode():
    lin = linearize(small_image(), torch.tanh)
    with torch.inference_mode():
        again = pickle.loads(pickle.dumps(lin))
        assert torch.equal(again.jvp(again.image[None]), lin.jvp(lin.image[None]))


NEW = hasattr(torch._C, "_get_fp32_precision_getter")  # from 2.9 on
BACKENDS = [("generic", "all"), ("cuda", "all"), ("mkldnn", "all")]
OPERATIONS = [(backend, name) for backend in ("cuda", "mkldnn") for name in ("conv", "rnn", "matmul")]


def precisions(*places):
    return [torch._C._get_fp32_precision_getter(*place) for place in places] if NEW else []


def old_precisions():
    return torch._C._get_float32_matmul_precision(), torch._C._get_cudnn_allow_tf32()


def precisions_by_level():
    """Also what is set for an operation itself, which shows when the general precision is another."""
    found = [precisions(*BACKENDS, *OPERATIONS), [] if NEW else old_precisions()]
    if NEW:
        (general,) = precisions(BACKENDS[0])
        torch._C._set_fp32_precision_setter(*BACKENDS[0], "none" if general == "ieee" else "ieee")
        found.append(precisions(*BACKENDS, *OPERATIONS))
        torch._C._set_fp32_precision_setter(*BACKENDS[0], general)
    return found


def put(backend, name, value):
    def switch():
        torch._C._set_fp32_precision_setter(backend, name, value)

    return pytest.param(switch, marks=pytest.mark.skipif(not NEW, reason="PyTorch has no such switch before 2.9"))


@pytest.fixture
def as_at_first():
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True
    for place in (*BACKENDS, *OPERATIONS[2:]) if NEW else ():
        torch._C._set_fp32_precision_setter(*place, "none")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(
    "switch",
    [
        lambda: None,
        lambda: torch.set_float32_matmul_precision("high"),
        lambda: torch.set_float32_matmul_precision("medium"),
        lambda: setattr(torch.backends.cudnn, "allow_tf32", False),
        put("generic", "all", "tf32"),
        put("generic", "all", "ieee"),
        put("cuda", "all", "tf32"),
        put("cuda", "conv", "ieee"),
        put("mkldnn", "all", "bf16"),
        put("mkldnn", "matmul", "tf32"),
    ],
)
def test_float32_is_computed_as_such(switch, device, engine, as_at_first, monkeypatch):
    """TF32, which convolutions use by default on NVIDIA's GPUs, has a thousandth where float32 has a ten-millionth.

    What is set for a GPU is looked at without one.
    """
    monkeypatch.setattr(undisturbed, "compute_exactly", lambda _, undo: compute_exactly(device, undo))
    switch()
    before, seen = precisions_by_level(), []
    backend = "cuda" if device == "cuda" else "mkldnn"

    def look(_=None):
        seen.append(precisions(*(place for place in OPERATIONS if place[0] == backend)))
        if not NEW:
            seen[-1] = [old_precisions() == ("highest", False) if device == "cuda" else old_precisions()[0]]

    def model(x):
        look()
        return x.sin()

    lin = linearize(torch.ones(3), model, engine=engine)
    lin.on_product = look
    lin.vjp(lin.jvp(torch.ones(2, 3)))
    assert all(set(found) <= {"ieee", "none", "highest", True} for found in seen) and seen
    if device == "cuda" and NEW:
        assert all("none" not in found for found in seen), "by default, some operations are reduced"
    assert precisions_by_level() == before


def test_float32_while_any_thread_needs_it(as_at_first):
    torch.set_float32_matmul_precision("high")
    inside, go_on, seen = threading.Event(), threading.Event(), []

    def slow(x):
        inside.set()
        go_on.wait(60)
        seen.append(torch._C._get_float32_matmul_precision() if not NEW else precisions(("mkldnn", "matmul")))
        return x.sin()

    F = FisherOperator(torch.ones(3), lambda x: x.cos())
    other = threading.Thread(target=lambda: linearize(torch.ones(3), slow))
    other.start()
    assert inside.wait(60)
    F.linearization.jvp(torch.ones(1, 3))
    go_on.set()
    other.join()
    assert set(map(str, seen)) == {"['ieee']" if NEW else "highest"}
    assert torch.get_float32_matmul_precision() == "high"
    assert not NEW or precisions(("mkldnn", "matmul")) == ["tf32"]


def test_a_model_may_switch_cudnn_off():
    """On a CPU; elsewhere PyTorch's context manager wants its old switches to agree with its new ones."""

    def model(x):
        with torch.backends.cudnn.flags(enabled=False):
            return x.sin()

    assert linearize(torch.ones(3), model).jvp(torch.ones(1, 3)).shape == (1, 3)


def test_settings_that_a_failing_model_leaves_changed():
    """Each of them is put back, also anomaly detection, for which PyTorch has several functions."""

    def model(x):
        torch.autograd.set_detect_anomaly(True)
        torch.backends.mha.set_fastpath_enabled(False)
        raise RuntimeError("as it must")

    linearize(small_image(), small_model())  # what is imported at the first call adds filters of warnings
    before = settings()
    with pytest.raises(RuntimeError, match="as it must"):
        linearize(small_image(), model)
    assert settings() == before
