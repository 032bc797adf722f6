"""Every kind of model that people linearize: right products by the expected engine, and a model that is unharmed."""

import copy
import functools
import importlib.util
import io
import itertools
import os
import pathlib
import subprocess
import sys

import pytest
import torch
from helpers import DEVICES, DTYPES, assert_close, rtol
from kinds import FIELD, KEEPERS, KINDS, THEIRS, Kind, flat, plain
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from unharmed import check_unharmed, respond, state, tensors_in

from fisherop import linearize
from fisherop.model.compat import _Formulas

ALL = KINDS | THEIRS
BY_HAND = [  # engines named, in float64
    pytest.param(name, engine, marks=() if name in FIELD | KEEPERS else pytest.mark.slow)
    for name in KINDS
    for engine in ("functional", "double_backward")
]
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),  # torch.compile's own
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning"),
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS, but there was no current CUDA context:UserWarning"),
]


def available(name: str) -> Kind:
    kind = ALL[name]
    if kind.needs and not importlib.util.find_spec(kind.needs):
        pytest.skip(f"{kind.needs} is not installed")
    return kind


def drawn(*shape: int, dtype=torch.float64, seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def on(device, model):
    return model.to(device) if isinstance(model, nn.Module) else model


class Truth:
    """J in float64 by PyTorch's reverse mode, as the rows U J for some random U."""

    def __init__(self, name: str, device: str = "cpu") -> None:
        kind = ALL[name]
        model, self.image = on(device, plain(kind.make(torch.float64))), kind.image(torch.float64).to(device)
        x = self.image.clone().requires_grad_()
        with torch.backends.cudnn.flags(enabled=False):  # recurrent layers of cuDNN have no derivative
            response = flat(model(x.clone()))
        self.response = response.detach().cpu()
        self.u = drawn(20, len(response), seed=4)
        rows = [torch.autograd.grad(response, x, u.to(response), retain_graph=True)[0] for u in self.u]
        self.rows = torch.stack(rows).flatten(1).cpu()

    def differences(self, name: str, v: Tensor) -> Tensor:
        model, h = on(self.image.device, ALL[name].make(torch.float64)), 1e-6
        return torch.stack(
            [(respond(model, self.image + h * one) - respond(model, self.image - h * one)) / (2 * h) for one in v]
        )


truth = functools.cache(Truth)


def check_products(lin, name: str, dtype: torch.dtype) -> None:
    device = lin.image.device
    kind, true = ALL[name], truth(name, device.type)
    precision = max(dtype, kind.precision, key=lambda d: torch.finfo(d).eps)
    v, u = drawn(3, *kind.shape, dtype=dtype).to(device), true.u[:3].to(device, dtype)
    jv, jtu = lin.jvp(v), lin.vjp(u)
    close = functools.partial(assert_close, dtype=precision, factor=1e4)
    close(jv.double().cpu() @ true.u.T, v.flatten(1).double().cpu() @ true.rows.T)
    close(jtu.flatten(1).cpu(), true.rows[:3])
    for one in range(3):
        close(lin.jvp(v[one : one + 1])[0].cpu(), jv[one].cpu())
        close(lin.vjp(u[one : one + 1])[0].cpu(), jtu[one].cpu())
    given, received = (v.clone(), u.clone()), (jv.clone(), jtu.clone())
    r, products = lin.normal(v)
    close((r.T @ r).cpu(), (jv.double() @ jv.double().T).cpu())
    close(products.flatten(1).cpu(), lin.vjp(jv).flatten(1).cpu())
    r, product = lin.normal(v[2:])
    close(r.abs().cpu(), jv[2:].double().norm(dim=1)[:, None].cpu())
    close(product.flatten(1).cpu(), products[2:].flatten(1).cpu())
    for now, before in zip((v, u, jv, jtu), given + received, strict=True):
        assert torch.equal(now, before), "what was passed in or received has been overwritten"
    forward, reverse = ((a.double() * b.double()).flatten(1).sum(1) for a, b in ((jv, u), (jtu, v)))
    sizes = jv.double().norm(dim=1) * u.double().norm(dim=1)
    assert ((forward - reverse).abs() <= rtol(precision, 1e4) * sizes).all(), "⟨J v, u⟩ = ⟨v, Jᵀu⟩"
    for _ in range(2) if device.type == "cpu" else ():  # elsewhere sums may be taken in any order
        assert torch.equal(lin.jvp(v), jv) and torch.equal(lin.vjp(u), jtu), "the same bits again"
    if dtype == torch.float64 and kind.smooth:
        rounding = 1e-9 * float(true.response.abs().max())
        desired = true.differences(name, v)
        assert ((jv - desired).abs() <= 1e-6 * desired.abs().max() + rounding).all(), "central differences"


def fails(action, model) -> Exception | None:
    try:
        action(model)
    except Exception as error:
        return error


def saved(model) -> None:
    torch.save(model, io.BytesIO())


def check_usable(model, kind: Kind, name: str, control) -> None:
    """What worked before works afterwards."""
    dtype = next((t.dtype for _, t in tensors_in(model) if t.is_floating_point()), torch.float64)
    x, true = kind.image(dtype), truth(name)
    for action in (copy.deepcopy, saved) if isinstance(model, nn.Module) else ():
        error = fails(action, model)
        assert error is None or fails(action, control) is not None, f"{action.__name__}: {error}"
    close = functools.partial(assert_close, factor=1e4)
    precision = max(dtype, kind.precision, key=lambda d: torch.finfo(d).eps)
    close(respond(model, x), true.response, dtype=precision)
    if kind.functorch and kind.forward_mode and not kind.writes:
        v = drawn(*kind.shape, dtype=dtype)
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)  # what is fused has no forward mode
        try:
            with sdpa_kernel(SDPBackend.MATH):
                _, jv = torch.func.jvp(lambda x: flat(plain(model)(x.clone())), (x,), (v,))
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
        close(true.u @ jv.detach().double(), true.rows @ v.double().flatten(), dtype=precision)
    if isinstance(model, nn.Module) and not (kind.precision is torch.float32 and kind.needs):
        close(respond(model.to(torch.float64), kind.image(torch.float64)), true.response, dtype=precision)


