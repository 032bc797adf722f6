"""The spectral density against all eigenvalues: quadrature bounds what it says, and bands hold as often as they say."""

import json

import numpy as np
import pytest
import torch
from helpers import SPECTRA, diagonal, linear_operator
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fisherop import Eigendistortion, FisherOperator, eigenpairs, files, noise, plot, spaces, spectral_density
from fisherop.density import Quadrature
from fisherop.jacobian import OfModel, Transposed
from fisherop.krylov.lanczos import LanczosFactorization
from fisherop.testing import linear_model, matrix_with_singular_values

THRESHOLDS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-6)


def quantities(density):
    """Every number that has a band, with what is true of descending eigenvalues."""
    found = {
        "trace": (density.trace_of(lambda x: x), lambda x: x.sum()),
        "effective_dimension": (density.effective_dimension, lambda x: x.sum() / x[0]),
        "participation_ratio": (density.participation_ratio, lambda x: x.sum() ** 2 / (x**2).sum()),
        "fourth moment": (density.trace_of(lambda x: x**2), lambda x: (x**2).sum()),
    }
    for t in THRESHOLDS:
        found[f"below {t:.0e}"] = density.count_below(t), lambda x, t=t: (x < t * x[0]).sum()
    for eps in (1e-1, 1e-2, 1e-3):
        found[f"log det {eps:.0e}"] = density.log_det(eps), lambda x, eps=eps: np.log(x / x[0] + eps).sum()
    places = np.array([-0.5, -1.0, -2.0, -3.0])
    for place, *rest in zip(places, *density.density(places), strict=True):
        value, low, high = rest

        def truth(x, place=place):
            with np.errstate(divide="ignore"):
                away = (np.log10(x / x[0]) - place) / 0.25
            return np.exp(-(away**2) / 2).sum() / (0.25 * np.sqrt(2 * np.pi))

        found[f"density at {place}"] = (value, 0.0, low, high), truth
    return found


def spectrum_of(matrix):
    sigma = np.linalg.svd(matrix, compute_uv=False)
    values = np.zeros(matrix.shape[1])
    values[: len(sigma)] = sigma**2
    return values


