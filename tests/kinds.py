"""Small models of every kind that people linearize, and what must hold for each: tables that the tests go through.

No model needs a download: parameters are published numbers or drawn by a seed. `KINDS` are written here; `THEIRS` are
other packages' own, where these are installed.
"""

from __future__ import annotations

import collections
import dataclasses
import importlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from fisherop.model.compat import VERSION

GREY, COLOUR = (1, 1, 16, 16), (1, 3, 8, 8)

# What PyTorch's own torch.func.jvp can do by version
READS_INTEGERS = VERSION >= (2, 10)  # .tolist() of a tensor that was made inside
CHECKPOINTS_FORWARD = VERSION >= (2, 12)
SAMPLES_FORWARD = VERSION >= (2, 15)


@dataclasses.dataclass(frozen=True)
class Kind:
    """A model and what is expected of it.

    `engine` is what "auto" finds: "traced" wherever PyTorch has a forward mode for all operations.
    """

    build: Callable[[torch.dtype], Callable]  # the model in a dtype, in evaluation mode; called under a seed
    shape: tuple[int, ...] = COLOUR
    engine: str = "traced"
    smooth: bool = True  # at the image, so that central differences there tell J
    zeros: bool = False  # whether the image is zero in part
    writes: bool = False  # parameters by .data, in forward: a plain torch.func.jvp would crash PyTorch
    forward_mode: bool = True  # dual numbers can do it, with our help
    double_backward: bool = True  # PyTorch can differentiate its backward pass
    functorch: bool = True  # torch.func.jvp can do it, without our help, where dual numbers can
    precision: torch.dtype = torch.float64  # of its coarsest step
    needs: str = ""  # a package

    def make(self, dtype: torch.dtype) -> Callable:
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of their constructors
            torch.manual_seed(0)
            return self.build(dtype)

    def image(self, dtype: torch.dtype) -> Tensor:
        """Numbers that float32 holds, too."""
        x = torch.rand(self.shape, generator=torch.Generator().manual_seed(1))
        if self.zeros:
            x[..., : self.shape[-1] // 2] = 0
        return x.to(dtype)


def module(build: Callable[[], nn.Module]) -> Callable[[torch.dtype], nn.Module]:
    return lambda dtype: build().eval().to(dtype)


def function(model: Callable[[Tensor], Any]) -> Callable[[torch.dtype], Callable]:
    return lambda dtype: model


def tensors(response: Any) -> Iterator[Tensor]:
    """The tensors of a response, in order."""
    if isinstance(response, Tensor):
        yield response
    elif dataclasses.is_dataclass(response) and not isinstance(response, Mapping):
        for field in dataclasses.fields(response):
            yield from tensors(getattr(response, field.name))
    elif response is not None:
        for part in response.values() if isinstance(response, Mapping) else response:
            yield from tensors(part)


def flat(response: Any) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors(response)])


# The field's own: front ends, pyramids, statistics, metrics


class Blur(nn.Module):
    """As plenoptic's Gaussian: its width is made positive through .data, its filter kept by a buffer, in forward."""

    def __init__(self, std: float, cached: bool) -> None:
        super().__init__()
        self.std = nn.Parameter(torch.tensor([std]))
        self.cached = cached
        self.register_buffer("kept", None)

    @property
    def kernel(self) -> Tensor:
        if self.kept is not None:
            return self.kept
        t = torch.arange(-2, 3, device=self.std.device)
        line = torch.exp(-(t**2) / (2 * self.std**2))
        kernel = line[:, None] * line
        kernel = (kernel / kernel.sum())[None, None]
        if self.cached:
            self.register_buffer("kept", kernel)
        return kernel

    def forward(self, x: Tensor) -> Tensor:
        self.std.data = self.std.data.abs()
        return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), self.kernel)


class GainControl(nn.Module):
    """Center-surround, divided by luminance, then by contrast, as in Berardino et al. (2018)."""

    def __init__(self, cached: bool, negative: bool = False) -> None:
        super().__init__()
        sign = -1 if negative else 1  # of the widths, which the first call makes positive
        self.center, self.surround, self.luminance, self.contrast = (
            Blur(sign * std, cached) for std in (0.5, 1.5, 2.5, 2.0)
        )
        self.scalars = nn.Parameter(torch.tensor([2.0, 7.0]))

    def forward(self, x: Tensor) -> Tensor:
        linear = self.center(x) - self.surround(x)
        normalized = linear / (1 + self.scalars[0] * self.luminance(x))
        contrast = (self.contrast(normalized**2) + 1e-6).sqrt()
        return F.softplus(normalized / (1 + self.scalars[1] * contrast))


def warm(dtype: torch.dtype) -> nn.Module:
    model = module(lambda: GainControl(True))(dtype)
    with torch.no_grad():
        model(torch.ones(GREY, dtype=dtype))
    return model


class LaplacianPyramid(nn.Module):
    """As plenoptic's, with sizes computed by small tensors; normalized by amplitude as in Laparra et al. (2016)."""

    FILTER = np.array([0.05, 0.25, 0.4, 0.25, 0.05])

    def __init__(self, normalized: bool = False) -> None:
        super().__init__()
        self.normalized = normalized

    def blurred(self, x: Tensor) -> Tensor:
        kernel = torch.as_tensor(np.outer(self.FILTER, self.FILTER), dtype=x.dtype, device=x.device)
        start = torch.as_tensor(kernel.shape) // 2
        end = torch.as_tensor(kernel.shape) - start - 1
        pad = torch.as_tensor([start[1], end[1], start[0], end[0]])
        return F.conv2d(F.pad(x, pad.tolist(), mode="reflect"), kernel[None, None])

    def forward(self, x: Tensor) -> list[Tensor]:
        bands = []
        for _ in range(2):
            odd = torch.as_tensor(x.shape)[2:4] % 2
            down = self.blurred(x)[:, :, ::2, ::2]
            height, width = (2 * torch.as_tensor(down.shape)[2:4] - odd).tolist()
            up = torch.zeros(1, 1, height, width, dtype=x.dtype, device=x.device)
            up[:, :, ::2, ::2] = 4 * down
            bands.append(x - self.blurred(up))
            x = down
        bands.append(x)
        return [y / (0.17 + self.blurred(y.abs())) for y in bands] if self.normalized else bands


