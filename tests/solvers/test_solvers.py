import re
import sys

import numpy as np
import pytest
import scipy.sparse.linalg as sla
import torch
from helpers import (
    DEVICES,
    DTYPES,
    ITERATIVE,
    METHODS,
    SPECTRA,
    assert_truthful,
    linear_operator,
    matrices,
    small_image,
    small_model,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import fisherop.progress
from fisherop import ConvergenceError, FisherOperator, JacobianOperator, Status, eigenpairs
from fisherop.testing import matrix_with_singular_values

TOL = 1e-6


@pytest.mark.filterwarnings("ignore:J is zero")
@pytest.mark.parametrize("method", METHODS)
@given(
    matrix=matrices(), dtype=st.sampled_from(DTYPES), k=st.integers(1, 3), seed=st.integers(0, 2**32 - 1),
    which=st.sampled_from(["both", "largest", "smallest"]),
)  # fmt: skip
@settings(max_examples=60)
def test_right_or_raises(method, matrix, dtype, k, seed, which):
    n = matrix.shape[1]
    F = linear_operator(matrix, dtype)
    try:
        result = eigenpairs(F, min(k, n), which, method=method, tol=TOL, rng=seed, maxiter=500, progress=False)
        assert result.converged.all()
        expected = {"largest": min(k, n), "smallest": min(k, n), "both": min(2 * k, n)}[which]
        assert len(result.eigenvalues) == expected
    except ConvergenceError as error:
        assert method != "exact", error
        result = error.result
        assert result.method == method and "what was found is in the error's .result" in str(error)
    except ValueError as error:
        assert method != "exact" and "use method='exact'" in str(error)
        return
    assert_truthful(result, matrix)


ELSEWHERE_WRONG = {  # what has been seen of other tools, or of these by themselves, on singular values and k
    "eigsh finds 0 of 4 in 160,000 products": lambda: (np.r_[np.linspace(2, 1, 600), np.zeros(400)], 4),
    "propack says 0 where it is 0.01": lambda: (np.r_[np.linspace(0.94, 0.75, 299), 0.01], 1),
    "shifted eigsh, PRIMME miss the third of a null space": lambda: (SPECTRA["resnet18_maxpool_40"], 3),
    "eigsh with a large basis does not converge": lambda: (SPECTRA["vgg16_features11_40"], 3),
    "a criterion that is absolute stops at once": lambda: (1e-3 * SPECTRA["onoff_56"], 1),
    "power iteration calls 0.0083 the smallest": lambda: (SPECTRA["onoff_56"], 1),
    "power iteration calls 0.006 the smallest": lambda: (SPECTRA["luminance_gain_56"], 1),
    "members of a cluster of zeros are left out": lambda: (np.r_[np.linspace(3, 1, 20), np.zeros(40)], 5),
}


@pytest.mark.parametrize("method", ["golub_kahan", "eigsh", "lobpcg", "svds"])
@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[pytest.mark.slow] if "large basis" in case else []) for case in ELSEWHERE_WRONG],
)
def test_right_or_raises_where_others_fail(case, method):
    sigma, k = ELSEWHERE_WRONG[case]()
    tensor = torch.as_tensor(sigma)
    F = FisherOperator(torch.zeros(len(sigma), dtype=tensor.dtype), lambda x: tensor * x)
    limit = {} if method == "golub_kahan" else {"maxiter": 200}
    try:
        result = eigenpairs(F, k, method=method, rng=0, progress=False, **limit)
    except ConvergenceError as error:
        assert method != "golub_kahan", error
        result = error.result
    wrong = np.abs(result.eigenvalues - sigma[result.eigenindex] ** 2) > 2 * (2 * k) ** 0.5 * TOL * sigma[0] ** 2
    assert not (wrong & result.converged).any(), result


@pytest.mark.parametrize("method", ["golub_kahan", "eigsh", "lobpcg", "svds"])
def test_the_null_space_of_a_wide_jacobian(method):
    """svds by itself works on the smaller Gram matrix, and says 0.054 λ_max for a smallest eigenvalue of 0."""
    matrix = matrix_with_singular_values(np.linspace(1, 0.23, 40), 40, 120)
    result = eigenpairs(linear_operator(matrix, torch.float64), 1, method=method, rng=0, progress=False)
    assert_truthful(result, matrix)
    assert result.converged.all() and result.eigenvalues[-1] <= TOL


