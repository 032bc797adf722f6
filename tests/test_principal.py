"""The distortions that tell two models apart, against scipy.linalg.eigh of the dense regularized pencil."""

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fisherop import ConvergenceError, FisherOperator, noise, principal_distortions, spaces
from fisherop.testing import linear_model, matrix_with_singular_values


def truth(a, b, eps, lambda_max=None):
    """All eigenvalues, descending, of matrices J_A and J_B."""
    scales = [np.linalg.norm(j, 2) ** 2 for j in (a, b)] if lambda_max is None else lambda_max
    fa, fb = (j.T @ j / scale for j, scale in zip((a, b), scales, strict=True))
    identity = eps * np.eye(a.shape[1])
    return scipy.linalg.eigh(fa + identity, fb + identity, eigvals_only=True)[::-1]


def found(a, b, *args, dtype=torch.float64, **options):
    image = torch.zeros(a.shape[1], dtype=dtype)
    models = (linear_model(j, dtype) for j in (a, b))
    return principal_distortions(image, *models, *args, progress=False, rng=0, **options)


def assert_right(result, a, b, k=1):
    eps, values = result.regularization, truth(a, b, result.regularization, result.lambda_max)
    top = (result.eigenvalues > 1).sum() if len(result.eigenvalues) < 2 * k else k
    exact = np.r_[values[:top], values[len(values) - (len(result.eigenvalues) - top) :]]
    np.testing.assert_allclose(result.eigenvalues, exact, rtol=1e-3)
    v = result.distortions.double().numpy()
    np.testing.assert_allclose(np.linalg.norm(v, axis=1), 1, rtol=1e-5)
    squares = np.stack([np.linalg.norm(v @ j.T, axis=1) ** 2 for j in (a, b)], axis=1)
    scales = np.array([np.linalg.norm(j, 2) ** 2 for j in (a, b)])
    np.testing.assert_allclose(result.lambda_max, scales, rtol=1e-3)
    np.testing.assert_allclose(result.thresholds, squares**-0.5, rtol=1e-3)
    phi = eps * scales / (squares + eps * scales)
    np.testing.assert_allclose(np.stack([result.phi_a, result.phi_b], axis=1), phi, atol=1e-3)
    assert (result.converged == (result.error_bounds <= result.tol)).all() and result.converged.all()
    above, below = result.beyond
    others = np.delete(values, np.r_[:top, len(values) - (len(result.eigenvalues) - top) : len(values)])
    assert (others <= above).all() and (others >= below).all()


