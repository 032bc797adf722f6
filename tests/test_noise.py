"""Every noise: its root against its Fisher information by definition, and F of models against dense truth."""

import pickle

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch
from helpers import assert_truthful
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.linalg import LinearOperator

from fisherop import Eigendistortion, FisherOperator, JacobianOperator, eigenpairs, noise
from fisherop.testing import check_adjoint, matrix_with_singular_values

FLOAT64 = torch.float64


def information(root, response):
    """SᵀS, dense."""
    S = noise.Root(root, response)
    dense = S.jvp(torch.eye(response.numel(), dtype=response.dtype)).T
    back = S.vjp(torch.eye(S.shape[0], dtype=response.dtype))
    torch.testing.assert_close(dense, back)
    return (dense.T @ dense).numpy()


def by_scores(log_density, response, outcomes, weights):
    """E[∇log p ∇log pᵀ] over outcomes, by autograd."""
    total = np.zeros((len(response), len(response)))
    for y, weight in zip(outcomes, weights, strict=True):
        f = response.clone().requires_grad_()
        score = torch.autograd.grad(log_density(y, f), f)[0].numpy()
        total += weight * np.outer(score, score)
    return total


def responses(draw, low, high, m):
    return torch.tensor(draw(st.lists(st.floats(low, high), min_size=m, max_size=m)), dtype=FLOAT64)


@given(st.data())
@settings(max_examples=20)
def test_poisson_and_negative_binomial_by_enumeration(data):
    f, r = responses(data.draw, 0.05, 6.0, 3), data.draw(st.floats(0.5, 20))
    counts = np.arange(400)
    for i, rate in enumerate(f.tolist()):
        one = f[i : i + 1]
        p = scipy.stats.poisson.pmf(counts, rate)
        expected = by_scores(lambda y, f: (y * f.log() - f).sum(), one, counts, p)
        np.testing.assert_allclose(information(noise.Poisson(), one), expected, rtol=1e-8)
        p = scipy.stats.nbinom.pmf(counts, r, r / (r + rate))
        lost = 1 - p.sum()
        expected = by_scores(lambda y, f: (y * (f / (f + r)).log() - r * (f + r).log()).sum(), one, counts, p)
        np.testing.assert_allclose(information(noise.NegativeBinomial(r), one), expected, rtol=1e-6 + 1e6 * lost)
    assert np.count_nonzero(information(noise.Poisson(), f)) == 3


@given(st.data(), st.integers(2, 6))
@settings(max_examples=30)
def test_categorical_and_bernoulli_by_enumeration(data, classes):
    logits = responses(data.draw, -30.0, 30.0, classes)
    p = torch.softmax(logits, 0).numpy()
    expected = by_scores(lambda y, f: torch.log_softmax(f, 0)[y], logits, range(classes), p)
    np.testing.assert_allclose(information(noise.Categorical(), logits), expected, rtol=1e-10, atol=1e-300)
    assert noise.Root(noise.Categorical(), logits).shape == (classes - 1, classes)
    q = torch.sigmoid(logits).numpy()
    np.testing.assert_allclose(np.diag(information(noise.Bernoulli(), logits)), q * torch.sigmoid(-logits).numpy())


@pytest.mark.parametrize("dim", [-1, 0, 1, 2, -2])
def test_a_choice_at_each_place(dim):
    logits = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(0), dtype=FLOAT64)
    p = torch.softmax(logits, dim)
    expected = torch.diag(p.flatten())
    index = torch.arange(24).reshape(3, 4, 2).movedim(dim, -1).reshape(-1, logits.shape[dim])
    for one in index:
        expected[one[:, None], one] -= torch.outer(p.flatten()[one], p.flatten()[one])
    np.testing.assert_allclose(information(noise.Categorical(dim), logits), expected, atol=1e-14)


def test_a_confident_choice_keeps_its_precision():
    """pᵀu² − (pᵀu)² would be rounding in float32."""
    for gap in (5.0, 20.0, 60.0):
        logits = torch.tensor([gap, 0.0, -3.0])
        exact = information(noise.Categorical(), logits.double())
        found = information(noise.Categorical(), logits)
        np.testing.assert_allclose(found[1:, 1:], exact[1:, 1:], rtol=1e-5, atol=1e-38)


