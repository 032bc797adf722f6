"""However small or large a Jacobian is, also where F = JᵀJ leaves the range of the dtype, and where J is zero."""

import copy
import pickle

import numpy as np
import pytest
import torch
from helpers import DTYPES, METHODS, eps, linear_operator, matrices, small_image, small_model
from hypothesis import given, settings
from hypothesis import strategies as st
from test_solvers import assert_truthful
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
from fisherop.jacobian import Scaled
from fisherop.testing import check_adjoint, matrix_with_singular_values

FLOAT32, FLOAT64 = DTYPES
POWERS = [(FLOAT32, s) for s in (-34, -22, -12, 12, 22, 34)] + [(FLOAT64, s) for s in (-150, -80, -12, 12, 80, 150)]
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
        np.testing.assert_allclose(ours / factor / factor, theirs, rtol=1e-2, atol=slack * top, err_msg=name)


@pytest.mark.parametrize(("method", "which", "options"), WAYS, ids=lambda x: x if isinstance(x, str) else "")
@pytest.mark.parametrize(("dtype", "power"), POWERS)
def test_scale_does_not_matter(method, which, options, dtype, power):
    """Neither to the products spent nor to what is found."""
    plain, scaled = (
        eigenpairs(linear_operator(a, dtype), 2, which, method=method, rng=0, tol=1e-5, progress=False, **options)
        for a in (MATRIX, 10.0**power * MATRIX)
    )
    assert abs(scaled.n_products - plain.n_products) <= 0.1 * plain.n_products
    np.testing.assert_allclose(spectrum_of(scaled, power), SIGMA[scaled.eigenindex] ** 2, atol=100 * eps(dtype))
    assert_same_but_for_scale(scaled, plain, 10.0**power, dtype)
    if method == "randomized_svd":
        assert scaled.details["range_error"] == pytest.approx(plain.details["range_error"] * 10.0**power, rel=1e-3)


@pytest.mark.filterwarnings("ignore:J is zero")
@given(
    matrix=matrices(), dtype=st.sampled_from(DTYPES), part=st.floats(-1, 1), method=st.sampled_from(METHODS),
    which=st.sampled_from(["both", "largest", "smallest"]), k=st.integers(1, 3), seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_eigenvalues_go_with_the_square_of_the_scale(matrix, dtype, part, method, which, k, seed):
    n = matrix.shape[1]
    if method != "exact" and (n < 5 * k or (2 * k > n and which == "both")):
        return
    factor = 2.0 ** round(part * (90 if dtype == FLOAT32 else 460))
    options = {"method": method, "rng": seed, "maxiter": 500, "tol": 1e-5}
    plain, scaled = (outcome(linear_operator(a, dtype), min(k, n), which, **options) for a in (matrix, factor * matrix))
    assert_same_but_for_scale(scaled, plain, factor, dtype)
    assert scaled.n_products == plain.n_products
