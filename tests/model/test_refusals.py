"""What must be refused, by which words, and what must not be; after each, PyTorch and the model work as before."""

import contextlib
import gc
import random

import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from helpers import assert_close
from kinds import flat
from torch import Tensor, library, nn
from unharmed import check_unharmed, respond, state

from fisherop import linearize
from fisherop.model.engines import ENGINES

pytestmark = pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered:UserWarning")  # PyTorch's own


@pytest.fixture(autouse=True, scope="module")
def little_garbage():
    """What was made before these tests is not searched by each gc.collect()."""
    gc.freeze()
    yield
    gc.unfreeze()


def image(dtype=torch.float64) -> Tensor:
    return torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(0)).to(dtype)


class Model(nn.Module):
    """A convolution, then what is tried."""

    def __init__(self, step) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.step = step

    def forward(self, x: Tensor):
        return self.step(self.conv(x).tanh())


# Randomness: told by what is drawn, since it may show once in a million times only


class Kept(nn.Module):
    """A step that draws from a generator which it keeps."""

    def __init__(self, generator) -> None:
        super().__init__()
        self.generator = generator

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.generator, np.random.Generator):
            return x * (2 if self.generator.random() < 1e-6 else 1)
        return x * (2 if torch.rand((), generator=self.generator) < 1e-6 else 1)


def forked(x: Tensor) -> Tensor:
    """The generator is as before afterwards; what was drawn still depends on it."""
    with torch.random.fork_rng():
        return x * (2 if torch.rand(()) < 1e-6 else 1)


def noise_added(x: Tensor) -> Tensor:
    return x + 1e-30 * torch.randn_like(x)


RANDOM = {
    "branch": lambda: lambda x: x * (2 if torch.rand(()) < 1e-6 else 1),
    "bernoulli": lambda: lambda x: x * (1 - torch.bernoulli(torch.full_like(x, 1e-6))),
    "dropout": lambda: lambda x: nn.functional.dropout(x, p=1e-6, training=True),
    "noise below rounding": lambda: noise_added,
    "permutation": lambda: lambda x: x * (2 if int(torch.randperm(10**5)[0]) == 0 else 1),
    "fork without a seed": lambda: forked,
    "NumPy's global generator": lambda: lambda x: x * (2 if np.random.rand() < 1e-6 else 1),  # noqa: NPY002
    "Python's random": lambda: lambda x: x * (2 if random.random() < 1e-6 else 1),
    "a generator of torch kept": lambda: Kept(torch.Generator().manual_seed(0)),
    "a generator of NumPy kept": lambda: Kept(np.random.default_rng(0)),
}


CASES = [(name, "auto") for name in RANDOM] + [("branch", engine) for engine in ENGINES]


@pytest.mark.parametrize(("name", "engine"), CASES)
def test_randomness_is_refused(name, engine):
    with pytest.raises(ValueError, match="random"):
        linearize(image(), Model(RANDOM[name]()).double(), engine=engine)
    check_pytorch()


def seeded_by_fork(x: Tensor) -> Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return x * torch.rand_like(x)


def seeded_by_generator(x: Tensor) -> Tensor:
    return x * torch.rand(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)


def seeded_by_numpy(x: Tensor) -> Tensor:
    return x * torch.as_tensor(np.random.default_rng(0).random(x.shape), dtype=x.dtype)


def seeded_by_python(x: Tensor) -> Tensor:
    return x * random.Random(0).random()


SEEDED = [seeded_by_fork, seeded_by_generator, seeded_by_numpy, seeded_by_python]


@pytest.mark.parametrize("engine", ["auto", *ENGINES])
@pytest.mark.parametrize("step", SEEDED)
def test_draws_that_are_seeded_inside_are_taken(step, engine):
    check_right_or_not_traced(step, engine)


# Derivatives that are missing, in both directions alike, or wrong

LIBRARY = library.Library("fisherop_refusals", "DEF")
LIBRARY.define("cubed(Tensor x) -> Tensor")


def below_autograd(x: Tensor) -> Tensor:
    """As a kernel in C++ does."""
    with torch._C._AutoDispatchBelowAutograd():
        return x**3


