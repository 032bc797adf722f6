import concurrent.futures
import copy
import functools
import multiprocessing
import pickle
import re
import sys
import warnings

import numpy as np
import pytest
import scipy.sparse as sp
import scipy.sparse.linalg as sla
import torch
from helpers import DEVICES, DTYPES, assert_close, linear_operator, matrices, small_image, small_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fisherop import FisherOperator, JacobianOperator
from fisherop.testing import check_adjoint, linear_model, matrix_with_singular_values

given_matrix = given(matrix=matrices(), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**32 - 1))


@given_matrix
@settings(max_examples=60)
def test_laws(matrix, dtype, seed):
    """J is the weight matrix, F = JᵀJ; adjoint, symmetric, positive semidefinite, linear; blocks are columns."""
    F = linear_operator(matrix, dtype)
    J = F.jacobian
    rng = np.random.default_rng(seed)
    m, n = matrix.shape
    x, u = rng.standard_normal((n, 3)).astype(J.dtype), rng.standard_normal((m, 3)).astype(J.dtype)
    assert_close(J.to_dense(), matrix, dtype)
    assert_close(J @ x, matrix @ x, dtype)
    assert_close(J.H @ u, matrix.T @ u, dtype)
    assert_close(J.T @ u, matrix.T @ u, dtype)
    assert_close(F @ x, matrix.T @ (matrix @ x), dtype)
    assert_close(F.to_dense(), matrix.T @ matrix, dtype)
    scale = np.abs(matrix).max() * np.abs(x).max() * np.abs(u).max() * m * n
    assert np.abs(u.T @ (J @ x) - (J.H @ u).T @ x).max() <= 1e3 * np.finfo(J.dtype).eps * scale
    gram = x.T.astype(np.float64) @ (F @ x)
    assert_close(gram, gram.T, dtype)
    assert np.linalg.eigvalsh((gram + gram.T) / 2).min() >= -1e3 * np.finfo(J.dtype).eps * np.abs(gram).max()
    assert_close(J @ (2 * x[:, 0] - x[:, 1]), 2 * (J @ x[:, 0]) - J @ x[:, 1], dtype)
    assert_close(J @ x, np.column_stack([J @ column for column in x.T]), dtype)
    assert_close(F @ x, np.column_stack([F.matvec(column) for column in x.T]), dtype)
    check_adjoint(J)
    check_adjoint(F)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nonlinear_model(dtype, device):
    image = small_image(dtype, device)
    J = JacobianOperator(image, small_model(dtype, device))
    assert J.image_shape == (1, 2, 6, 4) and J.response_shape == (J.shape[0],)
    exact = JacobianOperator(image.cpu().double(), small_model()).to_dense()
    assert_close(J.to_dense(), exact, dtype)
    assert_close(J @ np.eye(48), exact, dtype)


@pytest.mark.parametrize("m", [5, 70])
def test_to_dense_by_rows_and_by_columns(m):
    matrix = np.random.default_rng(0).standard_normal((m, 30))
    F = FisherOperator(torch.ones(30).double(), linear_model(matrix), chunk_size=4)
    before = F.n_products
    dense = F.jacobian.to_dense()
    np.testing.assert_allclose(dense, matrix, atol=1e-13)
    assert F.n_products - before == min(m, 30) / 2
    assert F.jacobian.to_dense() is dense and not dense.flags.writeable
    with pytest.raises(
        ValueError, match=r"over the limit of 9\.31e-10 GiB: use products instead, or pass max_bytes=7200"
    ):
        F.to_dense(max_bytes=1)
    with pytest.raises(ValueError, match=f"pass max_bytes={m * 30 * 8}"):
        JacobianOperator(torch.ones(30).double(), linear_model(matrix)).to_dense(max_bytes=1)


MATRIX = np.random.default_rng(5).standard_normal((12, 8)).astype(np.float32).astype(np.float64)


def unaligned(x):
    packed = np.zeros(len(x), dtype=[("pad", "u1"), ("x", "f8")])
    packed["x"] = x
    return packed["x"]


