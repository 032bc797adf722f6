"""What one product (one J v, one Jᵀu) costs, in plain forward passes of the model: FLOPs, time, peak memory.

Every engine of fisherop, plain `torch.func`, and, where installed, plenoptic's and curvlinops' products, side by side
in one process, float32. Prints a Markdown table and writes ``products.json``, also what building and the second image
cost, and how a vector in a block of 8 compares with a single one, in pairs. All models but On–Off need torchvision;
weights are random.

    python benchmarks/products.py [--sizes 128 224] [--threads 1 2] [--models NAME ...] [--engines NAME ...]
                                  [--device cuda]
    python benchmarks/products.py --cold | --held
"""

import argparse
import ctypes
import functools
import importlib.util
import json
import math
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fisherop import LayerResponse, linearize
from fisherop.model.compat import differentiable
from fisherop.models import OnOff
from fisherop.testing import count_flops

ENGINES = ("traced", "functional", "double_backward")


def models(size: int) -> dict[str, Callable[[], nn.Module]]:
    found: dict[str, Callable[[], nn.Module]] = {}
    if importlib.util.find_spec("torchvision"):
        import torchvision.models as tv

        for layer in ("maxpool", "layer1", "layer2.0", "layer4"):
            found[f"ResNet18 {layer}"] = lambda layer=layer: LayerResponse(tv.resnet18(), layer)
        found["wide_resnet50_2 layer1"] = lambda: LayerResponse(tv.wide_resnet50_2(), "layer1")
        found["VGG13 features.14"] = lambda: LayerResponse(tv.vgg13(), "features.14")
        found["VGG16 features.11"] = lambda: LayerResponse(tv.vgg16(), "features.11")
        found["ViT-B/16"] = lambda: with_random_head(tv.vit_b_16(image_size=size), "heads.head")
        found["ConvNeXt-tiny"] = tv.convnext_tiny
    found["On–Off"] = OnOff
    return found


def with_random_head(model: nn.Module, name: str) -> nn.Module:
    nn.init.normal_(model.get_submodule(name).weight, std=0.02)
    return model


class AtImage(nn.Module):
    """A model whose one parameter is the image, for curvlinops."""

    def __init__(self, model: nn.Module, image: Tensor) -> None:
        super().__init__()
        self.x = nn.Parameter(image.clone())
        self.respond = lambda x: model(x.clone()).reshape(1, -1)

    def forward(self, _: Tensor) -> Tensor:
        with differentiable():
            return self.respond(self.x)


def ours(engine: str) -> Callable:
    def build(image: Tensor, model: nn.Module) -> tuple[Callable, Callable]:
        lin = linearize(image, model, engine=engine)
        return lin.jvp, lin.vjp

    return build


def compiled(image: Tensor, model: nn.Module) -> tuple[Callable, Callable]:
    """The traced engine's programs through `torch.compile`, to see what that would win; in the same chunks."""
    lin = linearize(image, model, engine="traced")
    engine, programs = lin._engine, {}

    def product(direction: str, block: Tensor) -> Tensor:
        key = direction, len(block)
        if key not in programs:
            getattr(engine, direction)(block)
            programs[key] = torch.compile(engine._program._blocks[key], dynamic=False)
        return programs[key](block, *engine._constants)[0]

    def chunked(direction: str, block: Tensor) -> Tensor:
        return torch.cat([product(direction, chunk) for chunk in block.split(lin.chunk_size)])

    return functools.partial(chunked, "jvp"), functools.partial(chunked, "vjp")


def torch_func(image: Tensor, model: nn.Module) -> tuple[Callable, Callable]:
    def respond(x: Tensor) -> Tensor:
        with differentiable():
            return model(x.clone()).reshape(-1)

    def jvp(block: Tensor) -> Tensor:
        return torch.func.vmap(lambda v: torch.func.jvp(respond, (image,), (v,))[1])(block)

    def vjp(block: Tensor) -> Tensor:
        return torch.func.vmap(lambda u: torch.func.vjp(respond, image)[1](u)[0])(block)

    def one_jvp(block: Tensor) -> Tensor:
        return torch.func.jvp(respond, (image,), (block[0],))[1][None] if len(block) == 1 else jvp(block)

    def one_vjp(block: Tensor) -> Tensor:
        return torch.func.vjp(respond, image)[1](block[0])[0][None] if len(block) == 1 else vjp(block)

    return one_jvp, one_vjp


