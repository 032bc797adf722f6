"""Subspaces and metrics: their bases against dense definitions, the extremes of F within them against dense truth."""

import itertools
import pickle

import numpy as np
import pytest
import scipy.linalg
import torch
from helpers import DTYPES
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.linalg import LinearOperator

from fisherop import (
    ConvergenceError,
    Eigendistortion,
    FisherOperator,
    JacobianOperator,
    eigenpairs,
    images,
    models,
    noise,
    spaces,
)
from fisherop.basis import Basis
from fisherop.testing import check_adjoint, matrix_with_singular_values

FLOAT64 = torch.float64
GREY, COLOUR = (1, 1, 6, 5), (1, 3, 4, 6)
DISC = np.hypot(*np.mgrid[-2:2:6j, -2:2:5j]) < 2.1
CORNER = np.arange(24).reshape(4, 6) % 5 < 3
SOFT = np.clip(np.linspace(-0.3, 1.2, 24).reshape(4, 6), 0, 1)
LUMA, OPPONENT = [0.299, 0.587, 0.114], [1.0, -1.0, 0.0]


def dense(basis):
    return basis.jvp(torch.eye(basis.shape[1], dtype=basis.dtype, device=basis.device)).T.double().numpy()


def fourier_projection(shape, low, high):
    """On all waves within a band, by the complex transform."""
    height, width = shape[-2:]
    f = np.hypot(np.fft.fftfreq(height, 1 / height)[:, None], np.fft.fftfreq(width, 1 / width))
    within = (f >= low - 1e-9) & (f <= high + 1e-9)
    images = np.eye(int(np.prod(shape))).reshape(-1, *shape)
    filtered = np.fft.ifft2(np.fft.fft2(images) * within).real
    return filtered.reshape(len(images), -1)


def channel_projection(shape, weights):
    q = np.linalg.qr(np.atleast_2d(weights).T)[0]
    images = np.eye(int(np.prod(shape))).reshape(-1, *shape)
    return np.einsum("...chw,dc->...dhw", images, q @ q.T).reshape(len(images), -1)


def mask_projection(shape, weights):
    return np.diag(np.broadcast_to(weights > 0, shape).ravel().astype(float))


def mean_projection(shape):
    n = int(np.prod(shape))
    return np.eye(n) - 1 / n