LAYOUTS = {
    "float16": lambda x: x.astype(np.float16),
    "float64": lambda x: x.astype(np.float64),
    "long double": lambda x: x.astype(np.longdouble),
    "integer": lambda x: np.round(x).astype(np.int64),
    "boolean": lambda x: x > 0,
    "complex": lambda x: x + 2j * x[::-1],
    "complex columns": lambda x: np.c_[x + 2j * x[::-1], 1j * x],
    "big-endian": lambda x: x.astype(">f8"),
    "Fortran": lambda x: np.asfortranarray(np.c_[x, x]),
    "strided": lambda x: np.repeat(x, 2, axis=0)[::2],
    "strided columns": lambda x: np.repeat(np.c_[x, 2 * x, 3 * x], 2, axis=0)[::2, ::2],
    "unaligned": unaligned,
    "overlapping": lambda x: np.lib.stride_tricks.sliding_window_view(np.r_[x, 1, 2], len(x)).T,
    "reversed": lambda x: x[::-1],
    "column": lambda x: x[:, None],
    "column, its columns reversed": lambda x: x[:, None][:, ::-1],
    "column, all reversed": lambda x: x[:, None][::-1, ::-1],
    "column, strides of nothing": lambda x: np.lib.stride_tricks.as_strided(x, (len(x), 1), (x.strides[0], -3)),
    "columns reversed": lambda x: np.c_[x, 2 * x][:, ::-1],
    "block": lambda x: np.c_[x, 2 * x, x[::-1]],
    "no columns": lambda x: np.empty((len(x), 0)),
    "list": lambda x: x.tolist(),
    "matrix": lambda x: np.asmatrix(np.c_[x, 2 * x]),
    "tensor": torch.from_numpy,
    "tensor column": lambda x: torch.from_numpy(x)[:, None],
    "read-only": lambda x: np.broadcast_to(x[0], x.shape),
    "read-only column, reversed": lambda x: np.broadcast_to(x[:, None], (len(x), 1))[:, ::-1],
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
def test_whatever_the_vectors_look_like(layout, dtype):
    """By every method and operator that there is, and the array given is as it was."""
    F = linear_operator(MATRIX, dtype)
    gram = MATRIX.T @ MATRIX
    for operator, matrix in ((F.jacobian, MATRIX), (F.jacobian.H, MATRIX.T), (F, gram), (F.T, gram)):
        x = LAYOUTS[layout](np.random.default_rng(1).standard_normal(matrix.shape[1]))
        kept = np.asarray(x).copy()
        wanted = matrix @ kept.astype(complex if kept.dtype.kind == "c" else float)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            adjoint = operator.H
            by_kind = (operator.matvec, adjoint.rmatvec) if kept.ndim == 1 else (operator.matmat, adjoint.rmatmat)
            for multiply in (operator.__matmul__, operator.dot, *by_kind, adjoint.H.dot, operator.T.T.dot):
                product = multiply(x)
                assert isinstance(product, np.ndarray) and product.shape == wanted.shape
                assert product.dtype == np.result_type(operator.dtype, np.complex64 if kept.dtype.kind == "c" else "?")
                assert_close(product.real, wanted.real, dtype)
                assert_close(product.imag, wanted.imag, dtype)
        assert np.array_equal(np.asarray(x), kept)


@pytest.mark.parametrize("layout", ["column, its columns reversed", "read-only column, reversed", "big-endian"])
def test_images_of_columns_whatever_they_look_like(layout):
    columns = LAYOUTS[layout](np.arange(8.0)).reshape(8, -1)
    block = linear_operator(MATRIX, shape=(1, 2, 4)).to_tensors(columns)
    assert torch.equal(block, torch.arange(8.0).double().reshape(1, 1, 2, 4))


@functools.cache
def known_operator(sizes):
    matrix = np.random.default_rng(6).standard_normal(sizes)
    return matrix, linear_operator(matrix)


SHAPES = [(), (1,), (4,), (5,), (1, 4), (4, 1), (1, 5), (5, 1), (4, 4), (5, 5), (4, 5), (5, 4), (4, 0), (0, 4), (1, 1)]
SHAPES += [(3, 4, 2), (3, 5, 2), (2, 3, 4), (2, 4, 4), (2, 5, 5), (2, 5, 1), (2, 1, 3, 4), (2, 1, 4, 3), (2, 0, 4)]


@pytest.mark.filterwarnings("ignore:Calling `r?matvec` on 'column vectors':FutureWarning")  # SciPy's, from 1.18 on
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sizes", [(5, 4), (4, 5), (1, 4), (4, 1), (1, 1)])
def test_a_shape_means_what_it_means_to_scipy(sizes, shape):
    """In the SciPy in use: every method takes what SciPy's own operator of the matrix takes, with the same result."""
    (matrix, F), x = known_operator(sizes), np.random.default_rng(7).standard_normal(shape)
    for ours, theirs in (
        (F.jacobian, sla.aslinearoperator(matrix)),
        (F.jacobian.H, sla.aslinearoperator(matrix).H),
        (F, sla.aslinearoperator(matrix.T @ matrix)),
        (2 * F.jacobian, 2 * sla.aslinearoperator(matrix)),
        (F.in_float64(), sla.aslinearoperator(matrix.T @ matrix)),
    ):
        for method in ("matvec", "rmatvec", "matmat", "rmatmat", "dot", "__rmul__"):
            try:
                wanted = getattr(theirs, method)(x)
            except ValueError:
                with pytest.raises(ValueError):
                    getattr(ours, method)(x)
            else:
                product = getattr(ours, method)(x)
                if isinstance(wanted, sla.LinearOperator):  # times a number
                    product, wanted = product.matmat(np.eye(ours.shape[1])), wanted.matmat(np.eye(ours.shape[1]))
                assert product.shape == wanted.shape
                np.testing.assert_allclose(product, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [sp.csr_array, sp.csr_matrix, sp.coo_array, sp.dia_array])
def test_sparse_operand(kind):
    F = linear_operator(MATRIX)
    for operator, matrix in ((F.jacobian, MATRIX), (F.jacobian.T, MATRIX.T), (F, MATRIX.T @ MATRIX)):
        n = operator.shape[1]
        for dense in (np.eye(n), np.eye(n, 3)):
            x = kind(dense)
            for multiply in (
                lambda: operator @ x,  # noqa: B023
                lambda: x.T @ operator.T,  # noqa: B023
                lambda: operator.matmat(x),  # noqa: B023
                lambda: operator.H.rmatmat(x),  # noqa: B023
            ):
                with pytest.raises(TypeError, match=r"[Ww]rap.* the matrix .*aslinearoperator") as caught:
                    multiply()
                assert re.search(r"multiplies dense arrays.*x\.toarray\(\)", str(caught.value.__cause__))
            assert_close((operator @ sla.aslinearoperator(x)).matmat(np.eye(x.shape[1])), matrix @ dense, torch.float64)
    for call in (F.matvec, F.rmatvec):
        with pytest.raises(
            TypeError, match=r"<8x8 FisherOperator .* multiplies dense arrays, got a sparse one: use x\."
        ):
            call(kind(np.ones((8, 1))))


def test_tensor_with_a_graph():
    with pytest.raises(RuntimeError, match=r"requires grad. Use tensor.detach\(\)"):
        linear_operator(MATRIX) @ torch.ones(8).requires_grad_()


def test_algebra():
    F = linear_operator(MATRIX)
    J, x, gram = F.jacobian, np.random.default_rng(2).standard_normal(8), MATRIX.T @ MATRIX
    shifted = F + sla.aslinearoperator(np.eye(8))
    for operator, matrix in (
        (J.H @ J, gram),
        (2 * F, 2 * gram),
        (-F, -gram),
        (F - 0.5 * F, 0.5 * gram),
        (F**2, gram @ gram),
        (shifted, gram + np.eye(8)),
        (shifted.H, gram + np.eye(8)),
        (J @ F, MATRIX @ gram),
        (J.T.T, MATRIX),
    ):
        np.testing.assert_allclose(operator @ x, matrix @ x, rtol=1e-12)
    np.testing.assert_allclose(x @ F, x @ gram, rtol=1e-12)
    assert F.T is F and F.H is F
    assert J.args == F.args == () and (J @ F).args == (J, F)


@pytest.fixture(scope="module", params=DTYPES)
def truth(request):
    """An operator of known spectrum, 80 × 40, with its singular values and right singular vectors."""
    matrix = matrix_with_singular_values(np.linspace(1, 3, 40)[::-1], 80, 40)
    F = linear_operator(matrix, request.param, shape=(1, 1, 8, 5))
    return F, *np.linalg.svd(matrix)[1:], request.param


def test_eigsh(truth):
    F, sigma, _, dtype = truth
    for which, wanted in (("LA", sigma[2::-1]), ("SA", sigma[:-4:-1])):
        values = sla.eigsh(F, k=3, which=which, v0=np.ones(40), return_eigenvectors=False)
        assert_close(np.sort(values), np.sort(wanted) ** 2, dtype)


def test_lobpcg(truth):
    F, sigma, _, dtype = truth
    start = np.random.default_rng(0).standard_normal((40, 2))
    values, _ = sla.lobpcg(F, start.astype(F.dtype), largest=True, maxiter=200, tol=20 * np.finfo(F.dtype).eps ** 0.7)
    assert_close(values, sigma[:2] ** 2, dtype, 1e4)


def test_lobpcg_dense_fallback_multiplies_an_integer_identity():
    F = linear_operator(MATRIX)
    with pytest.warns(UserWarning, match="dense eigensolver"):
        values, _ = sla.lobpcg(F, np.eye(8, 3), largest=True)
    np.testing.assert_allclose(values, np.linalg.svd(MATRIX)[1][:3] ** 2)


@pytest.mark.parametrize("solver", ["arpack", "lobpcg", "propack"])
def test_svds(truth, solver):
    F, sigma, _, dtype = truth
    tol = np.finfo(F.dtype).eps ** 0.35  # which SciPy squares
    _, values, _ = sla.svds(F.jacobian, k=2, solver=solver, rng=np.random.default_rng(0), maxiter=300, tol=tol)
    assert_close(np.sort(values), np.sort(sigma[:2]), dtype, 1e4)


# SciPy's lsmr starts its condition estimate at 1e100, beyond float32
@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
@pytest.mark.parametrize("solve", [sla.lsmr, sla.lsqr])
def test_least_squares(truth, solve):
    F, *_, dtype = truth
    x = np.random.default_rng(3).standard_normal(40)
    tight = dict.fromkeys(("atol", "btol"), 20 * np.finfo(F.dtype).eps) | (
        {"maxiter": 500} if solve is sla.lsmr else {"iter_lim": 500}
    )
    assert_close(solve(F.jacobian, F.jacobian @ x, **tight)[0], x, dtype, 1e4)


@pytest.mark.parametrize("solve", [sla.cg, sla.minres])
def test_linear_solves(truth, solve):
    F, *_, dtype = truth
    x = np.random.default_rng(4).standard_normal(40)
    solution, info = solve(F, F @ x, rtol=20 * np.finfo(F.dtype).eps)
    assert info == 0
    assert_close(solution, x, dtype, 1e4)


def test_pylops(truth):
    pylops = pytest.importorskip("pylops", reason="PyLops is an optional neighbour")
    F, *_, dtype = truth
    x = np.random.default_rng(5).standard_normal(40).astype(F.dtype)
    wrapped = pylops.aslinearoperator(F.jacobian)
    assert_close((wrapped.H * (wrapped * x)), F @ x, dtype)
    assert pylops.utils.dottest(wrapped, *wrapped.shape, rtol=1e-3)


def test_primme(truth):
    primme = pytest.importorskip("primme", reason="PRIMME is an optional neighbour")
    F, sigma, _, dtype = truth
    values, _ = primme.eigsh(F, 2, which="SA", tol=np.finfo(F.dtype).eps ** 0.6)
    assert_close(np.sort(values), np.sort(sigma[-2:] ** 2), dtype, 1e4)


@pytest.mark.parametrize(
    ("vector", "error", "message"),
    [
        (np.full(8, np.nan), ValueError, r"JacobianOperator with dtype=float64> was given a vector that holds NaN"),
        (np.array([np.inf] * 8), ValueError, "was given a vector that holds NaN or infinity"),
        (np.array(["a"] * 8), TypeError, "multiplies numbers, got an array of dtype <U1"),
    ],
)
def test_bad_vector(vector, error, message):
    J = linear_operator(MATRIX).jacobian
    with pytest.raises(error, match=message):
        J @ vector


@pytest.mark.parametrize("shape", [(7,), (7, 2), (2, 3, 1)])
def test_bad_shape(shape):
    """SciPy's own words for `@`, from 1.18 on; ours for the methods."""
    J, x, got = linear_operator(MATRIX).jacobian, np.ones(shape), re.escape(f"got {shape}")
    for vectors, columns, n in ((J.matvec, J.matmat, 8), (J.rmatvec, J.rmatmat, 12)):
        message = rf"{vectors.__name__} of <12x8 .* takes arrays of shape \(.*{n}.*\), and {columns.__name__} columns "
        with pytest.raises(ValueError, match=message + rf"\({n}, k\); {got}"):
            vectors(x)
        with pytest.raises(ValueError, match=rf"{columns.__name__} of .* takes arrays of shape \(.*{n}, k\); {got}"):
            columns(x)
    with pytest.raises(ValueError, match=r"[Dd]imension mismatch.*8|takes arrays of shape \(8|expected 1-d"):
        J @ x


def test_products_are_counted_by_columns():
    F = linear_operator(MATRIX)
    assert F.n_products == 0
    F @ np.ones((8, 3))
    F.jacobian @ np.ones(8)
    assert F.n_products == F.jacobian.n_products == 3.5


def test_check_adjoint_can_fail():
    wrong = sla.LinearOperator((8, 8), matvec=lambda x: x, rmatvec=lambda x: 1.01 * x, dtype=float)
    with pytest.raises(AssertionError, match="but"):
        check_adjoint(wrong)


KINDS = [FisherOperator, JacobianOperator]
COPIES = {
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "pickle, protocol 0": lambda x: pickle.loads(pickle.dumps(x, 0)),
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
}


def products(operator):
    """Both products with a fixed block, and the dense matrix."""
    rng = np.random.default_rng(8)
    x, u = (rng.standard_normal((n, 3)).astype(operator.dtype) for n in reversed(operator.shape))
    return operator @ x, operator.H @ u, operator.to_dense()


def assert_same_bits(these, those):
    for this, that in zip(these, those, strict=True):
        assert this.dtype == that.dtype and np.array_equal(this, that)


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("engine", ["auto", "functional", "double_backward"])
@pytest.mark.parametrize("kind", KINDS)
def test_copies_have_the_same_bits(kind, engine, how):
    operator = kind(small_image(torch.float32), small_model(torch.float32), engine=engine, chunk_size=2)
    wanted = products(operator)  # which fills the cache of to_dense
    new = COPIES[how](operator)
    assert type(new) is kind and new is not operator and new.shape == operator.shape
    assert new.image_shape == operator.image_shape and new.response_shape == operator.response_shape
    assert new.linearization.chunk_size == 2
    assert new.linearization.engine_report[-1].split(":")[0] == operator.linearization.engine_report[-1].split(":")[0]
    assert_same_bits(products(new), wanted)
    if how != "copy":
        assert new.linearization is not operator.linearization
        assert new.linearization.model is not operator.linearization.model


@pytest.mark.parametrize("kind", KINDS)
def test_a_pickle_holds_the_image_and_the_model_alone(kind):
    image, model = torch.rand(40), nn.Linear(40, 30)
    operator = kind(image, model)
    before = len(pickle.dumps(operator))
    products(operator)
    assert len(pickle.dumps(operator)) == before < len(pickle.dumps((image, model))) + 1000
    J, F = pickle.loads(pickle.dumps((operator, operator)))
    assert J is F  # what is sent together arrives together
    F, J = pickle.loads(pickle.dumps((FisherOperator.from_linearization(operator.linearization), operator)))
    assert F.linearization is J.linearization


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("model", "named"),
    [
        (lambda x: x.sin(), "<lambda>"),
        (linear_model(MATRIX), "linear_model.<locals>.model"),
        (nn.Sequential(nn.Linear(8, 3), type("Local", (nn.Tanh,), {})()).double(), "Sequential"),
    ],
)
def test_a_model_that_cannot_be_pickled(kind, model, named, monkeypatch):
    for name in ("cloudpickle", "joblib.externals.cloudpickle"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    operator = kind(torch.ones(8).double(), model)
    message = (
        rf"the model {re.escape(named)} can't be pickled: .*Let it be an instance of a class, or a function, that is"
    )
    for thing in (operator, operator.linearization, {"it": operator}):
        with pytest.raises(pickle.PicklingError, match=message):
            pickle.dumps(thing)
    for new in (copy.deepcopy(operator), copy.copy(operator)):
        assert_same_bits(products(new), products(operator))
    assert_same_bits(products(kind.from_linearization(copy.copy(operator.linearization))), products(operator))


@pytest.mark.parametrize("kind", KINDS)
def test_cloudpickle_takes_what_pickle_refuses(kind):
    cloudpickle = pytest.importorskip("cloudpickle", reason="cloudpickle is an optional neighbour")
    weight = torch.rand(5, 8).double()
    operator = kind(torch.ones(8).double(), lambda x: (weight @ x).sin())
    assert_same_bits(products(pickle.loads(cloudpickle.dumps(operator))), products(operator))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_process_pool(kind):
    """Sent to another process and back, as an argument, in an algebraic expression and as a result."""
    operator = kind(small_image(torch.float32), small_model(torch.float32))
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert_same_bits(pool.submit(products, operator).result(), products(operator))
        assert_same_bits(pool.submit(copy.copy, operator).result() @ np.eye(48), operator @ np.eye(48))
        x = np.arange(48, dtype=np.float32)
        assert_same_bits([pool.submit((2 * operator).matvec, x).result()], [2 * (operator @ x)])
