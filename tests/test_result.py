import copy
import dataclasses
import pickle

import numpy as np
import pytest
from helpers import DTYPES, linear_operator, matrices
from hypothesis import given, settings
from hypothesis import strategies as st

from fisherop import Answer, ConvergenceError, SolverStopped, Status, certify
from fisherop.testing import matrix_with_singular_values

SIGMA = np.r_[5.0, 4.0, np.linspace(3, 1, 26), 0.5, 0.1]


def known(sigma=SIGMA, m=40, n=30, dtype=DTYPES[1]):
    matrix = matrix_with_singular_values(sigma, m, n).astype(np.float32).astype(np.float64)
    vectors = np.linalg.svd(matrix)[2].T
    return linear_operator(matrix, dtype), vectors, matrix


@pytest.mark.parametrize("dtype", DTYPES)
def test_true_eigenvectors_pass(dtype):
    F, v, matrix = known(dtype=dtype)
    result = certify(F, v[:, [0, 1, 28, 29]], [0, 1, -2, -1], rng=0)
    truth = np.linalg.svd(matrix)[1][[0, 1, 28, 29]] ** 2
    np.testing.assert_allclose(result.eigenvalues, truth, rtol=1e3 * np.finfo(F.dtype).eps)
    assert list(result.eigenindex) == [0, 1, 28, 29]
    assert result.converged.all() and (result.status == Status.EIGENPAIR).all()
    assert result.eigenvectors.dtype == F.dtype and result.eigenvalues.dtype == np.float64
    assert result.n_products == F.n_products > 0
    assert result.lambda_max_bounds[0] <= truth[0] * (1 + 1e-5) and result.lambda_max_bounds[1] == np.inf
    assert result.lambda_min_bounds[0] == 0 and result.lambda_min_bounds[1] >= truth[-1] * (1 - 1e-5)


@given(seed=st.integers(0, 2**32 - 1), size=st.floats(-5.5, -1), dtype=st.sampled_from(DTYPES))
@settings(max_examples=50)
def test_perturbed_vectors_are_rejected(seed, size, dtype):
    """Turned by an angle well over tol, no vector passes; the residual is what dense float64 algebra says."""
    F, v, matrix = known(dtype=dtype)
    noise = np.random.default_rng(seed).standard_normal(v[:, 0].shape)
    noise -= v[:, [0, 29]] @ (v[:, [0, 29]].T @ noise)
    noise /= np.linalg.norm(noise)
    angle = 10.0**size
    top = np.cos(angle) * v[:, 0] + np.sin(angle) * noise
    result = certify(F, top[:, None], [0], tol=1e-6, rng=0)
    x = result.eigenvectors[:, 0].astype(np.float64)
    residual = np.linalg.norm(matrix.T @ (matrix @ x) - result.eigenvalues[0] * x)
    np.testing.assert_allclose(result.residual_norms[0], residual, atol=1e3 * np.finfo(F.dtype).eps * 25)
    if residual > 2e-6 * 25:
        assert result.status[0] == Status.UNCONVERGED and not result.converged[0]


def test_wrong_index_is_rejected():
    """The second and third are eigenpairs, but not the first and second; nor is the last but one the last."""
    F, v, _ = known()
    result = certify(F, v[:, [1, 2]], [0, 1], rng=0)
    assert (result.status == Status.NOT_EXTREME).all() and not result.converged.any()
    result = certify(F, v[:, [0, 28]], [0, -1], rng=0)
    assert list(result.status) == [Status.EIGENPAIR, Status.NOT_EXTREME]
    assert "refuted" in result.ground


def test_more_null_vectors_than_claimed_are_found_by_shape_and_by_probe():
    sigma = np.r_[np.linspace(3, 1, 8)]
    F, v, _ = known(sigma, m=10, n=30)
    result = certify(F, v[:, [0, 7]], [0, -1], probe=0)  # M < N: index 29 belongs to the value 0
    assert result.status[1] == Status.NOT_EXTREME
    F, v, _ = known(sigma, m=40, n=30)  # no shape helps: the probe must
    assert certify(F, v[:, [0, 7]], [0, -1], probe=0).status[1] == Status.EIGENPAIR
    assert certify(F, v[:, [0, 7]], [0, -1], rng=0).status[1] == Status.NOT_EXTREME


