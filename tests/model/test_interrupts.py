"""An interrupt at any time leaves PyTorch, the generators and the model as they were, and the next call right."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch
from kinds import flat
from torch import nn
from torch.multiprocessing import reductions
from torch.utils import checkpoint
from torch.utils._python_dispatch import TorchDispatchMode
from unharmed import settings

from fisherop import linearize
from fisherop.model.engines import ENGINES

HERE = [str(folder) for folder in pathlib.Path(__file__).parents[:2]]  # of this file, and of what it imports


class Layers(nn.Module):
    """With attention, a recurrent layer, a checkpoint, a buffer made at the first call, a parameter moved by it."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            self.conv = nn.Conv2d(1, 2, 1)
            self.recurrent = nn.RNN(2, 2, batch_first=True)
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("table", None)
        self.notes = ["kept", 1.0]

    def forward(self, x):
        self.scale.data = self.scale.data.abs()
        if self.table is None:
            self.table = torch.linspace(1, 2, x.shape[-1], dtype=x.dtype)
        tokens = checkpoint.checkpoint(torch.tanh, self.conv(x) * self.table, use_reentrant=False)
        tokens = tokens.flatten(2).transpose(1, 2)
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            gains = torch.rand(2, dtype=x.dtype)
        tokens = nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)
        return self.recurrent(tokens)[0] * gains * self.scale


def image(seed=0):
    return torch.rand(1, 1, 2, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def contents(model):
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    held = {name: (id(t), t.requires_grad, t.grad, t.tolist()) for name, t in tensors.items()}
    return held, list(model.notes), model.training, len(model._forward_hooks)


class AtLine:
    """Raises KeyboardInterrupt before the n-th line, or at the n-th call or return, that Python executes from here on.

    That is at more places than those where Python looks for signals, which are some calls, loops and ends of calls.
    """

    def __init__(self, n):
        self.n, self.count = n, 0

    def __call__(self, frame, event, argument):
        if self._is_exempt(frame) or (frame.f_back is not None and self._is_exempt(frame.f_back)):
            return self
        self.count += 1
        if self.count == self.n:
            sys.settrace(None)
            raise KeyboardInterrupt
        return self

    @staticmethod
    def _is_exempt(frame):
        """Python lets no exception out of a ``__del__``, and PyTorch's weak references have one, which needs all."""
        return frame.f_code.co_name == "__del__" or frame.f_code.co_filename == reductions.__file__

    def __enter__(self):
        sys.settrace(self)
        return self

    def __exit__(self, *exception):
        sys.settrace(None)


class AtOperation(TorchDispatchMode):
    def __init__(self, n):
        super().__init__()
        self.n, self.count = n, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        if self.count == self.n:
            raise KeyboardInterrupt
        return func(*args, **(kwargs or {}))


def products(model, engine, x):
    lin = linearize(x, model, engine=engine)
    v = torch.ones(3, *x.shape, dtype=x.dtype)
    return lin.vjp(lin.jvp(v))


@pytest.fixture(scope="module")
def expected():
    x, model = image(), Layers().double().eval()
    truth = torch.autograd.functional.jacobian(lambda x: flat(model(x)), x).reshape(-1, x.numel())
    return (truth.T @ (truth @ torch.ones(x.numel(), dtype=x.dtype))).reshape(x.shape)


def interrupted(at, n, engine, resumes, expected):
    """Whether it came to that; what was left is checked."""
    model = Layers().double().eval()
    if resumes:
        linearize(image(1), model, engine=engine)
    before, held = settings(), contents(model)
    try:
        with at(n):
            products(model, engine, image())
    except KeyboardInterrupt:
        came = True
    else:
        came = False
    now = settings()
    assert {k for k in now if now[k] != before[k]} == set(), f"after the interrupt {n}"
    if came:
        tensors, *rest = contents(model)
        tensors = {name: tensors[name] for name in tensors if name in held[0]}  # a table may be there now, or not
        assert (tensors, *rest) == held
    torch.testing.assert_close(products(model, engine, image())[0], expected, rtol=1e-8, atol=1e-10)
    assert torch.equal(torch.func.vmap(torch.sin)(image()), image().sin())
    return came


def count_of(at, engine, resumes):
    model = Layers().double().eval()
    if resumes:
        linearize(image(1), model, engine=engine)
    with at(-1) as counter:
        products(model, engine, image())
    return counter.count


CASES = [(engine, resumes) for engine in ENGINES for resumes in (False, True) if engine == "traced" or not resumes]


@pytest.mark.parametrize(("at", "times"), [(AtOperation, 6), pytest.param(AtLine, 200, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("engine", "resumes"), CASES)
def test_an_interrupt_anywhere(engine, resumes, at, times, expected):
    products(Layers().double().eval(), engine, image())  # what is imported at the first call
    total = count_of(at, engine, resumes)
    drawn = np.random.default_rng(times).integers(1, total, times)
    assert sum(interrupted(at, int(n), engine, resumes, expected) for n in drawn) >= 0.9 * times


REAL = """
import random, signal, sys, time
import torch
torch.set_num_threads(1)
sys.path[:0] = {tests!r}
from test_interrupts import Layers, contents, image, products
from unharmed import settings

model = Layers().double().eval()
expected = products(model, "auto", image())
usual = float("inf")
for _ in range(3):
    start = time.process_time()
    products(Layers().double().eval(), "auto", image())
    usual = min(usual, time.process_time() - start)
draw, came = random.Random(0), 0
for _ in range({times}):
    model = Layers().double().eval()
    before, held = settings(), contents(model)
    try:
        signal.setitimer(signal.ITIMER_REAL, draw.uniform(1e-5, usual))
        products(model, "auto", image())
        signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        came += 1
    now = settings()
    assert not [k for k in now if now[k] != before[k]], [k for k in now if now[k] != before[k]]
    tensors, *rest = contents(model)
    assert ({{name: tensors[name] for name in tensors if name in held[0]}}, *rest) == held
    assert torch.allclose(products(model, "auto", image()), expected)
print(came)
"""


@pytest.mark.slow
def test_signals_at_random_times():
    script = "import signal\nsignal.signal(signal.SIGALRM, signal.default_int_handler)\n" + REAL.format(
        tests=HERE, times=200
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) > 100


FORK = """
import os, sys, threading, time
import torch
torch.set_num_threads(1)
sys.path[:0] = {tests!r}
from test_interrupts import Layers, image, products
from unharmed import settings
from fisherop import linearize

expected = products(Layers().double().eval(), "auto", image())
before, inside, go_on = settings(), threading.Event(), threading.Event()

def waits(x):
    inside.set()
    go_on.wait()
    return x.sin()

other = threading.Thread(target=lambda: linearize(image(), waits))
other.start()
inside.wait()
assert settings()["mha"] != before["mha"], "it is forked while settings are changed"
child = os.fork()
if child == 0:
    now = settings()
    wrong = [k for k in now if now[k] != before[k] and k != "random"]  # which Python itself seeds anew
    right = torch.allclose(products(Layers().double().eval(), "auto", image()), expected)
    os._exit(0 if right and not wrong else 1)
for _ in range(600):
    done, status = os.waitpid(child, os.WNOHANG)
    if done:
        break
    time.sleep(0.1)
else:
    os.kill(child, 9)
go_on.set()
other.join()
assert done and status == 0, (done, status)
assert settings() == before
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.skipif(torch.cuda.is_available(), reason="PyTorch differentiates in threads for CUDA, which no fork has")
def test_a_fork_while_another_thread_linearizes():
    """The child waits for no thread that it doesn't have, and PyTorch is there as it should be."""
    script = FORK.format(tests=HERE)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
