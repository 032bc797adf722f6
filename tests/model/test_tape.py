"""Random programs of views and writes in place: what the tape makes of them, against dense derivatives by autograd."""

import random

import pytest
import torch
from torch import Tensor, nn

import fisherop.model.engines.tape
from fisherop import linearize
from fisherop.model.compat import clean_failure
from fisherop.model.engines import Traced
from fisherop.model.engines.nodes import NotLinear
from fisherop.model.engines.plain import forward_mode, with_graph
from fisherop.model.response import Response

F64 = torch.float64


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def part(r: random.Random, n: int) -> slice:
    start = r.randrange(n)
    return slice(start, r.randint(start + 1, n), r.choice([1, 1, 2, 3]))


def along(d: int, index) -> tuple:
    return (*[slice(None)] * d, index)


def is_expanded(t: Tensor) -> bool:
    return any(n > 1 and s == 0 for n, s in zip(t.shape, t.stride(), strict=True))


# of a tensor, one of its dimensions and a source of choices
VIEWS = {
    "slice": lambda t, d, r: t[along(d, part(r, t.shape[d]))],
    "select": lambda t, d, r: t.select(d, r.randrange(t.shape[d])),
    "unsqueeze": lambda t, d, r: t.unsqueeze(d),
    "expand": lambda t, d, r: t.unsqueeze(d).expand(*t.shape[:d], 2, *t.shape[d:]),
    "unfold": lambda t, d, r: t.unfold(d, min(2, t.shape[d]), r.randint(1, 2)),
    "transpose": lambda t, d, r: t.transpose(0, d),
    "diagonal": lambda t, d, r: torch.diagonal(t[None], 0, 0, d + 1),
    "flip": lambda t, d, r: t.flip(d),
    "reshape": lambda t, d, r: t.reshape(t.shape[d], -1),
    "strided": lambda t, d, r: t.as_strided((2, t.numel() // 2), (0, 1)) if t.is_contiguous() else t,
    "complex": lambda t, d, r: torch.view_as_complex(torch.stack([t, t * t.detach()], -1)),
}
VALUES = {
    "clone": lambda t, d, r: t.clone(),
    "sine": lambda t, d, r: t.clone().sin(),
    "sum": lambda t, d, r: t.sum(d, keepdim=r.random() < 0.5),
}


def set_slice(t: Tensor, s: Tensor, d: int, r: random.Random) -> None:
    index = along(d, part(r, t.shape[d]))
    t[index] = s[index]


def set_mask(t: Tensor, s: Tensor, d: int, r: random.Random) -> None:
    t[torch.arange(t.numel()).reshape(t.shape) % 3 == 0] = 0.3


def set_index(t: Tensor, s: Tensor, d: int, r: random.Random) -> None:
    index = along(d, torch.tensor([t.shape[d] - 1]))
    t[index] = s[index] * 0.5


def swap(t: Tensor, s: Tensor, d: int, r: random.Random) -> None:
    first, last = t.select(d, 0), t.select(d, t.shape[d] - 1)
    kept = first.clone()
    first.copy_(last)
    last.copy_(kept)


def set_data(t: Tensor, s: Tensor, d: int, r: random.Random) -> None:
    t.data = t.data.abs() + 0.1


# of a tensor, one of its shape, a dimension and a source of choices
WRITES = {
    "copy": lambda t, s, d, r: t.copy_(s),
    "multiply": lambda t, s, d, r: t.mul_(s.clone()),
    "add single": lambda t, s, d, r: t.add_(s.float()),
    "fill": lambda t, s, d, r: t.fill_(r.choice([0.25, s.sum() * 0.1])),
    "lerp": lambda t, s, d, r: t.lerp_(s, 0.3),
    "addcmul": lambda t, s, d, r: t.addcmul_(s.clone(), s.clone(), value=0.5),
    "masked": lambda t, s, d, r: t.masked_fill_(torch.arange(t.numel()).reshape(t.shape) % 3 == 1, 0.2),
    "cumsum": lambda t, s, d, r: t.cumsum_(d),
    "scatter": lambda t, s, d, r: t.scatter_add_(d, torch.zeros(t.shape, dtype=torch.long), s.clone()),
    "index put": lambda t, s, d, r: t.index_put_((torch.tensor([0, 0]),), s[[0, -1]] * 0.5, accumulate=True),
    "transpose": lambda t, s, d, r: t.transpose_(0, d),
    "detached": lambda t, s, d, r: t.detach().mul_(1.25),
    "data": set_data,
    "slice": set_slice,
    "mask": set_mask,
    "index": set_index,
    "swap": swap,
}
ORIGINS = [
    lambda x, p: x.reshape(-1),
    lambda x, p: x.t().exp(),
    lambda x, p: x[1:],
    lambda x, p: p.clone(),
    lambda x, p: p.detach() * x.mean(),
    lambda x, p: torch.zeros(4, 3, dtype=x.dtype).t(),
]


class Program(nn.Module):
    """Views of tensors, and writes to them, as a seed has it: at every call the same."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed
        self.p = nn.Parameter(torch.rand(3, 4, generator=generator(seed), dtype=F64) + 0.5)
        self.register_buffer("weights", torch.rand(200, generator=generator(seed + 1), dtype=F64) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        r = random.Random(self.seed)
        pool = [r.choice([x, x * 1]), *(r.choice(ORIGINS)(x, self.p) for _ in range(2))]
        for _ in range(3 + self.seed % 8):
            t, s = r.choice(pool), r.choice(pool)
            if t.ndim == 0 or t.numel() > 50 or t.is_complex() or s.is_complex():
                continue
            d = r.randrange(t.ndim)
            if r.random() < 0.5:
                kinds = VIEWS if r.random() < 0.7 else VALUES
                made = kinds[r.choice(list(kinds))](t, d, r)
                pool.append(torch.view_as_real(made)[..., 0] if made.is_complex() and r.random() < 0.7 else made)
            elif not is_expanded(t):
                if s.shape != t.shape or r.random() < 0.5:
                    s = s.reshape(-1)[torch.arange(t.numel()) % s.numel()].reshape(t.shape)
                WRITES[r.choice(list(WRITES))](t, s, d, r)
        flat = [(t.abs() if t.is_complex() else t).reshape(-1)[:200] for t in pool]
        return torch.cat([x.reshape(-1) ** 2, *(t * self.weights[: len(t)] + t.tanh() for t in flat)])


def dense(respond: Response, x: Tensor) -> tuple[Tensor, Tensor] | None:
    """The response and J by reverse mode; None where PyTorch can't, or forward mode gives another."""
    v = torch.randn(x.shape, generator=generator(0), dtype=x.dtype)
    try:
        with clean_failure():
            y, start = with_graph(respond, x)
            rows = [torch.autograd.grad(y, start, e, retain_graph=True)[0] for e in torch.eye(len(y), dtype=x.dtype)]
            with torch.no_grad():
                jv = forward_mode(respond, x, v)[1]
    except RuntimeError:
        return None
    jacobian = torch.stack(rows).flatten(1)
    right = torch.isfinite(jacobian).all() and torch.isfinite(y).all() and close(jv, jacobian @ v.flatten())
    return (y.detach(), jacobian) if right else None


def close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() <= 1e-6 * (1 + b.abs().max()))  # with steps in float32


def check_program(seed: int) -> str:
    """Hold the products of a random program to autograd's at two images; how that went."""
    respond = Response(Program(seed))
    images = torch.rand(2, 3, 4, generator=generator(seed), dtype=F64)
    truth = [dense(respond, x) for x in images]
    if None in truth:
        return "invalid"
    with torch.no_grad():
        try:
            with clean_failure():
                engine = Traced(respond, images[0], truth[0][0])
        except NotLinear:
            return "refused"
        engine.prepare(images[0])
        program = engine.program
        for x, (y, jacobian) in zip(images, truth, strict=True):
            again, *constants = program.prepare(x)
            assert close(again, y), f"the response of program {seed}"
            for held in (constants, engine._constants) if x is images[0] else (constants,):
                v = torch.randn(3, *x.shape, generator=generator(1), dtype=F64)
                u = torch.randn(3, len(y), generator=generator(2), dtype=F64)
                for k in (1, 3) if seed % 3 == 0 else (1,):  # a block is recorded for itself
                    jv, jtu = program.product("jvp", held, v[:k]), program.product("vjp", held, u[:k])
                    assert close(jv, v[:k].flatten(1) @ jacobian.T), f"J v of program {seed}"
                    assert close(jtu.flatten(1), u[:k] @ jacobian), f"Jᵀu of program {seed}"
    return "right"


@pytest.mark.parametrize("small", [0, 4096])
def test_views_and_writes_agree_with_autograd(small, monkeypatch):
    monkeypatch.setattr(fisherop.model.engines.tape, "_SMALL", small)  # constants are told apart by place, or by value
    results = [check_program(seed) for seed in range(small, small + 22)]
    assert results.count("right") > len(results) / 3
    assert results.count("refused") < len(results) / 10


def test_a_write_that_returns_nothing_is_not_lost():
    def model(x: Tensor) -> Tensor:
        y = x * 2
        torch._foreach_mul_([y[:1], y[1:]], [3.0, 5.0])
        return y.sin()

    x = torch.rand(2, 3, generator=generator(0), dtype=F64)
    with torch.no_grad(), pytest.raises(NotLinear, match="in place"):
        Traced(Response(model), x, model(x).flatten())
    lin = linearize(x, model)
    factors = torch.tensor([[6.0], [10.0]], dtype=F64)
    torch.testing.assert_close(lin.jvp(x[None])[0], (factors * (factors * x).cos() * x).flatten())


def test_a_wrong_part_beside_a_right_one_is_refused():
    def model(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.sin(), x * torch.tensor(x.tolist(), dtype=x.dtype)

    with pytest.raises(ValueError, match="not the slope"):
        linearize(torch.rand(1, 4, generator=generator(0), dtype=F64), model)


def test_detached_tensors_may_vary_in_number():
    def model(x: Tensor) -> Tensor:
        y = x.sin() + (x * 1e3).floor() + 0.5 * (x > 0.5)
        for _ in range(1 + int(x.sum().item() * 1e8) % 5):
            y = y + 0 * y.detach()
        return y

    for seed in range(4):
        linearize(torch.rand(1, 6, generator=generator(seed), dtype=F64), model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_coarse_step_hides_no_missing_derivative(dtype):
    def model(x: Tensor) -> Tensor:
        return x.to(dtype).to(x.dtype).sin() * (1 + 0.1 * x.sum().item())

    with pytest.raises(ValueError, match="not the slope"):
        linearize(torch.rand(1, 4, generator=generator(0), dtype=F64), model)


def test_a_filter_drawn_by_the_first_call_is_no_randomness():
    class Cached(nn.Module):
        kept = None

        def forward(self, x: Tensor) -> Tensor:
            if self.kept is None:
                self.kept = torch.randn(4, 4, generator=generator(0), dtype=x.dtype)
            return (x @ self.kept).tanh()

    model, x = Cached(), torch.rand(1, 4, generator=generator(0), dtype=F64)
    assert linearize(x, model).engine_report[-1].startswith("traced")
    torch.testing.assert_close(model.kept, torch.randn(4, 4, generator=generator(0), dtype=F64))
