"""What makes products fast changes no result: memory that is used again, layouts, other forms of convolutions."""

import os
import subprocess
import sys

import pytest
import torch
from helpers import DTYPES, assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fisherop import linearize
from fisherop.jacobian import OfModel
from fisherop.model.engines.kernels import nchw, nhwc
from fisherop.model.engines.nodes import IMAGE, LINEAR, STATIC, compile_nodes, needed
from fisherop.model.engines.reuse import in_place
from fisherop.model.engines.tape import Tape

SHAPE = (2, 3, 3)


def drawn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def twice(x, c):
    a = x * c
    return a + x * 2, a * c


def a_view_read_later(x, c):
    a = x * c
    b = a.transpose(0, 1)
    return (a + x).neg(), b * 3


def an_expanded_view_read_later(x, c):
    a = (x * c).sum(0, keepdim=True)
    b = a * 2
    return b.expand(SHAPE) + x, b + a


def with_itself(x, c):
    a = x * c
    b = x * 2
    return a + a, b + b.mT


def over_a_broadcast(x, c):
    a = (x * c)[:1]
    return a + x * c, (a * 2) * c


def the_second_argument(x, c):
    return x + x * c, x - x * 3


def a_result_in_between(x, c):
    a = x * c
    return a, a.neg() * c, a.reshape(-1)


def a_slice_of_what_is_added_to(x, c):
    a = x * c
    return a.reshape(6, 3)[1:].sum(0) + (a + a.reshape(-1).flip(0).reshape(SHAPE)).sum((0, 1))


def expanded(x, c):
    a = (x * c)[:1].expand(SHAPE)
    return a * c, (x * 2)[:1].expand(SHAPE).neg()


# of which at least so many operations may work in place
PROGRAMS = {
    twice: 1,
    a_view_read_later: 1,
    an_expanded_view_read_later: 0,
    with_itself: 0,
    over_a_broadcast: 0,
    the_second_argument: 1,
    a_result_in_between: 1,
    a_slice_of_what_is_added_to: 0,
    expanded: 0,
}


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("level", [STATIC, IMAGE])
def test_programs_in_place(program, level):
    """The same bits as out of place; what is passed in, constants and earlier results stay as they are."""
    x, c = drawn(*SHAPE), drawn(*SHAPE, seed=1)
    tape = Tape()
    given = (x, c) if level == IMAGE else (x,)  # or c is a constant of the program
    inputs = [tape.input(t, level) for t, level in zip(given, (LINEAR, IMAGE), strict=False)]
    results = tape.record(lambda: program(x, c))
    results = list(results) if isinstance(results, tuple) else [results]
    nodes = needed(results, above=STATIC)
    instead = in_place(nodes, results)
    assert len(instead) >= PROGRAMS[program]
    plain, fast = compile_nodes(nodes, inputs, results), compile_nodes(nodes, inputs, results, instead)
    kept = x.clone(), c.clone()
    first = fast(*given)
    copies = [t.clone() for t in first]
    assert all(map(torch.equal, first, plain(*given)))
    again = fast(*given)
    other = fast(x + 1, *given[1:])
    assert all(map(torch.equal, first, copies)) and all(map(torch.equal, again, copies))
    assert not all(map(torch.equal, other, copies))
    assert all(map(torch.equal, (x, c), kept))


@given(
    kernel=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    stride=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    padding=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    dilation=st.sampled_from([1, 1, 2]),
    size=st.tuples(st.integers(9, 20), st.integers(9, 20)),
    channels=st.sampled_from([(1, 2), (3, 4), (4, 8), (6, 3)]),
)
@settings(max_examples=60)
def test_transposed_convolutions(kernel, stride, padding, dilation, size, channels):
    fits = all(n + 2 * p > dilation * (k - 1) for n, p, k in zip(size, padding, kernel, strict=True))
    if not fits:
        return
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Conv2d(*channels, kernel, stride, padding, dilation).double()
    x = drawn(1, channels[0], *size, dtype=torch.float64)
    truth = torch.autograd.functional.jacobian(model, x).reshape(-1, x.numel())
    lin = linearize(x.float(), model.float(), engine="traced")
    for k in (1, 3):
        u = drawn(k, lin.response_size, seed=2)
        assert_close(lin.vjp(u).flatten(1), u.double() @ truth, torch.float32, factor=1e4)
    rows = drawn(3, x.numel(), seed=3)
    r, products = OfModel(lin).normal(rows)
    images = rows.double() @ truth.T
    assert_close(r.T @ r, images @ images.T, torch.float32, factor=1e4)
    assert_close(products, images @ truth, torch.float32, factor=1e4)