@pytest.mark.filterwarnings("ignore:J is zero")
@given(matrix=matrices(), dtype=st.sampled_from(DTYPES), k=st.integers(1, 3), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=60)
def test_randomized_svd_error_bound_holds(matrix, dtype, k, seed):
    k = min(k, *matrix.shape)
    F = linear_operator(matrix, dtype)
    try:
        result = eigenpairs(F, k, "largest", method="randomized_svd", rng=seed, progress=False)
    except ConvergenceError as error:
        result = error.result
    assert_truthful(result, matrix)
    top = np.linalg.svd(matrix)[1][0] ** 2
    assert result.lambda_max_bounds[1] >= top * (1 - 100 * np.finfo(F.dtype).eps)
    assert top == 0 or result.details["range_error"] >= 0  # where J is zero, nothing is searched


def test_randomized_svd_bounds_the_range_error():
    """On a slowly decaying spectrum, k + p = 7 of 40 directions miss at least σ₈."""
    matrix = matrix_with_singular_values(np.linspace(2, 1, 40), 60, 40)
    with pytest.raises(ConvergenceError, match="randomized_svd") as caught:
        eigenpairs(linear_operator(matrix), 2, "largest", method="randomized_svd", rng=0, progress=False)
    details = caught.value.result.details
    assert details["range_error"] >= np.linspace(2, 1, 40)[7]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", METHODS)
def test_nonlinear_model(method, device):
    F = FisherOperator(small_image(device=device), small_model(device=device))
    # the smallest are 2e-7 and 4e-7 of the largest: power iteration crawls, and ARPACK with fewer than N vectors
    tol = 1e-3 if method in ("power", "svds") else 1e-6
    result = eigenpairs(F, 2, method=method, rng=0, progress=False, tol=tol)
    assert_truthful(result, FisherOperator(small_image(), small_model()).jacobian.to_dense())
    assert result.converged.all()


@pytest.mark.parametrize("method", METHODS)
def test_same_seed_same_bits_and_global_seeds_untouched(method):
    matrix = matrix_with_singular_values(np.linspace(3, 1, 30), 40, 30)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
    first, second = (eigenpairs(linear_operator(matrix), method=method, rng=7, progress=False) for _ in range(2))
    assert np.array_equal(first.eigenvectors, second.eigenvectors)
    assert first.n_products == second.n_products
    assert torch.equal(states[0], torch.get_rng_state()) and states[1] == np.random.get_state()[1].tolist()  # noqa: NPY002


def test_signs_do_not_depend_on_the_method():
    F = linear_operator(matrix_with_singular_values(np.linspace(3, 1, 30), 40, 30))
    results = [eigenpairs(F, method=method, rng=i, progress=False).eigenvectors for i, method in enumerate(METHODS)]
    for vectors in results[1:]:
        np.testing.assert_allclose(vectors, results[0], atol=1e-4)
    assert (np.random.default_rng(2017).standard_normal(30) @ results[0] > 0).all()


@pytest.mark.parametrize("k", [1, 3])
def test_both_ends_of_a_jacobian_operator(k):
    matrix = matrix_with_singular_values(np.linspace(3, 1, 30), 40, 30)
    J = linear_operator(matrix).jacobian
    result = eigenpairs(J, k, rng=0, progress=False)
    assert list(result.eigenindex) == [*range(k), *range(30 - k, 30)]
    np.testing.assert_allclose(result.eigenvalues, np.linspace(3, 1, 30)[result.eigenindex] ** 2, rtol=1e-9)
    assert result.n_products == J.n_products


