"""Images to start from, as tensors (1, channels, height, width) with values from 0, black, to 1, white."""

from __future__ import annotations

import os

import matplotlib.cbook
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from fisherop import checks


def center_crop(image: Tensor, size: int | tuple[int, int]) -> Tensor:
    """The middle of an image, a view of it.

    Parameters
    ----------
    image : Tensor, shape (..., height, width)
    size : int or (int, int)
        Height and width; one number for both. If an odd number is removed, the extra one is removed at the end.

    Returns
    -------
    Tensor, shape ``(..., *size)``

    Raises
    ------
    ValueError
        The image is smaller.
    """
    have = tuple(checks.instance("image", image, (Tensor, np.ndarray), "a tensor or an array").shape[-2:])
    if len(have) < 2:
        checks.refuse(ValueError, "image", "of shape (..., height, width)", image)
    sizes = checks.integers("size", size)
    height, width = sizes * 2 if np.ndim(size) == 0 else sizes if len(sizes) == 2 else (0, 0)
    if not (1 <= height <= have[0] and 1 <= width <= have[1]):
        checks.refuse(ValueError, "size", f"one number or two, from 1 to the image's own height and width {have}", size)
    top, left = (have[0] - height) // 2, (have[1] - width) // 2
    return image[..., top : top + height, left : left + width]


def load_image(
    path: str | os.PathLike,
    *,
    as_gray: bool = False,
    size: int | tuple[int, int] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Read an image file of any format that Pillow knows.

    Parameters
    ----------
    path : str or path-like
    as_gray : bool
        Colours become their luma, 0.299 R + 0.587 G + 0.114 B (ITU-R BT.601).
    size : int or (int, int), optional
        The middle of this height and width is taken; no pixel is interpolated.
    dtype : torch.dtype

    Returns
    -------
    Tensor, shape (1, 1, height, width) or (1, 3, height, width)
        Upright, as the file's orientation says. 8-bit values are divided by 255, 16-bit ones by 65,535.

    Raises
    ------
    ValueError
        Some of the image is transparent, its pixels are neither 8- nor 16-bit, or it is smaller than `size`.
    OSError
        There is no such file, or Pillow can't read it.
    """
    path, as_gray, dtype = checks.path("path", path), checks.flag("as_gray", as_gray), checks.floating("dtype", dtype)
    with Image.open(path) as file:
        upright = ImageOps.exif_transpose(file)
        if upright.has_transparency_data:
            rgba = upright.convert("RGBA")
            if np.asarray(rgba.getchannel("A")).min() < 255:
                raise ValueError(
                    f"{path} has transparent pixels, whose colour is unknown: put it on a background first"
                )
            upright = rgba.convert("RGB")
        if upright.mode.startswith("I"):  # 16-bit grey, which Pillow may hold in 32
            pixels = np.asarray(upright, dtype=np.float64) / 65535
            if upright.mode == "I" and pixels.max() > 1:
                raise ValueError(f"{path} has pixels of more than 16 bits: convert it to 8 or 16")
        elif upright.mode == "F":
            raise ValueError(f"{path} holds floating-point pixels, whose white level is unknown: pass your own tensor")
        else:
            grey = upright.mode in ("1", "L", "LA")
            pixels = np.asarray(upright.convert("L" if grey else "RGB"), dtype=np.float64) / 255
    if pixels.ndim == 3:
        pixels = pixels @ np.array([0.299, 0.587, 0.114]) if as_gray else np.moveaxis(pixels, 2, 0)
    image = torch.tensor(pixels, dtype=dtype).reshape(1, -1, *pixels.shape[-2:])
    return image if size is None else center_crop(image, size)


def photograph(
    *, as_gray: bool = False, size: int | tuple[int, int] | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Matplotlib's photograph of Grace Hopper, 600 × 512 pixels; the arguments are those of `load_image`."""
    return load_image(
        matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False), as_gray=as_gray, size=size, dtype=dtype
    )


def color_wheel(size: int = 128, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """All hues around a circle, red to the right and green 120° on, white at its centre; mid-grey beyond it.

    The hue is the angle, the saturation the distance from the centre, the value 1, in the model HSV of A. R. Smith,
    Color gamut transform pairs, SIGGRAPH 1978.

    Parameters
    ----------
    size : int
        Height and width.
    dtype : torch.dtype

    Returns
    -------
    Tensor, shape (1, 3, size, size)
    """
    size, dtype = checks.integer("size", size, 1, 2**15), checks.floating("dtype", dtype)
    axis = (torch.arange(size, dtype=torch.float64) - (size - 1) / 2) / (size / 2)
    up, right = torch.meshgrid(-axis, axis, indexing="ij")
    saturation = torch.hypot(up, right)
    sextant = torch.atan2(up, right) * (3 / torch.pi)
    k = (sextant + torch.tensor([5.0, 3.0, 1.0], dtype=torch.float64)[:, None, None]) % 6
    wheel = 1 - saturation * torch.minimum(k, 4 - k).clamp(0, 1)
    return torch.where(saturation <= 1, wheel, 0.5)[None].to(dtype)