@pytest.mark.parametrize(
    "shape", [(1, 3, 4, 5), (3, 1, 4, 5), (2, 5, 1, 1), (2, 70, 8, 9), (0, 3, 2, 2), (2, 64, 64, 66)]
)
def test_layouts(shape):
    x = drawn(*shape)
    laid_out = nhwc(x)
    assert torch.equal(laid_out, x) and laid_out.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(nchw(laid_out), x) and nchw(laid_out).is_contiguous()
    assert laid_out.stride() == torch.empty_like(x, memory_format=torch.channels_last).stride()
    assert torch.equal(nhwc(laid_out), x)
    several = laid_out.unsqueeze(1)
    assert torch.equal(nchw(several), x.unsqueeze(1)) and nchw(several).is_contiguous()
    turned = x.transpose(0, 1)
    assert torch.equal(nhwc(turned), turned) and torch.equal(nchw(turned), turned)


class Stem(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 6, 7, stride=2, padding=3)
        self.inner = nn.Sequential(nn.Conv2d(6, 6, 1), nn.Softplus(), nn.Conv2d(6, 6, 3, padding=1))

    def forward(self, x):
        x = nn.functional.max_pool2d(nn.functional.softplus(self.first(x)), 3, 2, 1)
        return nn.functional.relu(self.inner(x) + x)


@pytest.mark.parametrize("engine", ["traced", "functional"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_normal_counts_its_products_and_is_r_and_the_product(dtype, engine):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Stem().to(dtype)
    lin = linearize(drawn(1, 3, 40, 36, dtype=dtype), model, engine=engine, chunk_size=3)
    heard = []
    lin.on_product = heard.append
    for k in (0, 1, 2, 3, 7):
        v, before = drawn(k, *lin.image_shape, seed=k, dtype=dtype), (lin.n_jvp, lin.n_vjp)
        heard.clear()
        r, products = lin.normal(v)
        assert (lin.n_jvp - before[0], lin.n_vjp - before[1]) == (k, k) and sum(heard) == k
        jv = lin.jvp(v)
        assert r.shape == (k, k) and r.dtype == torch.float64 and products.shape == v.shape
        assert_close(r.T @ r, jv.double() @ jv.double().T, dtype, factor=1e4)
        assert_close(products, lin.vjp(jv), dtype, factor=1e4)
        again = lin.normal(v)
        assert torch.equal(again[0], r) and torch.equal(again[1], products), "the same bits again"
    if engine == "traced":
        tried = lin._engine.program._blocks
        assert {k for direction, k in tried if direction == "normal"} == {1, 2, 3}
        assert all(program for (_, k), program in tried.items() if k != 2), "none was rejected"


def test_a_product_may_be_what_was_passed_in():
    """The identity gives the block itself, which the result must not share memory with."""
    lin = linearize(drawn(1, 2, 3), lambda x: x.flatten(), engine="traced")
    for k in (1, 3):
        v = drawn(k, 1, 2, 3)
        jv, (_, products) = lin.jvp(v), lin.normal(v)
        kept = v.clone()
        jv.zero_()
        products.zero_()
        assert torch.equal(v, kept)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="it counts what Linux gives to a process")
def test_products_of_blocks_reuse_their_memory():
    """Fresh pages for every tensor of every product would take longer than what is computed."""
    code = """
import resource, torch
from fisherop import linearize
torch.set_num_threads(1)
model = torch.nn.Sequential(*(torch.nn.Conv2d(c, 16, 3, padding=1) for c in (1, 16, 16)), torch.nn.Tanh()).eval()
x = torch.rand(1, 1, 96, 96)
lin, v = linearize(x, model), torch.randn(8, *x.shape)
for _ in range(3):
    lin.normal(v)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    lin.normal(v)
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 10)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    a_tensor = 8 * 16 * 96 * 96 * 4 / os.sysconf("SC_PAGE_SIZE")
    assert float(done.stdout) < a_tensor / 4
