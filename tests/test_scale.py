"""However small or large a Jacobian is, also where F = JᵀJ leaves the range of the dtype, and where J is zero."""

import copy

import numpy as np
import pytest
import torch
from helpers import DTYPES, METHODS, assert_truthful, eps, linear_operator, matrices, small_image, small_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fisherop import (
    ConvergenceError,
    Eigendistortion,
    FisherOperator,
    JacobianOperator,
    Status,
    certify,
    eigenpairs,
    linearize,
)
from fisherop.jacobian import Counted, OfModel, Scaled
from fisherop.testing import check_adjoint, matrix_with_singular_values

FLOAT32, FLOAT64 = DTYPES
POWERS = [(FLOAT32, s) for s in (-34, -22, -12, 12, 22, 34)] + [(FLOAT64, s) for s in (-150, -80, -12, 12, 80, 150)]
FEWER = [pytest.param(*case, marks=[pytest.mark.slow] if i % 3 else []) for i, case in enumerate(POWERS)]
SIGMA = np.r_[3, 2.5, np.linspace(0.8, 0.5, 26), 0.3, 0.1]
MATRIX = matrix_with_singular_values(SIGMA, 40, 30)
RIGHT = np.linalg.svd(MATRIX)[2].T
WAYS = [(method, "both", {}) for method in METHODS] + [("randomized_svd", "largest", {"q": 8})]


def spectrum_of(result, power):
    """The eigenvalues of MATRIX that those of 10ᵖ MATRIX stand for; 10²ᵖ may leave float64 where they don't."""
    return result.eigenvalues / 10.0**power / 10.0**power


def outcome(operator, *arguments, **options):
    try:
        return eigenpairs(operator, *arguments, progress=False, **options)
    except ConvergenceError as error:
        return error.result


def assert_same_but_for_scale(result, plain, factor, dtype):
    top = plain.lambda_max_bounds[0]
    slack = 100 * eps(dtype)
    assert list(result.eigenindex) == list(plain.eigenindex) and list(result.status) == list(plain.status)
    assert result.noise == pytest.approx(plain.noise, abs=10 * eps(dtype))
    for name in ("eigenvalues", "residual_norms", "lambda_max_bounds", "lambda_min_bounds"):
        ours, theirs = np.asarray(getattr(result, name)), np.asarray(getattr(plain, name))
        rtol = 1e-3 if "bounds" in name else 1e-6  # the outer ones change with a step more, by rounding
        np.testing.assert_allclose(ours / factor / factor, theirs, rtol=rtol, atol=slack * top, err_msg=name)


@pytest.mark.parametrize(("method", "which", "options"), WAYS, ids=lambda x: x if isinstance(x, str) else "")
@pytest.mark.parametrize(("dtype", "power"), FEWER)
def test_scale_does_not_matter(method, which, options, dtype, power):
    """Neither to the products spent nor to what is found."""
    plain, scaled = (
        eigenpairs(linear_operator(a, dtype), 2, which, method=method, rng=0, tol=1e-5, progress=False, **options)
        for a in (MATRIX, 10.0**power * MATRIX)
    )
    assert abs(scaled.n_products - plain.n_products) <= 0.1 * plain.n_products
    np.testing.assert_allclose(spectrum_of(scaled, power), SIGMA[scaled.eigenindex] ** 2, rtol=0, atol=1e-5)
    assert_same_but_for_scale(scaled, plain, 10.0**power, dtype)
    if method == "randomized_svd":
        assert scaled.details["range_error"] == pytest.approx(plain.details["range_error"] * 10.0**power, rel=1e-3)


