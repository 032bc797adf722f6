import concurrent.futures
import gc
import itertools
import logging
import weakref

import pytest
import torch
from helpers import DTYPES, assert_close
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from fisherop import linearize
from fisherop.model import programs
from fisherop.model.engines import ENGINES, Traced
from fisherop.testing import count_flops


class Skip(nn.Module):
    def __init__(self, *inner):
        super().__init__()
        self.inner = nn.Sequential(*inner)

    def forward(self, x):
        return x + self.inner(x)


class Flat(nn.Module):
    """A layer for sequences."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x.flatten(2)).reshape(x.shape)


class Gate(nn.Module):
    """Squeeze and excite: channels scaled by what they are."""

    def __init__(self, channels):
        super().__init__()
        self.linear = nn.Linear(channels, channels)

    def forward(self, x):
        return x * self.linear(x.mean((2, 3))).sigmoid()[:, :, None, None]


class SelfAttention(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.bias = nn.Parameter(torch.ones(3 * channels))

    def forward(self, x):
        bias = self.bias.clone()
        bias[: x.shape[1]].zero_()  # in place, through a view, as swin does
        tokens = self.norm(x.flatten(2).transpose(1, 2))
        qkv = (functional.linear(tokens, self.qkv.weight) + bias).unflatten(-1, (3, -1)).permute(2, 0, 1, 3)
        out = functional.scaled_dot_product_attention(*qkv)
        return x + out.transpose(1, 2).reshape(x.shape)


class Fill(nn.Module):
    """Writes into a new tensor, part by part."""

    def forward(self, x):
        out = torch.zeros_like(x)
        out[:, ::2] = x[:, ::2].tanh()
        out[:, 1::2] = x[:, 1::2].flip(-1)
        out[:, :1].mul_(x[:, -1:])
        return out


class Call(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


C = 4
LAYERS = {
    "conv": lambda: nn.Conv2d(C, C, 3, padding=1),
    "strided": lambda: nn.Conv2d(C, C, 3, stride=2, padding=1),
    "depthwise": lambda: nn.Conv2d(C, C, (5, 1), padding=(2, 0), groups=C),
    "dilated": lambda: nn.Conv2d(C, C, 2, dilation=2, padding=1, bias=False),
    "transposed": lambda: nn.ConvTranspose2d(C, C, 3, stride=2, output_padding=1, groups=2),
    "1d": lambda: Flat(nn.Conv1d(C, C, 3, padding=1)),
    "conv norm relu": lambda: nn.Sequential(nn.Conv2d(C, C, 3, padding=1), nn.BatchNorm2d(C), nn.ReLU(inplace=True)),
    "norm conv": lambda: nn.Sequential(nn.BatchNorm2d(C), nn.Conv2d(C, C, 1)),
    "norm transposed norm": lambda: nn.Sequential(nn.BatchNorm2d(C), nn.ConvTranspose2d(C, C, 2), nn.BatchNorm2d(C)),
    "norm twice": lambda: nn.Sequential(nn.BatchNorm2d(C), nn.BatchNorm2d(C, affine=False)),
    "residual block": lambda: Skip(nn.Conv2d(C, C, 3, padding=1), nn.BatchNorm2d(C), nn.SiLU(inplace=True)),
    "group norm": lambda: nn.GroupNorm(2, C),
    "instance norm": lambda: nn.InstanceNorm2d(C, affine=True),
    "attention": lambda: SelfAttention(C),
    "gate": lambda: Gate(C),
    "fill": lambda: Fill(),
    "max pool": lambda: nn.MaxPool2d(3, 2, 1),
    "stem": lambda: nn.Sequential(
        nn.Conv2d(C, C, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2, 1), Skip(nn.Conv2d(C, C, 3, padding=1))
    ),
    "average pool": lambda: nn.AvgPool2d(2, ceil_mode=True),
    "adaptive pool": lambda: nn.AdaptiveAvgPool2d(3),
    "upsample": lambda: nn.Upsample(scale_factor=2, mode="bilinear"),
    "pad": lambda: nn.ReflectionPad2d((1, 0, 0, 1)),
    "gelu": lambda: nn.GELU(),
    "tanh gelu": lambda: nn.GELU("tanh"),
    "softplus": lambda: nn.Softplus(beta=2),
    "elu": lambda: nn.Sequential(Call(lambda x: x - 0.2), nn.ELU(inplace=True)),
    "leaky": lambda: nn.Sequential(Call(lambda x: x - 0.2), nn.LeakyReLU(0.1, inplace=True)),
    "hardtanh": lambda: nn.ReLU6(),
    "mish": lambda: nn.Mish(),
    "norm of pixel": lambda: Call(lambda x: functional.normalize(x + 0.1, dim=1)),
    "divide": lambda: Call(lambda x: x / (1 + x.square().mean((2, 3), keepdim=True)).sqrt()),
    "shuffle": lambda: nn.Sequential(nn.PixelShuffle(2), nn.Conv2d(C // 4, C, 2, stride=2)),
    "channels last": lambda: Call(lambda x: x.contiguous(memory_format=torch.channels_last)),
    "permuted linear": lambda: nn.Sequential(
        Call(lambda x: x.permute(0, 2, 3, 1)), nn.Linear(C, C), Call(lambda x: x.permute(0, 3, 1, 2))
    ),
    "roll and cat": lambda: Call(lambda x: torch.cat([x[:, 2:].roll(1, -1), x[:, :2] - x[:, 2:]], 1)),
    "fft": lambda: Call(
        lambda x: torch.fft.irfft2(torch.fft.rfft2(x) / (2 + torch.arange(x.shape[-1] // 2 + 1)), x.shape[2:])
    ),
    "complex": lambda: Call(lambda x: (torch.fft.fft2(x).conj() * torch.exp(1j * x) / 9).abs()),
    "softmax": lambda: Call(lambda x: 3 * x.softmax(1)),
    "where": lambda: Call(lambda x: torch.where(x > 0, x.square(), -0.5 * x)),
    "indices": lambda: Call(lambda x: x[:, [1, 0, 3, 2]] + x.index_select(3, torch.arange(x.shape[3]).flip(0))),
    "slices": lambda: Call(lambda x: torch.ones_like(x).mul_(x).slice_scatter(x[..., ::2].square(), 3, step=2)),
    "imaginary": lambda: Call(lambda x: torch.exp(1j * x).imag),
    "widely transposed": lambda: nn.ConvTranspose2d(C, C, 2, dilation=2, output_padding=1, padding=1),
    "gate of one": lambda: Call(lambda x: x.square().mean((0, 2, 3)).reshape(1, C, 1, 1).expand(x.shape) * x[:, :1]),
    "einsum": lambda: Call(lambda x: torch.einsum("bchw,bdhw->bcd", x, x)[..., None]),
}


class Net(nn.Module):
    """Layers in a row, where the size allows. `several`: the response is the last one's output and the mean of each."""

    def __init__(self, names, seed, several):
        super().__init__()
        self.several = several
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.layers = nn.ModuleList([nn.Conv2d(3, C, 3, padding=1), *(LAYERS[name]() for name in names)])
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    nn.init.normal_(module.running_mean)
                    nn.init.uniform_(module.running_var, 0.5, 2)
                    if module.affine:
                        nn.init.normal_(module.weight)

    def forward(self, x):
        means = []
        for layer in self.layers:
            if min(x.shape[2:]) >= 2 and max(x.shape[2:]) <= 16:
                x = layer(x)
                means.append(x.mean())
        return {"last": x, "means": means} if self.several else x