@given(
    m=st.integers(1, 30), n=st.integers(1, 30), decades=st.floats(0, 4), scale=st.floats(-20, 20),
    seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
@settings(max_examples=25)
def test_small_operators_are_exact(m, n, decades, scale, seed):
    matrix = matrix_with_singular_values(10.0 ** (scale - np.linspace(0, decades, min(m, n))), m, n, rng=seed)
    density = spectral_density(linear_operator(matrix), rng=seed, progress=False)
    truth = spectrum_of(matrix)
    assert density.is_exact and density.n_zeros == max(n - m, 0) and "all its eigenvalues" in str(density)
    for name, ((value, _, low, high), exact) in quantities(density).items():
        if name.startswith("below") and any(abs(truth / truth[0] / float(name[6:]) - 1) < 1e-9):
            continue
        np.testing.assert_allclose([value, low, high], exact(truth), rtol=1e-8, atol=1e-8 * truth[0], err_msg=name)
    assert density.trace_error == 0


@given(
    n=st.integers(3, 60), steps=st.integers(1, 20), b=st.integers(1, 3), decades=st.floats(0, 8),
    kind=st.sampled_from(["spread", "null", "cluster"]), seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
@example(n=8, steps=4, b=2, decades=8.0, kind="spread", seed=0)
def test_quadrature_bounds_the_spectral_measure(n, steps, b, decades, kind, seed):
    """That of the very vectors that a run started from: no chance in it."""
    rng = np.random.default_rng(seed)
    sigma = 10.0 ** -np.sort(rng.uniform(0, decades, n))
    if kind == "null":
        sigma[n // 2 :] = 0
    elif kind == "cluster":
        sigma[n // 3 :] = sigma[n // 3]
    J = OfModel(diagonal(sigma).linearization)
    b = min(b, n)
    fact = LanczosFactorization(J, torch.empty(0, n, dtype=torch.float64), torch.empty(n, n, dtype=torch.float64))
    v = rng.standard_normal((b, n))
    fact.extend(torch.as_tensor(v))
    while fact.m + b <= min(n, b * steps) and not fact.is_exhausted:
        fact.expand()
    if fact.m < b:
        return
    values = sigma**2
    for run, one in zip(fact.quadratures(b), v / np.linalg.norm(v, axis=1)[:, None], strict=True):
        assert_bounded(run, one, values)


# of shares, where x is next to a node, or eigenvalues lie 10⁻¹⁰ λ_max apart, whose vectors rounding mixes
ROUNDING = 1e-5


def assert_bounded(run, v, values):
    np.testing.assert_allclose((run.start**2).sum(), 1, rtol=1e-9)
    thresholds = np.geomspace(1e-10, 2, 15) * values[0]
    truth = np.array([(v[values < x] ** 2).sum() for x in thresholds])
    for x, share in zip(thresholds, truth, strict=True):
        low, high = run.shares_below(x)
        assert low - ROUNDING <= share <= high + ROUNDING
    wide = run.curves_below(thresholds)
    assert (wide[0] - ROUNDING <= truth).all() and (truth <= wide[1] + ROUNDING).all()
    assert (wide[0] <= [run.shares_below(x)[0] + ROUNDING for x in thresholds]).all()
    for eps in (1e-1, 1e-3):
        exact = v**2 @ np.log(values / values[0] + eps)
        nodes, weights = run.gauss()
        above = weights @ np.log(nodes / values[0] + eps)
        nodes, weights, at_zero = run.radau(0.0)
        below = weights @ np.log(nodes.clip(0) / values[0] + eps) + at_zero * np.log(eps)
        assert below - 1e-8 <= exact <= above + 1e-8
    degree = min(2 * run.nodes.size - 1, 4)
    np.testing.assert_allclose(run.gauss()[1] @ run.nodes**degree, v**2 @ values**degree, rtol=1e-8)


def covered(name, n_probes, n_steps, seeds):
    """How often each band holds."""
    truth = np.sort(SPECTRA[name].astype(np.float64) ** 2)[::-1]
    operator = diagonal(torch.as_tensor(SPECTRA[name]))
    hits = {}
    for seed in range(seeds):
        density = spectral_density(operator, n_probes, n_steps, rng=seed, progress=False)
        assert not density.is_exact
        for quantity, ((_, _, low, high), exact) in quantities(density).items():
            slack = 1e-9 * abs(exact(truth)) + 1e-6  # of a density's tail
            hits.setdefault(quantity, []).append(low - slack <= exact(truth) <= high + slack)
    return {quantity: np.mean(held) for quantity, held in hits.items()}


@pytest.mark.slow
@pytest.mark.parametrize("n_probes", [1, 3, 10])
@pytest.mark.parametrize("name", SPECTRA)
def test_bands_hold(name, n_probes):
    """In 95 % of runs, as 200 of them can tell."""
    rates = covered(name, n_probes, 30, 200)
    assert min(rates.values()) >= 0.93, rates


def test_bands_hold_in_a_few_runs():
    assert min(covered("onoff_56", 2, 20, 30).values()) >= 0.8


def test_what_searches_give_for_nothing():
    """One random vector's bands, of the products that were done."""
    name = "resnet18_maxpool_40"
    truth = np.sort(SPECTRA[name].astype(np.float64) ** 2)[::-1]
    held = []
    for seed in range(10):
        F = diagonal(torch.as_tensor(SPECTRA[name]))
        result = eigenpairs(F, method="golub_kahan", tol=1e-4, rng=seed, progress=False)
        assert result.density.n_probes == 1 and result.density.n_products == result.n_products
        for (_, _, low, high), exact in quantities(result.density).values():
            held.append(low - 1e-6 <= exact(truth) <= high + 1e-6)
    assert np.mean(held) >= 0.85
    assert eigenpairs(F, method="eigsh", which="largest", tol=1e-2, progress=False).density is None
    given_start = eigenpairs(F, method="golub_kahan", tol=1e-2, rng=0, v0=np.ones(4800), progress=False)
    assert given_start.density is None


def test_what_a_restart_loses():
    F = diagonal(SPECTRA["onoff_56"])
    result = eigenpairs(F, method="golub_kahan", rng=0, max_basis=40, progress=False)
    assert result.details["restarts"] > 0 and result.density is None


def test_a_search_of_many_vectors_and_scales():
    sigma = np.r_[np.geomspace(1, 1e-2, 150), np.zeros(100)] * 1e-70
    result = eigenpairs(diagonal(sigma), 3, method="golub_kahan", rng=0, progress=False)
    density = result.density
    assert abs(density.trace / (sigma**2).sum() - 1) < 4 * density.trace_error / density.trace
    low, high = density.count_below(1e-6)[2:]
    assert low <= 100 <= high


def test_it_is_saved_with_the_rest(tmp_path):
    model = linear_model(matrix_with_singular_values(np.geomspace(1, 1e-2, 60), 60, 60))
    image = torch.zeros(60, dtype=torch.float64)
    ed = Eigendistortion(image, model).synthesize(method="golub_kahan", rng=0, progress=False)
    ed.save(tmp_path / "ed.npz")
    again = Eigendistortion.from_file(tmp_path / "ed.npz", model)
    assert str(again.result.density) == str(ed.result.density)
    assert again.result.density.count_below(1e-2) == ed.result.density.count_below(1e-2)


@pytest.mark.parametrize(
    "damage", [3, [3], None, [{"nodes": [1.0]}], [{"nodes": [], "start": [], "residuals": [], "noise": 0}]]
)
def test_a_damaged_file(tmp_path, damage):
    model = linear_model(matrix_with_singular_values(np.geomspace(1, 1e-2, 60), 60, 60))
    ed = Eigendistortion(torch.zeros(60, dtype=torch.float64), model)
    ed.synthesize(method="golub_kahan", rng=0, progress=False).save(tmp_path / "ed.npz")
    fields = files.read(tmp_path / "ed.npz")
    details = json.loads(fields["details"].item()) | {"quadrature": damage}
    del fields["versions"]
    files.write(tmp_path / "ed.npz", fields | {"details": json.dumps(details)})
    with pytest.raises(ValueError, match="is damaged or was altered: its details can't be right"):
        Eigendistortion.from_file(tmp_path / "ed.npz", model)


def test_few_responses():
    """M < N: the vectors are responses, N − M zeros are exact."""
    matrix = matrix_with_singular_values(np.geomspace(1, 0.1, 700), 700, 2000)
    density = spectral_density(linear_operator(matrix), 5, 20, rng=0, progress=False)
    assert not density.is_exact and density.n_zeros == 1300 and density.n_products <= 102
    truth = spectrum_of(matrix)
    for name, ((_, error, low, high), exact) in quantities(density).items():
        assert low - 3 * error <= exact(truth) <= high + 3 * error, name
    assert density.count_below(1e-4).low >= 1300


def test_until_the_trace_is_near_enough():
    F = diagonal(np.geomspace(1, 1e-2, 1200))
    few, many = (spectral_density(F, 2, 4, rng=0, rtol=rtol, progress=False) for rtol in (0.5, 0.02))
    assert few.n_probes == 2 < many.n_probes
    assert many.trace_error <= 0.02 * many.trace and not many.is_exact
    assert spectral_density(F, 2, 4, rng=0, rtol=1e-5, progress=False).is_exact


def test_rounding_of_float32_is_in_the_band_of_a_count():
    matrix = matrix_with_singular_values(np.r_[np.geomspace(1, 0.1, 500), np.full(500, 1e-5)], 1000, 1000)
    F = linear_operator(matrix, torch.float32)
    density = spectral_density(F, 2, 60, rng=0, progress=False)
    _, _, low, high = density.count_below(1e-9)  # 500, and none below 1e-11: products can't tell
    assert low == 0 and high > 500
    assert density.count_below(1e-3).low > 400


def test_with_noise_subspaces_and_many_images():
    several = list(torch.rand(3, 1, 1, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    A = torch.as_tensor(matrix_with_singular_values(np.geomspace(1, 0.1, 30), 40, 30))
    options = {"noise": noise.Poisson(), "subspace": spaces.zero_mean()}
    F = FisherOperator.pooled(several, lambda x: torch.exp(A @ x.flatten()), **options)
    density = spectral_density(F, rng=0, progress=False)
    np.testing.assert_allclose(density.trace, np.trace(F @ np.eye(29)), rtol=1e-9)


def test_a_zero_jacobian_and_arguments():
    density = spectral_density(diagonal(np.zeros(5)), progress=False)
    assert density.is_exact and density.trace == 0 and density.effective_dimension.value == 0
    assert density.count_below(1e-3)[0] == 5 and density.participation_ratio.value == 0
    with pytest.raises(ValueError, match=r"J is zero, so that F / λ_max is not defined"):
        density.log_det(0.1)
    with pytest.raises(ValueError, match="J is zero, so that there is no spectrum to draw"):
        plot.density(density)
    F = diagonal(np.ones(5))
    for options, message in (
        ({"n_probes": 0}, "n_probes must be an integer from 1, got 0"),
        ({"n_steps": 1}, "n_steps must be an integer from 2, got 1"),
        ({"rtol": 1e-9, "operator": diagonal(np.geomspace(1, 1e-2, 20_000))}, "takes about .* random vectors"),
        ({"rtol": 0}, "rtol must be a number between 0 and 1, or None, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            spectral_density(**{"operator": F, "progress": False, "n_steps": 2} | options)
    with pytest.raises(TypeError, match="operator must be a FisherOperator or a JacobianOperator"):
        spectral_density(np.eye(3))
    density = spectral_density(F.jacobian, progress=False)
    for call, message in (
        (lambda: density.count_below(0), "threshold must be a number above 0, got 0"),
        (lambda: density.log_det(-1), "epsilon must be a number above 0, got -1"),
        (lambda: density.density([0.0], width=0), "width must be a number from 0.01 to 10, got 0"),
        (lambda: density.density([400.0]), "decades must be numbers from −300 to 300"),
        (lambda: density.trace_of(lambda x: np.ones(9)), r"what function gives must be an array of shape \(5,\)"),
        (lambda: Quadrature([1.0], [1.0, 2.0], [0.0], 0.0), "start must be an array of shape"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("scale", [1e-100, 1e-40, 1e70])
def test_scales(scale):
    sigma = np.geomspace(1, 1e-2, 900)
    one, other = (spectral_density(diagonal(s * sigma), 2, 10, rng=0, progress=False) for s in (1.0, scale))
    np.testing.assert_allclose(other.trace / scale**2, one.trace, rtol=1e-9)
    for quantity, (estimate, _) in quantities(one).items():
        if quantity not in ("trace", "fourth moment"):
            np.testing.assert_allclose(quantities(other)[quantity][0], estimate, rtol=1e-6, atol=1e-9, err_msg=quantity)
    assert str(other).splitlines()[4:] == str(one).splitlines()[4:]


SKEWED = {
    "spike": np.r_[1.0, np.full(399, 1e-4)],
    "inverse": 1 / np.arange(1.0, 401),
    "inverse squares": np.arange(1.0, 401) ** -2.0,
    "a null space": np.r_[np.logspace(0, -2, 300), np.zeros(100)],
    "few large": np.r_[np.ones(3), np.full(397, 1e-3)],
}


@pytest.mark.parametrize("n_probes", [1, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", SKEWED)
def test_bands_of_skewed_spectra(name, n_probes):
    """Where one eigenvalue holds most of the trace, a low draw looks certain; the logarithm of a null space."""
    values, hits = SKEWED[name], {}
    operator = diagonal(np.sqrt(values))
    for seed in range(100):
        density = spectral_density(operator, n_probes, 12, rng=seed, progress=False)
        found = {"trace": density.trace_of(lambda x: x), "log det": density.log_det(1e-8)}
        found |= {"effective": density.effective_dimension, "participation": density.participation_ratio}
        found["density"] = [0.0, 0.0, *np.ravel(density.density([0.0])[1:])]
        places = {"log det": np.log(values / values[0] + 1e-8).sum(), "effective": values.sum() / values[0]}
        places |= {"trace": values.sum(), "participation": values.sum() ** 2 / (values**2).sum()}
        with np.errstate(divide="ignore"):
            places["density"] = (np.exp(-((np.log10(values) / 0.25) ** 2) / 2) / (0.25 * np.sqrt(2 * np.pi))).sum()
        for quantity, truth in places.items():
            _, _, low, high = found[quantity]
            hits.setdefault(quantity, []).append(low - 1e-9 * abs(truth) <= truth <= high + 1e-9 * abs(truth))
    assert min(np.mean(held) for held in hits.values()) >= 0.9, {name: np.mean(held) for name, held in hits.items()}


def test_the_same_seed_gives_the_same_bits():
    F = diagonal(np.geomspace(1, 1e-2, 2000))
    one, other = (spectral_density(F, 2, 10, rng=3, progress=False) for _ in range(2))
    assert one.trace == other.trace and Transposed(F.products).shape == (2000, 2000)


def test_figure():
    densities = [spectral_density(diagonal(np.geomspace(1, 1e-3, n)), 2, 10, rng=0, progress=False) for n in (40, 900)]
    figure = plot.density(densities, ["small", "large"])
    _, below = figure.axes
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["small, N = 40", "large, N = 900"]
    counts = below.lines[0].get_ydata()
    assert counts[-1] == 39 and (np.diff(counts) >= 0).all()  # all but the largest itself
    with pytest.raises(ValueError, match="names must be a text for each of the 2 densities"):
        plot.density(densities, ["one"])
