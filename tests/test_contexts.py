"""Whatever of PyTorch is switched around a call, its answer is the same, and the switches are as they were."""

import contextlib
import copy
import pickle

import numpy as np
import pytest
import torch
from helpers import small_image, small_model
from test_interrupts import settings

from fisherop import Eigendistortion, FisherOperator, certify, eigenpairs, linearize
from fisherop.engines import ENGINES


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
