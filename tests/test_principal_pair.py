"""The pair of distortions that several models rank most differently, against dense optimization and closed forms."""

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fisherop import ConvergenceError, FisherOperator, noise, principal_distortions, principal_pair, spaces
from fisherop.krylov.box import Box
from fisherop.testing import linear_model, matrix_with_singular_values


def matrices(count, n, decay, seed, m=None):
    m = m or n
    sigma = 10.0 ** -np.linspace(0, decay, min(m, n))
    return [matrix_with_singular_values((i + 1) * sigma, m, n, rng=seed + i) for i in range(count)]


def regular(js, eps, lambda_max=None):
    """F_n / λ_n + ε I, with λ_n as they were found, to 1e-4, or the true ones."""
    scales = [np.linalg.norm(j, 2) ** 2 for j in js] if lambda_max is None else lambda_max
    return np.array([j.T @ j / scale + eps * np.eye(j.shape[1]) for j, scale in zip(js, scales, strict=True)])


def value(forms, a, b):
    return np.var([np.log(a @ f @ a / (a @ a)) - np.log(b @ f @ b / (b @ b)) for f in forms])


def gradient(forms, a, b):
    r = np.array([np.log(a @ f @ a) - np.log(b @ f @ b) for f in forms])
    c = r - r.mean()
    parts = [
        sign * 4 / len(forms) * sum(x * f @ v / (v @ f @ v) for x, f in zip(c, forms, strict=True))
        for sign, v in ((1, a), (-1, b))
    ]
    return np.linalg.norm(np.concatenate(parts))


def found(js, dtype=torch.float64, function=principal_pair, **options):
    image = torch.zeros(js[0].shape[1], dtype=dtype)
    models = [linear_model(j, dtype) for j in js]
    return function(image, models, **{"progress": False, "rng": 0} | options)


def best_dense(forms, starts=20):
    """By BFGS from random starts and the extremes of pairs."""
    rng, n = np.random.default_rng(0), forms.shape[1]
    first = [rng.standard_normal(2 * n) for _ in range(starts)]
    for i in range(len(forms)):
        for j in range(i):
            y = scipy.linalg.eigh(forms[i], forms[j])[1]
            first.append(np.r_[y[:, -1], y[:, 0]])
    return max(-scipy.optimize.minimize(lambda z: -value(forms, z[:n], z[n:]), z, method="BFGS").fun for z in first)


@given(
    n=st.integers(3, 30), decay=st.floats(0, 2), eps=st.sampled_from([1e-2, 1e-3]), seed=st.integers(0, 2**32 - 10),
)  # fmt: skip
@settings(max_examples=10)
def test_two_models_give_the_closed_form(n, decay, eps, seed):
    js = matrices(2, n, decay, seed)
    result = found(js, regularization=eps, n_starts=1)
    theta = scipy.linalg.eigh(*regular(js, eps, result.lambda_max), eigvals_only=True)
    np.testing.assert_allclose(result.value, np.log(theta[-1] / theta[0]) ** 2 / 4, rtol=1e-6, atol=1e-12)
    assert result.log_ratios[0] >= -1e-9 and result.log_ratios[1] <= 1e-9


@given(
    count=st.integers(3, 5), n=st.integers(4, 40), m=st.integers(3, 40), decay=st.floats(0, 2),
    seed=st.integers(0, 2**32 - 10),
)  # fmt: skip
@settings(max_examples=10)
def test_everything_it_says(count, n, m, decay, seed):
    js = matrices(count, n, decay, seed, m)
    result = found(js, regularization=1e-2, n_starts=2)
    a, b = result.distortions.numpy()
    np.testing.assert_allclose([np.linalg.norm(a), np.linalg.norm(b)], 1)
    forms = regular(js, 1e-2, result.lambda_max)
    np.testing.assert_allclose(result.value, value(forms, a, b), rtol=1e-9, atol=1e-14)
    assert result.converged and gradient(forms, a, b) <= max(1.001e-4 * result.value, 1e-12)
    ratios = np.array([np.log(a @ f @ a) - np.log(b @ f @ b) for f in forms])
    np.testing.assert_allclose(result.log_ratios, ratios, atol=1e-9)
    assert ratios[0] >= ratios.mean() - 1e-9
    squares = np.array([[np.linalg.norm(j @ v) ** 2 for j in js] for v in (a, b)])
    np.testing.assert_allclose(result.thresholds, squares**-0.5, rtol=1e-6)
    np.testing.assert_allclose(result.lambda_max, [np.linalg.norm(j, 2) ** 2 for j in js], rtol=1e-4)
    np.testing.assert_allclose(result.phi, 1e-2 * result.lambda_max / (squares + 1e-2 * result.lambda_max))
    assert (result.values <= result.value * (1 + 1e-9) + 1e-12).all() and 1 <= result.n_best <= 2
    history = result.details["history"]
    assert len(history) == 2 and history[0][-1]["gradient"] <= max(1e-4 * history[0][-1]["value"], 1e-12)