def test_null_is_proven_jointly():
    """Two vectors with ‖Jv‖² = 0.9 tol each need not prove two eigenvalues below tol: their span may hold 1.8 tol."""
    tol = 1e-2
    F, v, _ = known(np.r_[np.linspace(10, 5, 28), np.sqrt(1.8 * tol) * 10, 0.0], m=40, n=30)
    turned = v[:, 28:] @ np.array([[1, -1], [1, 1]]) / np.sqrt(2)
    result = certify(F, turned, [28, 29], tol=tol, rng=0)
    assert (result.eigenvalues < tol * 100).all()
    assert list(result.status != Status.NULL) == [True, False]


@pytest.mark.parametrize(
    ("change", "index", "message"),
    [
        (lambda v: v[:, [1, 0]], [0, 1], r"in descending order of ‖J v‖², but column 0 has 16 and column 1 25"),
        (
            lambda v: 2 * v[:, :1],
            [0],
            "vectors must be orthonormal to 2e-13, but VᵀV differs from the identity by 3.0e",
        ),
        (lambda v: (1 + 1e-9) * v[:, :1], [0], r"differs from the identity by 2\.0e-09: orthonormalize"),
        (lambda v: v[:, [0, 0]], [0, 1], r"differs from the identity by 1\.0e\+00"),
        (
            lambda v: v[:, :1] * np.nan,
            [0],
            "vectors must be .* and finite, got ndarray .*: it holds NaN",
        ),
        (lambda v: v[:, :2], [0], r"vectors must be columns, .* of shape \(30, 1\), got ndarray of shape \(30, 2\)"),
        (lambda v: v[:, :2], [1, 0], r"eigenindex must ascend within 0 … 29, got \[1, 0\]"),
        (lambda v: v[:, :2], [0, 30], r"eigenindex must be indices from 0 to 29, or .*, got \[0, 30\]"),
        (lambda v: v[:, :1], [15], r"must run on from 0, or up to 29, or both, since .* examined; got \[15\]"),
        (lambda v: v[:, :2], [0, 2], r"must run on from 0, or up to 29, or both, since .* examined; got \[0, 2\]"),
        (lambda v: v[:, :3], [0, 28, 28], r"eigenindex must ascend"),
    ],
)
def test_what_is_no_answer_raises(change, index, message):
    F, v, _ = known()
    with pytest.raises(ValueError, match=message):
        certify(F, change(v), index)


@pytest.mark.filterwarnings("ignore:J is zero")
@given(matrix=matrices(), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=80)
def test_bounds_hold(matrix, dtype, seed):
    """Whatever vectors are certified, the intervals contain the dense extremes, and no claim is false."""
    F = linear_operator(matrix, dtype)
    n = matrix.shape[1]
    rng = np.random.default_rng(seed)
    q = np.linalg.qr(rng.standard_normal((n, rng.integers(0, n + 1))))[0]
    q = q @ np.linalg.svd(np.linalg.qr(matrix @ q)[1])[2].T if q.shape[1] else q
    result = certify(F, q, np.arange(q.shape[1]), rng=rng)
    truth = np.linalg.svd(matrix)[1] ** 2
    top, bottom = truth[0], truth[-1] if matrix.shape[0] >= n else 0.0
    slack = 1e3 * np.finfo(F.dtype).eps * top
    assert result.lambda_max_bounds[0] <= top + slack
    assert result.lambda_min_bounds[1] >= bottom - slack
    assert result.lambda_max_bounds[0] <= top * (1 + 1e-14)  # rounding is in it
    assert result.eigenvalues.max(initial=0.0) <= result.lambda_max_bounds[0] + slack
    full = np.r_[truth, np.zeros(max(0, n - len(truth)))]
    wrong = abs(result.eigenvalues - full[result.eigenindex]) > 2 * result.tol * top + slack
    assert not (wrong & result.converged).any()
    assert (np.diff(result.eigenvalues) <= 0).all()


