"""Many images at once, against the dense sum of their Fisher matrices."""

import pickle

import numpy as np
import pytest
import torch
from helpers import assert_truthful

from fisherop import FisherOperator, eigenpairs, noise, spaces
from fisherop.pooled import Again
from fisherop.testing import matrix_with_singular_values

MATRIX = torch.as_tensor(matrix_with_singular_values(np.geomspace(2, 0.05, 20), 24, 20))


class Bent(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("matrix", MATRIX.clone())

    def forward(self, x):
        return torch.tanh(self.matrix.to(x) @ x.flatten()) + 1.2


def images(count, dtype=torch.float64):
    return list(torch.randn(count, 1, 1, 4, 5, generator=torch.Generator().manual_seed(0), dtype=dtype))


def truth(model, several, weights, root=lambda y: np.eye(len(y)), B=None):
    total = 0.0
    for weight, x in zip(weights, several, strict=True):
        J = root(model(x)) @ torch.func.jacrev(model)(x).reshape(24, 20).numpy() @ (np.eye(20) if B is None else B)
        total = total + weight * J.T @ J
    return total


@pytest.mark.parametrize("engine", ["auto", "functional"])
@pytest.mark.parametrize("memory", [2**30, 1500, 0])
def test_f_of_many_images(memory, engine):
    several, model, weights = images(5), Bent(), [1.0, 0.5, 0.0, 2.0, 1e-3]
    F = FisherOperator.pooled(several, model, weights=weights, memory=memory, engine=engine)
    dense = truth(model, several, weights)
    np.testing.assert_allclose(F @ np.eye(20), dense, atol=1e-13)
    result = eigenpairs(F, method="golub_kahan", tol=1e-9, rng=0, progress=False)
    values, vectors = np.linalg.eigh(dense)
    assert_truthful(result, np.sqrt(values.clip(0))[:, None] * vectors.T)
    assert F.to_tensors(result.eigenvectors).shape == (2, 1, 1, 4, 5)
    kept = sum(not isinstance(J, Again) for _, J in F.products.J.parts)
    assert kept == (0 if engine == "functional" or memory == 0 else 5 if memory == 2**30 else kept)
    if memory == 1500 and engine == "auto":
        assert 0 < kept < 5


@pytest.mark.parametrize("metric", [False, True])
@pytest.mark.parametrize("kind", ["white", "Poisson", "Gaussian"])
def test_with_noise_in_a_subspace_in_a_metric(kind, metric):
    several, model = images(3), Bent()
    disc, weights = np.arange(20).reshape(4, 5) % 3 > 0, np.linspace(0.5, 3, 20)
    noises = {"white": None, "Poisson": noise.Poisson(), "Gaussian": noise.Gaussian(lambda f: 0.1 + f**2)}
    options = {"noise": noises[kind], "subspace": spaces.mask(disc), "memory": 0}
    options |= {"metric": weights.reshape(4, 5)} if metric else {}

    def information(y):
        """By the definition of each."""
        f = y.numpy()
        variance = {"white": np.ones_like(f), "Poisson": f, "Gaussian": 0.1 + f**2}[kind]
        slope = 2 * f if kind == "Gaussian" else 0.0  # of the variance: its second term
        return np.diag(np.sqrt(1 / variance + (slope / variance) ** 2 / 2))

    F = FisherOperator.pooled(several, model, **options)
    B = (np.diag(weights**-0.5) if metric else np.eye(20))[:, disc.ravel()]
    dense = truth(model, several, [1 / 3] * 3, information, B)
    np.testing.assert_allclose(F @ np.eye(disc.sum()), dense, atol=1e-13)
    assert F.to_tensors(np.ones((disc.sum(), 2))).shape == (2, 1, 1, 4, 5)


def test_pickles():
    for memory in (2**30, 0):
        F = FisherOperator.pooled(images(2), Bent(), memory=memory)
        same = pickle.loads(pickle.dumps(F))
        np.testing.assert_allclose(same @ np.ones(20), F @ np.ones(20), rtol=1e-12)


def test_a_model_that_changes():
    model = Bent()
    F = FisherOperator.pooled(images(2), model, memory=0)
    eigenpairs(F, 1, "largest", method="golub_kahan", rng=0, progress=False)
    model.matrix.mul_(2)
    with pytest.raises(RuntimeError, match="the model has changed since the images were pooled"):
        eigenpairs(F, 1, "largest", method="golub_kahan", rng=0, progress=False)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"images": []}, ValueError, "images must be a sequence of at least one image, each a tensor"),
        (
            {"images": [torch.ones(2), torch.ones(3)]},
            ValueError,
            r"images must share one shape, got \(3,\)",
        ),
        ({"weights": [1.0]}, ValueError, "weights must be a number from 0 for each of the 2 images"),
        ({"weights": [1.0, -1.0]}, ValueError, "a weight must be a number from 0, got -1.0"),
        ({"memory": "all"}, TypeError, "memory must be"),
    ],
)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        FisherOperator.pooled(**{"images": [torch.ones(2)] * 2, "model": torch.sin} | change)
