"""A model that has changed since: no program and no product of the model as it was passes for one of it as it is."""

import gc
import types
import warnings
import weakref

import numpy as np
import pytest
import torch
from helpers import assert_close
from kinds import flat
from torch import nn

from fisherop import (
    Eigendistortion,
    FisherOperator,
    LayerResponse,
    certify,
    eigenpairs,
    linearize,
)
from fisherop.model import programs
from fisherop.model.engines import ENGINES

GAIN = 1.0
SETTINGS = {"gain": 1.0}


class Nested:
    __slots__ = ("gain",)

    def __init__(self):
        self.gain = 1.0


class Model(nn.Module):
    """Whose response depends on something in every place where a model may keep it."""

    by_class = 1.0

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.conv = nn.Conv2d(1, 2, 3, padding=1)
            self.norm = nn.BatchNorm2d(2)
            self.large = nn.Linear(80, 80)
        self.register_buffer("shift", torch.ones(()))
        self.plain = 1.0
        self.gains = [1.0, {"inner": 1.0}]
        self.space = types.SimpleNamespace(gain=1.0)
        self.nested = Nested()
        self.array = np.ones(3)
        self.table = {"gain": torch.ones((), dtype=torch.float64)}
        gain = 1.0

        def closed(x):
            return x * gain

        def close(value):
            nonlocal gain
            gain = value

        self.closed, self.close = closed, close

    def scaled(self, x):
        return x * self.by_class

    def forward(self, x):
        x = x * (self.gains[0] * self.gains[1]["inner"] * self.space.gain * self.nested.gain * float(self.array[0]))
        x = x * (GAIN * SETTINGS["gain"] * self.plain) * self.table["gain"] * self.shift
        x = self.norm(self.conv(self.scaled(self.closed(x)))).tanh()
        return self.large(x.reshape(-1, 80)[:1])


