"""How cost grows: tasks a minute with more processes, products of a pooled operator, time and memory with the image.

Random weights; ResNet18 and VGG16 need torchvision, clusters dask.distributed. Every process has one thread. Prints
Markdown tables.

    export OMP_NUM_THREADS=1
    python benchmarks/scaling.py tasks [--images 20]
    python benchmarks/scaling.py pooled [--images 16 64 256]
    python benchmarks/scaling.py sizes [--models NAME ...] [--sizes 32 64 128 256 512 1024] [--no-ends]
    python benchmarks/scaling.py one NAME SIZE [--no-ends]  # one line of these, in a process of its own
"""

import argparse
import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import time

import numpy as np
import torch

import fisherop
from fisherop import FisherOperator, LayerResponse, eigenpairs, images, sweep
from fisherop.models import OnOff

MIB = 2**20
LAYERS = ("maxpool", "layer1.0", "layer2.0")
# Dask lets its workers give memory back at once, so that large tensors would fault anew in every product
KEEP_MEMORY = {f"MALLOC_{name}_THRESHOLD_": str(2**30) for name in ("TRIM", "MMAP")}


def resnet18():
    import torchvision

    torch.manual_seed(0)
    return torchvision.models.resnet18().eval()


def model(name):
    if name == "On–Off":
        return OnOff(), 1
    import torchvision

    torch.manual_seed(0)
    kind, layer = name.split()
    return LayerResponse(getattr(torchvision.models, kind.lower())().eval(), layer), 3


MODELS = ("On–Off", "ResNet18 maxpool", "ResNet18 layer2.0", "VGG16 features.11")


@contextlib.contextmanager
def cluster(n_workers):
    import dask
    from distributed import Client, LocalCluster

    settings: dict = {f"distributed.nanny.pre-spawn-environ.{name}": value for name, value in KEEP_MEMORY.items()}
    settings["distributed.worker.profile.enabled"] = False  # it stops the worker's thread a hundred times a second
    with (
        dask.config.set(settings),
        LocalCluster(n_workers=n_workers, threads_per_worker=1, dashboard_address=None) as workers,
        Client(workers) as client,
    ):
        yield client


def tasks(count, size=64):
    """Tasks a minute of 20 images × 3 layers, after each worker has done a few, in three rounds by turns."""
    several = [torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(i)) for i in range(count)]
    models = [(resnet18, layer) for layer in LAYERS]
    warm = [torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(1000 + i)) for i in range(8)]

    def measure(executor):
        start = time.perf_counter()
        table = sweep(several, models, executor=executor, tol=1e-4, rng=0, progress=False)
        assert not table.failed, table
        return 60 * len(table) / (time.perf_counter() - start)

    with cluster(1) as one, cluster(2) as two:
        where = {
            "this process": None,
            "Dask, 1 × 1 thread": one.get_executor(),
            "Dask, 2 × 1 thread": two.get_executor(),
        }
        for executor in where.values():
            sweep(warm, models, executor=executor, tol=1e-4, rng=0, progress=False)
        rounds = [{name: measure(executor) for name, executor in where.items()} for _ in range(3)]
    print(f"\n{len(several)} images of {size}² × {len(models)} layers of ResNet18\n")
    print("| where | tasks a minute | times one process, median |")
    print("|---|---|---|")
    for name in where:
        ratio = statistics.median(one[name] / one["this process"] for one in rounds)
        print(f"| {name} | {', '.join(f'{one[name]:.0f}' for one in rounds)} | {ratio:.2f} |")


