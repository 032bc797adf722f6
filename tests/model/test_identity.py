"""The identity of a model: others for models that compute something else, the same for those that don't, anywhere."""

import copy
import os
import pathlib
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from studies import Net
from torch import nn

from fisherop.model.identity import identity

PREFIX = """
import collections, copy, enum, functools, types, weakref
import numpy as np, torch
from torch import nn
C = float({c})
ONE = 1.0
class Base(nn.Module):
    gain = {c}
    def scaled(self, x): return x * {c}
    @property
    def factor(self): return {c}
    @staticmethod
    def static(x): return x * {c}
class Plain:
    def __init__(self): self.gain = {c}
    def __call__(self, x): return x * self.gain
"""
# each computes something else for another {c}
SOURCES = {
    "attribute": "model = Plain()",
    "own method": "class M(Base):\n  def forward(self, x): return self.scaled(x)\nmodel = M()",
    "a method of a submodule": (
        "class M(nn.Module):\n  def __init__(self):\n    super().__init__(); self.part = Base()\n"
        "  def forward(self, x): return self.part.scaled(x)\nmodel = M()"
    ),
    "a property of a submodule": (
        "class M(nn.Module):\n  def __init__(self):\n    super().__init__(); self.part = Base()\n"
        "  def forward(self, x): return self.part.factor * x\nmodel = M()"
    ),
    "a class attribute from outside": "part = Base()\nmodel = lambda x: part.gain * x",
    "super": (
        "class A(nn.Module):\n  def forward(self, x): return x * {c}\n"
        "class M(A):\n  def forward(self, x): return super().forward(x)\nmodel = M()"
    ),
    "decorated": (
        "class M(Base):\n  @torch.enable_grad()\n  def forward(self, x): return self.scaled(x)\nmodel = M()"
    ),
    "by name": "class M(Base):\n  def forward(self, x): return getattr(self, 'sca' + 'led')(x)\nmodel = M()",
    "indexing": "class L(nn.ModuleList):\n  def __getitem__(self, i): return lambda x: x * {c}\n"
    "class M(nn.Module):\n  def __init__(self):\n    super().__init__(); self.parts = L()\n"
    "  def forward(self, x): return self.parts[0](x)\nmodel = M()",
    "a list with a method": "class L(list):\n  def __call__(self, x): return x * {c}\nmodel = L()",
    "a number with a method": "class F(float):\n  def of(self, x): return x * {c}\nf = F(1)\nmodel = lambda x: f.of(x)",
    "enumeration": "class E(enum.IntEnum):\n  A = 1\n  def of(self, x): return x * {c}\nmodel = lambda x: E.A.of(x)",
    "a global": "model = lambda x: C * x",
    "globals in another order": "A, B = (None, 3.0) if {c} == 1 else (3.0, None)\nmodel = lambda x: (A or 1) * x",
    "default": "def model(x, c={c}): return c * x",
    "keyword default": "def model(x, *, c={c}): return c * x",
    "closure": "model = (lambda c: lambda x: c * x)({c})",
    "an attribute of a function": "def model(x): return model.c * x\nmodel.c = {c}",
    "partial": "model = functools.partial(lambda x, c: c * x, c={c})",
    "cached": "@functools.lru_cache\ndef f(): return {c}\nmodel = lambda x: f() * x",
    "wrapped": "def of(f):\n  @functools.wraps(f)\n  def g(x): return f(x) * {c}\n  return g\n"
    "model = of(torch.sin)",
    "slots": "class M:\n  __slots__ = ('__c',)\n  def __init__(self): self.__c = {c}\n"
    "  def __call__(self, x): return self.__c * x\nmodel = M()",
    "array": "a = np.full(2, {c})\nmodel = lambda x: float(a[0]) * x",
    "masked array": "a = np.ma.array([1., 2.], mask=[{c} == 1, {c} == 2])\nmodel = lambda x: float(a.sum()) * x",
    "defaultdict": "d = collections.defaultdict(lambda: {c})\nmodel = lambda x: d['a'] * x",
    "long list": "d = [0.] * 2000 + [{c}]\nmodel = lambda x: d[-1] * x",
    "ufunc": "f = np.exp if {c} == 1 else np.sin\nmodel = lambda x: float(f(1.0)) * x",
    "weak reference": "part = Plain()\nr = weakref.ref(part)\nmodel = lambda x: r()(x)",
    "buffer": (
        "class M(nn.Module):\n  def __init__(self):\n    super().__init__()\n"
        "    self.register_buffer('b', torch.tensor(float({c})), persistent=False)\n"
        "  def forward(self, x): return self.b * x\nmodel = M()"
    ),
    "hook": "model = nn.Identity()\nmodel.register_forward_hook(lambda m, i, o: o * {c})",
    "traced": "model = torch.jit.trace(lambda x: x * torch.tensor([float({c})] * 9), torch.ones(9))",
    "default dtype": "torch.set_default_dtype([None, torch.float32, torch.float64][{c}])\n"
    "model = lambda x: x * torch.tensor([0.1]).double()",
}  # fmt: skip


def built(source, c):
    space = {"__name__": "user"}
    exec((PREFIX + source).replace("{c}", str(c)), space)
    return space["model"]


@pytest.fixture
def default_dtype():
    before = torch.get_default_dtype()
    yield
    torch.set_default_dtype(before)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SOURCES)
def test_it_stands_for_all_that_a_response_depends_on(name, default_dtype):
    x, found = torch.ones(9), []
    for c in (1, 2, 1):
        torch.set_default_dtype(torch.float32)
        model = built(SOURCES[name], c)
        found.append((identity(model), model(x).detach().double().tolist()))
    assert found[0] == found[2]
    assert found[0][1] != found[1][1] and found[0][0] != found[1][0]


def test_copies_are_the_same():
    model = Net()
    model.register_forward_hook(print)
    assert identity(model) == identity(pickle.loads(pickle.dumps(model))) == identity(copy.deepcopy(model))
    handle = model.register_forward_pre_hook(print, with_kwargs=True)
    handle.remove()
    model.register_forward_pre_hook(print, with_kwargs=True)  # of another number in the process
    other = Net()
    other.register_forward_hook(print)
    other.register_forward_pre_hook(print, with_kwargs=True)
    assert identity(model) == identity(other)
    model.device, other.device = torch.device("cpu"), torch.device("cuda", 1)  # as a worker with a GPU has it
    assert identity(model) == identity(other)
    assert identity(torch.compile(Net())) == identity(torch.compile(Net()))


def test_it_is_the_same_in_every_process():
    code = "from test_identity import *; print(identity({'a', 'b', 'c'}, Net(), np.eye(3), SOURCES))"
    paths = [str(pathlib.Path(__file__).parent), str(pathlib.Path(__file__).parents[1]), *sys.path]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    found = {
        subprocess.run(
            [sys.executable, "-c", code], check=True, env=env | {"PYTHONHASHSEED": seed}, capture_output=True, text=True
        ).stdout.strip()
        for seed in "12"
    }
    assert found == {identity({"a", "b", "c"}, Net(), np.eye(3), SOURCES)}


def test_what_can_not_be_told_is_refused():
    model = nn.Identity()
    model.stream = (i for i in range(3))
    with pytest.raises(TypeError, match=r"the model holds a builtins.generator, .*: leave out the store"):
        identity(model)
    assert identity(nn.LazyLinear(3)) == identity(nn.LazyLinear(3))
