"""What operators are made of: anybody's matrices and operators, and what is refused."""

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from scipy.sparse.linalg import LinearOperator, aslinearoperator

from fisherop import FisherOperator, JacobianOperator, certify, eigenpairs, singular_triplets
from fisherop.from_operator import FromOperator
from fisherop.jacobian import Scaled
from fisherop.testing import matrix_with_singular_values

MATRIX = matrix_with_singular_values(np.linspace(3, 1, 7), 9, 7)


def test_integers_are_multiplied_as_numbers():
    """Sums of int8 would leave its range."""
    for A in (np.full((3, 40), 100, np.int8), sp.csr_array(np.full((3, 40), 100, np.int8)), torch.full((3, 40), 100)):
        np.testing.assert_array_equal(JacobianOperator.of(A) @ np.ones(40), np.full(3, 4000.0))


@pytest.mark.parametrize(
    ("A", "error", "message"),
    [
        (np.ones((2, 3)) * 1j, TypeError, "A must be a LinearOperator, a sparse or dense matrix of real numbers"),
        (
            torch.ones(2, 3) * 1j,
            TypeError,
            "A must be a LinearOperator, .* a dense tensor, .* of two dimensions, got Tensor",
        ),
        (np.ones(3), ValueError, r"A must be .* of two dimensions, got ndarray of shape \(3,\)"),
        (np.ones((0, 3)), ValueError, "A must be a matrix with at least one element"),
        ("matrix", TypeError, "A must be a LinearOperator, .*, got 'matrix'"),
        (None, TypeError, "A must be a LinearOperator"),
        (torch.eye(3).to_sparse(), TypeError, "A must be a LinearOperator"),
        (lambda x: x, TypeError, "A must be a LinearOperator"),
    ],
)
def test_what_no_operator_is_made_of(A, error, message):
    with pytest.raises(error, match=message):
        FisherOperator.of(A)


def test_an_operator_without_an_adjoint_says_so():
    A = LinearOperator((4, 3), matvec=lambda x: np.ones(4), dtype=np.float64)
    with pytest.raises(
        TypeError, match=r"A must be an operator with products and with an adjoint, .*: give it an rmatvec"
    ):
        FisherOperator.of(A)


@pytest.mark.parametrize("kind", [np.asarray, sp.csr_array, sp.coo_array, torch.as_tensor])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_matrix_that_is_not_finite(kind, value):
    A = MATRIX.copy()
    A[2, 3] = value
    with pytest.raises(ValueError, match=r"A must be finite, got .*: it holds NaN or infinity"):
        JacobianOperator.of(kind(A))


ADJOINTS = {
    "scaled": lambda y: 1.01 * (MATRIX.T @ y),
    "reversed": lambda y: (MATRIX.T @ y)[::-1],
    "masked": lambda y: np.r_[np.ones(3), np.zeros(4)] * (MATRIX.T @ y),
    "zero": lambda y: 0 * (MATRIX.T @ y),
    "of another": lambda y: (MATRIX[::-1]).T @ y,
}


@pytest.mark.parametrize("adjoint", list(ADJOINTS))
def test_an_adjoint_of_another_matrix(adjoint):
    A = LinearOperator(MATRIX.shape, matvec=lambda x: MATRIX @ x, rmatvec=ADJOINTS[adjoint], dtype=float)
    with pytest.raises(ValueError, match=r"A must be an operator whose adjoint is that of its products"):
        FisherOperator.of(A)


def test_an_inexact_adjoint_is_taken_into_account():
    """As of an operator with an iteration inside."""
    A = LinearOperator(MATRIX.shape, lambda x: MATRIX @ x, rmatvec=lambda y: (1 + 1e-5) * (MATRIX.T @ y), dtype=float)
    F = FisherOperator.of(A)
    assert 0.9e-5 <= F.products.mismatch <= 1.1e-5
    assert eigenpairs(F, tol=1e-3, rng=0, progress=False).noise >= 0.9e-5
    assert FisherOperator.of(aslinearoperator(MATRIX)).products.mismatch == 0


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rounding_is_no_mismatch(dtype):
    """Also where a random vector lies where the operator is small, as of a matrix that is nearly of rank 1."""
    for seed in range(600):
        A = matrix_with_singular_values([100.0, 1e-5, 1e-6], 10, 11, rng=seed).astype(dtype)
        operator = LinearOperator(A.shape, lambda x, A=A: A @ x, rmatvec=lambda y, A=A: A.T @ y, dtype=dtype)
        assert FromOperator(operator).mismatch == 0


def without_adjoint(shape):
    class Forward(LinearOperator):
        def __init__(self):
            super().__init__(np.float64, shape)

        def _matvec(self, x):
            return np.ones(shape[0]) * x.sum()

    return Forward()