@given(
    m=st.integers(8, 40), n=st.integers(4, 30), decay=st.floats(0, 3), eps=st.sampled_from([1e-2, 1e-3]),
    k=st.integers(1, 2), seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
@settings(max_examples=25)
def test_both_ends_of_a_pencil(m, n, decay, eps, k, seed):
    """Also of singular matrices, where M < N."""
    rank = min(m, n)
    a = matrix_with_singular_values(10.0 ** -np.linspace(0, decay, rank), m, n, rng=seed)
    b = matrix_with_singular_values(3 * 10.0 ** -np.linspace(0, decay / 2, rank), m, n, rng=seed + 1)
    assert_right(found(a, b, k, regularization=eps), a, b, k)


def test_a_smaller_tol_gives_smaller_errors():
    a, b = (matrix_with_singular_values(10.0 ** -np.linspace(0, 2, 60), 60, 60, rng=seed) for seed in (0, 1))
    for tol, error in ((1e-2, 1e-4), (1e-4, 1e-8)):
        result = found(a, b, tol=tol)
        np.testing.assert_allclose(result.eigenvalues, truth(a, b, 1e-3)[[0, -1]], rtol=error)


def test_exchanging_the_models_inverts_the_eigenvalues():
    a, b = (matrix_with_singular_values(10.0 ** -np.linspace(0, 2, 30), 30, 40, rng=seed) for seed in (0, 1))
    one, other = found(a, b, tol=1e-4), found(b, a, tol=1e-4)
    np.testing.assert_allclose(one.eigenvalues, 1 / other.eigenvalues[::-1], rtol=1e-6)
    np.testing.assert_allclose(one.thresholds, other.thresholds[::-1, ::-1], rtol=1e-3)
    for end, i in (("largest", 0), ("smallest", -1)):
        np.testing.assert_allclose(found(a, b, which=end, tol=1e-4).eigenvalues, one.eigenvalues[i], rtol=1e-6)


def test_the_share_of_the_regularization():
    """d log λ / d log ε = φ_A − φ_B, and what only ε decides is marked."""
    a, b = (matrix_with_singular_values(10.0 ** -np.linspace(0, 2, 30), 30, 30, rng=seed) for seed in (0, 1))
    low, middle, high = (found(a, b, tol=1e-5, regularization=eps) for eps in (0.999e-2, 1e-2, 1.001e-2))
    slope = np.log(high.eigenvalues / low.eigenvalues) / np.log(1.001 / 0.999)
    np.testing.assert_allclose(slope, middle.phi_a - middle.phi_b, atol=1e-4)
    null = np.diag([1.0, 1.0, 1.0, 0.0])
    result = found(np.eye(4), null)
    assert result.from_regularization.tolist() == [True, False] and np.isinf(result.quotients[0])
    assert ", of the regularization" in str(result)


def test_models_that_are_the_same():
    a = matrix_with_singular_values(np.linspace(2, 1, 12), 12, 12)
    result = found(a, a)
    np.testing.assert_allclose(result.eigenvalues, 1)
    assert result.converged.all()


def test_float32():
    a, b = (matrix_with_singular_values(10.0 ** -np.linspace(0, 2, 60), 60, 60, rng=seed) for seed in (0, 1))
    result = found(a, b, dtype=torch.float32)
    np.testing.assert_allclose(result.eigenvalues, truth(a, b, 1e-3)[[0, -1]], rtol=1e-3)
    with pytest.raises(ValueError, match=r"regularization must be at least 0.0001 in float32, got 1e-05"):
        found(a, b, dtype=torch.float32, regularization=1e-5)


def test_with_noise_and_a_subspace():
    x = torch.linspace(0.5, 1.5, 36, dtype=torch.float64).reshape(1, 1, 6, 6)
    a, b = (torch.as_tensor(matrix_with_singular_values(np.geomspace(2, 0.1, 36), 40, 36, rng=s)) for s in (0, 1))
    disc = np.hypot(*np.mgrid[-2:2:6j, -2:2:6j]) < 2.1
    options = {"noise": noise.Poisson(), "subspace": spaces.mask(disc)}
    models = [lambda x, j=j: torch.exp(j @ x.flatten()) for j in (a, b)]
    result = principal_distortions(x, *models, rng=0, progress=False, **options)
    dense = [torch.func.jacrev(m)(x).reshape(40, 36).numpy() for m in models]
    dense = [m(x).numpy()[:, None] ** -0.5 * j[:, disc.ravel()] for m, j in zip(models, dense, strict=True)]
    np.testing.assert_allclose(result.eigenvalues, truth(*dense, 1e-3)[[0, -1]], rtol=1e-3)
    assert result.distortions.shape == (2, 1, 1, 6, 6)
    assert result.distortions[..., torch.as_tensor(~disc)].abs().max() == 0
    operators = [FisherOperator(x, m, **options) for m in models]
    again = principal_distortions(x, *operators, rng=0, progress=False)
    np.testing.assert_array_equal(again.eigenvalues, result.eigenvalues)
    with pytest.raises(TypeError, match="model_a is an operator, which has options of its own"):
        principal_distortions(x, *operators, noise=noise.Poisson())


def test_what_does_not_converge_raises_with_the_rest():
    a, b = (matrix_with_singular_values(10.0 ** -np.linspace(0, 2, 60), 60, 60, rng=seed) for seed in (0, 1))
    with pytest.raises(
        ConvergenceError, match=r"did not reach tol=0.01 in 5 steps: the bounds are .*maxiter"
    ) as caught:
        found(a, b, maxiter=5)
    assert not caught.value.result.converged.any() and caught.value.result.distortions.shape == (2, 60)
    with pytest.warns(RuntimeWarning, match="did not reach tol"):
        found(a, b, maxiter=5, on_failure="warn")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k": 0}, ValueError, "k must be an integer from 1 to 2, got 0"),
        ({"k": 3}, ValueError, "k must be an integer from 1 to 2, got 3"),
        ({"which": "top"}, ValueError, "which must be"),
        ({"tol": 0.5}, ValueError, "tol must be a number between 0 and 0.1, got 0.5"),
        ({"regularization": 0}, ValueError, "regularization must be a number between 0 and 1, got 0"),
        ({"factor": 1}, ValueError, "factor must be a number above 1, got 1"),
        (
            {"model_b": lambda x: x[:3].double() * 0},
            ValueError,
            "the response of model B doesn't change with the image",
        ),
        ({"model_b": FisherOperator.of(np.eye(5))}, ValueError, "model_a and model_b must have the same image, got 4"),
        ({"model_a": 3}, TypeError, "model"),
    ],
)
def test_bad_input(change, error, message):
    options = {"model_a": torch.sin, "model_b": torch.cos, "progress": False} | change
    with pytest.raises(error, match=message):
        principal_distortions(torch.ones(4, dtype=torch.float64), **options)