LIBRARY.impl("cubed", below_autograd, "CPU")


@library.custom_op("fisherop_refusals::custom", mutates_args=())
def custom(x: Tensor) -> Tensor:
    return x**3


def cubed(x: Tensor) -> Tensor:
    return x + torch.ops.fisherop_refusals.cubed(x)


def custom_added(x: Tensor) -> Tensor:
    return x + custom(x)


def edited(x: Tensor) -> Tensor:
    """Of 4 x², PyTorch's derivative is 4 x."""
    h = 1.0 * x
    h.data.mul_(2)
    return h * h


def edited_once_used(x: Tensor) -> Tensor:
    h = x.sin()
    y = h * 2  # which doesn't keep h
    h.data.mul_(2)
    return y + h


def unseen_factor(x: Tensor) -> Tensor:
    """A number that is read from the image is a constant to PyTorch."""
    return x * x.mean().item()


def unseen_summand(x: Tensor) -> Tensor:
    return x + torch.tensor(x.square().mean().tolist(), dtype=x.dtype)


class Wrong(torch.autograd.Function):
    """x², with a backward pass that is off by 10 %, without forward mode."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, g):
        return 2.2 * ctx.saved_tensors[0] * g


class WrongInBoth(torch.autograd.Function):
    """x², with both derivatives off by 10 %: the adjoint identity holds."""

    @staticmethod
    def forward(x):
        return x**2

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, g):
        return 2.2 * ctx.saved_tensors[0] * g

    @staticmethod
    def jvp(ctx, t):
        return 2.2 * ctx.saved_tensors[0] * t


class WrongForward(WrongInBoth):
    """x², with a forward mode that is off."""

    @staticmethod
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g


class WrongReverse(WrongInBoth):
    @staticmethod
    def jvp(ctx, t):
        return 2 * ctx.saved_tensors[0] * t


MISSING = {
    "an operation without derivative": cubed,
    "a custom operation without derivative": custom_added,
    "an edit of .data": edited,
    "an edit of .data after use": edited_once_used,
    ".item() as a factor": unseen_factor,
    ".tolist() as a summand": unseen_summand,
    "a wrong backward": Wrong.apply,
    "a wrong backward and jvp": WrongInBoth.apply,
    "a wrong jvp": WrongForward.apply,
    "a wrong backward beside a jvp": WrongReverse.apply,
}
DERIVATIVE = "derivative|differentiate|gradient"


@pytest.mark.parametrize(
    ("engine", "dtype"), [("auto", torch.float32), *((engine, torch.float64) for engine in ("auto", *ENGINES))]
)
@pytest.mark.parametrize("step", MISSING.values(), ids=MISSING.keys())
def test_wrong_products_are_refused(step, engine, dtype):
    model, control = Model(step).to(dtype), Model(step).to(dtype)
    respond(control, image(dtype))
    before = state(model)
    try:
        lin = linearize(image(dtype), model, engine=engine)
    except (ValueError, RuntimeError) as error:
        words = str(error).lower()
        assert any(word in words for word in DERIVATIVE.split("|")), words
    else:  # an engine that never uses what is wrong
        assert step == WrongForward.apply, "a wrong product is accepted"
        check_against_differences(lin, Model(step).double())
    check_unharmed(model, before, control)
    check_pytorch()


def by_numpy(x: Tensor) -> Tensor:
    """A gain by way of NumPy: announced as a constant by .detach()."""
    return x * torch.as_tensor(np.sqrt(x.detach().square().mean().numpy()), dtype=x.dtype)


def by_item(x: Tensor) -> Tensor:
    return x * x.detach().mean().item()


def detached(x: Tensor) -> Tensor:
    return x * x.detach().norm()


def straight_through(x: Tensor) -> Tensor:
    return x + (x.round() - x).detach()


def quantized(x: Tensor) -> Tensor:
    """To the nearest of a codebook's entries, straight through."""
    codes = torch.linspace(-1, 1, 5, dtype=x.dtype)
    nearest = codes[(x.detach()[..., None] - codes).abs().argmin(-1)]
    return x.square() + (nearest - x.square()).detach()


