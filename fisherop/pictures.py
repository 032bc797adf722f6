"""Images as pictures: arrays of what is shown, its black and white, its 256 levels, and these as PNG."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from torch import Tensor

from fisherop import checks

_LARGE, _USUAL = 256, 192  # pixels of a picture in a notebook: at most, and at least where it can be enlarged


def to_pictures(
    image: Tensor | ArrayLike, as_rgb: bool | None = None, channel_idx: int | None = None, name: str = "image"
) -> list[NDArray]:
    """The pictures that `imshow` shows of an image: one (height, width, 3), or a (height, width) for each channel."""
    image = image.detach() if isinstance(image, Tensor) else image
    pixels = checks.array(name, image, what="an array of shape (..., height, width)").astype(np.float64)
    if pixels.ndim < 2 or pixels.size == 0:
        checks.refuse(ValueError, name, "of shape (..., height, width), and not empty", image)
    as_rgb = as_rgb if as_rgb is None else checks.flag("as_rgb", as_rgb)
    channels = pixels.reshape(-1, *pixels.shape[-2:])
    count = len(channels)
    if channel_idx is not None:
        if as_rgb:
            raise ValueError(f"as_rgb shows all channels, and channel_idx={channel_idx} one: give one of them")
        return [channels[checks.position("channel_idx", channel_idx, count, "channels")]]
    if as_rgb and count != 3:
        raise ValueError(f"as_rgb needs an image of three channels, (..., 3, height, width), got shape {pixels.shape}")
    return [np.moveaxis(channels, 0, -1)] if count == 3 and as_rgb is not False else list(channels)


def value_range(
    pictures: Sequence[NDArray], vrange: tuple[float, float] | None = None, symmetric: bool = False
) -> tuple[float, float]:
    """Black and white: (0, 1) where all pictures keep to it, else their extremes; on demand about zero."""
    if vrange is None:
        least, most = float(min(p.min() for p in pictures)), float(max(p.max() for p in pictures))
        if symmetric and least < 0:
            least, most = -max(-least, most), max(-least, most)
        vrange = (0.0, 1.0) if least >= 0 and most <= 1 else (least, most)
        if least == most and vrange != (0.0, 1.0):
            raise ValueError(f"what is to be shown is {least:g} throughout: pass vrange, the values of black and white")
    what = "two ascending numbers (black, white)"
    low, high = checks.array("vrange", vrange, (2,), what).tolist()
    if not 0 < high - low < np.inf:
        checks.refuse(ValueError, "vrange", what, vrange)
    return low, high


def describe(vrange: tuple[float, float]) -> str:
    low, high = ends(vrange)
    return f"black {low}, white {high}"


def ends(vrange: tuple[float, float]) -> tuple[str, str]:
    """Black and white, in as many digits as tell them apart."""
    low, high = vrange
    digits = 3 + max(0, math.floor(math.log10(max(abs(low), abs(high)) / (high - low))))
    return short(low, digits), short(high, digits)


def short(value: float, digits: int = 3) -> str:
    """A number as text, with a true minus sign."""
    rounded = float(f"{value:.{digits}g}")
    shown, _, exponent = f"{rounded:.{max(digits, 6)}g}".partition("e")
    shown += f"e{int(exponent)}" if exponent else ""
    return shown.replace("-", "−").replace("inf", "∞")


def default_scale(limits: tuple[float, float], size: int) -> float:
    """By what distortions are multiplied: the RMS of a unit norm is 5 % of the range from black to white."""
    return 0.05 * (limits[1] - limits[0]) * size**0.5


def to_picture(image: Tensor) -> NDArray:
    """The one picture, (height, width) or (height, width, 3), that an image is."""
    if image.ndim < 2 or image[..., 0, 0].numel() not in (1, 3):
        raise ValueError(
            f"the image must be grey (..., height, width) or colour (..., 3, height, width), got shape "
            f"{tuple(image.shape)}"
        )
    (picture,) = to_pictures(image)
    return picture


def averaged(picture: NDArray, size: int) -> NDArray:
    """Means of squares of so many pixels in a direction; what is left over at the ends is cut."""
    height, width = (length // size for length in picture.shape[:2])
    blocks = picture[: height * size, : width * size].reshape(height, size, width, size, -1)
    return blocks.mean((1, 3)).reshape(height, width, *picture.shape[2:])


def levels_of(image: Tensor, low: float, high: float, most: int, draws: Tensor | None = None) -> Tensor:
    """The nearest levels, from 0 to `most`; with draws from 0 to 1, one of the two around, with the right mean."""
    values = (image.detach().cpu().double() - low) / (high - low) * most
    near = values.round()
    values = torch.where((values - near).abs() < 1e-4, near, values)  # of a level, but for rounding
    return torch.floor(values + (0.5 if draws is None else draws)).clamp(0, most).to(torch.int64)


def picture_of(levels: Tensor, bits: int) -> Image.Image:
    """Levels (..., height, width), of one or three channels, for Pillow."""
    pixels = levels.reshape(-1, *levels.shape[-2:]).numpy()
    pixels = pixels[0] if len(pixels) == 1 else np.moveaxis(pixels, 0, -1)
    return Image.fromarray(pixels.astype(np.uint8 if bits == 8 else np.uint16))


def png(picture: NDArray, vrange: tuple[float, float]) -> str:
    """Its 256 levels, the nearest ones, as the address of a PNG that holds itself."""
    low, high = vrange
    levels = np.floor((np.clip(picture, low, high) - low) / (high - low) * 255 + 0.5).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(levels).save(file, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def figure(image: Tensor, changes: Tensor, names: Sequence[str]) -> str:
    """HTML of an image, and of it plus and minus each change at one scale, at which a unit norm has an RMS of 5 %.

    What is larger than 256 pixels is shown by the means of squares, what is smaller in the pixels of the screen.

    Parameters
    ----------
    image : Tensor, shape image_shape
        Grey, ``(..., height, width)``, or in colour, ``(..., 3, height, width)``.
    changes : Tensor, shape (K, *image_shape)
    names : sequence of str
        For each change; they hold no markup.
    """
    picture = to_picture(image)
    limits = low, high = value_range([picture])
    scale = default_scale(limits, picture.size)
    shown = [("image", picture)]
    for name, change in zip(names, map(to_picture, changes), strict=True):
        rms = scale * float(np.linalg.norm(change)) / picture.size**0.5
        for sign, step in (("+", scale), ("−", -scale)):
            shown.append((f"{sign} {name}, RMS {rms:.2g}", picture + step * change))
    size = min(-(-max(picture.shape[:2]) // _LARGE), *picture.shape[:2])
    zoom = max(1, _USUAL // max(picture.shape[:2]))
    parts = []
    for caption, one in shown:
        pixels = averaged(np.clip(one, low, high), size)
        height, width = (zoom * length for length in pixels.shape[:2])
        parts.append(
            f'<figure style="display: inline-block; margin: 0.5em 1em 0.5em 0"><img src="{png(pixels, limits)}" '
            f'width="{width}" height="{height}" alt="{caption}" style="image-rendering: pixelated">'
            f"<figcaption>{caption}</figcaption></figure>"
        )
    small = f"; each pixel is the mean of {size} × {size}" if size > 1 else ""
    return f"<div>{''.join(parts)}</div><p>Distortions × {scale:.3g}; {describe(limits)}{small}.</p>"