def pooled(counts, size=64):
    """Products a second of F of many images, blocks of one vector."""
    net, _ = model("ResNet18 layer2.0")
    most = [torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(i)) for i in range(max(counts))]

    def rate(operator, seconds=6.0):
        x = torch.randn(1, operator.shape[0], generator=torch.Generator().manual_seed(0))
        operator.products.normal(x)
        times, start = [], time.perf_counter()
        while time.perf_counter() < start + seconds or len(times) < 3:
            begin = time.perf_counter()
            operator.products.normal(x)
            times.append(time.perf_counter() - begin)
        return 1 / statistics.median(times)

    found = {count: [rate(FisherOperator.pooled(most[:count], net))] for count in counts}
    for n_workers in (1, 2):
        with cluster(n_workers) as client:
            for count in counts:
                found[count].append(rate(FisherOperator.pooled(most[:count], net, client=client)))
    print(f"\nResNet18 layer2.0, {size}²: products a second\n\n| images | this process | 1 worker | 2 workers |")
    print("|---|---|---|---|")
    for count, rates in found.items():
        print(f"| {count} | " + " | ".join(f"{one:.2f}" for one in rates) + " |")


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def one(name, size, ends):
    """Time and memory of one model at one size, as JSON; memory is the growth of the process."""
    net, channels = model(name)

    def image(side):
        if name == "On–Off":
            return images.photograph(as_gray=True, size=side) if side <= 512 else torch.rand(1, 1, side, side)
        return torch.rand(1, channels, side, side, generator=torch.Generator().manual_seed(0))

    x = image(size)
    eigenpairs(FisherOperator(image(32), net), tol=1e-2, progress=False, rng=0)  # imports, and what they allocate
    with torch.no_grad():
        net(x)
        start = time.thread_time()
        net(x)
        forward = time.thread_time() - start
    before, ceiling = resident(), peak()
    start = time.thread_time()
    F = FisherOperator(x, net)
    build = time.thread_time() - start
    built = peak()
    v = torch.randn(1, F.shape[0], generator=torch.Generator().manual_seed(0))
    F.products.normal(v)
    repeats = max(3, min(20, int(10 / max(build, 1e-3))))
    times = []
    for _ in range(repeats):
        start = time.thread_time()
        F.products.normal(v)
        times.append(time.thread_time() - start)
    told = {
        "name": name,
        "size": size,
        "forward": forward,
        "build": build,
        "product": statistics.median(times),
        "held_mib": F.linearization.held_bytes / MIB,
        "build_peak_mib": (built - before) / MIB if built > ceiling else float("nan"),
    }
    if ends:
        start = time.thread_time()
        result = eigenpairs(F, tol=1e-4, progress=False, rng=0)
        told |= {
            "ends": time.thread_time() - start,
            "products": result.n_products,
            "status": list(map(str, result.status)),
        }
    told |= {"peak_mib": (peak() - before) / MIB, "process_peak_mib": peak() / MIB}
    print(json.dumps(told))


def sizes(names, several, ends):
    header = ("model", "size", "linearize / fwd", "product / fwd", "product, s", "held, MiB", "peak of linearize, MiB")
    header += ("both ends: products", "s", "peak, MiB") if ends else ()
    print("| " + " | ".join(header) + " |\n" + "|---" * len(header) + "|", flush=True)
    for name in names:
        rows = []
        for size in several:
            command = [sys.executable, __file__, "one", name, str(size), *([] if ends else ["--no-ends"])]
            told = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            rows.append(told)
            cells = [
                name,
                f"{size}²",
                f"{told['build'] / told['forward']:.1f}",
                f"{told['product'] / told['forward']:.2f}",
            ]
            cells += [f"{told['product']:.3g}", f"{told['held_mib']:.3g}", f"{told['build_peak_mib']:.3g}"]
            cells += [f"{told['products']:.0f}", f"{told['ends']:.3g}", f"{told['peak_mib']:.4g}"] if ends else []
            print("| " + " | ".join(cells) + " |", flush=True)
        large = [row for row in rows if row["size"] >= 128]
        if len(large) > 1:
            pixels = np.log([row["size"] ** 2 for row in large])
            fits = {
                what: np.polyfit(pixels, np.log([row[what] for row in large]), 1)[0] for what in ("product", "held_mib")
            }
            if ends:
                fits["peak_mib"] = np.polyfit(pixels, np.log([row["peak_mib"] for row in large]), 1)[0]
            told = ", ".join(f"{what} {value:.2f}" for what, value in fits.items())
            print(f"\nExponents in N of {name}, from 128²: {told}\n", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["tasks", "pooled", "sizes", "one"])
    parser.add_argument("of", nargs="*")
    parser.add_argument("--images", nargs="+", type=int)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--sizes", nargs="+", type=int, default=[32, 64, 128, 256, 512, 1024])
    parser.add_argument("--no-ends", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"fisherop {fisherop.__version__}, torch {torch.__version__}", file=sys.stderr)
    if options.what == "tasks":
        tasks((options.images or [20])[0])
    elif options.what == "pooled":
        pooled(options.images or [16, 64, 256])
    elif options.what == "sizes":
        sizes(options.models, options.sizes, not options.no_ends)
    else:
        one(options.of[0], int(options.of[1]), not options.no_ends)
