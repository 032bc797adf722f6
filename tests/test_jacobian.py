"""The law of every Jacobian and of what is made of them, and the operators and solvers on each."""

import pickle

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from helpers import DTYPES, assert_close, assert_truthful, eps, matrices
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.linalg import LinearOperator, aslinearoperator

from fisherop import FisherOperator, JacobianOperator, certify, eigenpairs, linearize, singular_triplets
from fisherop.combinators import Restricted, Stacked, Whitened
from fisherop.from_operator import FromOperator
from fisherop.jacobian import Counted, OfModel, Scaled, Transposed
from fisherop.testing import check_adjoint, matrix_with_singular_values


def of_model(matrix):
    matrix = torch.as_tensor(matrix)
    return OfModel(linearize(torch.zeros(matrix.shape[1], dtype=matrix.dtype), lambda x: matrix @ x))


def stacked(matrix):
    """Of three linearizations, with weights."""
    parts = zip((1.0, 4.0, 0.25), np.array_split(matrix, 3), strict=True)
    return Stacked([(w, of_model(part / np.float32(w**0.5))) for w, part in parts if len(part)])


class Plain(LinearOperator):
    """A SciPy operator of vectors alone."""

    def __init__(self, matrix):
        self.matrix = matrix
        super().__init__(matrix.dtype, matrix.shape)

    def _matvec(self, x):
        return self.matrix @ x

    def _rmatvec(self, x):
        return self.matrix.T @ x


def of_pylops(matrix):
    pylops = pytest.importorskip("pylops", reason="PyLops is an optional neighbour")
    return pylops.MatrixMult(matrix, dtype=matrix.dtype)


SOURCES = {  # what `of` takes
    "array": lambda matrix: matrix,
    "sparse array": sp.csr_array,
    "sparse matrix": sp.coo_matrix,
    "SciPy's operator": aslinearoperator,
    "a plain operator": Plain,
    "PyLops": of_pylops,
    "tensor": torch.as_tensor,
    "a model": of_model,
    "a stack of models": stacked,
}
MADE = {  # a Jacobian of a matrix, and the matrix that it then is of
    "of a model": lambda a, rng: (of_model(a), a),
    "counted": lambda a, rng: (Counted(FromOperator(a)), a),
    "scaled": lambda a, rng: (Scaled(FromOperator(a), -3), a / 8),
    "transposed": lambda a, rng: (Transposed(FromOperator(a)), a.T),
    "whitened": lambda a, rng: whitened(a, rng.standard_normal((3, len(a)))),
    "whitened by numbers": lambda a, rng: whitened(a, rng.standard_normal(len(a))),
    "restricted": lambda a, rng: restricted(a, rng.standard_normal((a.shape[1], 2))),
    "restricted by numbers": lambda a, rng: restricted(a, rng.standard_normal(a.shape[1])),
    "stacked": lambda a, rng: (stacked(a), a),
    "all of them": lambda a, rng: all_of_them(a, rng),
}


def whitened(matrix, root):
    root = root.astype(matrix.dtype)
    made = root @ matrix if root.ndim > 1 else root[:, None] * matrix
    return Whitened(FromOperator(matrix), torch.as_tensor(root)), made


def restricted(matrix, space):
    space = space.astype(matrix.dtype)
    made = matrix @ space if space.ndim > 1 else matrix * space
    return Restricted(FromOperator(matrix), torch.as_tensor(space)), made


def all_of_them(matrix, rng):
    J, other = restricted(matrix, rng.standard_normal((matrix.shape[1], 4)))
    root = rng.standard_normal(len(matrix)).astype(matrix.dtype)
    white = Whitened(Scaled(J, 2), torch.as_tensor(root))
    return Stacked([(2.0, white), (1.0, J)]), np.vstack([2**0.5 * 4 * root[:, None] * other, other])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", list(MADE))