@pytest.mark.parametrize("seed", range(2))
def test_the_best_of_many_dense_starts(seed):
    js = matrices(3, 5, 1.5, 10 * seed)
    result = found(js, regularization=1e-2)
    np.testing.assert_allclose(result.value, best_dense(regular(js, 1e-2)), rtol=1e-3)


@pytest.mark.parametrize("count", [3, pytest.param(4, marks=pytest.mark.slow)])
def test_how_often_the_best_is_found(count):
    """Filters of rising frequencies, one overlapping the next."""
    rng, x = np.random.default_rng(1), np.linspace(0, 1, 30)
    basis = np.linalg.qr(rng.standard_normal((30, 30)))[0]
    js = [np.exp(-(((x - i / (count - 1)) / 0.5) ** 2))[:, None] * basis for i in range(count)]
    result = found(js, n_starts=10)
    assert result.n_best >= 8 and f"from {result.n_best} of 10 starts" in str(result)


def test_in_little_memory():
    js = matrices(3, 90, 2, 3)
    large, small = (found(js, n_starts=1, tol=1e-3, basis_memory=m) for m in (2**30, 30 * 90 * 8 * 4))
    np.testing.assert_allclose(small.value, large.value, rtol=0.02)  # there are several maxima
    assert small.n_products.max() > large.n_products.max()
    with pytest.raises(ValueError, match=r"basis_memory=1000 holds 0 vectors .*: pass basis_memory=69120"):
        found(js, basis_memory=1000)


def test_float32():
    js = matrices(3, 40, 2, 3)
    single, double = (found(js, dtype, n_starts=1) for dtype in (torch.float32, torch.float64))
    np.testing.assert_allclose(single.value, double.value, rtol=1e-4)
    assert single.distortions.dtype == torch.float32


def test_the_same_by_the_other_name_with_operators_and_options():
    x = torch.linspace(0.5, 1.5, 36, dtype=torch.float64).reshape(1, 1, 6, 6)
    js = [torch.as_tensor(matrix_with_singular_values(np.geomspace(2, 0.1, 36), 40, 36, rng=s)) for s in range(3)]
    models = [lambda x, j=j: torch.exp(j @ x.flatten()) for j in js]
    options = {"noise": noise.Poisson(), "subspace": spaces.zero_mean()}
    one = principal_distortions(x, models, rng=0, progress=False, n_starts=1, **options)
    other = principal_pair(x, [FisherOperator(x, m, **options) for m in models], rng=0, progress=False, n_starts=1)
    np.testing.assert_allclose(one.value, other.value, rtol=1e-9)
    assert one.distortions.shape == (2, 1, 1, 6, 6) and abs(one.distortions.sum()) < 1e-9


@given(seed=st.integers(0, 2**32 - 10), count=st.integers(2, 4), scale=st.floats(0.3, 1.0))
@settings(max_examples=8)
def test_within_a_box(seed, count, scale):
    js = matrices(count, 10, 1, seed)
    image = torch.as_tensor(np.random.default_rng(seed).uniform(0.2, 0.8, 10))
    models = [linear_model(j) for j in js]
    free = principal_pair(image, models, rng=0, progress=False, n_starts=1, regularization=1e-2)
    result = principal_pair(
        image, models, rng=0, progress=False, n_starts=1, regularization=1e-2, box=(0, 1), scale=scale, tol=1e-2,
        maxiter=5000,
    )  # fmt: skip
    a, b = result.distortions.numpy()
    np.testing.assert_allclose([np.linalg.norm(a), np.linalg.norm(b)], 1)
    for v in (a, b):
        assert (image.numpy() + scale * v).min() >= -1e-12 and (image.numpy() + scale * v).max() <= 1 + 1e-12
    assert result.converged and result.value <= free.value * (1 + 1e-3)
    forms, rng = regular(js, 1e-2), np.random.default_rng(0)
    limits = Box(-image / scale, (1 - image) / scale)
    near = torch.as_tensor(np.stack([a, b]) + 0.03 * rng.standard_normal((200, 2, 10)))
    others = [value(forms, *limits.project(one).numpy()) for one in near]
    assert max(others) <= value(forms, a, b) * (1 + 1e-3)