@pytest.mark.filterwarnings("ignore:J is zero")
@given(
    matrix=matrices(), dtype=st.sampled_from(DTYPES), part=st.floats(-1, 1), method=st.sampled_from(METHODS),
    which=st.sampled_from(["both", "largest", "smallest"]), k=st.integers(1, 3), seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
@settings(max_examples=80)
def test_eigenvalues_go_with_the_square_of_the_scale(matrix, dtype, part, method, which, k, seed):
    n = matrix.shape[1]
    if method != "exact" and (n < 5 * k or (2 * k > n and which == "both")):
        return
    factor = 2.0 ** round(part * (90 if dtype == FLOAT32 else 460))
    options = {"method": method, "rng": seed, "maxiter": 500, "tol": 1e-5}
    plain, scaled = (outcome(linear_operator(a, dtype), min(k, n), which, **options) for a in (matrix, factor * matrix))
    assert_same_but_for_scale(scaled, plain, factor, dtype)
    few = max(2, 0.1 * plain.n_products)  # a BLAS may round otherwise, by where an array lies
    assert abs(scaled.n_products - plain.n_products) <= few


@pytest.mark.parametrize(("dtype", "power"), POWERS)
def test_certificates_at_any_scale(dtype, power):
    """Of true pairs, of a wrong index, of a vector that is none, of a null space."""
    factor = 10.0**power
    F, plain = linear_operator(factor * MATRIX, dtype), linear_operator(MATRIX, dtype)
    turned = np.linalg.qr(RIGHT[:, :1] + 1e-2 * RIGHT[:, 5:6])[0]
    cases = [(RIGHT[:, [0, 1, 29]], [0, 1, -1]), (RIGHT[:, [1]], [0]), (RIGHT[:, [28]], [-1]), (turned, [0])]
    for vectors, index in cases:
        ours, theirs = (certify(operator, vectors, index, tol=1e-5, rng=0) for operator in (F, plain))
        assert_same_but_for_scale(ours, theirs, factor, dtype)
        assert ours.n_products == theirs.n_products
    assert F.n_products == plain.n_products
    wide = linear_operator(factor * MATRIX[:10], dtype)
    null = np.linalg.svd(MATRIX[:10])[2][10:].T
    result = certify(wide, null[:, :2], [28, 29], tol=1e-5, rng=0)
    assert (result.status == Status.NULL).all()
    top = np.linalg.norm(MATRIX[:10], 2) ** 2
    assert 0.9 * top <= result.lambda_max_bounds[0] / factor / factor <= (1 + 1e-5) * top


def test_the_certificate_tells_the_values_it_was_given():
    """An error quotes ‖J v‖² as the user computes it, not as it is scaled inside."""
    with pytest.raises(ValueError, match=r"column 0 has 6\.25e-60 and column 1 9e-60"):
        certify(linear_operator(1e-30 * MATRIX, FLOAT32), RIGHT[:, [1, 0]], [0, 1], rng=0)


@pytest.mark.parametrize("power", [-30, 30])
def test_own_solver_gets_an_operator_that_works(power):
    seen = []

    def dense(operator, k, which, *, tol, maxiter, rng):
        seen.append(operator)
        assert isinstance(operator, FisherOperator) and operator.dtype == np.float32
        check_adjoint(operator.jacobian)
        values, vectors = np.linalg.eigh((operator @ np.eye(30)).astype(np.float64))
        return values[[-1, 0]], vectors[:, [-1, 0]], {"lambda_max_upper": 1.01 * values[-1], "by": "hand"}

    for factor in (1.0, 10.0**power):
        F = linear_operator(factor * MATRIX, FLOAT32)
        result = eigenpairs(F, method=dense, rng=0, tol=1e-4, progress=False)
        np.testing.assert_allclose(result.eigenvalues / factor / factor, [9, 0.01], atol=1e-5)
        assert result.lambda_max_bounds[1] / factor / factor == pytest.approx(9.09, rel=1e-4)
        assert result.details == {"by": "hand"} and result.n_products == F.n_products
        assert isinstance(seen[-1].products, Scaled) == (factor != 1)


@pytest.mark.parametrize("factor", [1e-22, 1e22])
def test_eigendistortions_at_any_scale(factor):
    """With all that goes on from them: more pairs, a larger tol, other methods, the same answer again."""
    image, model = small_image(FLOAT32), small_model(FLOAT32)
    parts = ("pooled", "parts")

    def scaled(x):
        out = model(x)
        return [factor * out[parts[0]], [factor * out[parts[1]][0], factor * out[parts[1]][1][0]]]

    plain, ours = Eigendistortion(image, model), Eigendistortion(image, scaled)
    options = {"rng": 0, "progress": False, "tol": 1e-4}
    for method, k, which in (
        ("golub_kahan", 1, "largest"), ("golub_kahan", 3, "largest"), ("golub_kahan", 2, "largest"),
        ("golub_kahan", 2, "both"), ("golub_kahan", 2, "both"), ("lobpcg", 1, "largest"), ("auto", 1, "both"),
    ):  # fmt: skip
        before = plain.operator.n_products, ours.operator.n_products
        for ed in (plain, ours):
            ed.synthesize(method, k, which=which, **options)
        assert_same_but_for_scale(ours.result, plain.result, factor, FLOAT32)
        spent = plain.operator.n_products - before[0], ours.operator.n_products - before[1]
        assert spent[0] == spent[1]
    assert torch.isfinite(ours.eigendistortions).all()
    predicted, actual = ours.response_change(0, 1e-2)
    assert actual == pytest.approx(predicted, rel=0.1)


@pytest.mark.parametrize("power", [-30, 30])
def test_the_next_pairs_at_any_scale(power):
    given = RIGHT[:, [0, 1]]
    F = linear_operator(10.0**power * MATRIX, FLOAT32)
    history = []
    options = {"method": "golub_kahan", "rng": 0, "tol": 1e-4, "progress": False}
    result = eigenpairs(F, 1, "largest", orthogonal_to=given, **options)
    np.testing.assert_allclose(spectrum_of(result, power), SIGMA[:3] ** 2, rtol=1e-4)
    eigenpairs(F, callback=history.append, **options)
    assert history[-1]["largest"][0] == pytest.approx([9 * 10.0 ** (2 * power)], rel=1e-4)


TOO_MUCH = [
    (
        FLOAT32,
        1e-37,
        FloatingPointError,
        r"too small for float32: ‖J v‖ is about \S+e-3[78] .*model\(x\) \* \de\+3[67]",
    ),
    (FLOAT32, 1e36, OverflowError, r"too large for float32: ‖J v‖ is about \S+e\+3[56] .*model\(x\) \* \de-3[67]"),
    (FLOAT64, 1e-152, FloatingPointError, r"too small for float64: .*between 3e-151 and 3e\+150"),
    (FLOAT64, 1e170, OverflowError, r"too large for float64: .*between 3e-151 and 3e\+150"),
]


@pytest.mark.parametrize(("dtype", "factor", "error", "message"), TOO_MUCH)
def test_what_even_j_cannot_hold_is_named(dtype, factor, error, message):
    F = linear_operator(factor * MATRIX, dtype)
    for method, which, options in WAYS:
        with pytest.raises(error, match=message):
            eigenpairs(F, 1, which, method=method, rng=0, progress=False, **options)
    with pytest.raises(error, match=message):
        certify(F, RIGHT[:, :1], [0])


@pytest.mark.parametrize("method", METHODS)
def test_what_underflows_to_zero_is_not_taken_for_zero(method):
    """J v = 0 for every unit vector v, though J isn't: a larger v shows it."""
    F = FisherOperator(torch.ones(30), lambda x: (x * 1e-25) * 1e-25)
    with pytest.raises(FloatingPointError, match=r"too small for float32: .*about 1\.0e-50"):
        eigenpairs(F, method=method, rng=0, progress=False)


@pytest.mark.parametrize("exponent", [-90, -31, 31, 90])
def test_scaled_products(exponent):
    """Those of J times 2ᵉ, to the bit; its counters and its listener are those of J."""
    J = Counted(OfModel(linearize(small_image(FLOAT32), small_model(FLOAT32))))
    scaled, heard = Scaled(J, exponent), []
    m, n = J.shape
    v, u = torch.randn(3, n), torch.randn(3, m)
    pairs = [(J.jvp(v), scaled.jvp(v)), (J.vjp(u), scaled.vjp(u))]
    assert all(torch.equal(2.0**exponent * ours, theirs) for ours, theirs in pairs)
    J.on_product = heard.append
    assert scaled.n_products == J.n_products == 6
    scaled.jvp(v)
    assert sum(heard) == 1.5 and copy.copy(scaled).n_products == 7.5
    check_adjoint(JacobianOperator.of(Scaled(scaled, -exponent)))


def test_what_a_model_computes_on_its_way_is_not_lost():
    """A gain inside that the end takes back leaves the range of float32 where all of 2ᵉ comes before, or after."""
    gain = 1e12
    lin = linearize(torch.ones(6), lambda x: ((x * 1e-30) / gain) * gain)
    assert Scaled(OfModel(lin), 100).jvp(torch.ones(1, 6)) == pytest.approx(
        1e-30 * 2.0**100 * np.ones((1, 6)), rel=1e-6
    )
    lin = linearize(torch.ones(6), lambda x: ((x * gain) / gain) * 1e-30)
    assert Scaled(OfModel(lin), 100).jvp(torch.ones(1, 6)) == pytest.approx(
        1e-30 * 2.0**100 * np.ones((1, 6)), rel=1e-6
    )


ZERO = "J is zero, so that every vector is both extremes"


@pytest.mark.parametrize(("method", "which"), [(m, w) for m in METHODS for w in ("both", "largest", "smallest")])
@pytest.mark.parametrize(("m", "n", "k"), [(12, 10, 2), (4, 20, 3), (1, 6, 1), (30, 8, 4)])
def test_zero_jacobian(method, which, m, n, k):
    for dtype in DTYPES:
        with pytest.warns(RuntimeWarning, match=ZERO) as warned:
            result = eigenpairs(linear_operator(np.zeros((m, n)), dtype), k, which, method=method, progress=False)
        assert len(warned) == 1 and warned[0].filename == __file__
        assert (result.eigenvalues == 0).all() and result.converged.all() and result.method == method
        assert result.lambda_max_bounds == result.lambda_min_bounds == (0, 0)
        assert result.ground == ZERO and f"extreme: {ZERO}" in str(result)
        assert_truthful(result, np.zeros((m, n)))


def test_zero_jacobian_is_told_each_time():
    """By the certificate alone, where a search goes on, and where a solver of one's own has nothing to start from."""
    F = linear_operator(np.zeros((200, 150)))
    with pytest.warns(RuntimeWarning, match=ZERO):
        assert certify(F, np.eye(150)[:, :2], [0, -1]).ground == ZERO
    state = {}
    for _ in range(2):
        with pytest.warns(RuntimeWarning, match=ZERO):
            assert eigenpairs(F, state=state, method="golub_kahan", progress=False).ground == ZERO

    def solver(*arguments, **options):
        raise AssertionError("there is nothing to solve")

    with pytest.warns(RuntimeWarning, match=ZERO):
        assert eigenpairs(F, 2, method=solver, progress=False).method == "solver"


def test_models_whose_jacobian_is_zero():
    image = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    head = nn.Linear(192, 10)
    nn.init.zeros_(head.weight)
    for model in (lambda y: (y - image).square().mean(), nn.Sequential(nn.Flatten(), head)):
        with pytest.warns(RuntimeWarning, match=ZERO):
            ed = Eigendistortion(image, model).synthesize(rng=0, progress=False)
        assert "J is zero" in str(ed.result) and np.isinf(ed.detection_thresholds()[0]).all()


def test_vectors_that_j_sends_to_zero_are_no_zero_jacobian():
    F = linear_operator(np.eye(12)[:3])
    result = certify(F, np.eye(12)[:, [11]], [-1], probe=0)
    assert result.ground == "not examined" and result.lambda_max_bounds[1] == np.inf
