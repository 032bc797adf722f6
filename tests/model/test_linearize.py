import logging
import warnings

import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from helpers import DEVICES, DTYPES, assert_close, flat_small, small_image, small_model
from torch import nn

import fisherop
from fisherop import Eigendistortion, FisherOperator, linearize
from fisherop.model.engines import ENGINES


def dense(model, x):
    jacobian = torch.autograd.functional.jacobian(lambda x: flat_small(model, x), x)
    return jacobian.reshape(-1, x.numel()).cpu()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk_size", [1, 3, None])
@pytest.mark.parametrize("engine", ENGINES)
def test_products_match_dense_autograd_in_float64(dtype, device, chunk_size, engine):
    model = small_model(dtype, device)
    lin = linearize(small_image(dtype, device), model, chunk_size=chunk_size, engine=engine)
    truth = dense(small_model(), small_image(dtype).double())
    generator = torch.Generator().manual_seed(2)
    v = torch.randn(7, *lin.image_shape, generator=generator, dtype=dtype).to(device)
    u = torch.randn(7, lin.response_size, generator=generator, dtype=dtype).to(device)
    assert_close(lin.jvp(v).cpu(), v.cpu().flatten(1).double() @ truth.T, dtype)
    assert_close(lin.vjp(u).cpu().flatten(1), u.cpu().double() @ truth, dtype)
    assert (lin.n_jvp, lin.n_vjp, lin.n_products) == (7, 7, 7)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


class Exp(torch.autograd.Function):
    """A custom function of the old style, which has neither a forward mode nor a vmap rule."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0].exp()


class Attention(nn.Module):
    """Self-attention in the three forms that PyTorch fuses."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.heads = nn.MultiheadAttention(8, 2, batch_first=True)
            self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    def forward(self, x):
        tokens = x.reshape(1, -1, 8)
        fused = nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)
        return self.heads(tokens, tokens, tokens), self.layer(tokens), fused


def checkpointed(x):
    return torch.utils.checkpoint.checkpoint(lambda x: (x.sin() * x).cumsum(-1), x, use_reentrant=False)


def sampled(x):
    grid = torch.linspace(-0.9, 0.7, 24, dtype=x.dtype).reshape(1, 3, 4, 2)
    return nn.functional.grid_sample(x, grid, align_corners=False)


def tied():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        conv = nn.Conv2d(2, 2, 3, padding=1).double()
    return nn.Sequential(conv, nn.GELU(), conv)


MODELS = {  # and the engine that "auto" is to find
    "convolutional": (lambda: small_model(), "traced"),
    "frozen": (lambda: small_model().requires_grad_(False), "traced"),
    "tied weights": (tied, "traced"),
    "scripted": (lambda: torch.jit.script(nn.Sequential(nn.Conv2d(2, 2, 1), nn.Softplus()).double()), "traced"),
    "attention": (lambda: Attention().double().eval(), "traced"),
    "instance norm in training mode": (lambda: nn.InstanceNorm2d(2).double(), "traced"),
    "no batching rule": (lambda: nn.Mish(), "traced"),
    "old custom function": (lambda: Exp.apply, "double_backward"),
    "checkpoint": (lambda: checkpointed, "traced"),
    "grid sample": (lambda: sampled, "traced"),
    "compiled": (lambda: torch.compile(small_model(), backend="eager"), "traced"),
    "traced": (lambda: torch.jit.trace(nn.Softplus(), small_image()), "traced"),
}