@given(seed=st.integers(0, 2**32 - 1), n=st.integers(2, 12))
def test_projection_on_the_sphere_in_a_box(seed, n):
    """The nearest of all unit vectors within."""
    rng = np.random.default_rng(seed)
    low, high = -rng.uniform(0.3, 1.5, n), rng.uniform(0.3, 1.5, n)
    row = rng.standard_normal(n)
    corner = np.where(row > 0, high, low)
    if np.linalg.norm(corner) < 1:
        return
    box = Box(torch.as_tensor(low), torch.as_tensor(high))
    near = box.project(torch.as_tensor(row[None]))[0].numpy()
    np.testing.assert_allclose(np.linalg.norm(near), 1)
    assert (near >= low - 1e-12).all() and (near <= high + 1e-12).all()
    others = near + 0.1 * rng.standard_normal((300, n))
    others = np.clip(others, low, high)
    norms = np.linalg.norm(others, axis=1)
    others = others[norms > 0.5] / norms[norms > 0.5, None]
    others = others[((others >= low) & (others <= high)).all(axis=1)]
    assert (others @ row <= near @ row + 1e-9).all()


def test_what_does_not_converge_raises_with_the_rest():
    js = matrices(3, 60, 2, 0)
    with pytest.raises(
        ConvergenceError, match=r"did not reach tol=0.0001 in 5 steps: the gradient is .*maxiter"
    ) as caught:
        found(js, maxiter=5)
    assert not caught.value.result.converged and caught.value.result.distortions.shape == (2, 60)
    assert "not converged" in str(caught.value.result)
    with pytest.warns(RuntimeWarning, match="did not reach tol"):
        found(js, maxiter=5, on_failure="warn", function=principal_distortions)


ONES = torch.full((4,), 0.5, dtype=torch.float64)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"models": [torch.sin]}, TypeError, "models must be a sequence of at least two models"),
        ({"models": torch.sin}, TypeError, "models must be a sequence of at least two models, got"),
        ({"models": [torch.sin, 3]}, TypeError, "model"),
        ({"tol": 0.5}, ValueError, "tol must be a number between 0 and 0.1, got 0.5"),
        ({"n_starts": 0}, ValueError, "n_starts must be an integer from 1, got 0"),
        ({"regularization": 0}, ValueError, "regularization must be a number between 0 and 1, got 0"),
        ({"models": [torch.sin, lambda x: x * 0]}, ValueError, "the response of model 1 doesn't change with the image"),
        (
            {"models": [torch.sin, FisherOperator.of(np.eye(5))]},
            ValueError,
            r"models\[0\] and models\[1\] must have the same image, got 4",
        ),
        ({"box": (0, 1)}, ValueError, "box needs scale, the norm of the distortion"),
        ({"box": (0, 1, 2), "scale": 1}, ValueError, r"box must be the least and the largest value .* of shape \(2,\)"),
        (
            {"box": (0.6, 1), "scale": 1},
            ValueError,
            "box must hold the image, whose values are from 0.5 to 0.5, got 0.6",
        ),
        ({"box": (0, 1), "scale": 9}, ValueError, "scale must be at most 1, the distance of the box's farthest corner"),
        ({"box": (0, 1), "scale": 0}, ValueError, "scale must be a number above 0"),
        (
            {"box": (0, 1), "scale": 1, "subspace": spaces.zero_mean()},
            ValueError,
            "box is for changes of an image's own elements: leave subspace and metric out",
        ),
    ],
)
def test_bad_input(change, error, message):
    options = {"models": [torch.sin, torch.cos], "progress": False} | change
    with pytest.raises(error, match=message):
        principal_pair(ONES, **options)


@pytest.mark.parametrize("difference", [1e-1, 1e-3, 1e-5, 1e-7])
def test_models_that_hardly_differ(difference):
    """Either the closed form, or an error: rounding must not pass for a maximum."""
    rng = np.random.default_rng(0)
    a = rng.standard_normal((10, 8))
    js = [a, a * (1 + difference * rng.standard_normal((10, 8)))]
    for dtype, rtol in ((torch.float64, 1e-4), (torch.float32, 0.02)):
        try:
            result = found(js, dtype, n_starts=1)
        except ConvergenceError as error:
            assert not error.result.converged and dtype == torch.float32
            continue
        theta = scipy.linalg.eigh(*regular(js, 1e-3, result.lambda_max), eigvals_only=True)
        truth = np.log(theta[-1] / theta[0]) ** 2 / 4
        if "do not differ" in str(result):
            assert dtype == torch.float32 and truth < 1e-4
        else:
            np.testing.assert_allclose(result.value, truth, rtol=rtol)


