import numpy as np
import pytest
import torch
from helpers import DEVICES, DTYPES, small_image, small_model

from fisherop import ConvergenceError, Eigendistortion
from fisherop.testing import linear_model, matrix_with_singular_values

MATRIX = matrix_with_singular_values(np.linspace(3, 1, 24), 30, 24)


def linear(shape=(1, 2, 3, 4), dtype=torch.float64):
    return Eigendistortion(torch.linspace(0, 1, 24, dtype=dtype).reshape(shape), linear_model(MATRIX, dtype))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_distortions_are_images(dtype, device):
    image = small_image(dtype, device)
    ed = Eigendistortion(image, small_model(dtype, device))
    assert ed.eigendistortions is None and ed.eigenvalues is None and ed.eigenindex is None and ed.jacobian is None
    assert repr(ed) == "<Eigendistortion of Small at an image (1, 2, 6, 4): not synthesized>"
    assert ed.synthesize(k=2, rng=0, tol=1e-5, progress=False) is ed
    assert repr(ed).endswith("4 eigendistortions>")
    assert ed.eigendistortions.shape == (4, 2, 6, 4) and list(ed.eigenindex) == [0, 1, 46, 47]
    for tensor in (ed.eigendistortions, ed.eigenvalues):
        assert tensor.dtype == dtype and tensor.device == image.device
    assert torch.equal(ed.image, image)
    # a step along each changes the response by √λ, in an independent float64 product
    truth = Eigendistortion(image.double(), small_model(device=device)).operator.linearization
    lengths = torch.linalg.vector_norm(truth.jvp(ed.eigendistortions[:, None].double()), dim=1)
    torch.testing.assert_close(lengths**2, ed.eigenvalues.double(), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((24,), (2, 24)), ((1, 24), (2, 24)), ((4, 6), (2, 4, 6)), ((1, 4, 6), (2, 4, 6)), ((1, 1, 4, 6), (2, 1, 4, 6))],
)
def test_leading_one_is_dropped(shape, expected):
    assert linear(shape).synthesize(rng=0, progress=False).eigendistortions.shape == expected


def test_image_of_one_pixel():
    ed = Eigendistortion(torch.tensor([2.0]).double(), lambda x: 3 * x).synthesize("exact", progress=False)
    assert ed.eigendistortions.shape == (1, 1) and ed.eigenvalues == 9


def test_exact_gives_everything_and_keeps_the_jacobian():
    ed = linear().synthesize("exact", progress=False)
    assert ed.eigendistortions.shape == (24, 2, 3, 4)
    np.testing.assert_allclose(ed.jacobian, MATRIX, atol=1e-13)
    assert linear().synthesize("exact", k=1, progress=False).eigenvalues.shape == (2,)
    ed = linear()
    assert torch.equal(ed.compute_jacobian(progress=False), ed.jacobian)


def test_the_established_arguments():
    ed = linear().synthesize("power", 2, 3000, stop_criterion=1e-5, rng=0, progress=False)
    assert list(ed.eigenindex) == [0, 1, 22, 23] and ed.result.tol == 1e-5 and ed.result.method == "power"
    ed = linear()
    with pytest.warns(RuntimeWarning, match="did not reach tol"):
        ed.synthesize("randomized_svd", k=2, p=4, q=3, rng=0, on_failure="warn", progress=False)
    assert list(ed.eigenindex) == [0, 1]
    with pytest.raises(ValueError, match="tol=1e-06 and stop_criterion=1e-07 mean the same: give one of them"):
        ed.synthesize(tol=1e-6, stop_criterion=1e-7)
    with pytest.raises(TypeError, match="method 'power' has no option 'p'; its options: none"):
        ed.synthesize("power", p=3)


def test_failure_leaves_the_object_as_it_was():
    ed = linear().synthesize(rng=0, progress=False)
    before = ed.result
    with pytest.raises(ConvergenceError) as caught:
        ed.synthesize("power", max_iter=2, rng=0, progress=False)
    assert ed.result is before and caught.value.result.method == "power"
