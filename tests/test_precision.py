"""What is claimed holds in the arithmetic that it was made in; what rounding hides is not claimed, and is named."""

import importlib.util
import pathlib
import warnings

import numpy as np
import pytest
import torch
from helpers import DTYPES, METHODS, linear_operator
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fisherop import ConvergenceError, Eigendistortion, FisherOperator, certify, eigenpairs
from fisherop.testing import matrix_with_singular_values

FLOAT32, FLOAT64 = torch.float32, torch.float64


def searched(operator, k=1, which="both", **options):
    try:
        return eigenpairs(operator, k, which, progress=False, **{"rng": 0} | options)
    except ConvergenceError as error:
        return error.result


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", ["auto", "golub_kahan", "exact"])
@pytest.mark.parametrize("k", [2, 4, 6])
@pytest.mark.parametrize("low", [1e-9, 1e-8, 1e-7, 1e-5])
def test_repeated_small_eigenvalues_are_in_order_but_for_rounding(low, k, method, dtype):
    matrix = matrix_with_singular_values(np.r_[np.ones(40), np.full(20, low**0.5)], 60, 60, rng=3)
    result = searched(linear_operator(matrix, dtype), k, "smallest", method=method, tol=1e-4)
    assert (np.diff(result.eigenvalues) <= 0).all()
    np.testing.assert_allclose(result.eigenvalues, low, rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore:J is zero")
@pytest.mark.parametrize("method", METHODS)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(2, 9), flat=st.booleans())
@settings(max_examples=40)
def test_bounds_hold_in_float32(method, seed, n, flat):
    """Also where few eigenvalues leave no slack to hide rounding in."""
    rng = np.random.default_rng(seed)
    matrix = matrix_with_singular_values(np.ones(n), n, n, rng=rng) if flat else rng.standard_normal((n, n))
    matrix = matrix.astype(np.float32).astype(np.float64)
    truth = np.linalg.svd(matrix)[1] ** 2
    if method == "lobpcg" and n < 5:
        return
    which = "largest" if method == "randomized_svd" else "both"
    result = searched(linear_operator(matrix, FLOAT32), 1, which, method=method, rng=seed, tol=1e-4)
    exact = 1e-14 * truth[0]
    assert result.lambda_max_bounds[0] <= truth[0] + exact and truth[-1] <= result.lambda_min_bounds[1] + exact
    if method != "golub_kahan":  # whose outer bounds hold with a probability
        assert result.lambda_min_bounds[0] <= truth[-1] + exact and truth[0] <= result.lambda_max_bounds[1] + exact


@pytest.mark.parametrize("dtype", [FLOAT32, pytest.param(FLOAT64, marks=pytest.mark.slow)])
def test_outer_bounds_hold_as_often_as_promised(dtype):
    """With probability 0.998, in few dimensions, where a random start can miss an end."""
    wrong = 0
    for seed in range(300):
        matrix = np.random.default_rng(seed).standard_normal((9, 9)).astype(np.float32).astype(np.float64)
        truth = np.linalg.svd(matrix)[1] ** 2
        result = searched(linear_operator(matrix, dtype), 1, method="golub_kahan", rng=seed, tol=1e-4)
        wrong += not (result.lambda_min_bounds[0] <= truth[-1] and truth[0] <= result.lambda_max_bounds[1])
    assert wrong <= 4  # 0.6 expected


@pytest.mark.parametrize("method", ["eigsh", "lobpcg", "svds", "power"])
def test_the_probe_sees_what_is_shorter_than_rounding(method):
    """An eigenvalue 5 tol beyond a flat spectrum, in float32, whoever missed it."""
    wrong = 0
    for seed in range(10):
        scale = torch.ones(60)
        scale[0] += 5e-5
        truth = np.sort(scale.double().numpy() ** 2)[::-1]
        F = FisherOperator(torch.zeros(60), lambda x, s=scale: s * x)
        result = searched(F, 1, "largest", method=method, tol=2e-5, rng=seed)
        off = abs(result.eigenvalues - truth[result.eigenindex])
        wrong += bool((result.converged & (off > 4e-5)).any())
    assert wrong == 0