def mask(x: Tensor) -> Tensor:
    return x * (x.detach() > 0) + x.argmax() * 0


CONSTANTS = {
    "NumPy": by_numpy,
    ".item() of a detached": by_item,
    "detach": detached,
    "straight through": straight_through,
    "codebook": quantized,
    "mask": mask,
}


@pytest.mark.parametrize("engine", ["auto", *ENGINES])
@pytest.mark.parametrize("step", CONSTANTS.values(), ids=CONSTANTS.keys())
def test_what_is_announced_as_constant_is_taken(step, engine):
    check_right_or_not_traced(step, engine)


def check_right_or_not_traced(step, engine) -> None:
    """A recording need not be possible; that it is not may be no reason for "auto" to refuse the model."""
    try:
        check_right(Model(step).double(), engine)
    except RuntimeError as error:
        assert engine == "traced" and "traced: rejected" in str(error)
    check_pytorch()


def check_right(model, engine) -> None:
    """Products equal PyTorch's own derivatives."""
    lin = linearize(image(), model, engine=engine)
    x, u = image().requires_grad_(), torch.ones(1, lin.response_size, dtype=torch.float64)
    (expected,) = torch.autograd.grad(flat(model(x)), x, u[0])
    assert_close(lin.vjp(u)[0], expected, torch.float64)
    v = torch.randn(1, *image().shape, generator=torch.Generator().manual_seed(1)).double()
    assert_close((lin.jvp(v) * u).sum(), (expected * v).sum(), torch.float64, factor=1e5)


def check_against_differences(lin, model) -> None:
    """Products equal what central differences in float64 tell, in both directions."""
    generator = torch.Generator().manual_seed(1)
    v = torch.randn(1, *lin.image_shape, generator=generator).to(lin.image.dtype)
    u = torch.randn(1, lin.response_size, generator=generator).to(lin.image.dtype)
    x, h = lin.image.double(), 1e-6
    expected = (respond(model, x + h * v[0]) - respond(model, x - h * v[0])) / (2 * h)
    assert_close(lin.jvp(v)[0], expected, torch.float32)
    assert_close((lin.vjp(u) * v).sum(), (expected * u[0]).sum(), torch.float32, factor=1e4)


# Responses and models that can't be differentiated


class Once(torch.autograd.Function):
    """As PyTorch's own operations that have neither a forward mode nor a derivative of the backward pass."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return g * ctx.saved_tensors[0].exp()


def reentrant(x: Tensor) -> Tensor:
    return torch.utils.checkpoint.checkpoint(torch.sin, x, use_reentrant=True)


REFUSED = {
    "complex": (torch.fft.rfft2, TypeError, "view_as_real"),
    "complex among others": (lambda x: {"a": x, "b": [torch.fft.fft2(x)]}, TypeError, "view_as_real"),
    "only None": (lambda x: (None, [None]), (TypeError, ValueError), "tensor"),
    "text": (lambda x: (x, "label"), TypeError, "str"),
    "integers": (lambda x: (x, x.argmax()), TypeError, "int64"),
    "no derivative of the backward pass, no forward mode": (Once.apply, RuntimeError, "jvp function"),
    "reentrant checkpoint": (reentrant, (RuntimeError, ValueError), "use_reentrant=False"),
    "NaN in the derivative": (lambda x: (x - x.detach()).sqrt(), ValueError, "NaN or infinity"),
    "an error of the model's own": (lambda x: x.reshape(7, 7), RuntimeError, "shape"),
    "an exception of the model's own": (lambda x: {}["missing"], KeyError, "missing"),
    "no gradient": (lambda x: x.detach(), ValueError, "gradient"),
    "under no_grad": (torch.no_grad()(lambda x: x * 2), ValueError, "gradient"),
}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")  # of checkpoint
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("step", "error", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_other_models_are_refused(step, error, words, dtype):
    model = Model(step).to(dtype)
    before = state(model)
    with pytest.raises(error) as caught:
        linearize(image(dtype), model)
    assert words in str(caught.value)
    check_unharmed(model, before, model)
    check_pytorch()


# Afterwards


def check_pytorch(linearizes: bool = False) -> None:
    """PyTorch's transforms, modes and gradients work as before, and another model can be linearized."""
    x, model = image(), Model(torch.sin).double()
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    y, jv = torch.func.jvp(model, (x,), (x,))
    leaf = x.clone().requires_grad_()
    (jtu,) = torch.autograd.grad(model(leaf), leaf, torch.ones_like(y))
    assert_close((jtu * x).sum(), jv.detach().sum(), torch.float64)
    assert torch.equal(torch.func.vmap(torch.sin)(x), x.sin())
    if linearizes:
        lin = linearize(x, model)
        assert lin.engine_report[-1].startswith("traced: in use")
        assert_close(lin.jvp(x[None])[0], jv.detach().flatten(), torch.float64)


