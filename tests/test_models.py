"""Models of early vision: their formula in NumPy, and plenoptic's numbers where it is installed."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import correlate1d

from fisherop import FisherOperator, models

KINDS = [models.LinearNonlinear, models.LuminanceGainControl, models.LuminanceContrastGainControl, models.OnOff]


def blur(x, std, size):
    places = np.arange(size) - size // 2
    kernel = np.exp(-(places**2) / (2 * std**2))
    for axis in (0, 1):
        x = correlate1d(x, kernel / kernel.sum(), axis, mode="mirror")
    return x


def response(kind, x, size):
    for c, sign in enumerate(kind.signs):
        y = sign * 1.25 * (blur(x, kind.centre_std[c], size) - blur(x, kind.surround_std[c], size))
        if kind.luminance_std:
            y = y / (1 + kind.luminance_scale[c] * blur(x, kind.luminance_std[c], size))
        if kind.contrast_std:
            y = y / (1 + kind.contrast_scale[c] * (np.sqrt(blur(y**2, kind.contrast_std[c], size)) + 1e-6))
        yield np.logaddexp(0, y)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20)
@given(st.integers(0, 99), st.sampled_from([1, 5, 31]), st.integers(16, 40), st.integers(16, 40))
def test_responses_are_those_of_the_formula(kind, seed, size, height, width):
    x = np.random.default_rng(seed).random((height, width))
    model = kind(size).double()
    for got, right in zip(model(torch.from_numpy(x)[None, None])[0], response(kind, x, size), strict=True):
        np.testing.assert_allclose(got, right, rtol=1e-6)  # the kernels are rounded to float32


@pytest.mark.parametrize("kind", KINDS)
def test_they_take_several_images_and_are_differentiated(kind):
    x = torch.rand(3, 1, 20, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = kind(7).double().eval()
    torch.testing.assert_close(model(x), torch.cat([model(one) for one in x.split(1)]))
    dense = torch.func.jacrev(model)(x[:1]).reshape(-1, 480)
    v = torch.rand(480, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    product = FisherOperator(x[:1], model) @ v.numpy()
    np.testing.assert_allclose(product, dense.T @ (dense @ v), atol=1e-6 * np.abs(product).max())


@pytest.mark.parametrize("kind", KINDS)
def test_the_numbers_are_those_of_plenoptic(kind):
    plenoptic = pytest.importorskip("plenoptic", reason="plenoptic is not installed")
    other = getattr(plenoptic.models, kind.__name__)((31, 31), pretrained=True, cache_filt=True)
    x = torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(kind()(x), other(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 3, 32, 32), (32, 32), (1, 1, 15, 32), (1, 1, 32, 15)])
def test_other_images_are_refused(shape):
    with pytest.raises(ValueError, match=r"grey, of shape \(n, 1, height, width\), and of at least 16 × 16 pixels"):
        models.OnOff()(torch.zeros(shape))


def test_bad_kinds_are_refused():
    with pytest.raises(ValueError, match="kernel_size must be odd, got 8: take 9"):
        models.OnOff(8)
    with pytest.raises(TypeError, match="take one of LinearNonlinear, LuminanceGainControl, LuminanceContrast"):
        models.FrontEnd()