def test_exact_with_everything():
    matrix = matrix_with_singular_values([3, 2, 1], 5, 7)
    F = linear_operator(matrix)
    result = eigenpairs(F, 7, method="exact", progress=False)
    np.testing.assert_allclose(result.eigenvalues, [9, 4, 1, 0, 0, 0, 0], atol=1e-14)
    assert (result.status[3:] == Status.NULL).all() and result.lambda_max_bounds[1] == pytest.approx(9)
    np.testing.assert_allclose(F.jacobian.dense, matrix, atol=1e-14)
    with pytest.raises(
        ValueError, match=r"would take about .* GiB for a Jacobian of 5 × 7, over the limit of .*max_bytes="
    ):
        eigenpairs(F, method="exact", max_bytes=10, progress=False)


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("which", ["both", "largest", "smallest"])
@pytest.mark.parametrize("m", [1, 3, 10])
def test_few_responses_to_many_pixels(m, which, k):
    """As of a classifier: neither F nor a basis of its null space would fit."""
    n = 60_000
    matrix = np.random.default_rng(0).standard_normal((m, n))
    result = eigenpairs(FisherOperator.of(matrix), k, which, rng=0, progress=False)
    assert result.details["method"].startswith("exact" if m <= 100 * k else "golub_kahan")
    assert result.converged.all()
    v = result.eigenvectors
    np.testing.assert_allclose(v.T @ v, np.eye(v.shape[1]), atol=1e-12)
    truth = np.zeros(n)
    truth[:m] = np.linalg.svd(matrix, compute_uv=False) ** 2
    np.testing.assert_allclose(result.eigenvalues, truth[result.eigenindex], atol=1e-9 * truth[0])


def test_exact_keeps_the_jacobian_of_a_jacobian_operator():
    J = linear_operator(matrix_with_singular_values([3, 2, 1], 5, 7)).jacobian
    eigenpairs(J, method="exact", progress=False)
    assert J.dense is not None and J.fisher.jacobian is J


def test_listener_hears_everything():
    F = linear_operator(matrix_with_singular_values(np.linspace(3, 1, 30), 40, 30))
    heard = []
    F.linearization.on_product = heard.append
    result = eigenpairs(F, rng=0, progress=False)
    assert sum(heard) == result.n_products and F.linearization.on_product == heard.append


def test_own_solver():
    matrix = matrix_with_singular_values(np.linspace(3, 1, 30), 40, 30)

    def dense(operator, k, which, *, tol, maxiter, rng):
        assert isinstance(operator, FisherOperator) and isinstance(rng, np.random.Generator) and maxiter is None
        values, vectors = np.linalg.eigh(operator @ np.eye(30))
        kept = np.r_[29 : 29 - k : -1, k - 1 : -1 : -1]
        return values[kept], vectors[:, kept], {"by": "hand"}

    result = eigenpairs(linear_operator(matrix), 2, method=dense, rng=0, progress=False)
    assert result.converged.all() and result.method == "dense" and result.details == {"by": "hand"}
    assert_truthful(result, matrix)


def test_own_solver_of_no_signature():
    """As functions written in C may be; its name is no solver's of ours."""

    class Solver:
        __name__ = "exact"

        @property
        def __signature__(self):
            raise ValueError("no signature found")

        def __call__(self, operator, k, which, *, tol, maxiter, rng):
            v = np.linalg.eigh(operator @ np.eye(30))[1]
            return None, v[:, [29, 0]]

    F = linear_operator(matrix_with_singular_values(np.linspace(3, 1, 30), 40, 30))
    result = eigenpairs(F, method=Solver(), rng=0, state={})
    np.testing.assert_allclose(result.eigenvalues, [9, 1])


@pytest.mark.parametrize("column", [1, 15])
def test_own_solver_that_lies_is_found_out(column):
    """An eigenvector that isn't the extreme one, with a perfect residual; and a vector that is none."""
    matrix = matrix_with_singular_values(np.linspace(3, 1, 30), 40, 30)
    v = np.linalg.svd(matrix)[2].T

    def liar(operator, k, which, *, tol, maxiter, rng):
        return np.array([9.0, 1.0]), v[:, [column, 29 - column]], {"ground": "believe me"}

    with pytest.raises(ConvergenceError, match="not extreme"):
        eigenpairs(linear_operator(matrix), method=liar, rng=0, progress=False)

    def noise(operator, k, which, *, tol, maxiter, rng):
        return np.array([9.0, 1.0]), rng.standard_normal((30, 2))

    with pytest.raises(ConvergenceError, match="not converged") as caught:
        eigenpairs(linear_operator(matrix), method=noise, rng=0, progress=False)
    assert_truthful(caught.value.result, matrix)