def image(seed=0):
    return torch.rand(1, 1, 8, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def set_global(model, by):
    globals()["GAIN"] = by


def replace_parameter(model, by):
    model.conv.weight = nn.Parameter(model.conv.weight.detach() * by)


@torch.no_grad()
def change_parameter(model, by):
    model.conv.weight.mul_(by)


@torch.no_grad()
def change_large_parameter(model, by):
    model.large.weight[0, 0] *= by


def load_state(model, by):
    model.load_state_dict({k: v * by if k == "conv.bias" else v for k, v in model.state_dict().items()})


def set_data(model, by):
    model.conv.weight.data = model.conv.weight.data * by


SEEN_AT_ONCE = {
    "replaced": replace_parameter,
    "in place": change_parameter,
    "one of many": change_large_parameter,
    "state": load_state,
    "another .data": set_data,
    "buffer": lambda model, by: model.shift.mul_(by),
    "table": lambda model, by: model.table["gain"].mul_(by),
    "statistics": lambda model, by: model.norm.running_var.mul_(by),
}
SEEN_BY_SEARCH = {
    ".data in place": lambda model, by: model.norm.weight.data.mul_(by),
    "attribute": lambda model, by: setattr(model, "plain", by),
    "list": lambda model, by: model.gains.__setitem__(0, by),
    "nested": lambda model, by: model.gains[1].__setitem__("inner", by),
    "namespace": lambda model, by: setattr(model.space, "gain", by),
    "slots": lambda model, by: setattr(model.nested, "gain", by),
    "array": lambda model, by: model.array.__setitem__(0, by),
    "in a dict": lambda model, by: model.table.__setitem__("gain", torch.tensor(by, dtype=torch.float64)),
    "closure": lambda model, by: model.close(by),
    "class": lambda model, by: setattr(type(model), "by_class", by),
    "method": lambda model, by: setattr(type(model), "scaled", lambda self, x: x * by),
    "global": set_global,
    "global dict": lambda model, by: SETTINGS.__setitem__("gain", by),
    "option": lambda model, by: setattr(model.norm, "eps", by),
    "hook": lambda model, by: model.conv.register_forward_hook(lambda m, i, o: o * by),
}
UNSEEN = {"large .data in place": lambda model, by: model.large.weight.data.mul_(by)}  # but by the model's response


@pytest.fixture(autouse=True)
def as_before():
    yield
    Model.by_class, Model.scaled = 1.0, _SCALED
    SETTINGS["gain"] = 1.0
    set_global(None, 1.0)


_SCALED = Model.scaled


def check_products(lin, model):
    truth = torch.autograd.functional.jacobian(lambda x: flat(model(x)), lin.image).reshape(-1, lin.image_size)
    v = torch.randn(3, *lin.image_shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert_close(lin.jvp(v), v.flatten(1) @ truth.T, torch.float64)
    assert_close(lin.vjp(lin.jvp(v)).flatten(1), v.flatten(1) @ truth.T @ truth, torch.float64)


CHANGES = SEEN_AT_ONCE | SEEN_BY_SEARCH | UNSEEN


@pytest.mark.parametrize("by", [1.5, 1 + 1e-11])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_no_program_of_the_model_as_it_was_is_resumed(change, by):
    model = Model().double().eval()
    linearize(image(), model)
    assert "by the program of an earlier image" in linearize(image(1), model).engine_report[-1]
    change(model, by)
    lin = linearize(image(2), model)
    if change not in UNSEEN.values():  # which is resumed where the program reads it anew
        assert "earlier image, " not in lin.engine_report[-1]
    check_products(lin, model)
    assert "by the program of an earlier image" in linearize(image(3), model).engine_report[-1]


def caught(function):
    """The warning or the error of a call."""
    with warnings.catch_warnings(record=True) as noted:
        warnings.simplefilter("always")
        try:
            function()
        except RuntimeError as error:
            return "error", str(error)
    return ("warning", str(noted[0].message)) if noted else ("silence", "")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_products_of_a_model_that_has_changed(change, engine):
    """Where they are still those of the model as it was there is one warning, else an error at every product."""
    model = Model().double().eval()
    lin = linearize(image(), model, engine=engine)
    v = torch.randn(1, *lin.image_shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    before = lin.jvp(v), lin.vjp(lin.jvp(v))
    change(model, 1.5)
    kind, message = caught(lambda: lin.jvp(v))
    if kind == "silence":
        assert change not in SEEN_AT_ONCE.values()
        kind, message = caught(lambda: eigenpairs(FisherOperator.from_linearization(lin), rng=0, progress=False))
    if kind == "silence":
        assert change in UNSEEN.values()
    elif kind == "error":
        assert "may be neither of the model as it was nor of the model as it is: linearize it again" in message
        with pytest.raises(RuntimeError, match="neither"):
            lin.vjp(before[0])
        with pytest.raises(RuntimeError, match="neither"):
            lin.jvp(v)
    else:
        assert "products are still of the model as it was" in message
        assert_close(lin.jvp(v), before[0], torch.float64)
        assert_close(lin.vjp(before[0]), before[1], torch.float64)
    if kind != "silence":
        assert "the model has changed since it was linearized (in " in message


def test_the_message_says_what_changed():
    model = Model().double().eval()
    lin = linearize(image(), model)
    change_large_parameter(model, 2.0)
    with pytest.raises(RuntimeError, match=r"\(in large\.weight\), so that products by the Traced engine may be"):
        lin.jvp(image()[None])


@pytest.mark.parametrize("engine", ENGINES)
def test_a_change_that_changes_nothing_is_passed_over(engine):
    model = Model().double().eval()
    later = LayerResponse(model, "conv")
    lins = [linearize(image(), m, engine=engine) for m in (model, later)]
    before = [lin.jvp(image()[None]) for lin in lins]
    with torch.no_grad():
        model.conv.bias.mul_(1.0)
        model(image())
    model.note = "seen"
    for lin, jv in zip(lins, before, strict=True):
        lin.check_current()
        assert torch.equal(lin.jvp(image()[None]), jv)
    change_large_parameter(model, 2.0)  # beyond the layer
    assert torch.equal(lins[1].jvp(image()[None]), before[1])
    lins[1].check_current()


def test_a_model_that_is_as_it_was_again():
    model = Model().double().eval()
    lin = linearize(image(), model)
    before = lin.jvp(image()[None])
    change_large_parameter(model, 2.0)
    with pytest.raises(RuntimeError, match="neither"):
        lin.jvp(image()[None])
    change_large_parameter(model, 0.5)
    assert torch.equal(lin.jvp(image()[None]), before)


def test_programs_are_few():
    model, programs_made = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Softplus()).double(), []
    for size in range(5, 15):
        x = torch.rand(1, 1, size, size, dtype=torch.float64)
        lin = linearize(x, model)
        programs_made.append(lin._engine.program)
        for k in range(3, 15):
            lin.jvp(x.expand(k, *x.shape))
        assert len(programs_made[-1]._blocks) <= 12
        assert len(programs._KEPT[model]) <= 4
    assert "by the program" in linearize(x, model).engine_report[-1]
    assert "by the program" not in linearize(torch.rand(1, 1, 5, 5, dtype=torch.float64), model).engine_report[-1]


def test_what_is_no_longer_kept_is_freed():
    model, made = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Softplus()).double(), []
    for size in range(5, 15):
        made.append(weakref.ref(linearize(torch.rand(1, 1, size, size, dtype=torch.float64), model)._engine.program))
    gc.collect()
    assert [program() is not None for program in made] == [False] * 6 + [True] * 4


@pytest.mark.parametrize("engine", ENGINES)
def test_a_model_in_training_mode_is_not_called(engine):
    """One call of it would move the running means of batch norms."""
    model = Model().double().eval()
    ed = Eigendistortion(image(), model, engine=engine).synthesize(rng=0, progress=False)
    model.train()
    before = {name: (t, t.clone()) for name, t in model.named_buffers()}
    with warnings.catch_warnings(record=True) as noted:
        warnings.simplefilter("always")
        if engine == "functional":
            with pytest.raises(RuntimeError, match=r"training mode .*: call model.eval\(\) first.*neither"):
                eigenpairs(ed.operator, rng=0, progress=False)
        else:
            eigenpairs(ed.operator, rng=0, progress=False)
            certify(ed.operator, ed.result.eigenvectors, ed.result.eigenindex)
        with pytest.raises((RuntimeError, ValueError), match=r"training mode .*: call model.eval\(\) first"):
            ed.response_change(0, 0.1)
    assert len(noted) == (engine != "functional")
    assert all("training mode" in str(warning.message) for warning in noted)
    assert all(model.get_buffer(name) is t and torch.equal(t, kept) for name, (t, kept) in before.items())
    model.eval()
    assert_close(*ed.response_change(0, 1e-6), torch.float64, factor=1e12)


def freed() -> torch.Tensor:
    tensor = torch.rand(4)
    tensor.untyped_storage().resize_(0)
    return tensor


class Pair(torch.Tensor):
    """As quantized weights: a tensor that does its operations itself."""

    @staticmethod
    def __new__(cls, one):
        return torch.Tensor._make_wrapper_subclass(cls, one.shape, dtype=one.dtype)

    def __init__(self, one):
        self.one = one

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return cls(func(*(a.one if isinstance(a, cls) else a for a in args), **(kwargs or {})))


OPAQUE = {
    "lazy": nn.parameter.UninitializedParameter,
    "nested": lambda: torch.nested.nested_tensor([torch.rand(2), torch.rand(3)]),
    "nested, jagged": lambda: torch.nested.nested_tensor([torch.rand(2), torch.rand(3)], layout=torch.jagged),
    "wrapper": lambda: Pair(torch.rand(3)),
    "without memory": freed,
    "half complex": lambda: torch.ones(3, dtype=torch.complex32),
    "function of Cython's": lambda: np.random.RandomState.set_state,
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning", "ignore:ComplexHalf:UserWarning")
@pytest.mark.parametrize("where", ["closure", "attribute", "default"])
@pytest.mark.parametrize("make", OPAQUE.values(), ids=OPAQUE.keys())
def test_what_can_t_be_read_like_other_things(make, where):
    """Where the model could reach them, though it doesn't use them."""
    layer, held = nn.Conv2d(1, 2, 3), make()

    class Holds(nn.Module):
        def forward(self, x, other=held if where == "default" else None):
            return layer(x).tanh() if where != "closure" or held is not None else x

    model, image = Holds().eval(), torch.rand(1, 1, 6, 6)
    if where == "attribute":
        model.held = [held]
    lin = linearize(image, model)
    lin.check_current()
    assert lin.engine_report[-1].startswith("traced: in use")
    assert "of an earlier image" in linearize(image / 2, model).engine_report[-1]