@pytest.mark.filterwarnings("ignore:`torch.jit.*` is:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch.compile's, of its own doing
@pytest.mark.parametrize(("build", "engine"), MODELS.values(), ids=MODELS.keys())
def test_every_kind_of_model_matches_central_differences(build, engine):
    model, x = build(), small_image()
    flags = torch.backends.mha.get_fastpath_enabled(), torch.backends.cuda.flash_sdp_enabled()
    lin = linearize(x, model)
    assert lin.engine_report[-1].startswith(f"{engine}: in use, ")
    v = torch.randn(3, *x.shape, generator=torch.Generator().manual_seed(3), dtype=x.dtype)
    u = torch.randn(3, lin.response_size, generator=torch.Generator().manual_seed(4), dtype=x.dtype)
    h = 1e-6

    def respond(x):
        return linearize(x, model).response.flatten()

    difference = torch.stack([(respond(x + h * one) - respond(x - h * one)) / (2 * h) for one in v])
    np.testing.assert_allclose(lin.jvp(v), difference, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose((lin.jvp(v) * u).sum(1), (lin.vjp(u) * v).flatten(1).sum(1), rtol=1e-10)
    assert flags == (torch.backends.mha.get_fastpath_enabled(), torch.backends.cuda.flash_sdp_enabled())


def test_flags_are_restored_after_an_exception():
    def broken(x):
        assert not torch.backends.mha.get_fastpath_enabled() and not torch.backends.cuda.flash_sdp_enabled()
        raise KeyError("broken")

    with pytest.raises(KeyError):
        linearize(small_image(), broken)
    assert torch.backends.mha.get_fastpath_enabled() and torch.backends.cuda.flash_sdp_enabled()


def test_engine_report_says_why():
    lin = linearize(small_image(), Exp.apply)
    tried = [line.split(", ")[0] for line in lin.engine_report]
    assert tried == ["traced: rejected", "functional: rejected", "double_backward: in use"]
    assert all("give the torch.autograd.Function a jvp" in line for line in lin.engine_report[:2])
    with pytest.raises(RuntimeError, match="can't differentiate this model as it has to be: functional: rejected, You"):
        linearize(small_image(), Exp.apply, engine="functional")
    with pytest.raises(
        ValueError,
        match="engine must be one of 'auto', 'traced', 'functional', 'double_backward', got 'magic'",
    ):
        linearize(small_image(), Exp.apply, engine="magic")


@pytest.mark.parametrize("engine", ENGINES)
def test_blocks_without_a_batching_rule_warn_nobody(engine, recwarn):
    """PyTorch has no rule for the derivative of Mish."""
    lin = linearize(small_image(), nn.Mish(), engine=engine)
    block = torch.cat([small_image()[None]] * 3)
    assert torch.equal(lin.jvp(block)[2], lin.jvp(block[:1])[0]) and not recwarn.list


def test_autocast_around_the_caller_is_refused():
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(TypeError, match=r"got torch\.bfloat16"):
        linearize(small_image(torch.float32), nn.Conv2d(2, 2, 3))


@pytest.mark.parametrize("engine", ENGINES)
def test_autocast_around_a_product_changes_nothing(engine):
    lin = linearize(small_image(torch.float32), small_model(torch.float32), engine=engine)
    v = torch.ones(1, *lin.image_shape)
    alone = lin.jvp(v), lin.vjp(lin.jvp(v))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(lin.jvp(v), alone[0]) and torch.equal(lin.vjp(alone[0]), alone[1])


def test_response_is_flattened_in_order():
    lin = linearize(small_image(), small_model())
    torch.testing.assert_close(lin.response, flat_small(small_model(), small_image()).detach())
    assert lin.response_shape == (lin.response_size,) and lin.image_size == 48


def test_single_tensor_keeps_its_shape():
    assert linearize(torch.ones(1, 1, 4, 5), nn.Conv2d(1, 2, 3)).response_shape == (1, 2, 2, 3)


def test_image_and_model_are_as_before():
    class Greedy(nn.Module):
        def forward(self, x):
            return x.mul_(2).relu_()

    image = torch.rand(3, 4)
    before = image.clone()
    lin = linearize(image, Greedy())
    lin.jvp(torch.ones(2, 3, 4))
    assert torch.equal(image, before) and torch.equal(lin.image, before)
    image.zero_()
    assert torch.equal(lin.image, before), "the linearization must hold a copy"

    model = small_model()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    flags = [(m.training, p.requires_grad) for m in model.modules() for p in m.parameters()]
    rng = torch.get_rng_state()
    lin = linearize(small_image().requires_grad_(), model)
    lin.vjp(lin.jvp(torch.ones(2, *lin.image_shape, dtype=torch.float64)))
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert flags == [(m.training, p.requires_grad) for m in model.modules() for p in m.parameters()]
    assert torch.equal(rng, torch.get_rng_state())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_callers_grad_mode_does_not_matter(context):
    model = small_model()
    with context():
        lin = linearize(small_image(), model)
        product = lin.jvp(torch.ones(2, *lin.image_shape, dtype=torch.float64))
    assert not product.requires_grad
    np.testing.assert_allclose(product[0], dense(small_model(), small_image()).sum(1), atol=1e-12)


def test_model_that_vmap_refuses_goes_one_at_a_time(caplog):
    class Halve(torch.autograd.Function):
        """A custom function without a vmap rule."""

        @staticmethod
        def forward(x):
            return x / 2

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(ctx, g):
            return g / 2

        @staticmethod
        def jvp(ctx, t):
            return t / 2

    with caplog.at_level(logging.INFO):
        lin = linearize(torch.ones(3), Halve.apply, engine="functional")
    assert lin.chunk_size == 1 and "one at a time" in caplog.text
    assert torch.equal(lin.jvp(torch.eye(3)), torch.eye(3) / 2)


def test_repeated_products_give_the_same_bits():
    lin = linearize(small_image(), small_model())
    v = torch.ones(3, *lin.image_shape, dtype=torch.float64)
    first = lin.jvp(v)
    assert all(torch.equal(first, lin.jvp(v)) for _ in range(3))


def test_a_model_of_inference_tensors_is_refused():
    with torch.inference_mode():
        model = nn.Conv2d(2, 2, 3).double()
        image = small_image()
    with pytest.raises(ValueError, match=r"model was made under torch\.inference_mode.*make it outside"):
        linearize(small_image(), model)
    assert linearize(image, small_model()).image_size == 48, "the image is copied"


class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return x * 2


class WrongBackward(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return 2 * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g):
        return 2.1 * g

    @staticmethod
    def jvp(ctx, t):
        return 2 * t


ONE = torch.ones(1, 3, 4, 4)
BAD_INPUTS = {
    "image type": ([1.0], nn.Identity(), TypeError, "image must be a torch.Tensor, got .*: use torch.as_tensor"),
    "image integer": (ONE.int(), nn.Identity(), TypeError, "image must be float32 or float64, got torch.int32: use"),
    "image complex": (ONE.cfloat(), nn.Identity(), TypeError, "image must be float32 or float64, got torch.complex64"),
    "image empty": (torch.ones(0), nn.Identity(), ValueError, r"image is empty: its shape is \(0,\)"),
    "image NaN": (ONE / 0 * 0, nn.Identity(), ValueError, "image holds NaN or infinity"),
    "batch": (torch.ones(2, 3, 4, 4), nn.Identity(), ValueError, "got a batch of 2 .*for one in image.split"),
    "model type": (ONE, 3, TypeError, "model must be a callable or an nn.Module, got 3"),
    "training dropout": (
        ONE,
        nn.Sequential(nn.Dropout()),
        ValueError,
        r"training mode and holds Dropout \('0'\).*eval",
    ),
    "training norm": (ONE, nn.BatchNorm2d(3), ValueError, r"training mode and holds BatchNorm2d \('itself'\).*eval"),
    "dtype": (
        ONE.double(),
        nn.Conv2d(3, 1, 1),
        ValueError,
        "share one dtype.* an image of torch.float64 and a model",
    ),
    "device": (
        ONE,
        nn.Conv2d(3, 1, 1, device="meta"),
        ValueError,
        "share one device.* an image of cpu and a model",
    ),
    "response NaN": (ONE, lambda x: x.log() / 0, ValueError, "response to this image holds NaN or infinity"),
    "response type": (ONE, lambda x: [x, "label"], TypeError, "must be a tensor, or a nesting .* it holds str"),
    "response dtype": (ONE, lambda x: (x, x.argmax()), TypeError, "response must be torch.float32 .*got torch.int64"),
    "response empty": (ONE, lambda x: x[:0], ValueError, "the model's response is empty"),
    "response without tensor": (ONE, lambda x: [], ValueError, "the model's response holds no tensor"),
    "constant": (ONE, lambda x: torch.ones(3), ValueError, "no gradient with respect to the image: it does not depend"),
    "detached": (ONE, lambda x: x.detach() * 2, ValueError, "no gradient with respect to the image"),
    "parameters only": (ONE, lambda x: nn.Linear(2, 2).weight, ValueError, "no gradient with respect to the image"),
    "random": (ONE, lambda x: x + torch.randn(()), ValueError, "answers differently when asked twice: .* differ by"),
    "history": (ONE, Counter(), ValueError, "changes its buffer 'calls' at every call"),
    "slope": (ONE * 0, lambda x: x.sqrt(), ValueError, "derivative at this image holds NaN or infinity"),
    "inconsistent": (
        ONE,
        WrongBackward.apply,
        ValueError,
        r"forward-mode and reverse-mode derivatives disagree: ⟨J v, u⟩ = .*, ⟨v, Jᵀu⟩ = .* \(difference allowed",
    ),
}


@pytest.mark.parametrize(("image", "model", "error", "message"), BAD_INPUTS.values(), ids=BAD_INPUTS.keys())
def test_bad_input(image, model, error, message):
    with pytest.raises(error, match=message):
        linearize(image, model)


def test_refused_model_keeps_its_buffers():
    model = Counter()
    with pytest.raises(ValueError, match="calls"):
        linearize(ONE, model)
    assert model.calls == 0


class Cached(nn.Module):
    """Sets up buffers at its first call, as position embeddings do."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", None)
        self.register_buffer("grown", torch.empty(0))
        self.register_buffer("statistic", torch.zeros(()))

    def forward(self, x):
        if self.table is None:
            self.table = torch.linspace(1, 2, x.shape[-1])
            self.grown = torch.ones(3)
            self.statistic.copy_(x.detach().mean())
        return x * self.table


def test_buffers_set_up_at_the_first_call_are_fine():
    lin = linearize(ONE, Cached())
    assert torch.equal(lin.jvp(ONE[None])[0], (ONE * torch.linspace(1, 2, 4)).flatten())


def test_modules_that_training_mode_does_not_change():
    linearize(ONE, nn.Sequential(nn.Dropout(0.0), nn.BatchNorm2d(3, track_running_stats=False)))


def test_image_without_dimensions():
    lin = linearize(torch.tensor(0.5), torch.sin)
    assert lin.image_shape == () and lin.image_size == 1
    torch.testing.assert_close(lin.jvp(torch.ones(2)), torch.full((2, 1), 0.5).cos())
    result = fisherop.eigenpairs(fisherop.FisherOperator(torch.tensor(0.5), torch.sin), which="largest", method="power")
    assert result.eigenvalues[0] == pytest.approx(np.cos(0.5) ** 2)


def no_grad_inside(x):
    with torch.no_grad():
        scale = x.std()
    return x.tanh() / scale


def test_no_grad_inside_is_named():
    with pytest.raises(ValueError, match=r"the usual causes are torch\.no_grad inside the model \(use \.detach"):
        linearize(torch.linspace(0, 1, 9), no_grad_inside)


def confident(dtype, seed, scale):
    """A softmax at 1 but for 10⁻⁴ to 10⁻⁷, by its image: rounding takes as large a share of its derivative."""
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(1000, 64, generator=generator) / 8).to(dtype)
    return torch.randn(1, 64, generator=generator).to(dtype), lambda x: torch.softmax(scale * (x @ weight.T), -1)


@pytest.mark.parametrize(
    ("dtype", "seed", "scale"), [(torch.float32, 7, 20), (torch.float32, 10, 20), (torch.float64, 7, 40)]
)
def test_rounding_is_not_taken_for_a_wrong_derivative(dtype, seed, scale):
    lin = linearize(*confident(dtype, seed, scale))
    assert torch.finfo(dtype).eps ** 0.5 < lin.mismatch < 1
    result = fisherop.eigenpairs(FisherOperator.from_linearization(lin), 1, "largest", progress=False, rng=0, tol=0.5)
    assert result.noise >= lin.mismatch


@pytest.mark.parametrize("scale", [10, 20])
def test_what_is_wrong_is_refused_beside_rounding(scale):
    image, softmax = confident(torch.float32, 7, scale)

    def wrong(x):
        with torch.no_grad():
            mean = x.mean()
        return torch.cat([softmax(x), x.tanh() * mean], -1)

    with pytest.raises(ValueError, match="derivatives disagree"):
        linearize(image, wrong)


@pytest.mark.parametrize(
    ("chunk_size", "error"), [(0, ValueError), (-1, ValueError), (2.0, TypeError), ("many", TypeError)]
)
def test_bad_chunk_size(chunk_size, error):
    with pytest.raises(error, match=f"chunk_size must be an integer from 1, or None, got {chunk_size!r}"):
        linearize(ONE, nn.Identity(), chunk_size=chunk_size)


@pytest.mark.parametrize(
    ("block", "error", "message"),
    [
        (np.ones((1, 3)), TypeError, r"tangents must be a tensor of shape \(k, 3\), got ndarray"),
        (torch.ones(3), ValueError, r"tangents must be a tensor of shape \(k, 3\), got Tensor of shape \(3,\)"),
        (torch.ones(2, 4), ValueError, r"tangents must be a tensor of shape \(k, 3\), got Tensor of shape \(2, 4\)"),
        (
            torch.ones(2, 3).double(),
            TypeError,
            "tangents must be torch.float32 on cpu like the image, and dense, got torch.float64",
        ),
    ],
)
def test_bad_block(block, error, message):
    with pytest.raises(error, match=message):
        linearize(torch.ones(3), nn.Identity()).jvp(block)


def low_precision_inside(x):
    return nn.functional.group_norm(x.float() * 3, 2).to(x.dtype).tanh()


def test_a_step_in_lower_precision_is_the_noise():
    result = fisherop.Eigendistortion(small_image(), low_precision_inside).synthesize(rng=0, progress=False).result
    assert 1e-9 < result.noise < 1e-6 and result.converged.all()
    exact = fisherop.Eigendistortion(small_image(), lambda x: nn.functional.group_norm(x * 3, 2).tanh())
    truth = exact.synthesize(rng=0, progress=False).result
    assert truth.noise < 1e-14
    np.testing.assert_allclose(result.eigenvalues[0], truth.eigenvalues[0], rtol=1e-5)


class Padded(nn.Module):
    """Some of its tokens are padded: without gradients, PyTorch's fast path answers zero there."""

    def __init__(self, nested):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=nested)

    def forward(self, x):
        return self.encoder(x, src_key_padding_mask=torch.tensor([[False, False, True, True]]))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
@pytest.mark.parametrize("nested", [True, False])
def test_a_fast_path_that_answers_otherwise_is_said(nested):
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = Padded(nested).double().eval()
    with warnings.catch_warnings(record=True) as noted:
        warnings.simplefilter("always")
        lin = linearize(torch.linspace(0, 1, 32, dtype=torch.float64).reshape(1, 4, 8).sin(), model)
    said = [str(w.message) for w in noted if "fast path" in str(w.message)]
    assert len(said) == nested, [str(w.message) for w in noted]
    with torch.no_grad():
        plain = model(lin.image).flatten()
    assert torch.allclose(plain, lin.response.flatten()) != nested


def test_attention_that_is_compiled_is_not_compiled_here():
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    linearize(torch.rand(1, 4, 8), torch.compile(nn.TransformerEncoderLayer(8, 2, 16).eval(), backend=counter))
    assert counter.frame_count == 0


@pytest.mark.parametrize("make", [linearize, FisherOperator, Eigendistortion])
def test_what_would_not_fit_is_known_before(make):
    """By one forward pass, and no more."""
    calls = []

    class Model(nn.Module):
        def forward(self, x):
            calls.append(x)
            return torch.exp(x) * 2

    x = torch.rand(1, 1, 64, 64)
    computed = 2 * x.nbytes  # of exp, and of its double
    with pytest.raises(ValueError, match=r"would take .* GiB, .* each product about .* s, .* or pass memory="):
        make(x, Model(), memory=computed)
    assert len(calls) == 1
    made = make(x, Model(), memory=10 * computed)
    assert getattr(getattr(made, "operator", made), "linearization", made).options["memory"] == 10 * computed
    with pytest.raises(TypeError, match="memory must be a number of bytes"):
        make(x, Model(), memory="1 GiB")
