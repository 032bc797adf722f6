"""Models for the examples."""

import torch
from torch import Tensor, nn
from torch.nn import functional


class OnOff(nn.Module):
    """The On–Off model of the retina and LGN, fitted to human judgements of distortions: (1, 1, H, W) → (1, 2, H, W).

    Two centre–surround channels, each with luminance and contrast gain control, and a softplus.

    References
    ----------
    Berardino 2018, Hierarchically normalized models of visual distortion sensitivity, Ph.D. thesis, New York
    University, Table 2.
    """

    kernel_size = 31
    centre_std = (1.237, 0.3233)  # pixels; first the on channel, then the off channel
    surround_std = (30.12, 2.184)
    luminance_std = (76.4, 2.184)
    luminance_scale = (3.2637, 14.3961)
    contrast_std = (7.49, 2.43)
    contrast_scale = (7.3405, 16.7423)
    amplitude = 1.25

    def __init__(self) -> None:
        super().__init__()
        for name in ("centre", "surround", "luminance", "contrast"):
            self.register_buffer(name, gaussians(getattr(self, f"{name}_std"), self.kernel_size))
        self.register_buffer("polarity", torch.tensor([1.0, -1.0]).reshape(2, 1, 1))
        self.register_buffer("a", torch.tensor(self.luminance_scale).reshape(2, 1, 1))
        self.register_buffer("b", torch.tensor(self.contrast_scale).reshape(2, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        image = image.expand(-1, 2, -1, -1)
        linear = self.amplitude * self.polarity * (blur(image, self.centre) - blur(image, self.surround))
        normalised = linear / (1 + self.a * blur(image, self.luminance))
        contrast = blur(normalised**2, self.contrast).sqrt() + 1e-6
        return functional.softplus(normalised / (1 + self.b * contrast))


def gaussians(stds: tuple[float, ...], size: int) -> Tensor:
    """One-dimensional Gaussian kernels that sum to one, (len(stds), 1, size)."""
    x = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    kernels = torch.exp(-(x**2) / (2 * torch.tensor(stds, dtype=torch.float64)[:, None] ** 2))
    return (kernels / kernels.sum(1, keepdim=True)).to(torch.get_default_dtype())[:, None]


def blur(image: Tensor, kernels: Tensor) -> Tensor:
    """Each channel of (1, C, H, W) with its own Gaussian, one axis after the other; borders reflect."""
    channels, _, size = kernels.shape
    half = size // 2
    image = functional.pad(image, (half, half, half, half), mode="reflect")
    image = functional.conv2d(image, kernels[:, :, :, None], groups=channels)
    return functional.conv2d(image, kernels[:, :, None, :], groups=channels)