@pytest.mark.parametrize("method", ["golub_kahan", "exact", "eigsh", "svds"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_advice_names_rounding(method, dtype):
    """Never more iterations, where the tolerance is below the noise of products."""
    tol = 1e-8 if dtype == FLOAT32 else 2e-17
    for n, seed in ((1, 0), (160, 1)):
        sigma = 1.234 * np.sqrt(np.linspace(1, 0.9, n // 2 + 1))
        F = linear_operator(matrix_with_singular_values(sigma, n, n, rng=seed), dtype)
        if n == 1 and (method, dtype) != ("golub_kahan", FLOAT32):  # which may be exact
            continue
        with pytest.raises(ConvergenceError, match="rounding") as caught:
            eigenpairs(F, 1, "largest", method=method, tol=tol, rng=seed, progress=False, maxiter=300)
        assert "allow more iterations" not in str(caught.value)
        assert ("use a float64 image" in str(caught.value)) == (dtype == FLOAT32)


def saturated():
    """A sigmoid whose slope, in float32, is wrong by some percent."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(30, 40), nn.Sigmoid())
        nn.init.constant_(model[0].bias, 14.0)
        return torch.rand(1, 30), model


def test_judged_by_a_more_precise_program():
    image, model = saturated()
    F, precise = FisherOperator(image, model), FisherOperator(image.double(), saturated()[1].double())
    own = eigenpairs(F, 1, tol=1e-4, rng=0, progress=False)
    truth = certify(precise, np.linalg.qr(own.eigenvectors.astype(float))[0], [0, 29], tol=1e-4, rng=0)
    assert truth.residual_norms[0] > 50 * own.tol * truth.eigenvalues[0]
    before = dict(model.named_parameters())
    for against in (torch.float64, precise, precise.jacobian):
        with pytest.raises(ConvergenceError, match=r"constants are inexact.*use a float64 image and model") as caught:
            eigenpairs(F, 1, tol=1e-4, rng=0, progress=False, against=against)
        judged = caught.value.result
        np.testing.assert_allclose(judged.eigenvalues, truth.eigenvalues, rtol=1e-6)
        np.testing.assert_allclose(judged.residual_norms, truth.residual_norms, rtol=1e-4)
        assert judged.eigenvectors.dtype == np.float32 and judged.details["against"] == "judged by products in float64"
        assert judged.noise < 1e-14 and judged.ground.endswith("in float32")
    assert all(dict(model.named_parameters())[name] is p and p.dtype == FLOAT32 for name, p in before.items())
    with pytest.raises(ConvergenceError, match="constants are inexact"):
        Eigendistortion(image, model).synthesize(tol=1e-4, rng=0, progress=False, against=torch.float64)


def test_a_precise_program_agrees_where_the_constants_are():
    matrix = matrix_with_singular_values(np.linspace(1, 0.1, 20), 20, 20)
    model = nn.Linear(20, 20, bias=False)
    model.weight.data = torch.tensor(matrix, dtype=FLOAT32)
    F = FisherOperator(torch.zeros(1, 20), model)
    result = eigenpairs(F, 2, tol=1e-5, rng=0, progress=False, against=torch.float64, method="golub_kahan")
    own = eigenpairs(F, 2, tol=1e-5, rng=0, progress=False, method="golub_kahan")
    assert result.converged.all() and result.n_products <= own.n_products + 8
    assert "outer bounds" in own.ground and "outer bounds" not in result.ground  # which are the float32 program's
    assert result.lambda_min_bounds[0] == 0 and result.lambda_max_bounds[1] == np.inf
    held = model.weight.detach().double().numpy()
    truth = np.linalg.svd(held)[1] ** 2
    assert result.lambda_max_bounds[0] <= truth[0] <= result.lambda_max_bounds[1]
    np.testing.assert_allclose(result.eigenvalues, truth[result.eigenindex], atol=1e-9)


def test_what_can_not_judge_is_said():
    F = linear_operator(np.eye(5), FLOAT32)
    vectors = np.eye(5)[:, :1]
    with pytest.raises(
        TypeError, match=r"against must be a dtype, as torch.float64, or a FisherOperator, got 'float64'"
    ):
        certify(F, vectors, [0], against="float64")
    with pytest.raises(ValueError, match="against must be an operator of a Jacobian of 5 × 5"):
        certify(F, vectors, [0], against=linear_operator(np.eye(6)))
    with pytest.raises(RuntimeError, match=r"the model is not an nn.Module.*make an operator from image.to"):
        certify(F, vectors, [0], against=torch.float64)


@pytest.mark.parametrize(("factor", "error"), [(1e-30, FloatingPointError), (1e30, OverflowError)])
def test_products_beyond_the_range_are_refused(factor, error):
    F = linear_operator(factor * matrix_with_singular_values([3, 2, 1], 4, 3), FLOAT32)
    with pytest.raises(error, match=r"is below what float32 can hold|exceeds what float32 can hold"):
        F @ np.ones(3)
    assert (F.jacobian @ np.ones(3)).any()
    assert eigenpairs(F, 1, rng=0, progress=False, tol=1e-5).converged.all()
    if error is OverflowError:
        with pytest.raises(error, match="exceeds what float32 can hold"):
            F.to_dense()


def test_a_zero_product_is_no_underflow():
    F = linear_operator(matrix_with_singular_values([1.0], 4, 3), FLOAT32)
    null = np.linalg.svd(F.jacobian.to_dense())[2][1]
    assert np.abs(F @ np.zeros(3)).max() == 0 and np.abs(F @ null).max() < 1e-6


class Sigmoids(nn.Module):
    """Ever nearer to saturation, so that float32 puts them in another order than float64."""

    def forward(self, x):
        return torch.sigmoid(x + torch.linspace(8, 14, x.shape[-1], dtype=x.dtype))


@pytest.mark.parametrize("method", ["golub_kahan", "exact"])
def test_a_judge_may_have_another_order(method):
    F = FisherOperator(torch.zeros(1, 150), Sigmoids())
    result = searched(F, 3, "smallest", method=method, against=torch.float64)
    assert (np.diff(result.eigenvalues) <= 0).all() and result.details["against"]


def test_what_was_judged_is_said_of_that_alone():
    """Not of what is certified anew by other products; and a judge in the same precision counts once."""
    model = nn.Linear(150, 160, bias=False)
    nn.init.normal_(model.weight, generator=torch.Generator().manual_seed(0))
    F, state = FisherOperator(torch.zeros(1, 150), model), {}
    options = {"method": "golub_kahan", "rng": 0, "progress": False, "state": state}
    assert "against" in eigenpairs(F, tol=1e-5, against=torch.float64, **options).details
    assert "against" not in eigenpairs(F, tol=1e-4, **options).details
    double = F.to(torch.float64)
    before = double.n_products
    assert eigenpairs(double, rng=0, progress=False, against=torch.float64).n_products == double.n_products - before


def test_a_changed_model_is_seen_before_anything_is_recalled_or_judged():
    model = nn.Linear(150, 160, bias=False)
    nn.init.normal_(model.weight, generator=torch.Generator().manual_seed(0))
    F, state = FisherOperator(torch.zeros(1, 150), model), {}
    options = {"method": "golub_kahan", "rng": 0, "progress": False, "state": state}
    found = eigenpairs(F, **options)
    with torch.no_grad():
        model.weight.mul_(3)
    for again in (
        lambda: eigenpairs(F, **options),
        lambda: certify(F, found.eigenvectors, [0, 149], against=torch.float64),
        lambda: F.to(torch.float64),
    ):
        with pytest.raises(RuntimeError, match="the model has changed since it was linearized"):
            again()


def test_sums_of_many_squares_are_in_the_bounds():
    """λ_max = λ_min = fl(1.1)², where 200,000 squares are summed."""
    n = 200_000
    F = FisherOperator(torch.zeros(n, dtype=FLOAT64), lambda x: 1.1 * x)
    for seed in range(3):
        q = np.linalg.qr(np.random.default_rng(seed).standard_normal((n, 3)))[0]
        result = certify(F, q, range(3), probe=0)
        assert result.lambda_max_bounds[0] <= 1.1**2
        assert certify(F, q, range(n - 3, n), probe=0).lambda_min_bounds[1] >= 1.1**2


@pytest.mark.parametrize(
    "seed",
    [22, 24, 27, 512, 527, 533, 543, 10225, 10521, 10572, 103853, 108840, 108945, 505038, 508948],
)
def test_what_the_adversary_once_found(seed):
    """Searches drawn by benchmarks/adversary.py of which a number that was printed was false, or that crashed."""
    path = pathlib.Path(__file__).parents[1] / "benchmarks" / "adversary.py"
    spec = importlib.util.spec_from_file_location("adversary", path)
    adversary = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(adversary)
    search = adversary.draw(seed, None, False)
    if search.method == "primme":
        pytest.skip("PRIMME may be installed here, which is drawn then")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert adversary.false_claims(search, adversary.run(search, seed)) == []