FAILING = {
    "complex": torch.fft.rfft2,
    "random": lambda x: x + torch.rand(()),
    "missing derivative": cubed,
    "edit": edited,
    "wrong backward": Wrong.apply,
    "quantile of a wrong rank": lambda x: torch.quantile(x, torch.ones(2, 2, dtype=x.dtype)),
    "no forward mode, no double backward": Once.apply,
}


@pytest.mark.parametrize("engine", ["auto", *ENGINES])
@pytest.mark.parametrize("step", FAILING.values(), ids=FAILING.keys())
def test_errors_leave_pytorch_usable_when_kept_and_when_freed(step, engine):
    error = None
    try:
        linearize(image(), Model(step).double(), engine=engine)
    except (TypeError, ValueError, RuntimeError) as caught:
        error = caught
    assert error is not None
    check_pytorch(linearizes=True)  # with the exception, its traceback and all frames alive
    del error
    gc.collect()
    check_pytorch(linearizes=True)


@pytest.mark.parametrize("engine", ["auto", *ENGINES])
@pytest.mark.parametrize("n", range(1, 7))
def test_a_model_that_fails_at_its_nth_call(n, engine):
    """Whatever the library is doing then."""
    calls = []

    def step(x: Tensor) -> Tensor:
        calls.append(None)
        if len(calls) == n:
            raise KeyError("no more")
        return x * x

    with contextlib.suppress(KeyError, RuntimeError):
        linearize(image(), Model(step).double(), engine=engine)
    check_pytorch(linearizes=True)
    calls.extend([None] * n)
    check_right(Model(step).double(), engine)


@pytest.mark.parametrize("engine", ["auto", *ENGINES])
def test_a_model_that_failed_works_once_it_is_mended(engine):
    model = Model(edited).double()
    with pytest.raises((ValueError, RuntimeError)):
        linearize(image(), model, engine=engine)
    model.step = torch.sin
    check_right(model, engine)


class Converts(nn.Module):
    """With weights in another precision than the image's, to which it converts it."""

    def __init__(self, dtype):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layer = nn.Linear(6, 5).to(dtype)

    def forward(self, x):
        return torch.tanh(self.layer(x.to(self.layer.weight.dtype))).to(x.dtype)


@pytest.mark.parametrize(("image", "weights"), [(torch.float64, torch.float32), (torch.float32, torch.bfloat16)])
def test_a_module_that_converts_the_image(image, weights):
    model, x = Converts(weights).eval(), torch.linspace(0, 1, 6, dtype=image)[None]
    lin = linearize(x, model)
    truth = torch.autograd.functional.jacobian(Converts(weights).to(torch.float64).eval(), x.double()).reshape(5, 6)
    dense = lin.vjp(torch.eye(5, dtype=image)).reshape(5, 6)
    torch.testing.assert_close(dense.double(), truth, rtol=0, atol=4 * torch.finfo(weights).eps)


def test_a_module_that_does_not_convert_is_named_with_a_cure_that_works():
    with pytest.raises(ValueError, match=r"a model of torch.bfloat16: use model.to\(torch.float32\)\. "):
        linearize(torch.rand(1, 6), nn.Linear(6, 5).bfloat16())