def plenoptic(image: Tensor, model: nn.Module) -> tuple[Callable, Callable]:
    from plenoptic._synthesize import autodiff

    with torch.enable_grad(), differentiable():
        x = image.reshape(-1, 1).clone().requires_grad_()
        y = model(x.reshape(image.shape)).reshape(-1, 1)
    dummy = torch.ones_like(y, requires_grad=True)

    def jvp(block: Tensor) -> Tensor:
        with torch.enable_grad():
            return autodiff._jacobian_vector_product(y, x, block.flatten(1).T, dummy).T.detach()

    def vjp(block: Tensor) -> Tensor:
        with torch.enable_grad():
            return autodiff._vector_jacobian_product(y, x, block.T, detach=True).T.reshape(-1, *image.shape)

    return jvp, vjp


def curvlinops(image: Tensor, model: nn.Module) -> tuple[Callable, Callable]:
    from curvlinops import JacobianLinearOperator, TransposedJacobianLinearOperator

    at, nothing = AtImage(model, image), [(torch.zeros(1, 1), torch.zeros(1, 1))]
    forward = JacobianLinearOperator(at, [at.x], nothing, check_deterministic=False)
    backward = TransposedJacobianLinearOperator(at, [at.x], nothing, check_deterministic=False)
    return (
        lambda block: (forward @ block.flatten(1).T).T,
        lambda block: (backward @ block.T).T.reshape(-1, *image.shape),
    )


def products() -> dict[str, Callable]:
    """Builders of (jvp, vjp) on blocks."""
    others = {"plenoptic": plenoptic, "curvlinops": curvlinops}
    return {
        **{name: ours(name) for name in ENGINES},
        "traced, compiled": compiled,
        "torch.func": torch_func,
        **{name: build for name, build in others.items() if importlib.util.find_spec(name)},
    }


def seconds(run: Callable[[], object]) -> float:
    finish()
    start = time.perf_counter()
    run()
    finish()
    return time.perf_counter() - start


def finish() -> None:
    """A GPU works on when PyTorch's functions have returned."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def ratio(run: Callable[[], object], forward: Callable[[], object], budget: float = 2.0) -> float:
    """The median over pairs of the time of `run` in forward passes."""
    run()
    forward()
    pairs, start = [], time.perf_counter()
    while len(pairs) < 3 or (len(pairs) < 15 and time.perf_counter() - start < budget):
        pairs.append(seconds(run) / min(seconds(forward) for _ in range(2)))
    return statistics.median(pairs)


def peak(run: Callable[[], object]) -> float:
    """MiB by which the process grows while `run` runs; Linux only."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        pathlib.Path("/proc/self/clear_refs").write_text("5")
        before = memory("VmRSS")
        run()
        return (memory("VmHWM") - before) / 1024
    except (OSError, AttributeError):
        return math.nan


def memory(what: str) -> int:
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what))


def measure(
    name: str, build: Callable[[], nn.Module], size: int, threads: int, engines: list[str], device: str
) -> list[dict]:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = build().eval().to(device)
    image, other = torch.rand(2, 1, 1 if name == "On–Off" else 3, size, size).to(device)
    rows, truth = [], None
    with torch.no_grad():
        v, u = torch.randn(8, *image.shape).to(device), torch.randn(8, model(image).numel()).to(device)
        for engine, make in products().items():
            if engine not in engines:
                continue
            row = {"model": name, "size": size, "threads": threads, "engine": engine}
            try:
                truth = cost(row, make, model, image, other, v, u, truth)
            except (RuntimeError, ValueError, TypeError) as error:
                row["error"] = str(error).splitlines()[0][:120]
            rows.append(row)
            print(line(row), flush=True)
    return rows


def cost(row: dict, make: Callable, model: nn.Module, image: Tensor, other: Tensor, v: Tensor, u: Tensor, truth):
    """Fill a row; the first row's J v is what the others are compared with."""

    def forward() -> Tensor:
        return model(image)

    forward_seconds = statistics.median(seconds(forward) for _ in range(5))
    start = time.perf_counter()
    pair = make(image, model)
    finish()
    row["build"] = (time.perf_counter() - start) / forward_seconds
    row["build_again"] = seconds(lambda: make(other, model)) / forward_seconds
    jv = pair[0](v[:1])
    truth = jv if truth is None else truth
    row["difference"] = float((jv - truth).norm() / truth.norm())
    with differentiable():  # fused attention has no formula that counts it
        forward_flops = count_flops(forward)
    for k in (1, 8):
        runs = [functools.partial(f, b[:k]) for f, b in zip(pair, (v, u), strict=True)]
        for run in runs:
            run()  # the first block of a size costs more
        row[f"flops_{k}"] = sum(map(count_flops, runs)) / k / forward_flops
        row[f"time_{k}"] = sum(ratio(run, forward) for run in runs) / k
    single, block = (functools.partial(product, pair, v[:k], u[:k]) for k in (1, 8))
    row["block"] = ratio(block, single) / 8
    del pair, runs, run, single, block
    row["peak_mib"] = peak(lambda: [f(b) for f, b in zip(make(image, model), (v[:1], u[:1]), strict=True)])
    return truth


