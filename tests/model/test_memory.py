"""What building a linearization takes and what it holds, counted by the memory that PyTorch's operations make."""

import pytest
import torch
from helpers import assert_close
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import fisherop.model.build
from fisherop import linearize
from fisherop.model import promoted
from fisherop.model.duals import Duals


class Live(TorchDispatchMode):
    """Counts the bytes of tensors that operations make and that are alive; `peak` is the largest sum."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.alive = {key: (ref, size) for key, (ref, size) in self.alive.items() if not ref.expired()}
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, Tensor) and not t.is_meta and not func.is_view:
                storage = t.untyped_storage()
                self.alive.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out


class Residual(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.inside = nn.Sequential(
            *(nn.Conv2d(n, n, 3, 1, 1, bias=False), nn.BatchNorm2d(n), nn.ReLU(inplace=True)),
            *(nn.Conv2d(n, n, 3, 1, 1, bias=False), nn.BatchNorm2d(n)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.inside(x)).relu()


class GainControl(nn.Module):
    """A centre and surround, divided by the local luminance and contrast, as models of the retina do."""

    def blur(self, x: Tensor, width: int) -> Tensor:
        kernel = torch.hann_window(width + 2, dtype=x.dtype)[1:-1].expand(2, 1, 1, -1) / width
        half = width // 2
        x = F.pad(x, (half, half, half, half), mode="reflect")
        return F.conv2d(F.conv2d(x, kernel, groups=2), kernel.mT, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        x = x.expand(-1, 2, -1, -1)
        y = self.blur(x, 3) - self.blur(x, 15)
        y = y / (1 + 5 * self.blur(x, 15))
        return F.softplus(y / (1 + 5 * self.blur(y**2, 9).sqrt()))


def vgg() -> nn.Module:
    layers, n = [], 3
    for width in (16, 16, 0, 32, 32, 0, 64):
        layers += [nn.Conv2d(n, width, 3, 1, 1), nn.ReLU(inplace=True)] if width else [nn.MaxPool2d(2, 2)]
        n = width or n
    return nn.Sequential(*layers)


def resnet() -> nn.Module:
    stem = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
    return nn.Sequential(*stem, Residual(16), Residual(16), nn.Conv2d(16, 32, 3, 2, 1))


def made(build) -> tuple[nn.Module, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build().eval(), torch.rand(1, 1 if build is GainControl else 3, 96, 96)


@pytest.mark.parametrize("build", [vgg, resnet, GainControl])
def test_building_takes_little_more_than_a_forward_pass_and_what_is_held(build, monkeypatch):
    monkeypatch.setattr(fisherop.model.build, "_MUCH", 0)  # so that what is held for so small an image is freed, too
    model, x = made(build)
    linearize(x[..., :32, :32], made(build)[0])  # what PyTorch itself sets up at the first call
    with Live() as live, torch.no_grad():
        model(x)
    forward = live.peak
    for _ in range(2):  # the second by the program of the first
        with Live() as live:
            lin = linearize(x, model)
        assert lin.engine_report[-1].startswith("traced")
        assert lin.held_bytes is not None
        assert live.peak <= 2.5 * (forward + lin.held_bytes)


def test_masks_take_a_byte_and_places_four():
    model, x = made(vgg)
    pooled = 48**2 * 16 + 24**2 * 32
    masks = 96**2 * 16 + 48**2 * 32 + 2 * 24**2 * 64 + 3 * pooled  # in the layouts of each direction and of blocks
    places = 3 * 4 * pooled
    lin = linearize(x, model)
    assert lin.held_bytes is not None
    assert lin.held_bytes - lin.image.nbytes - lin.response.nbytes <= masks + places


def test_convolutions_in_bands_are_those_of_the_whole(monkeypatch):
    monkeypatch.setattr(promoted, "_BAND_BYTES", 2**13)
    generator = torch.Generator().manual_seed(0)
    # channels, kernel, stride, padding, dilation, groups
    for n, kernel, stride, padding, dilation, groups in (
        (1, (3, 3), (1, 1), (1, 1), (1, 1), 1),
        (3, (5, 3), (2, 3), (7, 2), (2, 1), 2),
        (1, (21, 1), (1, 1), (0, 0), (1, 1), 4),
        (1, (3, 3), (2, 1), (40, 1), (3, 1), 1),
    ):
        x = torch.randn(n, 4, 40, 30, generator=generator, dtype=torch.float64)
        weight = torch.randn(8, 4 // groups, *kernel, generator=generator, dtype=torch.float64)
        bias = torch.randn(8, generator=generator, dtype=torch.float64)
        whole = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
        with promoted.Promoted():
            bands = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
        assert_close(bands.flatten(), whole.flatten(), torch.float64)


class Conditioned(nn.Module):
    """Layers whose parameters depend on the image, beside such as don't."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.norm.running_var = torch.full((4,), 2.0)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        y = F.conv2d(y, self.conv.weight.transpose(0, 1) * x.mean(), bias=x.mean((0, 2, 3)))
        return F.batch_norm(y, torch.zeros(3), torch.ones(3), weight=x.mean((0, 2, 3)), bias=x.mean((0, 2, 3)))


def test_dual_numbers_in_one_step_are_pytorchs():
    model, x = made(Conditioned)
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    results = []
    with torch.no_grad(), forward_ad.dual_level():
        for steps in (Duals(), torch.overrides.BaseTorchFunctionMode()):
            with steps:
                results.append(forward_ad.unpack_dual(model(forward_ad.make_dual(x, v))))
    (ours, ours_t), (theirs, theirs_t) = results
    assert torch.equal(ours, theirs)
    assert_close(ours_t.flatten(), theirs_t.flatten(), torch.float32)