def test_null_space_that_arpack_cannot_resolve_is_named():
    """A nullity of 3 looks like 1 to a single Krylov sequence; whatever eigsh makes of it, no claim is false."""
    matrix = matrix_with_singular_values(np.linspace(2, 1, 57), 80, 60)
    outcomes = set()
    for seed in range(10):
        try:
            result = eigenpairs(linear_operator(matrix), 3, method="eigsh", rng=seed, progress=False, ncv=12)
        except ConvergenceError as error:
            result = error.result
            if Status.NOT_EXTREME in result.status:
                assert "F has a null space or a repeated eigenvalue" in str(error) and "method='golub_kahan'" in str(
                    error
                )
                outcomes.add("named")
        assert_truthful(result, matrix)
    assert "named" in outcomes


def test_svds_where_m_is_less_than_n():
    """SciPy takes JJᵀ of J itself, and would return its smallest eigenvalue, 1, with a perfect residual."""
    matrix = matrix_with_singular_values(np.linspace(2, 1, 10), 10, 30)
    result = eigenpairs(linear_operator(matrix), method="svds", rng=0, progress=False)
    np.testing.assert_allclose(result.eigenvalues, [4, 0], atol=1e-9)


@pytest.mark.parametrize("method", ["eigsh", "svds"])
def test_arpack_without_convergence_keeps_the_largest_end(method):
    sigma = np.r_[9, 8, 10 ** -np.linspace(0, 4, 98)]  # gaps at the top, none at the bottom
    matrix = matrix_with_singular_values(sigma, 120, 100)
    with pytest.raises(ConvergenceError, match="ARPACK at the smallest end") as caught:
        eigenpairs(linear_operator(matrix), 2, method=method, rng=0, progress=False, maxiter=4, ncv=12, tol=1e-9)
    result = caught.value.result
    assert list(result.eigenindex[:2]) == [0, 1]
    assert_truthful(result, matrix)


@pytest.mark.parametrize("method", ["lobpcg", "power"])
def test_too_few_iterations_raise_or_warn(method):
    F = linear_operator(matrix_with_singular_values(10 ** -np.linspace(0, 4, 100), 120, 100))
    with pytest.raises(
        ConvergenceError, match=r"allow more iterations \(maxiter, in synthesize max_iter\), accept a larger tol"
    ) as caught:
        eigenpairs(F, method=method, rng=0, maxiter=3, progress=False)
    with pytest.warns(RuntimeWarning, match=f"method '{method}' did not reach tol=1e-06") as warning:
        result = eigenpairs(F, method=method, rng=0, maxiter=3, progress=False, on_failure="warn")
    assert warning[0].filename == __file__ and "error's .result" not in str(warning[0].message)
    assert np.array_equal(result.eigenvectors, caught.value.result.eigenvectors)


def test_float32_noise_is_named():
    F = linear_operator(matrix_with_singular_values(np.linspace(3, 1, 30), 40, 30), torch.float32)
    with pytest.raises(ConvergenceError, match="use a float64 image and model"):
        eigenpairs(F, method="lobpcg", tol=1e-8, rng=0, maxiter=50, progress=False)


def test_preconditioner_of_lobpcg():
    sigma = 10 ** -np.linspace(0, 2, 60)
    matrix = np.diag(sigma)
    F = linear_operator(matrix)
    plain = eigenpairs(F, method="lobpcg", rng=0, tol=1e-6, progress=False)
    helped = eigenpairs(
        F, method="lobpcg", rng=0, tol=1e-6, progress=False, preconditioner=sla.aslinearoperator(np.diag(sigma**-2.0))
    )
    assert helped.n_products < plain.n_products


def test_power_makes_one_product_an_iteration():
    F = linear_operator(matrix_with_singular_values(np.linspace(3, 1, 30), 40, 30))
    with pytest.raises(ConvergenceError) as caught:
        eigenpairs(F, method="power", rng=0, maxiter=20, progress=False)
    certificate = 1 + 2 + 2 + 28  # rotation, residuals, noise, probe
    assert caught.value.result.n_products == 2 * 20 + certificate