def test_the_same_model_twice():
    j = matrices(1, 12, 1, 0)[0]
    result = found([j, j, j])
    assert result.converged and result.value < 1e-20
    assert "the models do not differ at this image by more than rounding" in str(result)


@pytest.mark.parametrize("grey", [0.0, 1.0])
def test_a_box_at_black_and_white(grey):
    """Only one sign of a distortion lies within."""
    models = [lambda x: x, lambda x: x * torch.tensor([1.0, 3.0, 2.0], dtype=torch.float64)]
    image = torch.full((3,), grey, dtype=torch.float64)
    for seed in range(6):
        result = principal_pair(image, models, box=(0, 1), scale=0.4, rng=seed, progress=False, n_starts=1)
        changed = image + 0.4 * result.distortions
        assert changed.min() >= 0 and changed.max() <= 1
        np.testing.assert_allclose(result.distortions.abs().max(dim=1).values, 1, atol=1e-6)


def test_float32_stays_within_the_box():
    rng = torch.Generator().manual_seed(0)
    image = 0.5 + 1e-5 * (torch.rand(5, 5, generator=rng) - 0.5)
    models = [linear_model(j, torch.float32) for j in matrices(2, 25, 1, 0)]
    for seed in range(3):
        result = principal_pair(
            image, models, box=(0, 1), scale=2.4, rng=seed, progress=False, on_failure="warn", n_starts=1
        )
        changed = image + 2.4 * result.distortions
        assert changed.min() >= 0 and changed.max() <= 1


def test_operators_at_different_images_or_in_different_metrics():
    a, b = torch.rand(3, 3, dtype=torch.float64), torch.rand(3, 3, dtype=torch.float64)
    one, other = FisherOperator(a, torch.sin), FisherOperator(b, torch.cos)
    with pytest.raises(ValueError, match=r"models\[1\] is an operator at another image"):
        principal_pair(a, [one, other])
    with pytest.raises(ValueError, match=r"models\[0\] and models\[1\] must be at the same image"):
        principal_pair(None, [one, other])
    with pytest.raises(ValueError, match="model_b is an operator at another image"):
        principal_distortions(a, one, other)
    weighted = FisherOperator(a, torch.cos, metric=np.linspace(1, 2, 9).reshape(3, 3))
    with pytest.raises(ValueError, match="must have the same subspace and metric, and these differ"):
        principal_pair(a, [one, weighted])
    with pytest.raises(ValueError, match="box needs an image"):
        principal_pair(None, [FisherOperator.of(np.eye(3))] * 2, box=(0, 1), scale=1)
    with pytest.raises(ValueError, match="scale is for box"):
        principal_pair(a, [one, one], scale=1)
    with pytest.raises(TypeError, match="there is no option boxes"):
        principal_pair(a, [torch.sin, torch.cos], boxes=1)
    with pytest.raises(TypeError, match="box, scale goes with a list of models"):
        principal_distortions(a, torch.sin, torch.cos, box=(0, 1), scale=1)
    with pytest.raises(TypeError, match="a third model goes with a list of models"):
        principal_distortions(a, torch.sin, torch.cos, torch.tanh)


def test_thresholds_in_a_metric():
    """By what the distortions that are returned are multiplied."""
    x = torch.rand(1, 1, 4, 4, dtype=torch.float64)
    js = [torch.as_tensor(j) for j in matrices(3, 16, 1, 0)]
    models = [lambda x, j=j: j @ x.flatten() for j in js]
    options = {"metric": np.linspace(0.5, 4.5, 16).reshape(4, 4), "rng": 0, "progress": False}
    pair = principal_pair(x, models, n_starts=1, **options)
    two = principal_distortions(x, *models[:2], **options)
    for v, thresholds in [
        *zip(pair.distortions, pair.thresholds, strict=True),
        *zip(two.distortions, two.thresholds, strict=True),
    ]:
        moved = [float((j @ (t * v).flatten()).norm()) for j, t in zip(js, thresholds, strict=False)]
        np.testing.assert_allclose(moved, 1)


def test_options_of_two_models_are_refused_for_several():
    with pytest.raises(TypeError, match="k, which and factor are for two models"):
        principal_distortions(ONES, [torch.sin, torch.cos], k=2)