def test_result_is_frozen_and_readable():
    F, v, _ = known()
    result = certify(F, v[:, [0, 29]], [0, -1], method="mine", rng=0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.tol = 1
    with pytest.raises(ValueError, match="read-only"):
        result.eigenvalues[0] = 1
    lines = str(result).splitlines()
    assert lines[0].startswith("mine: 2 eigenpairs of F (30 × 30), J is 40 × 30, tol 1e-06, ")
    assert lines[3].split()[:3] == ["0", "2.50000e+01", "1.00e+00"] and lines[3].endswith("eigenpair")
    assert "λ_min: 0 ≤ λ_min ≤ 1.00000e-02" in lines
    assert str(ConvergenceError("message", result)) == "message"


def test_results_and_errors_travel_between_processes():
    F, v, _ = known()
    result = certify(F, v[:, [0, 29]], [0, -1], details={"a": 1}, rng=0)
    for travelled in (pickle.loads(pickle.dumps(result)), copy.deepcopy(result)):
        assert str(travelled) == str(result) and np.array_equal(travelled.eigenvectors, result.eigenvectors)
        assert list(travelled.status) == list(result.status) and travelled.converged.all()
    error = pickle.loads(pickle.dumps(ConvergenceError("message", result)))
    assert str(error) == "message" and str(error.result) == str(result)
    stopped = pickle.loads(pickle.dumps(SolverStopped("message", Answer(v[:, :1], v[:, :0]))))
    assert str(stopped) == "message" and stopped.answer.largest.shape == (30, 1)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"tol": np.nan}, ValueError, "tol must be a number between 0 and 1, .*, got nan"),
        ({"tol": "1e-6"}, TypeError, "tol must be a number between 0 and 1, .*, got '1e-6'"),
        ({"probe": -1}, ValueError, "probe must be an integer from 0, got -1"),
        ({"rng": np.random.RandomState(0)}, TypeError, "rng must be a seed, .* or a Generator"),
        ({"operator": np.eye(30)}, TypeError, "operator must be a FisherOperator or a JacobianOperator, got ndarray"),
    ],
)
def test_bad_arguments(arguments, error, message):
    F, v, _ = known()
    with pytest.raises(error, match=message):
        certify(**{"operator": F, "vectors": v[:, :1], "eigenindex": [0]} | arguments)


def test_a_jacobian_operator_will_do():
    F, v, _ = known()
    assert certify(F.jacobian, v[:, :1], [0], rng=0).converged.all()


def test_float32_margin_is_noise():
    """Where rounding is larger than tol, nothing is called converged that could fail in float64."""
    F, v, _ = known(dtype=DTYPES[0])
    result = certify(F, v[:, :1], [0], tol=1e-8, rng=0)
    assert 1e-9 < result.noise < 1e-6 and result.status[0] == Status.UNCONVERGED


def test_order_within_a_null_space_is_rounding(monkeypatch):
    """Also where the noise happens to be measured as zero."""
    monkeypatch.setattr("fisherop.sample.Sample.noise", lambda *_: 0.0)
    row = np.random.default_rng(0).standard_normal((1, 10))
    null = np.linalg.svd(row)[2][1:].T[:, :2]
    for vectors in (null, null[:, ::-1]):
        result = certify(linear_operator(row), vectors, [8, 9])
        assert result.status.tolist() == [Status.NULL] * 2 and (np.diff(result.eigenvalues) <= 0).all()


def test_null_pairs_are_counted_as_one_by_one():
    """By bisection on their number: as many as have a joint norm within the tolerance."""
    sigma = 10.0 ** -np.linspace(0, 6, 30)
    matrix = matrix_with_singular_values(sigma, 30, 30)
    vectors = np.linalg.svd(matrix)[2].T
    for tol in (1e-11, 1e-8, 1e-4, 0.5):
        result = certify(linear_operator(matrix), vectors, range(30), tol=tol, rng=0)
        assert (result.status == Status.NULL).sum() == (sigma**2 <= tol).sum()