@pytest.mark.parametrize("made", [lambda A: A, lambda A: 2 * A, lambda A: A + A, lambda A: without_adjoint((4, 3))])
def test_what_is_made_of_operators_without_an_adjoint(made):
    A = LinearOperator((4, 3), matvec=lambda x: np.ones(4) * x.sum(), dtype=np.float64)
    with pytest.raises(TypeError, match=r"A must be an operator with products and with an adjoint.*: give it an rmatv"):
        FisherOperator.of(made(A))


def test_functions_are_given_vectors():
    """SciPy gives them matrices (N, 1) of several columns, each of which is its own FFT along the last axis."""

    def fft(x):
        return np.fft.fft(x).real

    A = LinearOperator((60, 60), matvec=fft, rmatvec=fft, dtype=float)
    X = np.random.default_rng(0).standard_normal((60, 3))
    for operator, scale in ((A, 1), (2 * A, 2)):
        np.testing.assert_allclose(JacobianOperator.of(operator) @ X, scale * np.fft.fft(X, axis=0).real, atol=1e-12)
    assert JacobianOperator.of(A).matmat(np.zeros((60, 0))).shape == (60, 0)


def test_an_operator_that_writes_to_what_it_is_given():
    class Writing(LinearOperator):
        def __init__(self):
            super().__init__(MATRIX.dtype, MATRIX.shape)

        def _matvec(self, x):
            y = MATRIX @ x.ravel()
            x /= 2
            return y

        def _rmatvec(self, y):
            return MATRIX.T @ y

    np.testing.assert_allclose(singular_triplets(Writing(), method="golub_kahan", rng=0, progress=False).s, [3, 1])


def test_products_that_are_not_finite_on_the_way():
    calls = []

    def product(x):
        calls.append(1)
        return matrix @ x * (np.nan if len(calls) > 12 else 1)

    matrix = matrix_with_singular_values(np.linspace(3, 1, 60), 60, 60)
    F = FisherOperator.of(LinearOperator((60, 60), product, rmatvec=lambda y: matrix.T @ y, dtype=float))
    with pytest.raises(OverflowError, match=r"a product with A holds NaN or infinity, or more than torch.float64 can"):
        eigenpairs(F, method="golub_kahan", rng=0, progress=False)


@pytest.mark.parametrize("kind", [np.asarray, sp.csr_array, torch.as_tensor])
def test_a_matrix_that_changes(kind):
    A = kind(np.array(MATRIX))
    F, state = FisherOperator.of(A), {}
    eigenpairs(F, method="golub_kahan", state=state, rng=0, progress=False)
    A *= 2
    for call in (lambda: eigenpairs(F, state=state, progress=False), lambda: certify(F, np.eye(7)[:, :1], [0])):
        with pytest.raises(RuntimeError, match="the matrix has changed since its operator was made"):
            call()


def test_kinds_of_matrices():
    for kind in (
        sp.lil_array,
        sp.dok_array,
        sp.bsr_array,
        np.asfortranarray,
        lambda A: torch.as_tensor(A).requires_grad_(),
    ):
        np.testing.assert_allclose(JacobianOperator.of(kind(MATRIX)) @ np.eye(7), MATRIX, atol=1e-15)
    assert JacobianOperator.of(MATRIX.astype(">f4")).dtype == np.float32
    with pytest.raises(TypeError, match=r"without a mask.*use A.filled\(\)"):
        JacobianOperator.of(np.ma.masked_array(MATRIX, MATRIX > 1))
    with pytest.raises(TypeError, match=r"it is sparse: use A.to_dense\(\)"):
        JacobianOperator.of(torch.eye(3).to_sparse())
    assert FisherOperator.of(Scaled(FromOperator(np.eye(3)), 3)).n_products == 0


def test_products_with_f_that_vanish_beside_larger_ones():
    """Its square of 1e-25 is nothing in float32."""
    F = FisherOperator.of(np.diag([1, 1e-25, 1e-25]).astype(np.float32))
    assert certify(F, np.eye(3)[:, :1], [0], rng=0).converged.all()
    assert eigenpairs(F, 1, "largest", method="eigsh", rng=0, progress=False).converged.all()


def test_an_error_of_the_operator_stays_its_own():
    def product(x):
        raise TypeError("my own mistake")

    with pytest.raises(TypeError, match=r"^my own mistake$"):
        FisherOperator.of(LinearOperator((3, 3), product, rmatvec=lambda y: y, dtype=float))
    with pytest.raises(TypeError, match=r"^my own mistake$"):
        FisherOperator.of(LinearOperator((3, 3), lambda x: x, rmatvec=product, dtype=float))