def net(names, seed=0, several=False, dtype=torch.float64):
    return Net(names, seed, several).eval().to(dtype)


def image(dtype=torch.float64, seed=1, size=(6, 8)):
    return torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def dense(model, x):
    """The Jacobian in float64 by reverse mode, row by row."""

    def flat(x):
        out = model(x.clone())
        return torch.cat([t.flatten() for t in [out["last"], *out["means"]]]) if model.several else out.flatten()

    return torch.autograd.functional.jacobian(flat, x).reshape(-1, x.numel())


def check_products(lin, truth, dtype):
    generator = torch.Generator().manual_seed(2)
    for k in (1, 3):
        v = torch.randn(k, *lin.image_shape, generator=generator, dtype=dtype)
        u = torch.randn(k, lin.response_size, generator=generator, dtype=dtype)
        jv, jtu = lin.jvp(v), lin.vjp(u)
        assert_close(jv, v.flatten(1).double() @ truth.T, dtype, factor=1e4)
        assert_close(jtu.flatten(1), u.double() @ truth, dtype, factor=1e4)
        assert torch.equal(jv, lin.jvp(v)) and torch.equal(jtu, lin.vjp(u)), "the same bits again"
        strided_v, strided_u = v.mT.contiguous().mT, u.T.contiguous().T
        assert_close(lin.jvp(strided_v), jv, dtype)
        assert_close(lin.vjp(strided_u), jtu, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_is_traced(name, dtype):
    names = ["softplus", name, "softplus"]
    model = net(names, several=True, dtype=dtype)
    lin = linearize(image(dtype), model, engine="traced")
    check_products(lin, dense(net(names, several=True), image()), dtype)
    other = linearize(image(dtype, seed=5), model)  # by the same program
    assert "by the program of an earlier image" in other.engine_report[-1]
    check_products(other, dense(net(names, several=True), image(seed=5)), dtype)


DRAWN = sorted(set(LAYERS) - {"einsum"})  # which ends a network


@pytest.mark.parametrize("engine", ENGINES)
@settings(max_examples=20)
@given(
    names=st.lists(st.sampled_from(DRAWN), min_size=1, max_size=5),
    seed=st.integers(0, 2**16),
    several=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_random_networks_match_dense_autograd(engine, names, seed, several, dtype):
    # PyTorch 2.13, layout channels_last: the backward pass of one norm is wrong, the other has no forward mode
    assume(not {"instance norm", "group norm"} & set(names) or not {"channels last", "permuted linear"} & set(names))
    names = ["softplus", *names]  # after which no pixel sits on the kink of an activation
    truth = dense(net(names, seed, several), image())
    assume(truth.abs().max() > 1e-30)  # "gate of one" four times in a row: what float32 can't hold
    lin = linearize(image(dtype), net(names, seed, several, dtype), engine=engine)
    check_products(lin, truth, dtype)


@pytest.mark.parametrize("engine", ENGINES)
def test_wrong_blocks_of_pytorchs_are_taken_apart(engine):
    """In PyTorch 2.13 the batched backward pass of a batch norm is wrong for a gradient in layout channels_last."""
    names = ["softplus", "norm transposed norm", "channels last", "adaptive pool"]
    lin = linearize(image(torch.float32), net(names, dtype=torch.float32), engine=engine)
    check_products(lin, dense(net(names), image()), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_wrong_derivative_of_pytorchs_is_not_believed(dtype):
    """See above; the traced engine is right or refused."""
    model = net(["instance norm", "channels last", "adaptive pool"])
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(8, *image().shape, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        slopes = torch.stack(
            [(model(image() + 1e-6 * one) - model(image() - 1e-6 * one)).flatten() / 2e-6 for one in v]
        )
    try:
        lin = linearize(image(dtype), model.to(dtype))
    except ValueError as error:
        assert "forward-mode and reverse-mode derivatives disagree" in str(error)
    else:
        u = torch.randn(1, lin.response_size, generator=generator, dtype=torch.float64)
        assert_close(v.flatten(1) @ lin.vjp(u.to(dtype)).double().flatten(), slopes @ u[0], torch.float32)


def test_count_flops():
    a, b, x = torch.ones(3, 4), torch.ones(4, 5), torch.ones(1, 2, 6, 6)
    assert count_flops(lambda: (a @ b).relu()) == 2 * 3 * 4 * 5
    assert count_flops(lambda: functional.conv2d(x, torch.ones(7, 2, 3, 3))) == 2 * 7 * 2 * 3 * 3 * 4 * 4


CONVOLUTIONAL = ["conv norm relu", "max pool", "residual block", "strided", "conv norm relu"]


@pytest.mark.parametrize(("names", "limit"), [(CONVOLUTIONAL, 2.0), (["depthwise", "permuted linear", "gelu"], 2.0)])
def test_a_product_costs_two_forward_passes(names, limit):
    model, x = net(names, dtype=torch.float32), image(torch.float32, size=(16, 16))
    lin = linearize(x, model)
    forward = count_flops(lambda: model(x))
    for k in (1, 3):
        v, u = torch.ones(k, *x.shape), torch.ones(k, lin.response_size)
        lin.jvp(v), lin.vjp(u)  # the first block of a size is checked
        assert count_flops(lambda v=v: lin.jvp(v)) + count_flops(lambda u=u: lin.vjp(u)) <= limit * k * forward


def test_sums_of_a_layer_with_itself_are_lowered_in_no_time():
    """Each sum asks for the layout of both terms, which share all that came before: 2⁴⁰ paths."""

    def model(x):
        for _ in range(40):
            x = 0.7 * (x * x.detach().sin() + x * x.detach().cos())
        return x

    lin = linearize(image(torch.float32), model, engine="traced")
    v = torch.ones(1, *image().shape)
    assert_close(lin.jvp(v)[0], torch.func.jvp(model, (image(torch.float32),), (v[0],))[1].flatten(), torch.float32)


def test_the_next_image_costs_five_forward_passes():
    model = net(CONVOLUTIONAL, dtype=torch.float32)
    linearize(image(torch.float32), model)
    cost = count_flops(lambda: linearize(image(torch.float32, seed=3), model))
    assert cost <= 5 * count_flops(lambda: model(image(torch.float32)))


def test_memory_is_less_than_autograds():
    model, x = net(CONVOLUTIONAL, dtype=torch.float32), image(torch.float32, size=(16, 16))
    saved = {}

    def pack(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(x.clone().requires_grad_())
    assert 0 < sum(linearize(x, model)._engine.held_bytes) <= sum(saved.values())


def test_a_program_goes_with_its_model():
    model = net(["conv", "gelu"])
    linearize(image(), model)
    (kept,) = programs._KEPT[model].values()
    program = weakref.ref(kept.program)
    del kept
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None and program() is None


def change_in_place(model):
    with torch.no_grad():
        model.layers[0].weight.mul_(2)


def change_behind_the_back(model):
    model.layers[0].weight.data.mul_(2)  # PyTorch counts no version here; the check has to see it


def replace(model):
    model.layers[0].weight = nn.Parameter(model.layers[0].weight.detach() * 2)


def change_flag(model):
    model.layers[1].beta = 5.0


def change_hook(model):
    model.layers[1].register_forward_hook(lambda module, inputs, output: output * 2)


@pytest.mark.parametrize("change", [change_in_place, change_behind_the_back, replace, change_flag, change_hook])
def test_a_changed_model_gets_a_new_program(change):
    model = net(["softplus", "conv"])
    v = torch.ones(1, *image().shape, dtype=torch.float64)
    before = linearize(image(), model).jvp(v)
    change(model)
    after = linearize(image(), model)
    assert "traced: in use, 64 vectors" in after.engine_report[-1]
    check_products(after, dense(model, image()), torch.float64)
    assert not torch.allclose(before, after.jvp(v))


class Loose(nn.Module):
    """What it depends on lies where it is not looked for: in an iterator."""

    def __init__(self):
        super().__init__()
        self.held = itertools.repeat([1.0, 1.0])

    def forward(self, x):
        gains = next(self.held)
        return {"large": gains[0] * 1e3 * x.sin(), "small": gains[1] * x.mean(-1).cos()}


@pytest.mark.parametrize("gain", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_small_change_is_seen_in_each_part_of_the_response(gain, dtype):
    model, x = Loose(), image(dtype)
    linearize(x, model)
    assert "by the program" in linearize(x, model).engine_report[-1]
    next(model.held)[gain] = 1 + 1e5 * torch.finfo(dtype).eps
    report = linearize(x, model).engine_report
    assert "the program of an earlier image is rejected" in report[0] and report[-1].startswith("traced: in use")
    assert "by the program" in linearize(x, model).engine_report[-1]


def test_programs_are_kept_for_every_size():
    model = net(["conv", "gelu"])
    sizes = [(6, 8), (8, 8), (6, 8), (8, 8)]
    resumed = ["by the program" in linearize(image(size=size), model).engine_report[-1] for size in sizes]
    assert resumed == [False, False, True, True]


def test_a_resumed_program_is_tried_in_blocks():
    model = net(["slices"])
    assert linearize(image(), model, chunk_size=1).chunk_size == 1
    lin = linearize(image(), model)
    assert "by the program" in lin.engine_report[-1] and lin.chunk_size == 64
    check_products(lin, dense(model, image()), torch.float64)


def test_the_directions_of_the_check_are_not_the_image():
    """J x is zero where the scale of x has no effect."""
    x = torch.randn(1, 4, 6, 8, generator=torch.Generator().manual_seed(0))
    assert linearize(x, nn.GroupNorm(2, 4), engine="traced").engine_report[-1].startswith("traced: in use")


def test_linearizing_in_threads():
    before = torch.backends.mha.get_fastpath_enabled()
    models = [net(["attention", "conv norm relu"], seed) for seed in range(8)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for engine in ENGINES:
            lins = pool.map(lambda model, engine=engine: linearize(image(), model, engine=engine), models)
            v = torch.ones(1, *image().shape, dtype=torch.float64)
            for model, product in zip(models, pool.map(lambda lin, v=v: lin.jvp(v), list(lins)), strict=True):
                assert_close(product[0], dense(model, image()).sum(1), torch.float64, factor=1e4)
    assert torch.backends.mha.get_fastpath_enabled() == before


@pytest.mark.parametrize("seen", [lambda x: x.mean() > 0.5, lambda x: float(x.detach().mean()) > 0.5])
def test_a_program_that_followed_the_image_is_for_that_image_alone(seen):
    class Branches(nn.Module):
        several = False

        def forward(self, x):
            return x.sin() if seen(x) else x.cos()

    model = Branches()
    for x in (image() / 2, image() / 2 + 0.5):
        lin = linearize(x, model, engine="traced")
        assert "earlier" not in lin.engine_report[-1]
        check_products(lin, dense(model, x), torch.float64)


def test_a_branch_that_python_hides_is_found_by_the_check():
    class Hidden(nn.Module):
        several = False

        def forward(self, x):
            with torch.no_grad():
                bright = float(sum(self.plain.tolist())) > 0.5
            return x.sin() if bright else x.cos()

    model = Hidden()
    for value in (0.0, 1.0):
        model.plain = torch.tensor([value])  # of the image, say, but computed elsewhere
        lin = linearize(image(), model)
        check_products(lin, dense(model, image()), torch.float64)


class Wrong(Traced):
    """J v off by 4 % in a direction that the adjoint identity does not see, as torch.func.linearize was on swin_t."""

    def jvp(self, tangents):
        jv = super().jvp(tangents)
        across = torch.roll(jv, 1, 1)
        across -= (across * jv).sum(1, keepdim=True) / (jv * jv).sum(1, keepdim=True) * jv
        return jv + 0.04 * across


class WrongBackward(Traced):
    def vjp(self, cotangents):
        jtu = super().vjp(cotangents)
        jtu[..., 0, 0] *= 2
        return jtu


class Drifting(Traced):
    """The first product is right, later ones are not: what a constant does that is changed in place."""

    calls = 0

    def jvp(self, tangents):
        self.calls += 1
        return super().jvp(tangents) * (1 if self.calls == 1 else 1 + 1e-15)


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (Wrong, "its J v differs from PyTorch's by"),
        (WrongBackward, "derivatives disagree"),
        (Drifting, "not the same when"),
    ],
)
def test_a_wrong_engine_is_rejected(monkeypatch, caplog, wrong, why):
    monkeypatch.setitem(ENGINES, "traced", wrong)
    model = net(["conv", "gelu", "conv"])
    with caplog.at_level(logging.INFO, logger="fisherop"):
        lin = linearize(image(), model)
    assert lin.engine_report[0].startswith("traced: rejected") and why in lin.engine_report[0]
    assert lin.engine_report[-1].startswith("functional: in use") and why in caplog.text
    check_products(lin, dense(model, image()), torch.float64)
    assert not programs._KEPT.get(model), "what was rejected is not kept"
    with pytest.raises(RuntimeError, match=why):
        linearize(image(), net(["conv", "gelu", "conv"]), engine="traced")


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5", "squeezenet1_1"])
def test_torchvision_layers_are_traced(name):
    torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torchvision.models.get_model(name).eval().double()
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    traced, plain = (linearize(x, model, engine=engine) for engine in ("traced", "functional"))
    v = torch.randn(2, *x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    assert_close(traced.jvp(v), plain.jvp(v), torch.float64)
    assert_close(traced.vjp(plain.jvp(v)), plain.vjp(plain.jvp(v)), torch.float64)


def test_blocks_of_float64_convolutions_are_small():
    """PyTorch multiplies columns there, (places × elements of a kernel), of which a block would leave the cache."""
    conv = nn.Conv2d(1, 1, 31, padding=15)
    single, double = (linearize(torch.rand(1, 1, 32, 32, dtype=d), conv.to(d)).chunk_size for d in DTYPES)
    assert single == 64 and double == (2**25 - 1) // (32 * 32 * 31 * 31 * 8)
