"""What part of the library compares models or restricts them, against dense algebra: products, errors, memory.

    python benchmarks/comparisons.py pairs        # two models: scipy.linalg.eigh(A, B), by pairs and ends
    python benchmarks/comparisons.py several      # three and four models: starts, and plain ascent beside
    python benchmarks/comparisons.py restricted   # real spectra, masked and band-limited
    python benchmarks/comparisons.py pooled       # the peak memory of many images

Each prints a Markdown table. Models are of the examples, with random weights where they are networks, in float64; the
pairs' Jacobians are replaced by their triangular factors, so that a product is cheap, and truth is known.
"""

import argparse
import pathlib
import resource
import subprocess
import sys

import numpy as np
import scipy.linalg
import torch
from torch import nn

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))

import networks

import fisherop
from fisherop import FisherOperator, LayerResponse, eigenpairs, images, principal_distortions, principal_pair, spaces

EPS = 1e-3
FRONT = {"onoff": "OnOff", "ln": "LinearNonlinear", "lg": "LuminanceGainControl", "lgg": "LuminanceContrastGainControl"}
NETWORKS = {
    "vgg11": ("VGG16Features", "features.11"),
    "maxpool": ("ResNet18", "maxpool"),
    "layer2": ("ResNet18", "layer2.0"),
}
GREY = [
    ("onoff", "ln"), ("onoff", "lg"), ("onoff", "lgg"), ("ln", "lg"), ("lg", "lgg"), ("onoff", "vgg11"),
    ("vgg11", "maxpool"), ("maxpool", "layer2"), ("ln", "layer2"),
]  # fmt: skip
COLOUR = [("maxpool", "layer2"), ("vgg11", "layer2")]


class Thrice(nn.Module):
    """A grey image as a colour one."""

    def forward(self, x):
        return x.expand(-1, 3, -1, -1)


def factor(name: str, size: int, grey: bool) -> np.ndarray:
    """R (N, N) of J = Q R, J that of a model at a photograph."""
    torch.manual_seed(0)
    if name in FRONT:
        model: nn.Module = getattr(fisherop.models, FRONT[name])()
    else:
        kind, layer = NETWORKS[name]
        network = nn.Sequential(*[Thrice()] * grey, networks.Normalise(), getattr(networks, kind)())
        model = LayerResponse(network, f"{1 + grey}.{layer}")
    image = images.photograph(as_gray=grey, size=size, dtype=torch.float64)
    dense = FisherOperator(image, model.double().eval()).jacobian.to_dense()
    r = scipy.linalg.qr(dense, mode="r")[0][: dense.shape[1]]
    return np.vstack([r, np.zeros((r.shape[1] - len(r), r.shape[1]))])


def pairs() -> None:
    print("| pair, N | end | eigenvalue | products, A + B, to 1e-3 | to 1e-6 | stopped at | error there |")
    print("|---|---|---|---|---|---|---|")
    counts, factors = [], {}
    for size, grey, names in ((40, True, GREY), (32, False, COLOUR)):
        for one, other in names:
            for name in (one, other):
                if (name, size) not in factors:
                    factors[name, size] = factor(name, size, grey)
            jacobians = [factors[name, size] for name in (one, other)]
            forms = [j.T @ j / np.linalg.norm(j, 2) ** 2 + EPS * np.eye(j.shape[1]) for j in jacobians]
            truth = scipy.linalg.eigh(*forms, eigvals_only=True)
            operators = [FisherOperator.of(j) for j in jacobians]
            for end, exact in (("largest", truth[-1]), ("smallest", truth[0])):
                rows = []
                for seed in range(3):
                    found = principal_distortions(
                        torch.zeros(len(truth)), *operators, which=end, tol=1e-3, rng=seed, progress=False
                    )
                    errors = [abs(step["quotients"][0] / exact - 1) for step in found.details["history"]]
                    spent = [sum(step["n_products"]) for step in found.details["history"]]
                    reached = [next(n for n, e in zip(spent, errors, strict=True) if e <= tol) for tol in (1e-3, 1e-6)]
                    rows.append([*reached, spent[-1], abs(found.eigenvalues[0] / exact - 1)])
                middle = np.median(rows, axis=0)
                counts.append(middle)
                print(
                    f"| {one}, {other}, {len(truth)} | {end} | {exact:.4g} | {middle[0]:g} | {middle[1]:g} |",
                    f"{middle[2]:g} | {np.max(rows, axis=0)[3]:.1e} |",
                    flush=True,
                )
    grey_counts = np.array(counts[: 2 * len(GREY)])
    medians, worst = np.median(grey_counts, axis=0), grey_counts.max(axis=0)
    print(f"\nMedians of the {len(grey_counts)} grey ends: {medians[0]:g} to 1e-3, {medians[1]:g} to 1e-6;", end=" ")
    print(f"worst {worst[1]:g} to 1e-6")


