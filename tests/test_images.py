import colorsys
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fisherop import images

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (5, 7), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)
LUMA = [0.299, 0.587, 0.114]


@pytest.mark.parametrize("ending", ["png", "tif", "bmp"])
def test_files_hold_what_was_written(ending, tmp_path):
    path = tmp_path / f"image.{ending}"
    Image.fromarray(GREY).save(path)
    np.testing.assert_array_equal(images.load_image(path, dtype=torch.float64)[0, 0], GREY / 255)
    assert images.load_image(path).dtype == torch.float32
    Image.fromarray(COLOUR).save(path)
    np.testing.assert_array_equal(images.load_image(path, dtype=torch.float64)[0], np.moveaxis(COLOUR, 2, 0) / 255)
    grey = images.load_image(path, as_gray=True, size=(3, 4), dtype=torch.float64)
    np.testing.assert_allclose(grey[0, 0], (COLOUR @ LUMA / 255)[1:4, 1:5], rtol=1e-12)


def test_other_kinds_of_pixels(tmp_path):
    path = tmp_path / "image.png"
    deep = RNG.integers(0, 65536, (5, 7), dtype=np.uint16)
    Image.fromarray(deep).save(path)
    np.testing.assert_array_equal(images.load_image(path, dtype=torch.float64)[0, 0], deep / 65535)
    Image.fromarray(GREY > 127).save(path)
    np.testing.assert_array_equal(images.load_image(path)[0, 0], GREY > 127)
    Image.fromarray(COLOUR).quantize(8).save(path)  # a palette
    assert images.load_image(path).shape == (1, 3, 5, 7)
    opaque = np.dstack([COLOUR, np.full((5, 7), 255, np.uint8)])
    Image.fromarray(opaque).save(path)
    np.testing.assert_allclose(images.load_image(path)[0], np.moveaxis(COLOUR, 2, 0) / 255, rtol=1e-6)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90°
    Image.fromarray(COLOUR).save(path, exif=exif)
    upright = np.moveaxis(np.rot90(COLOUR, -1), 2, 0) / 255
    np.testing.assert_allclose(images.load_image(path)[0], upright, rtol=1e-6)


def test_bad_files(tmp_path):
    path = tmp_path / "image.tif"
    Image.fromarray(np.dstack([COLOUR, GREY])).save(path)
    with pytest.raises(
        ValueError, match="has transparent pixels, whose colour is unknown: put it on a background first"
    ):
        images.load_image(path)
    Image.fromarray(GREY.astype(np.float32)).save(path)
    with pytest.raises(ValueError, match="holds floating-point pixels, whose white level is unknown"):
        images.load_image(path)
    Image.fromarray(GREY.astype(np.int32) * 1000).save(path)
    with pytest.raises(ValueError, match="has pixels of more than 16 bits: convert it to 8 or 16"):
        images.load_image(path)
    with pytest.raises(FileNotFoundError):
        images.load_image(tmp_path / "nothing.png")
    path.write_text("text")
    with pytest.raises(OSError, match="cannot identify image file"):
        images.load_image(path)


@settings(deadline=None)
@given(
    have=st.tuples(st.integers(1, 9), st.integers(1, 9)), want=st.tuples(st.integers(0, 10), st.integers(0, 10)),
    square=st.booleans(),
)  # fmt: skip
def test_center_crop(have, want, square):
    image = torch.arange(2 * have[0] * have[1]).reshape(2, *have)
    size = want[0] if square else want
    want = (want[0], want[0]) if square else want
    if not all(1 <= w <= h for w, h in zip(want, have, strict=True)):
        with pytest.raises(ValueError, match=r"size must be .* from 1 to the image's own height and width"):
            images.center_crop(image, size)
        return
    middle = images.center_crop(image, size)
    assert middle.shape == (2, *want)
    for axis, (w, h) in enumerate(zip(want, have, strict=True), 1):
        before = int((image == middle[:, :1, :1]).nonzero()[0, axis])
        assert before in ((h - w) / 2, (h - w - 1) / 2)
    row, column = ((h - w) // 2 for w, h in zip(want, have, strict=True))
    assert torch.equal(middle, image[:, row : row + want[0], column : column + want[1]])


def test_the_photograph():
    colour, grey = images.photograph(), images.photograph(as_gray=True, size=96, dtype=torch.float64)
    assert colour.shape == (1, 3, 600, 512) and grey.shape == (1, 1, 96, 96)
    assert 0 <= colour.min() < 0.05 and 0.95 < colour.max() <= 1
    luma = torch.einsum("chw,c->hw", images.center_crop(colour, 96)[0].double(), torch.tensor(LUMA).double())
    torch.testing.assert_close(grey[0, 0], luma, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [1, 2, 33, 64])
def test_the_colour_wheel_follows_its_definition(size):
    wheel = images.color_wheel(size, dtype=torch.float64)[0]
    assert wheel.shape == (3, size, size)
    for i in range(size):
        for j in range(size):
            up, right = (size - 1 - 2 * i) / size, (2 * j + 1 - size) / size
            hue, saturation = math.atan2(up, right) / (2 * math.pi) % 1, math.hypot(up, right)
            expected = colorsys.hsv_to_rgb(hue, saturation, 1) if saturation <= 1 else (0.5, 0.5, 0.5)
            np.testing.assert_allclose(wheel[:, i, j], expected, atol=1e-12)