@given(st.data(), st.integers(1, 6))
@settings(max_examples=20)
def test_gaussian(data, m):
    f, v = responses(data.draw, -3.0, 3.0, m), responses(data.draw, 0.01, 9.0, m)
    np.testing.assert_allclose(information(noise.Gaussian(2.5), f), np.eye(m) / 2.5)
    for variance in (v, v.numpy(), v.tolist()):
        np.testing.assert_allclose(information(noise.Gaussian(variance), f), np.diag(1 / v))
    if m > 1:
        root = matrix_with_singular_values(np.linspace(2, 0.3, m), m, m)
        covariance = root @ root.T
        np.testing.assert_allclose(information(noise.Gaussian(covariance), f), np.linalg.inv(covariance), atol=1e-10)
    S = matrix_with_singular_values(np.linspace(2, 1, min(m, 2)), 2, m) if m > 1 else np.ones((2, 1))
    operator = LinearOperator(S.shape, lambda x: S @ x, rmatvec=lambda y: S.T @ y, dtype=float)
    np.testing.assert_allclose(information(noise.Gaussian(operator), f), S.T @ S, atol=1e-14)


def test_a_variance_that_depends_on_the_response():
    """Its second term is half of the information here."""
    f = torch.tensor([0.5, 2.0, -1.0], dtype=FLOAT64)

    def variance(f):
        return 0.1 + f**2

    x = np.linspace(-60, 60, 400_001)
    expected = []
    for one in f:
        v = float(variance(one))
        density = scipy.stats.norm.pdf(x, float(one), v**0.5)
        score = (x - float(one)) / v + float(one) * ((x - float(one)) ** 2 / v**2 - 1 / v)
        expected.append(scipy.integrate.trapezoid(density * score**2, x))
    np.testing.assert_allclose(information(noise.Gaussian(variance), f), np.diag(expected), rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(information(noise.Gaussian(lambda f: torch.full_like(f, 4.0)), f), np.eye(3) / 4)


class Own:
    def root(self, response):
        weights = torch.arange(1, response.numel() + 1).to(response)
        return (lambda rows: rows * weights), (lambda rows: rows * weights)


MATRIX = torch.as_tensor(matrix_with_singular_values(np.linspace(2, 0.5, 30), 40, 30))
NOISES = {
    "number": noise.Gaussian(0.3),
    "numbers": noise.Gaussian(np.linspace(1, 3, 40)),
    "covariance": noise.Gaussian(np.diag(np.linspace(1, 3, 40)) + 0.1),
    "signal-dependent": noise.Gaussian(torch.exp),
    "Poisson": noise.Poisson(floor=0.2),
    "negative binomial": noise.NegativeBinomial(3.0, floor=0.2),
    "Bernoulli": noise.Bernoulli(),
    "categorical": noise.Categorical(),
    "own": Own(),
}


def bent(x):
    return torch.tanh(MATRIX.to(x) @ x) * 2 + 0.5


@pytest.mark.parametrize("kind", list(NOISES))
@pytest.mark.parametrize("dtype", [torch.float32, FLOAT64])
def test_both_ends_of_a_model_with_noise(kind, dtype):
    """Against the dense Jacobian by autograd, and the information of its response."""
    x = torch.linspace(-1, 1, 30, dtype=dtype)
    F = FisherOperator(x, bent, noise=NOISES[kind])
    J = torch.func.jacrev(bent)(x.double())
    truth = J.T.numpy() @ information(NOISES[kind], bent(x.double())) @ J.numpy()
    scale = np.linalg.norm(truth, 2)
    np.testing.assert_allclose(F @ np.eye(30), truth, atol=(1e-12 if dtype == FLOAT64 else 1e-5) * scale)
    check_adjoint(F.jacobian)
    values, vectors = np.linalg.eigh(truth)
    root = np.sqrt(values.clip(0))[:, None] * vectors.T
    for method in ("golub_kahan", "exact", "eigsh"):
        tol = 1e-5 if dtype == torch.float32 else 1e-8
        result = eigenpairs(F, method=method, tol=tol, rng=0, progress=False)
        assert_truthful(result, root)
        np.testing.assert_allclose(result.eigenvalues, values[[-1, 0]], atol=2 * tol * scale)
    assert F.observed == {"noise": NOISES[kind]} and F.jacobian.shape[1] == 30


def test_operators_with_noise_move_and_pickle():
    x = torch.linspace(-1, 1, 30)
    J = JacobianOperator(x, bent, noise=noise.Poisson(floor=0.2))
    double = J.to(FLOAT64)
    np.testing.assert_allclose(double @ np.ones(30), J @ np.ones(30), rtol=1e-4, atol=1e-4)
    assert double.observed == J.observed
    same = pickle.loads(pickle.dumps(J))
    np.testing.assert_array_equal(same @ np.ones(30), J @ np.ones(30))
    assert J.linearization.response_shape == (40,) and J.to_tensors(np.ones((30, 2))).shape == (2, 30)


def test_distortions_in_units_of_the_noise():
    """√λ is the discriminability d′ of a unit step; twice the variance halves λ."""
    x = torch.linspace(-1, 1, 30, dtype=FLOAT64)
    plain, noisy = (
        Eigendistortion(x, lambda x: MATRIX @ x, noise=n).synthesize(progress=False, rng=0)
        for n in (None, noise.Gaussian(4.0))
    )
    np.testing.assert_allclose(noisy.eigenvalues, plain.eigenvalues / 4)
    np.testing.assert_allclose(noisy.detection_thresholds()[0], 2 * plain.detection_thresholds()[0])
    predicted, actual = noisy.response_change(0, [0.5, 1.0])
    np.testing.assert_allclose(predicted, plain.response_change(0, [0.5, 1.0])[0] / 2)
    np.testing.assert_allclose(actual, predicted)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (
            noise.Poisson(),
            r"the response, a mean count, must be positive, but 2 of its 4 elements are not",
        ),
        (noise.Poisson(floor=0), "floor must be a positive number, got 0"),
        (noise.NegativeBinomial(0), "r must be a positive number, got 0"),
        (noise.Gaussian(0.0), "variance must be positive, got 0"),
        (noise.Gaussian([1.0, 2.0]), r"variance must be a number, of the response's shape \(2, 2\), \(4,\), or square"),
        (noise.Gaussian(np.ones((4, 4))), "variance, as a covariance matrix, must be positive definite"),
        (noise.Gaussian(np.triu(np.ones((4, 4)))), "variance, as a covariance matrix, must be symmetric"),
        (
            noise.Gaussian(lambda f: f.sum() + f**2 + 1),
            "the variance function must give the variance of each element",
        ),
        (noise.Gaussian(lambda f: f), "the variance must be positive"),
        (
            noise.Gaussian(LinearOperator((3, 3), lambda x: x, rmatvec=lambda x: x)),
            "variance must be an operator",
        ),
        (noise.Categorical(dim=2), r"dim must be a dimension of the response, of shape \(2, 2\), got 2"),
    ],
)
def test_bad_noise(made, message):
    with pytest.raises(ValueError, match=message):
        FisherOperator(torch.ones(2, 2), lambda x: x * torch.tensor([[1.0, 0.0], [2.0, -1.0]]), noise=made)