def check(name: str, dtype: torch.dtype, engine: str):
    kind = available(name)
    model, control, x = kind.make(dtype), kind.make(dtype), kind.image(dtype)
    response = respond(control, x)
    before = state(model)
    lin = linearize(x, model, engine=engine)
    assert_close(lin.response.flatten(), response, dtype, factor=1e4)
    check_products(lin, name, dtype)
    check_unharmed(model, before, control, writes=kind.writes)
    check_usable(model, kind, name, control)
    return lin


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ALL)
def test_every_kind(name, dtype):
    lin = check(name, dtype, "auto")
    assert lin.engine_report[-1].startswith(f"{ALL[name].engine}: in use"), lin.engine_report


@pytest.mark.parametrize("name", ["LSTM", "GRU", "recurrent cells", "recurrent functions", "packed sequence"])
def test_recurrent_layers_as_on_an_accelerator(name, monkeypatch):
    """Where PyTorch's kernels have no derivative: the same formulas, here on a CPU."""
    monkeypatch.setattr(_Formulas, "RECURRENT_ON", "cpu")
    check(name, torch.float64, "auto")


@pytest.mark.parametrize(("name", "dtype", "device"), list(itertools.product(ALL, DTYPES, DEVICES[1:])))
def test_every_kind_on_an_accelerator(name, dtype, device):
    kind = available(name)
    model, control = on(device, kind.make(dtype)), on(device, kind.make(dtype))
    x = kind.image(dtype).to(device)
    try:
        respond(control, x)
    except RuntimeError as error:
        pytest.skip(f"this model does not run there: {str(error).splitlines()[0]}")
    before = state(model)
    lin = linearize(x, model)
    assert lin.engine_report[-1].startswith(f"{kind.engine}: in use"), lin.engine_report
    precision = max(dtype, kind.precision, key=lambda d: torch.finfo(d).eps)
    assert_close(lin.response.flatten().cpu(), truth(name, device).response, precision, factor=1e4)
    check_products(lin, name, dtype)
    check_unharmed(model, before, control, writes=kind.writes)