class SteerablePyramid(nn.Module):
    """Two scales of two orientations, made in the Fourier domain (Simoncelli and Freeman, 1995): complex inside."""

    def __init__(self, size: int = 16, orientations: int = 2, scales: int = 2) -> None:
        super().__init__()
        self.orientations, self.scales = orientations, scales
        for scale in range(scales):
            n = size // 2**scale
            y, x = np.meshgrid(*2 * [np.arange(-(n // 2), n // 2) / (n // 2)], indexing="ij")
            radius = np.log2(np.maximum(np.hypot(x, y), 1 / n))
            low = np.cos(np.pi / 2 * np.clip(radius + 1.5, 0, 1))
            bands = [
                np.sqrt(1 - low**2) * np.where(np.cos(np.arctan2(y, x) - a) > 0, 2 * np.cos(np.arctan2(y, x) - a), 0)
                for a in np.pi * np.arange(orientations) / orientations
            ]
            self.register_buffer(f"low_{scale}", torch.as_tensor(low))
            self.register_buffer(f"bands_{scale}", torch.as_tensor(np.stack(bands)))

    def bands(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """Complex subbands (orientations, n, n) by scale, and the lowpass spectrum that remains, at half the size."""
        spectrum = torch.fft.fftshift(torch.fft.fft2(x[0, 0], norm="ortho"))
        out = []
        for scale in range(self.scales):
            masked = (-1j) ** (self.orientations - 1) * getattr(self, f"bands_{scale}") * spectrum
            out.append(torch.fft.ifft2(torch.fft.ifftshift(masked, dim=(-2, -1)), norm="ortho"))
            quarter = len(spectrum) // 4
            spectrum = (getattr(self, f"low_{scale}") * spectrum)[quarter:-quarter, quarter:-quarter] / 2
        return out, spectrum

    def forward(self, x: Tensor) -> dict[Any, Tensor]:
        bands, spectrum = self.bands(x)
        parts = {(i, part): getattr(band, part) for i, band in enumerate(bands) for part in ("real", "imag")}
        return parts | {"lowpass": torch.fft.ifft2(torch.fft.ifftshift(spectrum), norm="ortho").real}


class TextureStatistics(nn.Module):
    """Portilla and Simoncelli's (2000): moments, auto-correlations, cross-correlations of the magnitudes of subbands.

    As in plenoptic, the lowpass image is made by way of a spectrum of zeros, complex64 in a float64 model, too.
    """

    def __init__(self, spectrum_dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.pyramid = SteerablePyramid()
        self.spectrum_dtype = spectrum_dtype
        self.gain = torch.full((1, 1), 0.3).expand(1, 3)[:, ::2]  # float32, no buffer: its dtype stays

    @staticmethod
    def autocorrelation(x: Tensor) -> Tensor:
        full = torch.fft.irfft2(torch.fft.rfft2(x).abs() ** 2, s=x.shape[-2:])
        middle = x.shape[-1] // 2
        return torch.fft.fftshift(full, dim=(-2, -1))[..., middle - 2 : middle + 3, middle - 2 : middle + 3]

    @staticmethod
    def moments(x: Tensor) -> Tensor:
        centred = x - x.mean()
        variance = centred.square().mean()
        kept = variance / x.var().detach() > torch.finfo(x.dtype).resolution  # a choice that reads the image
        skew = torch.where(kept, (centred**3).mean() / variance**1.5, torch.zeros_like(variance))
        kurtosis = torch.where(kept, (centred**4).mean() / variance**2, torch.full_like(variance, 3))
        return torch.stack([x.mean(), variance, skew, kurtosis, x.min(), x.max()])

    def forward(self, x: Tensor) -> list[Tensor]:
        bands, lowpass = self.pyramid.bands(x)
        spectrum = torch.zeros(8, 8, dtype=self.spectrum_dtype or lowpass.dtype, device=x.device)
        spectrum[2:-2, 2:-2] = lowpass
        coarse = torch.fft.ifft2(torch.fft.ifftshift(spectrum)).real.to(x.dtype)
        out = [self.moments(x), self.moments(coarse), self.autocorrelation(coarse) * self.gain[:, :1]]
        for band in bands:
            magnitude = band.abs()
            magnitude = magnitude - magnitude.mean((-2, -1), keepdim=True)
            out.append(self.autocorrelation(magnitude / magnitude.std()))
            out.append(torch.einsum("ahw, bhw -> ab", magnitude, magnitude) / magnitude[0].numel())
        doubled = bands[1] * bands[1] / (bands[1].abs() + 1e-6)  # phases of the coarse scale, doubled
        out.append(torch.einsum("ahw, bhw -> ab", bands[0].real[:, ::2, ::2], torch.view_as_real(doubled)[..., 0]))
        return out


class LowerBound(torch.autograd.Function):
    """An old-style function, without forward mode; it sees parameters only."""

    @staticmethod
    def forward(ctx, w):
        ctx.save_for_backward(w)
        return w.clamp(min=1e-3)

    @staticmethod
    def backward(ctx, g):
        (w,) = ctx.saved_tensors
        return g * ((w >= 1e-3) | (g < 0))


class GDN(nn.Module):
    """Generalized divisive normalization (Ballé et al., 2016)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.ones(channels))
        self.gamma = nn.Parameter(0.3 * torch.rand(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        gamma = LowerBound.apply(self.gamma)[..., None, None]
        return x * torch.rsqrt(F.conv2d(x.square(), gamma, LowerBound.apply(self.beta)))


class Perceptual(nn.Module):
    """A distance to a reference, as LPIPS: by features whose channels have unit norm (Zhang et al., 2018)."""

    def __init__(self, reference: Tensor, scalar: bool = True) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), nn.Conv2d(4, 6, 3, stride=2)])
        self.weights = nn.ParameterList([torch.rand(1, c, 1, 1) for c in (4, 6)])
        self.scalar = scalar
        self.register_buffer("reference", reference)
        self.register_buffer("shift", torch.tensor([-0.03, -0.088, -0.188])[None, :, None, None])

    def features(self, x: Tensor) -> list[Tensor]:
        out, x = [], 2 * x - 1 - self.shift
        for layer in self.layers:
            x = layer(x)
            out.append(x / (x.square().sum(1, keepdim=True).add(1e-10).sqrt()))
        return out

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        pairs = zip(self.weights, self.features(x), self.features(self.reference), strict=True)
        parts = [(w * (a - b).square()).sum(1, keepdim=True).mean((2, 3)) for w, a, b in pairs]
        return sum(parts) if self.scalar else parts


def perceptual(at_reference: bool, scalar: bool = True) -> Callable[[torch.dtype], nn.Module]:
    image = torch.rand(COLOUR, generator=torch.Generator().manual_seed(1 if at_reference else 2))
    return module(lambda: Perceptual(image.clone(), scalar))


class Similarity(nn.Module):
    """SSIM's map against a reference (Wang et al., 2004), by moments in a uniform window."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("reference", torch.rand(GREY))

    def forward(self, x: Tensor) -> Tensor:
        y = self.reference
        a, b, aa, bb, ab = (F.avg_pool2d(t, 5, stride=2) for t in (x, y, x * x, y * y, x * y))
        c1, c2 = (torch.as_tensor([0.01, 0.03]) ** 2).to(x.dtype)
        return (2 * a * b + c1) * (2 * (ab - a * b) + c2) / ((a**2 + b**2 + c1) * (aa - a**2 + bb - b**2 + c2))


class Scattering(nn.Module):
    """Moduli of wavelet coefficients, twice, each averaged (Bruna and Mallat, 2013)."""

    def __init__(self, n: int = 16) -> None:
        super().__init__()
        f = np.fft.fftfreq(n) * 2 * np.pi
        fy, fx = np.meshgrid(f, f, indexing="ij")
        centres = [(s * np.cos(a), s * np.sin(a)) for s in (2.0, 1.0) for a in (0, np.pi / 2)]
        wavelets = [np.exp(-((fx - cx) ** 2 + (fy - cy) ** 2) / 0.5) for cx, cy in centres]
        self.register_buffer("wavelets", torch.as_tensor(np.stack(wavelets)))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        first = torch.fft.ifft2(torch.fft.fft2(x) * self.wavelets).abs()
        second = torch.fft.ifft2(torch.fft.fft2(first[:, :2]) * self.wavelets[2:]).abs()
        return F.avg_pool2d(x, 8), F.avg_pool2d(first, 8), F.avg_pool2d(second, 8)


class Spectrogram(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("window", torch.hann_window(16))

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.stft(x, 16, 8, window=self.window, center=True, return_complex=True)
        return torch.log(spectrum.abs().square() + 1e-3)


class VOne(nn.Module):
    """Fixed Gabor filters, then simple and complex cells (Dapello et al., 2020)."""

    def __init__(self) -> None:
        super().__init__()
        y, x = torch.meshgrid(*2 * [torch.arange(-3.0, 4.0)], indexing="ij")
        angles = torch.pi * torch.arange(4)[:, None, None] / 4
        across = x * angles.cos() + y * angles.sin()
        envelope = torch.exp(-(x**2 + y**2) / 8)
        for name, phase in (("even", 0.0), ("odd", torch.pi / 2)):
            self.register_buffer(name, (envelope * torch.cos(1.5 * across + phase))[:, None].repeat(1, 3, 1, 1) / 3)
        self.bottleneck = nn.Conv2d(4, 3, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        even, odd = (F.conv2d(x, weight, stride=2, padding=3) for weight in (self.even, self.odd))
        simple = F.relu(even[:, :2])
        cells = torch.sqrt(even[:, 2:] ** 2 + odd[:, 2:] ** 2 + 1e-9) / math.sqrt(2)
        return self.bottleneck(torch.cat([simple, cells], 1))


FIELD = {
    "gain control": Kind(module(lambda: GainControl(False)), GREY, writes=True),
    "gain control, filter cached": Kind(module(lambda: GainControl(True)), GREY, writes=True),
    "gain control, warm cache": Kind(warm, GREY, writes=True),
    "gain control, negative widths": Kind(module(lambda: GainControl(True, True)), GREY, writes=True),
    "Laplacian pyramid": Kind(module(LaplacianPyramid), GREY, functorch=READS_INTEGERS),
    "Laplacian pyramid, odd size": Kind(module(LaplacianPyramid), (1, 1, 13, 15), functorch=READS_INTEGERS),
    "normalized Laplacian pyramid": Kind(module(lambda: LaplacianPyramid(True)), GREY, functorch=READS_INTEGERS),
    "steerable pyramid": Kind(module(SteerablePyramid), GREY),
    "texture statistics": Kind(module(TextureStatistics), GREY),
    "texture statistics, complex64 inside": Kind(
        module(lambda: TextureStatistics(torch.complex64)), GREY, precision=torch.float32, smooth=False
    ),
    "GDN": Kind(module(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), GDN(4), nn.Conv2d(4, 2, 3))), functorch=False),
    "perceptual distance": Kind(perceptual(False)),
    "perceptual distance at its reference": Kind(perceptual(True), smooth=False),  # J is zero: nothing to compare to
    "perceptual distances, several": Kind(perceptual(False, scalar=False)),
    "structural similarity": Kind(module(Similarity), GREY),
    "scattering": Kind(module(Scattering), GREY),
    "spectrogram": Kind(module(Spectrogram), (1, 64)),
    "VOne block": Kind(module(VOne)),
}

# Architectures' layers


class Tokens(nn.Module):
    """A layer for sequences of 8 features, on patches of an image."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 2, stride=2)
        self.layer = layer

    def forward(self, x: Tensor) -> Any:
        return self.layer(self.embed(x).flatten(2).transpose(1, 2))


class SelfAttention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.heads = nn.MultiheadAttention(8, 2, batch_first=True)
        self.options = options

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.heads(x, x, x, **self.options)


class ScaledAttention(nn.Module):
    def __init__(self, mask: str) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.mask = mask
        self.register_buffer("bias", torch.randn(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        options = {
            "none": {},
            "causal": {"is_causal": True},
            "boolean": {"attn_mask": self.bias.tril() != 0},
            "float": {"attn_mask": self.bias},
        }
        return F.scaled_dot_product_attention(q, k, v, **options[self.mask])


class WindowAttention(nn.Module):
    """By einsum and softmax, with a table of relative positions, in shifted windows, as in Swin."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.table = nn.Parameter(torch.randn(7, 2))
        places = torch.arange(4)
        self.register_buffer("places", places[:, None] - places + 3)

    def forward(self, x: Tensor) -> Tensor:
        windows = torch.roll(x, -2, 1).reshape(4, 4, 8)
        q, k, v = self.qkv(windows).unflatten(-1, (3, 2, 4)).unbind(2)
        scores = torch.einsum("wihc, wjhc -> whij", q * 0.5, k) + self.table[self.places].permute(2, 0, 1)
        scores = scores.masked_fill(torch.ones(4, 4, dtype=torch.bool, device=x.device).triu(3), -100.0)
        return torch.roll(torch.einsum("whij, wjhc -> wihc", scores.softmax(-1), v).reshape(1, 16, 8), 2, 1)


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(8, 2, 16, batch_first=True)
        self.queries = nn.Parameter(torch.randn(1, 3, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.queries, x)


class Recurrent(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Any:
        return self.layer(x[0].permute(1, 0, 2).flatten(1)[None])


class Cells(nn.Module):
    """A cell of each kind, fed with one row of an image after another."""

    def __init__(self) -> None:
        super().__init__()
        self.long, self.gated, self.plain = nn.LSTMCell(24, 5), nn.GRUCell(5, 4, bias=False), nn.RNNCell(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        memory = gate = state = None
        for row in x[0].permute(1, 0, 2).flatten(1):
            memory = self.long(row[None], memory)
            gate = self.gated(memory[0], gate)
            state = self.plain(gate, state)
        return state


class RecurrentFunctions(nn.Module):
    """Of a row of an image, without modules: arguments by name, a bias alone, states that depend on the image."""

    def __init__(self) -> None:
        super().__init__()
        self.long, self.gated, self.plain = nn.LSTM(24, 5), nn.GRUCell(24, 5), nn.RNN(24, 5, nonlinearity="relu")

    def forward(self, x: Tensor) -> list[Any]:
        rows = x[0].permute(1, 0, 2).flatten(1)[:, None]
        first = rows[0]
        hidden, gated = first[:, :5].sin(), self.gated
        input_weight, weight, input_bias, bias = self.long._flat_weights
        cell = {"w_ih": input_weight, "w_hh": weight}
        layer = {"has_biases": True, "num_layers": 1, "dropout": 0.0, "train": False, "bidirectional": False}
        return [
            torch.lstm_cell(input=first, hx=[hidden, hidden], b_ih=input_bias, b_hh=bias, **cell),
            torch.lstm_cell(first, (hidden, hidden), b_hh=bias, **cell),
            torch.lstm_cell(first, (hidden, hidden), input_weight, weight, input_bias),
            torch.gru_cell(first, hidden, gated.weight_ih, gated.weight_hh, gated.bias_ih, b_hh=gated.bias_hh),
            torch.gru_cell(first, hx=hidden, w_ih=gated.weight_ih, w_hh=gated.weight_hh, b_hh=gated.bias_hh),
            torch.rnn_relu(rows, hidden[None], params=self.plain._flat_weights, batch_first=False, **layer),
        ]


class Packed(nn.Module):
    """The rows of an image as two sequences of different lengths, to an LSTM with projections and to a GRU."""

    def __init__(self) -> None:
        super().__init__()
        self.long, self.gated = nn.LSTM(24, 5, proj_size=3, bidirectional=True), nn.GRU(24, 4)

    def forward(self, x: Tensor) -> list[Tensor]:
        rows = x[0].permute(1, 0, 2).flatten(1)
        packed = nn.utils.rnn.pack_sequence([rows[:3], rows[2:]])
        return [layer(packed)[0].data for layer in (self.long, self.gated)]


class Sampler(nn.Module):
    """A spatial transformer, whose grid is a constant."""

    def __init__(self, mode: str = "bilinear") -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor([[[0.71, 0.313, 0.0173], [-0.233, 0.617, 0.0291]]]))
        self.mode = mode

    def forward(self, x: Tensor) -> Tensor:
        grid = F.affine_grid(self.theta, x.shape, align_corners=False)
        return F.grid_sample(x.square(), grid, mode=self.mode, align_corners=False)


class UNet(nn.Module):
    """As in diffusion models: a time's embedding scales the channels; skips, attention, group norm, up-sampling."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 16))
        self.first, self.down, self.up = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, 2, 1), nn.Conv2d(16, 8, 1)
        self.norm, self.qkv, self.last = nn.GroupNorm(2, 8), nn.Conv2d(8, 24, 1), nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angles = t.to(x.dtype)[:, None] * torch.exp(-torch.arange(4, dtype=x.dtype, device=x.device))
        scale, shift = self.time(torch.cat([angles.sin(), angles.cos()], -1))[:, :, None, None].chunk(2, 1)
        skip = F.silu(self.first(x))
        h = self.norm(self.down(skip)) * (1 + scale) + shift
        q, k, v = self.qkv(F.silu(h)).flatten(2).mT.chunk(3, -1)
        h = h + F.scaled_dot_product_attention(q, k, v).mT.reshape(h.shape)
        h = F.interpolate(h, scale_factor=2.0, mode="nearest")
        return self.last(F.silu(self.up(torch.cat([h, skip], 1))))


def recurrent(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    net = module(lambda: Recurrent(nn.LSTM(24, 5, batch_first=True)))(dtype)
    return lambda x: net(x)[0]


def unet(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    net, t = module(UNet)(dtype), torch.tensor([37])
    return lambda x: net(x, t)


class Generator(nn.Module):
    """An image from a latent, as StyleGAN's: the latent's norm is one, its styles modulate weights."""

    def __init__(self) -> None:
        super().__init__()
        self.mapping, self.start = nn.Linear(512, 16), nn.Parameter(torch.randn(1, 8, 3, 3))
        self.weight = nn.Parameter(torch.randn(8, 8, 3, 3))
        self.style, self.up, self.image = nn.Linear(16, 8), nn.ConvTranspose2d(8, 4, 4, 2, 1), nn.Conv2d(4, 3, 1)
        self.register_buffer("noise", torch.randn(1, 1, 3, 3))

    def forward(self, z: Tensor) -> Tensor:
        w = F.leaky_relu(self.mapping(z * z.square().mean(1, keepdim=True).add(1e-8).rsqrt()), 0.2)
        weight = self.weight * (1 + self.style(w))[0, None, :, None, None]
        weight = weight * weight.square().sum((1, 2, 3), keepdim=True).add(1e-8).rsqrt()
        h = F.leaky_relu(F.conv2d(self.start, weight, padding=1) + 0.1 * self.noise, 0.2)
        return self.image(F.leaky_relu(self.up(h), 0.2)).tanh()


def net(*layers: Callable[[], nn.Module]) -> Callable[[torch.dtype], nn.Module]:
    """Between convolutions."""
    return module(lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), *(layer() for layer in layers)))


def tokens(layer: Callable[[], nn.Module]) -> Callable[[torch.dtype], nn.Module]:
    return module(lambda: Tokens(layer()))


def conv(*args: Any, **kwargs: Any) -> nn.Module:
    return nn.Conv2d(*args, **kwargs)


def spectral() -> nn.Module:
    return nn.Sequential(parametrizations.spectral_norm(conv(3, 4, 3)), nn.Tanh())


def weighted() -> nn.Module:
    return nn.Sequential(parametrizations.weight_norm(conv(3, 4, 3)), nn.Tanh())


ARCHITECTURES = {
    "MultiheadAttention": Kind(tokens(SelfAttention)),
    "MultiheadAttention, (activation, None)": Kind(tokens(lambda: SelfAttention(need_weights=False))),
    "MultiheadAttention, weights of each head": Kind(tokens(lambda: SelfAttention(average_attn_weights=False))),
    "scaled attention": Kind(tokens(lambda: ScaledAttention("none"))),
    "scaled attention, causal": Kind(tokens(lambda: ScaledAttention("causal"))),
    "scaled attention, boolean mask": Kind(tokens(lambda: ScaledAttention("boolean"))),
    "scaled attention, float mask": Kind(tokens(lambda: ScaledAttention("float"))),
    "window attention": Kind(tokens(WindowAttention)),
    "TransformerEncoderLayer": Kind(tokens(lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))),
    "TransformerDecoderLayer": Kind(tokens(Decoder)),
    "conv transpose": Kind(net(lambda: nn.ConvTranspose2d(4, 3, 3, 2, 1, output_padding=1), nn.Softplus)),
    "pixel shuffle": Kind(net(lambda: nn.PixelShuffle(2), nn.Tanh, lambda: nn.PixelUnshuffle(2))),
    "batch norm": Kind(net(lambda: nn.BatchNorm2d(4), nn.ReLU)),
    "group norm": Kind(net(lambda: nn.GroupNorm(2, 4), nn.GELU)),
    "instance norm": Kind(net(lambda: nn.InstanceNorm2d(4, affine=True), nn.SiLU)),
    "layer norm": Kind(tokens(lambda: nn.LayerNorm(8))),
    "local response norm": Kind(net(lambda: nn.LocalResponseNorm(2), nn.Hardswish)),
    "hard sigmoid": Kind(net(nn.Hardsigmoid, lambda: nn.Conv2d(4, 3, 1), nn.Hardswish), double_backward=False),
    "weight norm": Kind(module(weighted)),
    "spectral norm": Kind(module(spectral)),
    "grid sample": Kind(module(Sampler), functorch=SAMPLES_FORWARD),
    "grid sample, nearest": Kind(module(lambda: Sampler("nearest")), functorch=SAMPLES_FORWARD),
    "LSTM": Kind(  # float32's fused kernel has no forward mode
        module(lambda: Recurrent(nn.LSTM(24, 5, batch_first=True, bidirectional=True))),
        (1, 3, 4, 8),
        functorch=False,
    ),
    "LSTM in a function": Kind(recurrent, (1, 3, 4, 8), functorch=False),
    "GRU": Kind(module(lambda: Recurrent(nn.GRU(24, 5, num_layers=2, batch_first=True))), (1, 3, 4, 8)),
    "recurrent cells": Kind(module(Cells), (1, 3, 4, 8)),
    "recurrent functions": Kind(module(RecurrentFunctions), (1, 3, 4, 8)),
    "packed sequence": Kind(  # packing has no forward mode
        module(Packed), (1, 3, 4, 8), engine="double_backward", forward_mode=False, functorch=False
    ),
    "U-Net at a time": Kind(unet),
    "generator": Kind(module(Generator), (1, 512)),
    "max pooling": Kind(net(lambda: nn.MaxPool2d(3, 2, 1), lambda: nn.Conv2d(4, 2, 3))),
    "adaptive pooling": Kind(net(lambda: nn.AdaptiveAvgPool2d(3), nn.ELU, lambda: nn.AdaptiveMaxPool2d(2))),
    "transposed memory": Kind(lambda dtype: net(nn.GELU)(dtype).to(memory_format=torch.channels_last)),
}

# Operations


def trimmed_mean(x: Tensor) -> Tensor:
    return x.flatten(2).sort(-1).values[..., 8:-8].mean(-1)


def best_patches(x: Tensor) -> tuple[Tensor, Tensor]:
    patches = F.unfold(x, 2, stride=2)
    best = patches.square().sum(1).topk(5)
    return best.values, patches.gather(2, best.indices[:, None].expand(-1, patches.shape[1], -1))


def median_pooling(x: Tensor) -> Tensor:
    return x.unfold(2, 3, 1).unfold(3, 3, 1).flatten(-2).median(-1).values


def overlapped(x: Tensor) -> Tensor:
    return F.fold(F.unfold(x.square(), 3, padding=1).sin(), x.shape[2:], 3, padding=1)


def filled(x: Tensor) -> Tensor:
    out = x.new_zeros(1, 6, *x.shape[2:])
    out[:, ::2] = x.square()
    out[:, 1::2, :, 1:] = x[..., :-1].sin()
    out[:, 0, 0] *= x[0, 1, 0]
    return out


def views_in_place(x: Tensor) -> Tensor:
    y = x.square()
    y[:, 0].mul_(3).add_(x[:, 1])
    y.view(3, -1)[2:].sub_(y.view(3, -1)[:1]).neg_()
    y.transpose(2, 3)[:, :, 0].copy_(x[..., 1])
    return y * x


def leaky_integrator(x: Tensor) -> Tensor:
    state = torch.zeros_like(x[..., 0])
    for step in x.unbind(-1):
        state.lerp_(step.square(), torch.full((1,), 0.3, dtype=x.dtype).expand(8))
    return (2 * x).lerp_(state[..., None].expand_as(x), 0.25)


def odd_constants(x: Tensor) -> Tensor:
    table = torch.tensor([[0.1, 0.2], [0.3, 0.4]], dtype=x.dtype)
    column = torch.linspace(0, 1, 7, dtype=x.dtype)[::3][1:2].expand(1, 1)
    return (x * table[:1, 1:] - column * torch.tensor(0.3, dtype=x.dtype).expand(1)).tanh() * table.T[1:, :1]


class SparsePooling(nn.Module):
    def __init__(self, layout: str) -> None:
        super().__init__()
        windows = (torch.rand(20, 192) - 0.8).clamp(min=0)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
            self.register_buffer("windows", windows.to_sparse() if layout == "COO" else windows.to_sparse_csr())

    def forward(self, x: Tensor) -> Tensor:
        return (self.windows @ x.reshape(-1, 1).square()).add(1e-3).sqrt()


def smoothed(x: Tensor, **options: Any) -> Tensor:
    return F.interpolate(x.square(), antialias=True, align_corners=False, **options)


def resized(x: Tensor) -> tuple[Tensor, ...]:
    return (
        F.interpolate(x.square(), scale_factor=2, mode="nearest"),
        F.interpolate(x.square(), (5, 11), mode="bilinear", align_corners=True),
        F.interpolate(x.square(), (7, 6), mode="bicubic"),
        F.interpolate(x.square(), (3, 5), mode="area"),
    )


def checkpointed(x: Tensor) -> Tensor:
    return torch.utils.checkpoint.checkpoint(lambda x: (x.sin() * x).cumsum(-1), x, use_reentrant=False)


def looping(x: Tensor) -> Tensor:
    for _ in range(3):
        x = x + 0.1 * torch.linalg.solve(torch.eye(8, dtype=x.dtype) + x @ x.mT, x)
    return x


def magnitudes(x: Tensor) -> list[Tensor]:
    return [
        x.abs(),
        (x.square() + 1e-8).sqrt(),
        torch.linalg.vector_norm(x, dim=1),
        torch.hypot(x[:, 0], x[:, 1] + 0.1),
        F.relu(x - 0.0) * 2,
        x.clamp(0.2, 0.8),
        torch.where(x > 0, x.clamp(min=1e-3).log(), x),
        F.huber_loss(x, torch.zeros_like(x), reduction="none"),
    ]


def several(x: Tensor) -> list[Tensor]:
    flattened = x.flatten(1)
    return [
        F.log_softmax(flattened, -1),
        torch.logsumexp(x, (2, 3)),
        torch.erf(flattened),
        flattened.cumprod(-1)[:, :9],
        flattened.cummax(-1).values,
        F.softmin(flattened, -1),
        F.cosine_similarity(x[:, 0], x[:, 1], dim=-1),
        (x[0, 0, :, None] - x[0, 1]).norm(dim=-1),
    ]


class Lower(nn.Module):
    """A step in float32, whatever the model's dtype."""

    def __init__(self, step: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        return self.step(x.float()).to(x.dtype) * x


def straight_through(x: Tensor) -> Tensor:
    return (x + ((4 * x).round() / 4 - x).detach()).square()


OPERATIONS = {
    "sorted": Kind(function(trimmed_mean)),
    "topk": Kind(function(best_patches)),
    "median pooling": Kind(function(median_pooling)),
    "fold": Kind(function(overlapped)),
    "cumsum": Kind(function(lambda x: (x.sin() * x).cumsum(-1).flip(-1))),
    "antialiased, bilinear": Kind(function(lambda x: smoothed(x, size=(3, 5), mode="bilinear"))),
    "antialiased, bicubic": Kind(function(lambda x: smoothed(x, size=(5, 4), mode="bicubic"))),
    "interpolated": Kind(function(resized)),
    "normalized at zero": Kind(function(lambda x: F.normalize(x, dim=1)), smooth=False, zeros=True),
    "kinks at zero": Kind(function(magnitudes), smooth=False, zeros=True),
    "quantile": Kind(function(lambda x: x.quantile(torch.tensor([0.25, 0.75], dtype=x.dtype), dim=-1))),
    "lerp in place": Kind(function(leaky_integrator)),
    "filled in slices": Kind(function(filled)),
    "in place on views": Kind(function(views_in_place)),
    "constants of odd strides": Kind(function(odd_constants)),
    "sparse, COO": Kind(module(lambda: SparsePooling("COO")), functorch=False),
    "sparse, CSR": Kind(module(lambda: SparsePooling("CSR")), functorch=False),
    "checkpoint": Kind(function(checkpointed), functorch=CHECKPOINTS_FORWARD),
    "solve": Kind(function(looping)),
    "several": Kind(function(several)),
    "group norm in float32": Kind(
        net(lambda: Lower(lambda x: F.group_norm(x, 2))), precision=torch.float32, smooth=False
    ),
    "softmax in float32": Kind(tokens(lambda: Lower(lambda x: x.softmax(-1))), precision=torch.float32, smooth=False),
}

# What models keep, and what they answer


class KeepsLast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = conv(3, 4, 3), conv(4, 2, 3)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.last = F.softplus(self.first(x))
        self.seen = [self.last.mean(), *self.seen][:1]
        return self.second(self.last)


class Keep:
    """A forward hook."""

    def __init__(self, kept: dict[str, Any], name: str) -> None:
        self.kept, self.name = kept, name

    def __call__(self, layer: nn.Module, inputs: Any, output: Any) -> None:
        self.kept[self.name] = output


class Hooked(nn.Module):
    """Its response is what hooks have stored, as feature extractors do it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(conv(3, 4, 3), nn.Tanh(), conv(4, 2, 3))
        self.kept: dict[str, Any] = {}
        for name, layer in self.net.named_children():
            layer.register_forward_hook(Keep(self.kept, name))

    def forward(self, x: Tensor) -> dict[str, Any]:
        self.net(x)
        return {name: self.kept[name] for name in ("1", "2")}


@dataclasses.dataclass
class Output:
    hidden: Tensor
    attentions: Tensor | None = None
    pooled: tuple[Tensor, ...] = ()


class ModelOutput(collections.OrderedDict):
    """As of transformers: a mapping, and its entries are attributes."""

    def __init__(self, **entries: Any) -> None:
        super().__init__({name: value for name, value in entries.items() if value is not None})
        vars(self).update(entries)


Pair = collections.namedtuple("Pair", ["mean", "scale"])


class Answers(nn.Module):
    """Features, wrapped."""

    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.first = conv(3, 4, 3)
        self.wrap = wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.first(x).tanh())


def as_dataclass(h: Tensor) -> Output:
    return Output(h, None, (h.mean((2, 3)),))


def as_model_output(h: Tensor) -> ModelOutput:
    return ModelOutput(hidden=h, attentions=None, pooled=h.mean((2, 3)))


def as_named_tuple(h: Tensor) -> Pair:
    return Pair(h.mean((2, 3)), h.std((2, 3)))


def as_nested(h: Tensor) -> dict[str, Any]:
    return {"a": [h[:, :1], (h[:, 1:].square(), None)], "none": None, "b": {"c": h.mean()}}


def as_pair_with_none(h: Tensor) -> tuple[Tensor, None]:
    return h, None


def compiled(fullgraph: bool) -> Callable[[torch.dtype], Callable]:
    def build(dtype: torch.dtype) -> Callable:
        layers = nn.Sequential(conv(3, 4, 3), nn.ReLU(), conv(4, 2, 3))
        return torch.compile(layers.eval().to(dtype), backend="eager", fullgraph=fullgraph)

    return build


def plain(model: Callable) -> Callable:
    """Without torch.compile around it."""
    return getattr(model, "_orig_mod", model)


class Lazily(nn.Module):
    """Its table of positions is set up by the first call, as a buffer and as an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([2.0]))
        self.register_buffer("table", None)
        self.other = None

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None:
            self.table = self.scale * torch.linspace(0, 1, x.shape[-1], dtype=x.dtype)
            self.other = self.table.cos()
        return (x * self.table).sin() * self.other


class CachesInDict(nn.Module):
    """What it computes of its parameters is kept by device, as LeViT's attention biases in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.biases = nn.Parameter(torch.rand(5))
        self.register_buffer("places", torch.arange(8) % 5, persistent=False)
        self.cache: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        key = str(x.device)
        if key not in self.cache:
            self.cache[key] = self.biases[self.places]
        return (x + self.cache[key]).square()


KEEPERS = {
    "cache in a dict": Kind(module(CachesInDict)),
    "keeps its last activation": Kind(module(KeepsLast)),
    "hooks that store": Kind(module(Hooked)),
    "lazy table": Kind(module(Lazily)),
    "dataclass": Kind(module(lambda: Answers(as_dataclass))),
    "model output": Kind(module(lambda: Answers(as_model_output))),
    "named tuple": Kind(module(lambda: Answers(as_named_tuple))),
    "nested dict": Kind(module(lambda: Answers(as_nested))),
    "(activation, None)": Kind(module(lambda: Answers(as_pair_with_none))),
    "compiled": Kind(compiled(False)),
    "compiled, full graph": Kind(compiled(True)),
    "straight-through": Kind(function(straight_through), smooth=False),
}

KINDS = FIELD | ARCHITECTURES | OPERATIONS | KEEPERS

# Other packages'


def plenoptic_front_end(name: str, cache: str) -> Callable[[torch.dtype], nn.Module]:
    def build(dtype: torch.dtype) -> nn.Module:
        import plenoptic

        model = getattr(plenoptic.models, name)(7, cache_filt=cache != "no").eval().to(dtype)
        if cache == "warm":
            with torch.no_grad():
                model(torch.ones(GREY, dtype=dtype))
        return model

    return build


def from_package(package: str, build: Callable[[Any], Callable], *shape: int, **expected: Any) -> Kind:
    def made(dtype: torch.dtype) -> Callable:
        model = build(importlib.import_module(package))
        return model.eval().to(dtype) if isinstance(model, nn.Module) else model

    return Kind(made, shape or (1, 3, 32, 32), needs=package.split(".")[0], **expected)


def transformer(transformers: Any, name: str, **options: Any) -> nn.Module:
    """With few parameters."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = getattr(transformers, f"{name}Config")(image_size=32, patch_size=8, **sizes, **options)
    return getattr(transformers, f"{name}Model")(config)


def language_model(transformers: Any) -> Callable:
    """From embeddings, which take the image's place."""
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=9, bos_token_id=0, eos_token_id=0)
    return Embedded(transformers.GPT2Model(config))


class Embedded(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Any:
        return self.net(inputs_embeds=x, use_cache=False)


FRONT_ENDS = {
    "Gaussian": True,  # whether it writes parameters
    "CenterSurround": False,
    "LinearNonlinear": False,
    "LuminanceGainControl": True,
    "LuminanceContrastGainControl": True,
    "OnOff": True,
}
THEIRS = {
    f"plenoptic {name}, {cache} cache": Kind(plenoptic_front_end(name, cache), GREY, writes=writes, needs="plenoptic")
    for name, writes in FRONT_ENDS.items()
    for cache in ("no", "cold", "warm")
}
THEIRS |= {
    "plenoptic LaplacianPyramid": from_package("plenoptic", lambda po: po.process.LaplacianPyramid(3), 1, 1, 33, 32),
    "plenoptic SteerablePyramidFreq": from_package(
        "plenoptic", lambda po: po.process.SteerablePyramidFreq((32, 32), height=2, order=1), 1, 1, 32, 32
    ),
    "plenoptic PortillaSimoncelli": from_package(
        "plenoptic",
        lambda po: po.models.PortillaSimoncelli((32, 32), n_scales=2, n_orientations=2, spatial_corr_width=3),
        *(1, 1, 32, 32),
        precision=torch.float32,
        smooth=False,
    ),
    "torchvision resnet18": from_package("torchvision.models", lambda tv: tv.resnet18()),
    "torchvision mobilenet_v3_small": from_package(
        "torchvision.models", lambda tv: tv.mobilenet_v3_small(), double_backward=False
    ),
    "torchvision swin": from_package(
        "torchvision.models",
        lambda tv: tv.SwinTransformer([4, 4], 16, [1, 1], [2, 2], [4, 4], num_classes=7),
    ),
    "timm test_vit": from_package("timm", lambda timm: timm.create_model("test_vit", img_size=32)),
    "timm test_convnext": from_package("timm", lambda timm: timm.create_model("test_convnext")),
    "timm test_efficientnet": from_package("timm", lambda timm: timm.create_model("test_efficientnet")),
    "transformers ViT": from_package("transformers", lambda tf: transformer(tf, "ViT")),
    "transformers CLIP": from_package("transformers", lambda tf: transformer(tf, "CLIPVision")),
    "transformers GPT2": from_package("transformers", language_model, 1, 5, 16),
    "kornia ssim": from_package("kornia", lambda k: Distance(k.losses.SSIMLoss(5)), 1, 3, 12, 12),
    "kornia lab": from_package("kornia", lambda k: k.color.RgbToLab(), 1, 3, 8, 8),
    "kornia unsharp": from_package("kornia", lambda k: k.filters.UnsharpMask((3, 3), (1.0, 1.5)), 1, 3, 8, 8),
    "lpips": from_package(
        "lpips",
        lambda lpips: Distance(lpips.LPIPS(False, "squeeze", pnet_rand=True, verbose=False)),
        *(1, 3, 64, 64),
        smooth=False,  # kinks lie everywhere
    ),
}


class Distance(nn.Module):
    """To one image."""

    def __init__(self, metric: nn.Module) -> None:
        super().__init__()
        self.metric = metric
        self.register_buffer("reference", torch.rand(1, 3, 64, 64))  # cropped as needed

    def forward(self, x: Tensor) -> Tensor:
        return self.metric(x, self.reference[..., : x.shape[-2], : x.shape[-1]])
