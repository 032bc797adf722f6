"""Many images on the workers of a real cluster, which die: the same operator as in one process."""

import functools
import os
import pickle
import signal
import threading
import time

import numpy as np
import pytest
import studies
import torch
from helpers import DEVICES
from studies import Net, build, images
from test_sweep import cluster, trained

from fisherop import FisherOperator, JacobianOperator, eigenpairs, noise, spaces
from fisherop.jacobian import uncounted
from fisherop.model.recipe import Recipe, _received
from fisherop.on_workers import answer

pytest.importorskip("distributed", reason="dask.distributed is not installed")
pytestmark = pytest.mark.slow  # clusters take seconds to start, and their processes as much to import PyTorch


def pids(client):
    return sorted(client.run(os.getpid).values())


def assert_same(one, other, rtol=1e-6):
    one, other = (np.asarray(x, dtype=np.float64) for x in (one, other))
    np.testing.assert_allclose(one, other, rtol=0, atol=rtol * np.abs(other).max())


@pytest.fixture(scope="module")
def client():
    with cluster() as found:
        yield found


def rows(operator, count=3):
    return torch.randn(count, operator.shape[1], generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("device", DEVICES)
def test_images_may_be_on_any_device(client, device):
    several, model = [image.to(device) for image in images(5)], Net().eval().to(device)
    here, there = (FisherOperator.pooled(several, model, client=where) for where in (None, client))
    v = torch.randn(3, 64, generator=torch.Generator().manual_seed(1)).to(device)
    (r, products), (right_r, right_products) = (operator.products.normal(v) for operator in (there, here))
    assert products.device == right_products.device
    assert_same(products.cpu(), right_products.cpu())
    assert_same((r.T @ r).cpu(), (right_r.T @ right_r).cpu())


@pytest.mark.parametrize("kind", ["plain", "observed"])
def test_the_same_operator_as_in_one_process(client, kind):
    several, model, weights = images(7), Net().eval(), np.linspace(0, 2, 7)
    options = {"weights": weights} if kind == "plain" else {"noise": noise.Poisson(), "subspace": spaces.zero_mean()}
    if kind == "observed":
        model = torch.nn.Sequential(model, torch.nn.Softplus())
    here = FisherOperator.pooled(several, model, **options)
    there = FisherOperator.pooled(several, model, client=client, **options)
    x = rows(here)
    (r, products), (own_r, own_products) = there.products.normal(x), here.products.normal(x)
    assert_same(products, own_products)
    assert_same(r.T @ r, own_r.T @ own_r)
    assert there.shape == here.shape and there.jacobian.shape == here.jacobian.shape
    assert_same(there.jacobian @ x.numpy().T, here.jacobian @ x.numpy().T)
    u = torch.randn(2, here.jacobian.shape[0], generator=torch.Generator().manual_seed(2)).numpy()
    assert_same(there.jacobian.H @ u.T, here.jacobian.H @ u.T)
    assert_same(there @ x.numpy().T, here @ x.numpy().T)
    assert torch.equal(there.products.normal(x)[1], there.products.normal(x)[1])  # a fixed order: the same bits
    assert there.to_tensors(np.eye(there.shape[0], 2)).shape == (2, 1, 1, 8, 8)
    assert_same(there.to_tensors(np.eye(there.shape[0], 2)), here.to_tensors(np.eye(here.shape[0], 2)))
    found = [eigenpairs(F, method="golub_kahan", tol=1e-4, rng=0, progress=False) for F in (there, here)]
    assert all(result.converged.all() for result in found)
    assert_same(found[0].eigenvalues, found[1].eigenvalues, 1e-4)


def test_a_model_may_be_sent_as_what_builds_it(client):
    here, there = FisherOperator.pooled(images(2), build()), FisherOperator.pooled(images(2), build, client=client)
    assert_same(there.products.normal(rows(here))[1], here.products.normal(rows(here))[1])


def test_what_builds_a_model_does_so_anew_for_each_operator(client, tmp_path):
    builder = functools.partial(studies.from_file, tmp_path / "weights.pt")
    for factor in (1, 2):
        trained(tmp_path / "weights.pt", factor)
        here, there = (
            FisherOperator.pooled(images(2), builder()),
            FisherOperator.pooled(images(2), builder, client=client),
        )
        assert_same(there.products.normal(rows(here))[1], here.products.normal(rows(here))[1])


def test_models_that_differ_between_workers_are_refused(client):
    with pytest.raises(RuntimeError, match="the model unseeded is not the same in all processes"):
        FisherOperator.pooled(images(2), studies.unseeded, client=client)


def test_a_share_whose_model_is_another_one_is_refused(tmp_path):
    """As a new worker may build it for one that has died."""
    recipe = Recipe(functools.partial(studies.from_file, trained(tmp_path / "weights.pt", 1)), "net")
    share = pickle.dumps(
        (np.stack([image.numpy() for image in images(2)]), recipe, [1, 1], 2**20, "cpu", {}, (None, None, None))
    )
    told = answer(("one", 0), (share, ""), (0, ""), "told", ())[0]
    assert answer(("two", 0), (share, told["weights"]), (0, ""), "told", ()) == (told,)
    _received.clear()
    trained(tmp_path / "weights.pt", 2)
    with pytest.raises(RuntimeError, match="not at each call of what builds it"):
        answer(("three", 0), (share, told["weights"]), (0, ""), "told", ())


def test_a_worker_that_dies_is_made_good():
    several, model = images(256), Net().eval()
    here = FisherOperator.pooled(several, model)
    x = rows(here)
    truth = here.products.normal(x)
    with cluster() as client:
        there = FisherOperator.pooled(several, model, client=client)

        def check():
            r, products = there.products.normal(x)
            assert_same(products, truth[1])
            assert_same(r.T @ r, truth[0].T @ truth[0])

        check()
        os.kill(pids(client)[0], signal.SIGKILL)  # between products
        check()
        again = pids(client)
        threading.Timer(0.05, os.kill, (again[0], signal.SIGKILL)).start()  # during one
        check()
        time.sleep(0.2)
        check()
        client.cluster.scale(0)
        uncounted(there.products).timeout = 1.0
        with pytest.raises(RuntimeError, match="has had no worker for 1 s: start workers and repeat the call"):
            check()
        client.cluster.scale(1)
        uncounted(there.products).timeout = 60.0
        check()


def test_errors_of_workers_are_those_of_one_process(client):
    several = images(3)
    several[1] = torch.full_like(several[1], -1)
    with pytest.raises(ValueError, match="this image is rejected"):
        FisherOperator.pooled(several, Net().eval(), client=client)
    with pytest.raises(ValueError, match="weights must be"):
        FisherOperator.pooled(images(2), Net().eval(), client=client, weights=[1.0])
    with pytest.raises(TypeError, match="client must be a dask.distributed.Client, got 'tcp".replace(".", r"\.")):
        FisherOperator.pooled(images(2), Net().eval(), client="tcp://localhost:8786")
    with pytest.raises(ValueError, match="timeout must be seconds"):
        FisherOperator.pooled(images(2), Net().eval(), client=client, timeout=0)
    operator = JacobianOperator.pooled(images(2), Net().eval(), client=client)
    with pytest.raises(TypeError, match="an operator on a cluster holds its client"):
        pickle.dumps(operator)


def test_a_share_that_is_not_there_is_asked_for():
    assert answer(("an operator", 0), None, (0, ""), "told", ()) is None