class Wrong:
    def __init__(self, apply, adjoint):
        self.pair = apply, adjoint

    def root(self, response):
        return self.pair


@pytest.mark.parametrize(
    ("made", "error", "message"),
    [
        (noise.Poisson, TypeError, r"noise must be one of fisherop.noise, .* call it, as noise.Poisson\(\)"),
        (2.0, TypeError, r"noise must be one of fisherop.noise, .*, got 2.0: as noise.Gaussian\(variance\)"),
        (Wrong(lambda u: u, lambda u: 2 * u), ValueError, "noise.root.response. must give a function and its adjoint"),
        (
            Wrong(lambda u: u, lambda u: u[:, 1:]),
            ValueError,
            "the adjoint of noise.root.response. gives 1 element",
        ),
        (
            Wrong(lambda u: u * np.nan, lambda u: u),
            ValueError,
            "what apply of noise.root.response. gives must be .*fin",
        ),
        (
            Wrong(lambda u: u[0], lambda u: u),
            ValueError,
            r"what apply of noise.root.response. gives must be a tensor",
        ),
        (Wrong(1, 2), TypeError, r"noise.root.response. must be a tuple \(apply, adjoint\) of two functions"),
    ],
)
def test_what_is_no_noise(made, error, message):
    with pytest.raises(error, match=message):
        FisherOperator(torch.ones(2), torch.sin, noise=made)