CASES = {  # an image's shape, a space, the projections whose product is that on it
    "mask": (GREY, spaces.mask(DISC), [mask_projection(GREY, DISC)]),
    "mask of booleans in colour": (COLOUR, spaces.mask(CORNER), [mask_projection(COLOUR, CORNER)]),
    "mask of one channel": (
        COLOUR, spaces.mask(np.arange(72).reshape(3, 4, 6) < 20), [np.diag((np.arange(72) < 20).astype(float))],
    ),
    "two masks": (GREY, spaces.mask(DISC) * spaces.mask(DISC[::-1]), [mask_projection(GREY, DISC * DISC[::-1])]),
    "low-pass": (GREY, spaces.bandpass((6, 5), 0, 2), [fourier_projection(GREY, 0, 2)]),
    "band-pass in colour": (COLOUR, spaces.bandpass(COLOUR, 1, 2.5), [fourier_projection(COLOUR, 1, 2.5)]),
    "all frequencies": (COLOUR, spaces.bandpass((4, 6), 0, 9), [np.eye(72)]),
    "odd sizes": ((5, 7), spaces.bandpass((5, 7), 0, 2), [fourier_projection((5, 7), 0, 2)]),
    "bands": (
        GREY, spaces.bandpass((6, 5), 0, 2) * spaces.bandpass((6, 5), 1, 3), [fourier_projection(GREY, 1, 2)],
    ),
    "luma": (COLOUR, spaces.channels(LUMA), [channel_projection(COLOUR, LUMA)]),
    "two colours": (COLOUR, spaces.channels([LUMA, OPPONENT]), [channel_projection(COLOUR, [LUMA, OPPONENT])]),
    "zero mean": (GREY, spaces.zero_mean(), [mean_projection(GREY)]),
    "mask, luma": (
        COLOUR, spaces.mask(CORNER) * spaces.channels(LUMA),
        [mask_projection(COLOUR, CORNER), channel_projection(COLOUR, LUMA)],
    ),
    "band, opponent": (
        COLOUR, spaces.channels(OPPONENT) * spaces.bandpass((4, 6), 0, 2),
        [fourier_projection(COLOUR, 0, 2), channel_projection(COLOUR, OPPONENT)],
    ),
    "band, zero mean": (
        GREY, spaces.zero_mean() * spaces.bandpass((6, 5), 0, 2),
        [mean_projection(GREY), fourier_projection(GREY, 0, 2)],
    ),
    "opponent, zero mean": (
        COLOUR, spaces.channels(OPPONENT) * spaces.zero_mean(), [channel_projection(COLOUR, OPPONENT)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", list(CASES))
def test_bases_of_subspaces(case, dtype):
    shape, space, projections = CASES[case]
    basis = Basis(torch.zeros(shape, dtype=dtype), space, None)
    B = dense(basis)
    tol = 1e-13 if dtype == FLOAT64 else 3e-6
    np.testing.assert_allclose(B.T @ B, np.eye(B.shape[1]), atol=tol)
    np.testing.assert_allclose(B @ B.T, np.linalg.multi_dot([*projections, np.eye(len(B))]), atol=tol)
    check_adjoint(JacobianOperator.of(basis))
    same = pickle.loads(pickle.dumps(basis))
    np.testing.assert_array_equal(dense(same), B)


def test_zero_mean_within_a_mask_is_the_intersection():
    """Their projections do not commute."""
    B = dense(Basis(torch.zeros(GREY, dtype=FLOAT64), spaces.mask(DISC) * spaces.zero_mean(), None))
    np.testing.assert_allclose(B.sum(axis=0), 0, atol=1e-14)
    assert B.shape[1] == DISC.sum() - 1 and not B[~DISC.ravel()].any()
    np.testing.assert_allclose(B.T @ B, np.eye(B.shape[1]), atol=1e-13)


def test_soft_weights():
    """A change counts as 1 / weight of its size."""
    B = dense(Basis(torch.zeros(COLOUR, dtype=FLOAT64), spaces.mask(SOFT) * spaces.channels(LUMA), None))
    expected = channel_projection(COLOUR, LUMA) @ np.diag(np.broadcast_to(SOFT, COLOUR).ravel() ** 2)
    np.testing.assert_allclose(B @ B.T, expected, atol=1e-14)
    B = dense(Basis(torch.zeros(COLOUR, dtype=FLOAT64), spaces.mask(SOFT) * spaces.zero_mean(), None))
    np.testing.assert_allclose(B.sum(axis=0), 0, atol=1e-13)


@given(p=st.integers(1, 5), seed=st.integers(0, 2**32 - 1), columns=st.booleans())
@settings(max_examples=20)
def test_span(p, seed, columns):
    images = np.random.default_rng(seed).standard_normal((p, *GREY))
    given = images.reshape(p, -1).T if columns else images
    B = dense(Basis(torch.zeros(GREY, dtype=FLOAT64), spaces.span(given), None))
    A = images.reshape(p, -1).T
    np.testing.assert_allclose(B @ B.T, A @ np.linalg.pinv(A), atol=1e-10)
    inside = images * DISC
    B = dense(Basis(torch.zeros(GREY, dtype=FLOAT64), spaces.span(inside) * spaces.mask(DISC), None))
    A = inside.reshape(p, -1).T
    np.testing.assert_allclose(B @ B.T, A @ np.linalg.pinv(A), atol=1e-10)


def gain(shape):
    """A positive weight of each frequency, and its operator W^(-1/2)."""
    height, width = shape[-2:]
    f = np.hypot(np.fft.fftfreq(height, 1 / height)[:, None], np.fft.fftfreq(width, 1 / width))
    root = 1 / (0.5 + f)
    n = int(np.prod(shape))

    def apply(x):
        return np.fft.ifft2(np.fft.fft2(x.reshape(shape)) * root).real.ravel()

    return LinearOperator((n, n), apply, rmatvec=apply, dtype=float)


def metrics(shape):
    n = int(np.prod(shape))
    pixels = np.linspace(0.5, 3, n).reshape(shape)
    return {
        "none": (None, np.eye(n)),
        "pixels": (pixels, np.diag(pixels.ravel())),
        "of the last dimensions": (pixels[0, 0], np.diag(np.broadcast_to(pixels[0, 0], shape).ravel())),
        "frequencies": (gain(shape), np.linalg.inv(gain(shape) @ gain(shape).H @ np.eye(n))),
    }


def response(shape):
    n = int(np.prod(shape))
    matrix = torch.as_tensor(matrix_with_singular_values(np.geomspace(3, 0.05, n), n + 7, n))

    def model(x):
        return torch.tanh(matrix.to(x) @ x.flatten()) + 1.2

    return model


WITH_METRIC = [(c, m) for c, m in itertools.product(CASES, metrics(GREY)) if "odd" not in c]


@pytest.mark.parametrize(("case", "metric"), WITH_METRIC)
def test_both_ends_within_a_subspace_in_a_metric(case, metric):
    """Against scipy.linalg.eigh of the dense F and W on an orthonormal basis of the subspace."""
    shape, space, _ = CASES[case]
    given, W = metrics(shape)[metric]
    x = torch.linspace(-1, 1, int(np.prod(shape)), dtype=FLOAT64).reshape(shape)
    model = response(shape)
    if metric == "frequencies" and ("mask" in case):
        with pytest.raises(ValueError, match="metric does not map the subspace to itself"):
            FisherOperator(x, model, subspace=space, metric=given)
        return
    F = FisherOperator(x, model, noise=noise.Poisson(), subspace=space, metric=given)
    S = np.diag(model(x).numpy() ** -0.5)
    J = S @ torch.func.jacrev(model)(x).reshape(-1, x.numel()).numpy()
    B = dense(Basis(x, space, None))
    truth = scipy.linalg.eigh(B.T @ J.T @ J @ B, B.T @ W @ B, eigvals_only=True)
    result = eigenpairs(F, method="golub_kahan", tol=1e-9, rng=0, progress=False)
    np.testing.assert_allclose(result.eigenvalues, truth[[-1, 0]], atol=1e-8 * truth[-1])
    for v, value in zip(F.to_tensors(result.eigenvectors), result.eigenvalues, strict=True):
        v = v.numpy().ravel()
        np.testing.assert_allclose(v @ W @ v, 1, rtol=1e-9)
        np.testing.assert_allclose(B @ (B.T @ v), v, atol=1e-9)
        np.testing.assert_allclose(v @ J.T @ J @ v, value, rtol=1e-8)


def test_masking_needs_no_masked_model():
    """A mask inside the model puts the least noticeable distortion outside the aperture."""
    x = torch.linspace(0.1, 1, 30, dtype=FLOAT64).reshape(GREY)
    ed = Eigendistortion(x, response(GREY), subspace=spaces.mask(DISC)).synthesize(progress=False, rng=0)
    outside = ed.eigendistortions[..., torch.as_tensor(~DISC)]
    assert outside.abs().max() == 0 and ed.result.image_size == DISC.sum()
    np.testing.assert_allclose(ed.eigendistortions.flatten(1).norm(dim=1), 1)
    amplitudes, rms = ed.detection_thresholds()
    np.testing.assert_allclose(rms, amplitudes / 30**0.5)
    predicted, actual = ed.response_change(-1, 1e-4)
    np.testing.assert_allclose(actual, predicted, rtol=1e-3)


def test_on_off_finds_no_minimum_on_the_edge_of_an_aperture():
    """Of a photograph in an aperture on grey. A mask in the model puts all of it outside, one of soft edge there."""
    on_off = models.OnOff().double().eval()
    radius = np.hypot(*np.mgrid[-1:1:32j, -1:1:32j])
    disc, edge = radius < 0.7, (radius < 0.7) & (radius > 0.58)
    patch = images.photograph(as_gray=True, dtype=FLOAT64)[..., 110:366:8, 130:386:8]
    x = torch.where(torch.as_tensor(disc), patch, 0.5)
    ed = Eigendistortion(x, on_off, subspace=spaces.mask(disc)).synthesize(progress=False, rng=0)
    shares = ed.eigendistortions[:, 0].numpy() ** 2
    np.testing.assert_allclose(shares[:, disc].sum(axis=1), 1)
    assert (shares[:, edge].sum(axis=1) < edge.sum() / disc.sum()).all()
    within = Eigendistortion(x, lambda y: on_off(y) * torch.as_tensor(disc)).synthesize(progress=False, rng=0)
    assert (within.eigendistortions[-1, 0].numpy()[disc] ** 2).sum() < 0.1


OBSERVED = {
    "noise": {"noise": noise.Poisson(floor=0.1)},
    "choice": {"noise": noise.Categorical()},
    "subspace": {"subspace": spaces.mask(DISC) * spaces.zero_mean()},
    "metric": {"metric": np.linspace(0.5, 3, 30).reshape(GREY)},
    "all": {"noise": noise.Gaussian(2.0), "subspace": spaces.bandpass((6, 5), 0, 2), "metric": gain(GREY)},
}


@pytest.mark.parametrize("kind", list(OBSERVED))
def test_files_of_restricted_distortions(kind, tmp_path):
    x, path = torch.linspace(0.1, 1, 30, dtype=FLOAT64).reshape(GREY), tmp_path / "found.npz"
    ed = Eigendistortion(x, response(GREY), **OBSERVED[kind]).synthesize("golub_kahan", progress=False, rng=0)
    ed.save(path)
    same = Eigendistortion.from_file(path, ed.model, **OBSERVED[kind])
    torch.testing.assert_close(same.eigendistortions, ed.eigendistortions, rtol=0, atol=0)
    torch.testing.assert_close(pickle.loads(pickle.dumps(same.eigenvalues)), ed.eigenvalues)
    with pytest.raises(ValueError, match=r"found\.npz holds eigendistortions with .*, these have none"):
        Eigendistortion(x, ed.model).load(path)
    floor = 2.0 if kind == "noise" else 0.1
    other = Eigendistortion(x, ed.model, noise=noise.Poisson(floor=floor))
    with pytest.raises(ValueError, match=r"found\.npz holds"):
        other.load(path)


@pytest.mark.parametrize("kind", list(OBSERVED))
def test_a_checkpoint_of_restricted_distortions(kind, tmp_path):
    path = tmp_path / "search.npz"
    x = torch.linspace(0.1, 1, 30, dtype=FLOAT64).reshape(GREY)
    with pytest.raises(ConvergenceError):
        Eigendistortion(x, response(GREY), **OBSERVED[kind]).synthesize(
            "golub_kahan", progress=False, rng=0, max_iter=4, checkpoint=path
        )
    ed = Eigendistortion(x, response(GREY), **OBSERVED[kind])
    before = ed.operator.n_products
    ed.synthesize("golub_kahan", progress=False, checkpoint=path, rng=0)
    cold = Eigendistortion(x, response(GREY), **OBSERVED[kind])
    cold.synthesize("golub_kahan", progress=False, rng=0)
    assert ed.operator.n_products - before <= cold.operator.n_products - before - 2
    np.testing.assert_allclose(ed.eigenvalues, cold.eigenvalues, rtol=1e-6)


@given(scale=st.floats(0.1, 10), deviation=st.floats(0.02, 0.5))
@settings(max_examples=10)
def test_where_the_linear_picture_ends(scale, deviation):
    """Of y = x + c x³ at 0: c a³ = deviation · a."""
    c = torch.linspace(1, 2, 12, dtype=FLOAT64) * scale
    ed = Eigendistortion(torch.zeros(12, dtype=FLOAT64), lambda x: torch.arange(1, 13) * (x + c * x**3))
    ed.synthesize("exact", 1, progress=False)
    np.testing.assert_allclose(ed.linear_range(0, deviation), (deviation / (2 * scale)) ** 0.5, rtol=0.011)
    np.testing.assert_allclose(ed.linear_range(-1, deviation), (deviation / scale) ** 0.5, rtol=0.011)
    noisy = Eigendistortion(ed.image, ed.model, noise=noise.Gaussian(4.0)).synthesize("exact", 1, progress=False)
    np.testing.assert_allclose(noisy.linear_range(0, deviation), ed.linear_range(0, deviation), rtol=0.011)


def test_linear_range_of_models_without_one():
    ed = Eigendistortion(torch.ones(4), lambda x: 2 * x).synthesize(progress=False)
    assert ed.linear_range(0) == np.inf
    flat = Eigendistortion(torch.ones(4), lambda x: x[:2]).synthesize(progress=False)
    assert flat.linear_range(-1) == 0
    with pytest.raises(IndexError, match="index must be"):
        ed.linear_range(7)
    with pytest.raises(ValueError, match="deviation must be a number above 0, got 0"):
        ed.linear_range(0, 0)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (spaces.mask(DISC) * spaces.bandpass((6, 5), 0, 2), "a mask and a bandpass, whose projections do not commute"),
        (
            spaces.mask(np.ones((3, 5))),
            r"weights must be of the image's shape \(1, 1, 6, 5\)",
        ),
        (spaces.bandpass((6, 6), 0, 2), r"shape must be \(height, width\) of the image, \(6, 5\)"),
        (spaces.bandpass((6, 5), 0.2, 0.8), "subspace is empty at this image: no change but zero lies in all"),
        (spaces.channels(LUMA), "channels has weights of 3 channels, but the image, of shape"),
        (spaces.mask(DISC) * spaces.mask(~DISC), "subspace is empty at this image"),
        (spaces.span(np.ones((2, 30))), "basis must be linearly independent"),
        (spaces.span(np.ones((2, 31))), "basis must be images of 30 elements, or columns of 30"),
        (spaces.span(np.ones((1, 30))) * spaces.mask(DISC), "a span that lies in part within its other parts"),
        (spaces.span(1.0 * ~DISC[None]) * spaces.mask(DISC), "subspace is empty at this image"),
        (spaces.span(1.0 * DISC[None]) * spaces.zero_mean(), "subspace is empty at this image"),
    ],
)
def test_spaces_that_do_not_fit(space, message):
    with pytest.raises(ValueError, match=message):
        FisherOperator(torch.zeros(GREY), torch.sin, subspace=space)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: spaces.mask(np.zeros((3, 3))), ValueError, "weights must be from 0 to 1, and not all 0"),
        (lambda: spaces.mask(2 * np.ones((3, 3))), ValueError, "weights must be from 0 to 1"),
        (lambda: spaces.mask("disc"), TypeError, "weights must be an array of weights from 0 to 1"),
        (lambda: spaces.bandpass((6, 5), 3, 2), ValueError, "high must be a number from low, got 2"),
        (lambda: spaces.bandpass(6, 3, 4), ValueError, "shape must be a sequence of at least 2 integers"),
        (lambda: spaces.channels([[1, 1, 1], [2, 2, 2]]), ValueError, "weights must be .* linearly independent"),
        (lambda: spaces.span(np.ones(3)), ValueError, r"basis must be images \(p, ...\), or columns \(N, p\)"),
        (lambda: spaces.mask(DISC) * 2, TypeError, "what is multiplied with a Space must be a Space, got 2"),
        (
            lambda: FisherOperator(torch.zeros(3), torch.sin, subspace=DISC),
            TypeError,
            "subspace must be of fisherop",
        ),
        (lambda: FisherOperator(torch.zeros(3), torch.sin, metric=[1, 0, 1]), ValueError, "metric must be positive"),
        (
            lambda: FisherOperator(torch.zeros(3), torch.sin, metric=np.ones(4)),
            ValueError,
            "metric must be of the image",
        ),
    ],
)
def test_bad_spaces(make, error, message):
    with pytest.raises(error, match=message):
        make()