@pytest.mark.parametrize("method", ITERATIVE)
def test_progress_bar_counts_products(method, capsys, monkeypatch):
    at_once = {"delay": 0, "mininterval": 0}
    monkeypatch.setattr(fisherop.progress, "tqdm", lambda **kw: tqdm_now(**(kw | at_once)))
    F = linear_operator(matrix_with_singular_values(np.linspace(3, 1, 30), 40, 30))
    result = eigenpairs(F, method=method, rng=0)
    last = capsys.readouterr().err.strip().split("\r")[-1]
    assert f"{method}: {result.n_products:.1f} products" in last
    if method == "golub_kahan":  # which tells what each end lacks
        assert re.search(r"residual / λ_max: largest \de[+-]\d\d, smallest \de[+-]\d\d \(tol 1e-06\)", last)
    eigenpairs(F, method=method, rng=0, progress=False)
    assert capsys.readouterr().err == ""
    assert F.linearization.on_product is None


def tqdm_now(**kwargs):
    from tqdm import tqdm

    return tqdm(**kwargs)


SQUARE = matrix_with_singular_values(np.linspace(3, 1, 8), 8, 8)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"k": 0}, ValueError, "k must be an integer from 1 to N = 8, got 0"),
        ({"k": 9}, ValueError, "k must be an integer from 1 to N = 8, got 9"),
        ({"k": 1.0}, TypeError, r"k must be an integer from 1 to N = 8, got 1\.0"),
        ({"which": "LM"}, ValueError, "which must be one of 'both', 'largest', 'smallest', got 'LM'"),
        ({"tol": 0}, ValueError, "tol must be a number between 0 and 1, .*, got 0"),
        ({"maxiter": 0}, ValueError, "maxiter must be an integer from 1 to 2147483647, or None, got 0"),
        ({"on_failure": "ignore"}, ValueError, "on_failure must be one of 'raise', 'warn', got 'ignore'"),
        ({"method": "arpack"}, ValueError, "method must be one of 'auto', .* or a callable, got 'arpack'"),
        ({"p": 3}, TypeError, "method 'golub_kahan' has no option 'p'; its options: basis_memory, callback, max_basis"),
        ({"method": "power", "ncv": 3}, TypeError, "method 'power' has no option 'ncv'; its options: none"),
        ({"k": 5, "method": "eigsh"}, ValueError, r"k=5 at both ends needs 2 k ≤ N = 8: use method='exact', or"),
        ({"k": 8, "which": "largest", "method": "eigsh"}, ValueError, "needs k < N, got k=8 and N=8: use"),
        ({"k": 2, "method": "lobpcg"}, ValueError, "method='lobpcg' needs 5 k ≤ N, got k=2 and N=8: use"),
        ({"k": 8, "which": "largest", "method": "svds"}, ValueError, "needs k < N, got k=8 and N=8: use"),
        ({"method": "randomized_svd"}, ValueError, "finds the largest end only, got which='both': use"),
        ({"method": "randomized_svd", "which": "largest", "q": -1}, ValueError, "q must be an integer from 0, got -1"),
        ({"method": lambda F, k, which, **kw: (0, np.ones((8, 1)))}, ValueError, r"got ndarray of shape \(8, 1\)"),
        ({"method": lambda F, k, which, **kw: (0, np.full((8, 2), np.nan))}, ValueError, "it holds NaN or infinity"),
    ],
)  # fmt: skip
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        eigenpairs(linear_operator(SQUARE), progress=False, **arguments)


def test_primme_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "primme", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'fisherop\[primme\]'"):
        eigenpairs(linear_operator(SQUARE), method="primme", progress=False)


def test_bad_operator():
    with pytest.raises(TypeError, match="operator must be a FisherOperator or a JacobianOperator, got ndarray"):
        eigenpairs(SQUARE)
    wide = JacobianOperator(torch.ones(4).double(), lambda x: x[:2])
    with pytest.raises(ValueError, match=r"needs k ≤ min\(M, N\), got k=3 and J of 2 × 4"):
        eigenpairs(wide, 3, "largest", method="randomized_svd", progress=False)