def test_the_law_of_jacobians(kind, dtype):
    """Products are those of one matrix, and `normal` is R and JᵀJ."""
    rng = np.random.default_rng(0)
    matrix = matrix_with_singular_values(np.linspace(2, 1, 7), 9, 7).astype(str(dtype).removeprefix("torch."))
    J, truth = MADE[kind](matrix, rng)
    m, n = truth.shape
    assert J.shape == (m, n) and J.dtype == dtype and J.device == torch.device("cpu")
    for k in (1, 3):
        rows = torch.randn(k, n, generator=torch.Generator().manual_seed(k), dtype=dtype)
        images = torch.randn(k, m, generator=torch.Generator().manual_seed(k + 9), dtype=dtype)
        assert_close(J.jvp(rows), rows.numpy() @ truth.T, dtype)
        assert_close(J.vjp(images), images.numpy() @ truth, dtype)
        r, products = J.normal(rows)
        assert r.dtype == torch.float64
        assert_close(r.T @ r, (rows.numpy() @ truth.T) @ (rows.numpy() @ truth.T).T, dtype)
        assert_close(products, rows.numpy() @ truth.T @ truth, dtype)
    J.check_current()
    check_adjoint(JacobianOperator.of(J))


def test_a_stack_multiplies_by_f_without_a_response_of_all():
    longest = []

    class Watched(FromOperator):
        def jvp(self, rows):
            longest.append(super().jvp(rows).shape[1])
            return super().jvp(rows)

    parts = [(1.0, Watched(np.eye(6) * (i + 1))) for i in range(5)]
    r, products = Stacked(parts).normal(torch.eye(6).double()[:2])
    assert max(longest) == 6 and r.shape == (2, 2)
    np.testing.assert_allclose(products, 55 * np.eye(6)[:2])


@pytest.mark.parametrize("source", list(SOURCES))
@given(matrix=matrices(max_m=20, max_n=14), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=15)
def test_operators_of_anything(source, matrix, dtype, seed):
    matrix = matrix.astype(str(dtype).removeprefix("torch."))
    J, F = (kind.of(SOURCES[source](matrix)) for kind in (JacobianOperator, FisherOperator))
    (m, n), rng = matrix.shape, np.random.default_rng(seed)
    assert J.shape == (m, n) and F.shape == (n, n) and J.dtype == F.dtype == matrix.dtype
    x, y = rng.standard_normal((n, 3)), rng.standard_normal((m, 2))
    exact = matrix.astype(np.float64)
    assert_close(J @ x, exact @ x, dtype)
    assert_close(J.H @ y, exact.T @ y, dtype)
    assert_close(F @ x, exact.T @ (exact @ x), dtype)
    assert_close(J.to_dense(), exact, dtype)
    before = F.n_products
    F.matvec(x[:, 0])
    assert F.n_products == before + 1