def several() -> None:
    print(
        "| models, N = 784 | f | gradient / f | products of each model, per start | starts at the best | plain ascent |"
    )
    print("|---|---|---|---|---|---|")
    for names in (("onoff", "ln", "lg"), ("onoff", "ln", "lg", "lgg")):
        jacobians = [factor(name, 28, True) for name in names]
        operators = [FisherOperator.of(j) for j in jacobians]
        found = principal_pair(torch.zeros(784), operators, n_starts=10, rng=0, progress=False)
        per_start = np.diff([0, *(max(h[-1]["n_products"]) for h in found.details["history"])])
        forms = np.array([j.T @ j / np.linalg.norm(j, 2) ** 2 + EPS * np.eye(784) for j in jacobians])
        plain = ascent(forms, int(np.median(per_start)))
        print(
            f"| {', '.join(names)} | {found.value:.5f} | {found.gradient:.1e} | {np.median(per_start):g} |",
            f"{found.n_best} of 10 | {plain / found.value:.3f} f |",
            flush=True,
        )


def ascent(forms: np.ndarray, products: int) -> float:
    """What normalized ascent on the unit spheres reaches, the best of three step sizes, at so many products."""
    best = 0.0
    for step in (1e-2, 1e-1, 1.0):
        rng = np.random.default_rng(0)
        x = rng.standard_normal((2, forms.shape[1]))
        x /= np.linalg.norm(x, axis=1)[:, None]
        for _ in range(products // 2):
            f_x = forms @ x.T  # (n, N, 2)
            q = np.einsum("nNi,iN->in", f_x, x)
            ratios = np.log(q[0]) - np.log(q[1])
            c = ratios - ratios.mean()
            best = max(best, float((c**2).mean()))
            gradient = np.stack([(c / q[0]) @ f_x[:, :, 0], -(c / q[1]) @ f_x[:, :, 1]])
            x = x + step * gradient / np.linalg.norm(gradient, axis=1)[:, None]
            x /= np.linalg.norm(x, axis=1)[:, None]
    return best


def restricted() -> None:
    print("| spectrum | subspace, d | products | of the dense restricted problem | ratio |")
    print("|---|---|---|---|---|")
    for path in sorted((pathlib.Path(fisherop.__file__).parents[1] / "tests" / "spectra").glob("*.npy")):
        sigma = torch.as_tensor(np.load(path)).double()
        n = len(sigma)
        channels, side = (1, 56) if n == 3136 else (3, 40)
        order = torch.as_tensor(np.random.default_rng(0).permutation(n))  # not sorted along the image
        shape, weights = (channels, side, side), sigma[order]
        disc = np.hypot(*np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j]) < 0.8
        for name, space in (("mask", spaces.mask(disc)), ("low-pass", spaces.bandpass((side, side), 0, side / 5))):
            image = torch.zeros(1, *shape, dtype=torch.float64)
            F = FisherOperator(image, lambda x, w=weights: w * x.flatten(), subspace=space)
            dense = FisherOperator.of(F.jacobian.to_dense(max_bytes=2**33))
            spent = [
                [eigenpairs(A, method="golub_kahan", rng=seed, progress=False).n_products for seed in range(3)]
                for A in (FisherOperator(image, lambda x, w=weights: w * x.flatten(), subspace=space), dense)
            ]
            own, truth = (np.median(one) for one in spent)
            ratio = np.median(np.divide(*spent))
            print(f"| {path.stem} | {name}, {F.shape[0]} | {own:g} | {truth:g} | {ratio:.3f} |", flush=True)


def pooled() -> None:
    print("| images of 64 × 64, ResNet18 layer2.0 | memory= | peak of the process, MiB, above that of one image |")
    print("|---|---|---|")
    base = peak(1, 2**30)
    for count, memory in ((4, 2**30), (64, 0), (64, 2**26), (64, 2**34)):
        print(f"| {count} | {memory / 2**20:g} MiB | {peak(count, memory) - base:.0f} |", flush=True)


def peak(count: int, memory: int) -> float:
    """That of a process of its own, in MiB."""
    command = [sys.executable, __file__, "one", "--count", str(count), "--memory", str(memory)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def one(count: int, memory: int) -> None:
    torch.manual_seed(0)
    model = LayerResponse(nn.Sequential(networks.Normalise(), networks.ResNet18()), "1.layer2.0").eval()
    several = list(torch.rand(count, 1, 3, 64, 64))
    F = FisherOperator.pooled(several, model, memory=memory)
    eigenpairs(F, which="largest", method="golub_kahan", tol=1e-2, rng=0, progress=False)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10)


if __name__ == "__main__":
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["pairs", "several", "restricted", "pooled", "one"])
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--memory", type=int, default=2**30)
    asked = parser.parse_args()
    if asked.what == "one":
        one(asked.count, asked.memory)
    else:
        {"pairs": pairs, "several": several, "restricted": restricted, "pooled": pooled}[asked.what]()
