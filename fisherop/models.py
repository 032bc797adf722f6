"""Models of early vision with published parameters, as observers to begin with: fitted to people's judgements.

They were fitted to human ratings of distortions in grey photographs, whose pixels lie between 0 and 1 (Berardino 2018,
Table 2). As modules they go wherever a model of your own goes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from fisherop import checks

__all__ = ["FrontEnd", "LinearNonlinear", "LuminanceContrastGainControl", "LuminanceGainControl", "OnOff"]


class FrontEnd(nn.Module):
    """A centre–surround filter, gain control by local luminance and contrast, and a softplus: what its kinds share.

    For each channel c, with Gaussian blurs G of its own widths,

    - ``y = ± 1.25 (G_centre x − G_surround x)``;
    - with luminance gain control, ``y / (1 + a G_luminance x)``;
    - with contrast gain control, ``y / (1 + b (√(G_contrast y²) + 10⁻⁶))``;
    - the response is ``log(1 + eʸ)``.

    It has no parameters to train: its numbers are buffers, which ``.to`` moves, and ``.double()`` converts.

    Parameters
    ----------
    kernel_size : int
        The side of the Gaussians' windows in pixels, odd; 31 where they were fitted. Borders reflect.

    References
    ----------
    Berardino 2018, Hierarchically normalized models of visual distortion sensitivity, Ph.D. thesis, New York
    University, Table 2. Berardino, Ballé, Laparra and Simoncelli 2017, Eigen-distortions of hierarchical
    representations, NeurIPS.
    """

    amplitude = 1.25
    signs: tuple[float, ...] = (1.0,)
    centre_std: tuple[float, ...]
    surround_std: tuple[float, ...]
    luminance_std: tuple[float, ...] = ()
    luminance_scale: tuple[float, ...] = ()
    contrast_std: tuple[float, ...] = ()
    contrast_scale: tuple[float, ...] = ()
    centre: Tensor
    surround: Tensor
    luminance: Tensor
    contrast: Tensor
    polarity: Tensor
    a: Tensor
    b: Tensor

    def __init__(self, kernel_size: int = 31) -> None:
        super().__init__()
        if type(self) is FrontEnd:
            kinds = ", ".join(kind.__name__ for kind in FrontEnd.__subclasses__())
            raise TypeError(f"FrontEnd has no numbers of its own: take one of {kinds}")
        self.kernel_size = checks.integer("kernel_size", kernel_size)
        if self.kernel_size % 2 == 0:
            checks.refuse(ValueError, "kernel_size", "odd", kernel_size, f"take {kernel_size + 1}")
        for name in ("centre", "surround", "luminance", "contrast"):
            if getattr(self, f"{name}_std"):
                self.register_buffer(name, _gaussians(getattr(self, f"{name}_std"), self.kernel_size))
        self.register_buffer("polarity", torch.tensor(self.signs).reshape(-1, 1, 1))
        self.register_buffer("a", torch.tensor(self.luminance_scale).reshape(-1, 1, 1))
        self.register_buffer("b", torch.tensor(self.contrast_scale).reshape(-1, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        """Grey images to the channels' responses: ``(n, 1, height, width) -> (n, channels, height, width)``.

        Raises
        ------
        ValueError
            The image has another shape, or is smaller than half of a Gaussian's window.
        """
        least = self.kernel_size // 2 + 1
        if image.ndim != 4 or image.shape[1] != 1 or min(image.shape[2:]) < least:
            raise ValueError(
                f"the image of {type(self).__name__} must be grey, of shape (n, 1, height, width), and of at least "
                f"{least} × {least} pixels, got {tuple(image.shape)}: use image.mean(-3, keepdim=True) for one in "
                "colour, or a smaller kernel_size"
            )
        image = image.expand(-1, len(self.signs), -1, -1)
        y = self.amplitude * self.polarity * (_blur(image, self.centre) - _blur(image, self.surround))
        if self.luminance_std:
            y = y / (1 + self.a * _blur(image, self.luminance))
        if self.contrast_std:
            contrast = _blur(y**2, self.contrast).sqrt() + 1e-6
            y = y / (1 + self.b * contrast)
        return functional.softplus(y)


class LinearNonlinear(FrontEnd):
    """A centre–surround filter and a softplus, one channel: see `FrontEnd`."""

    centre_std, surround_std = (0.5339,), (6.148,)


class LuminanceGainControl(FrontEnd):
    """With luminance gain control, one channel: see `FrontEnd`."""

    centre_std, surround_std = (1.962,), (4.235,)
    luminance_std, luminance_scale = (4.235,), (14.95,)


class LuminanceContrastGainControl(FrontEnd):
    """With luminance and contrast gain control, one channel: see `FrontEnd`."""

    centre_std, surround_std = (0.7363,), (48.37,)
    luminance_std, luminance_scale = (170.99,), (2.94,)
    contrast_std, contrast_scale = (2.658,), (34.03,)


class OnOff(FrontEnd):
    """An on and an off channel, each with luminance and contrast gain control: see `FrontEnd`."""

    signs = (1.0, -1.0)
    centre_std, surround_std = (1.237, 0.3233), (30.12, 2.184)
    luminance_std, luminance_scale = (76.4, 2.184), (3.2637, 14.3961)
    contrast_std, contrast_scale = (7.49, 2.43), (7.3405, 16.7423)


def _gaussians(stds: tuple[float, ...], size: int) -> Tensor:
    """One-dimensional Gaussian kernels that sum to one, (len(stds), 1, size)."""
    x = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    kernels = torch.exp(-(x**2) / (2 * torch.tensor(stds, dtype=torch.float64)[:, None] ** 2))
    return (kernels / kernels.sum(1, keepdim=True)).to(torch.get_default_dtype())[:, None]


def _blur(image: Tensor, kernels: Tensor) -> Tensor:
    """Each channel of (n, C, H, W) with its own Gaussian, one axis after the other; borders reflect."""
    channels, _, size = kernels.shape
    half = size // 2
    image = functional.pad(image, (half, half, half, half), mode="reflect")
    image = functional.conv2d(image, kernels[:, :, :, None], groups=channels)
    return functional.conv2d(image, kernels[:, :, None, :], groups=channels)