@pytest.mark.filterwarnings("ignore:J is zero")
@pytest.mark.parametrize("source", list(SOURCES))
@given(
    matrix=matrices(max_m=20, max_n=14), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**32 - 1),
    method=st.sampled_from(["golub_kahan", "exact"]),
)  # fmt: skip
@settings(max_examples=8)
def test_solvers_on_anything(source, matrix, dtype, seed, method):
    tol = 1e-5 if dtype == torch.float32 else 1e-6
    F = FisherOperator.of(SOURCES[source](matrix.astype(str(dtype).removeprefix("torch."))))
    k = max(1, min(2, matrix.shape[1] // 2))
    which = "both" if matrix.shape[1] > 1 else "largest"
    result = eigenpairs(F, k, which, method=method, tol=tol, rng=seed, progress=False)
    assert_truthful(result, matrix)
    assert result.n_products == F.n_products


@pytest.mark.parametrize("source", list(SOURCES))
@pytest.mark.parametrize("method", ["eigsh", "lobpcg", "svds", "power"])
def test_every_method_on_anything(source, method):
    matrix = matrix_with_singular_values(np.linspace(3, 1, 30), 40, 30)
    F = FisherOperator.of(SOURCES[source](matrix))
    assert_truthful(eigenpairs(F, method=method, tol=1e-3, rng=0, progress=False), matrix)


def test_what_an_operator_of_a_matrix_lacks():
    F = FisherOperator.of(np.eye(5))
    assert F.image_shape == (5,) and F.response_shape == (5,) and not hasattr(F, "linearization")
    with pytest.raises(AttributeError, match="has no linearization: it is of a FromOperator, and not of a model"):
        F.linearization  # noqa: B018
    with pytest.raises(TypeError, match=r"is of no model: convert the matrix, as by A.astype\(...\), and use of\(\)"):
        F.to(torch.float32)
    with pytest.raises(TypeError, match="against must be a FisherOperator, since this one is of no model"):
        certify(F, np.eye(5)[:, :1], [0], against=torch.float64)
    judged = certify(F, np.eye(5)[:, :1], [0], against=FisherOperator.of(np.eye(5)), rng=0)
    assert judged.converged.all()
    other = pickle.loads(pickle.dumps(FisherOperator.of(sp.eye_array(5))))
    np.testing.assert_array_equal(other @ np.ones(5), np.ones(5))
    assert FisherOperator.of(F.jacobian).products is F.products


def test_parts_that_do_not_fit():
    J = FromOperator(np.eye(3))
    for made, message in (
        (lambda: Stacked([]), r"parts must be a sequence of at least one \(weight, Jacobian\)"),
        (lambda: Stacked([(J,)]), r"parts must be a sequence of at least one \(weight, Jacobian\)"),
        (lambda: Stacked([(1.0, J), (1.0, FromOperator(np.eye(4)))]), "parts must share N, dtype and device: got 4"),
        (lambda: Stacked([(-1.0, J)]), "a weight must be a number from 0, got -1.0"),
        (lambda: Whitened(J, torch.ones(4).double()), r"root must be of shape \(M', M\), M = 3"),
        (lambda: Whitened(J, torch.full((3,), np.nan).double()), "root must be finite"),
        (lambda: Restricted(J, torch.ones(4, 2).double()), r"space must be of shape \(N, p\), N = 3"),
        (lambda: FisherOperator.of(Restricted(J, np.ones((3, 0)))), "A must be a matrix with at least one element"),
    ):
        with pytest.raises(ValueError, match=message):
            made()
    with pytest.raises(TypeError, match=r"root must be a matrix .* of torch.float64 on cpu, as J is"):
        Whitened(J, torch.ones(3))
    with pytest.raises(TypeError, match="what parts holds must be of type tuple, got FromOperator"):
        Stacked([J])


def test_parts_may_be_whatever_operators_are_made_of():
    matrix = matrix_with_singular_values([3.0, 2.0, 1.0], 4, 3)
    lin = of_model(matrix).linearization
    for part in (matrix, sp.csr_array(matrix), torch.as_tensor(matrix), lin, FisherOperator.from_linearization(lin)):
        F = FisherOperator.of(Stacked([(1.0, part), (3.0, JacobianOperator.of(part))]))
        np.testing.assert_allclose(F @ np.eye(3), 4 * matrix.T @ matrix, atol=1e-14)
        F = FisherOperator.of(Restricted(Whitened(part, 2 * np.eye(4)), torch.eye(3).double()[:, :2].requires_grad_()))
        np.testing.assert_allclose(F @ np.eye(2), 4 * (matrix.T @ matrix)[:2, :2], atol=1e-14)


@pytest.mark.parametrize("weight", [1e-40, 1e40])
def test_a_weight_may_be_out_of_range_beside_its_part(weight):
    """As 1e40 is in float32."""
    matrix = matrix_with_singular_values(np.linspace(3, 1, 60), 80, 60).astype(np.float32)
    J = Stacked([(weight, matrix[:40] / np.float32(weight**0.5)), (1.0, matrix[40:])])
    F = FisherOperator.of(J)
    assert_truthful(eigenpairs(F, method="golub_kahan", tol=1e-4, rng=0, progress=False), matrix)
    _, products = J.normal(torch.eye(60)[:3])
    np.testing.assert_allclose(products, J.vjp(J.jvp(torch.eye(60)[:3])), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:J is zero")
@given(matrix=matrices(max_m=20, max_n=20), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=40)
def test_singular_triplets(matrix, dtype, seed):
    tol = 1e-5 if dtype == torch.float32 else 1e-6
    m, n = matrix.shape
    k = max(1, min(2, min(m, n) // 2))
    which = "both" if min(m, n) > 1 else "largest"
    given = matrix.astype(str(dtype).removeprefix("torch."))
    found = singular_triplets(given, k, which, tol=tol, rng=seed, progress=False)
    assert_truthful(found.eigen, matrix if m >= n else matrix.T)
    K = len(found.s)
    assert found.u.shape == (m, K) and found.vh.shape == (K, n) and (np.diff(found.s) <= 0).all()
    assert_close(found.u.T @ found.u, np.eye(K), dtype, factor=100)
    assert_close(found.vh @ found.vh.T, np.eye(K), dtype, factor=100)
    u, v, top = found.u.astype(float), found.vh.T.astype(float), np.linalg.norm(matrix, 2)
    rounding = 100 * eps(dtype) * top
    left, right = (np.linalg.norm(r, axis=0) for r in (matrix @ v - found.s * u, matrix.T @ u - found.s * v))
    assert np.abs(left - found.left_residuals).max() <= rounding
    assert np.abs(right - found.right_residuals).max() <= rounding
    exact, other = (left, right) if m >= n else (right, left)
    assert exact.max() <= rounding  # one side is the direction of A times the other
    seen = found.s > 10 * tol**0.5 * top
    assert (other[seen] <= 2 * tol * top**2 / found.s[seen] + rounding).all()


def test_triplets_say_what_they_are():
    matrix = matrix_with_singular_values(np.linspace(3, 1, 20), 20, 35)
    found = singular_triplets(sp.csr_array(matrix), rng=0, progress=False, tol=1e-10)
    np.testing.assert_allclose(found.s, [3, 1])
    lines = repr(found).splitlines()
    assert lines[0].startswith("2 singular triplets of A (20 × 35), of 20, ") and lines[3].split()[0] == "0"
    assert found.eigen.image_size == 20 and found.n_products == found.eigen.n_products + 2
    assert "by eigenpairs of AAᵀ, where λ = σ² and J is Aᵀ: " in str(found)
    u, s, vh = found
    assert u is found.u and s is found.s and vh is found.vh and not s.flags.writeable
    assert (found.status == "eigenpair").all() and lines[3].endswith("eigenpair")
    with pytest.raises(TypeError, match="A must be a matrix, or the operator of J, got FisherOperator"):
        singular_triplets(FisherOperator.of(matrix))


@pytest.mark.parametrize("shape", [(60, 40), (40, 60)])
def test_triplets_go_on(shape):
    """Of the same matrix, or an operator, whichever side is the longer; and another operator may judge."""
    matrix = matrix_with_singular_values(np.linspace(3, 1, 40), *shape)
    for A in (matrix, JacobianOperator.of(matrix), sp.csr_array(matrix)):
        state, options = {}, {"method": "golub_kahan", "rng": 0, "progress": False}
        first = singular_triplets(A, 1, tol=1e-3, state=state, **options)
        again = singular_triplets(A, 1, state=state, **options)
        anew = singular_triplets(A, 1, **options)
        certificate = 5  # of the first call
        assert first.n_products < again.n_products <= anew.n_products + certificate
        np.testing.assert_allclose(again.s, [3, 1])
    with pytest.raises(ValueError, match="state belongs to another operator: pass an empty dict"):
        singular_triplets(matrix.copy(), 1, state=state, **options)
    judged = singular_triplets(matrix, against=JacobianOperator.of(matrix), rng=0, progress=False)
    np.testing.assert_allclose(judged.s, [3, 1])


def test_a_state_does_not_keep_what_another_operator_judged():
    matrix = matrix_with_singular_values(np.linspace(3, 1, 40), 60, 40)
    F, state, options = FisherOperator.of(matrix), {}, {"method": "golub_kahan", "rng": 0, "progress": False}
    judged = eigenpairs(F, against=FisherOperator.of(2 * matrix), state=state, **options)
    np.testing.assert_allclose(judged.eigenvalues, [36, 4])
    np.testing.assert_allclose(eigenpairs(F, state=state, **options).eigenvalues, [9, 1])