@pytest.mark.parametrize(("name", "engine"), BY_HAND)
def test_engines_named(name, engine):
    kind = KINDS[name]
    if kind.forward_mode if engine == "functional" else kind.double_backward:
        check(name, torch.float64, engine)
        return
    model, control, x = kind.make(torch.float64), kind.make(torch.float64), kind.image(torch.float64)
    respond(control, x)
    before = state(model)
    with pytest.raises(RuntimeError, match=f"{engine}: rejected"):
        linearize(x, model, engine=engine)
    check_unharmed(model, before, control, writes=kind.writes)


SCRIPT = """
import sys, torch
from helpers import DTYPES
from fisherop import linearize
from test_kinds import ALL
from unharmed import check_unharmed, respond, state
kind = ALL[sys.argv[1]]
for dtype in DTYPES:
    for engine in ("auto", "functional", "double_backward"):
        model, control = kind.make(dtype), kind.make(dtype)
        respond(control, kind.image(dtype))
        before = state(model)
        try:
            lin = linearize(kind.image(dtype), model, engine=engine)
            lin.vjp(lin.jvp(torch.ones(3, *kind.shape, dtype=dtype)))
        except RuntimeError:
            assert engine != "auto"
        check_unharmed(model, before, control, writes=kind.writes)
        respond(model, kind.image(dtype))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_no_process_crashes(name):
    available(name)
    here = pathlib.Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent), str(here.parents[1]), os.environ.get("PYTHONPATH", "")])
    run = [sys.executable, "-c", SCRIPT, name]
    done = subprocess.run(run, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stderr[-2000:]}"


def replace(model):
    model.layers[0].weight = nn.Parameter(model.layers[0].weight.detach().clone())


def change(model):
    model.layers[0].bias.data.mul_(1 + 1e-6)


def leave_graph(model):
    model.cache = {"kept": [model.layers[0].weight * 2]}


def leave_wrapper(model):
    def keep(x):
        model.cache = {"kept": [x]}
        return x

    torch.func.vmap(keep)(torch.ones(2))


def leave_gradient(model):
    model.layers[0].weight.grad = torch.zeros_like(model.layers[0].weight)


def lose(model):
    model.layers[0].bias = None


def leave_hook(model):
    model.layers[0].register_forward_hook(lambda module, inputs, output: None)


@pytest.mark.parametrize("harm", [replace, change, leave_graph, leave_wrapper, leave_gradient, lose, leave_hook])
def test_harm_is_seen(harm):
    class Layered(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(2, 2))

    model, control = Layered(), Layered()
    control.load_state_dict(model.state_dict())
    control.cache = {"kept": [torch.zeros(2, 2)]}
    before = state(model)
    check_unharmed(model, before, control)
    harm(model)
    with pytest.raises(AssertionError):
        check_unharmed(model, before, control)


def test_a_compiled_model_goes_on_compiling():
    from torch._dynamo.testing import CompileCounter

    def frames(first):
        torch._dynamo.reset()
        counter, x = CompileCounter(), torch.rand(1, 3, 16, 16)
        model = torch.compile(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval(), backend=counter)
        with torch.no_grad():
            first(x, model)
            before = counter.frame_count
            model(torch.rand(1, 3, 20, 20)), model(torch.rand(1, 3, 24, 20))
        return counter.frame_count - before

    assert frames(linearize) >= frames(lambda x, model: model(x)) > 0