def product(pair: tuple, v: Tensor, u: Tensor) -> None:
    pair[0](v)
    pair[1](u)


def line(row: dict) -> str:
    cells = [row["model"], f"{row['size']}²", row["threads"], row["engine"]]
    if "error" in row:
        return f"| {' | '.join(map(str, cells))} | {row['error']} |"
    cells += [f"{row[key]:.2f}" for key in ("flops_1", "time_1", "flops_8", "time_8", "block")]
    cells += [f"{row['build']:.0f}", f"{row['build_again']:.1f}", f"{row['build_again'] + 50 * row['time_1']:.0f}"]
    cells += [f"{row['peak_mib']:.0f}", f"{row['difference']:.0e}"]
    return f"| {' | '.join(map(str, cells))} |"


def cold(name: str = "ResNet18 layer2.0", size: int = 128) -> None:
    """Seconds of `linearize` and 50 products in a fresh process, and the same for the next image, one thread."""
    code = (
        f"import sys, time; sys.path.insert(0, {str(pathlib.Path(__file__).parent)!r}); from products import *;"
        f"torch.set_num_threads(1); torch.manual_seed(0); model = models({size})[{name!r}]().eval();"
        f"x, v = torch.rand(2, 1, 3, {size}, {size}), torch.randn(1, 1, 3, {size}, {size}); model(x[0])\n"
        "for image in x:\n"
        "    start = time.perf_counter(); lin = linearize(image, model, engine=sys.argv[1])\n"
        "    for _ in range(50): lin.vjp(lin.jvp(v))\n"
        "    print(time.perf_counter() - start, end=' ')"
    )
    runs = [
        [
            [float(t) for t in subprocess.check_output([sys.executable, "-W", "ignore", "-c", code, engine]).split()]
            for engine in ("traced", "functional")
        ]
        for _ in range(5)
    ]
    for i, which in enumerate(("first", "next")):
        ours, theirs = (statistics.median(run[e][i] for run in runs) for e in (0, 1))
        pairs = statistics.median(run[0][i] / run[1][i] for run in runs)
        print(f"{name} at {size}², {which} image, with 50 products:", end=" ")
        print(f"traced {ours:.2f} s, functional {theirs:.2f} s, ratio {pairs:.2f}")


def held(name: str = "ResNet18 layer4", size: int = 224) -> None:
    """What a traced linearization holds, and what autograd keeps for one backward pass."""
    model, image = models(size)[name]().eval(), torch.rand(1, 3, size, size)
    own, shared = (n / 2**20 for n in linearize(image, model, engine="traced")._engine.held_bytes)
    saved = {}

    def keep(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes() / 2**20
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model(image.clone().requires_grad_())
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    activations = sum(n for place, n in saved.items() if place not in parameters)
    print(f"{name} at {size}²: {own:.1f} MiB for the image and {shared:.1f} for the model;", end=" ")
    print(f"autograd: {activations:.1f} MiB, with the parameters that it holds {sum(saved.values()):.1f}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 224])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--models", nargs="+")
    parser.add_argument("--engines", nargs="+", default=list(products()))
    parser.add_argument("--device", default="cpu", help="on a GPU, plain passes are timed in float32, without TF32")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("products.json"))
    parser.add_argument("--cold", action="store_true", help="only the first and the next image, in fresh processes")
    parser.add_argument("--held", action="store_true", help="only the memory that a linearization holds")
    options = parser.parse_args()
    torch.backends.cudnn.allow_tf32 = False
    if options.held:
        return held()
    if options.cold:
        return cold()
    print(
        "FLOPs and time per product and vector, in forward passes; of building, and of the next image of the same "
        "model, alone and with 50 products; the process's growth in MiB; J v against the first row's.\n"
    )
    names = (
        "model|image|threads|engine|FLOPs|time|FLOPs, k=8|time, k=8|a vector of 8 / one|build|next image|"
        "with 50 products|peak|difference"
    )
    print(f"| {names.replace('|', ' | ')} |")
    print("|---" * (names.count("|") + 1) + "|")
    rows = []
    for threads in options.threads:
        for size in options.sizes:
            for name, build in models(size).items():
                if options.models is None or name in options.models:
                    rows += measure(name, build, size, threads, options.engines, options.device)
                    options.out.write_text(json.dumps(rows, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
