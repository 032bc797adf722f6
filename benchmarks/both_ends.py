"""Products and seconds to both ends of the spectrum, and the true error of what each method returns.

Linear models of real spectra (``tests/spectra``), whose truth is known, and networks with random weights, whose vectors
are judged in float64 against a long run in float64. One thread. Prints a Markdown table, writes ``both_ends.json``;
ResNet18, VGG16 and ViT-B/16 need torchvision, "plenoptic" plenoptic. "auto, next image" uses the program that another
image left. A method may be named several times, before and after others, to compare seconds.

    export OMP_NUM_THREADS=1  # for NumPy's own threads
    python benchmarks/both_ends.py [--problems NAME ...] [--methods NAME ...] [--k 1 3] [--tol 1e-4 1e-6] [--limit 600]
"""

import argparse
import copy
import importlib.util
import json
import pathlib
import sys
import time
import unittest.mock
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fisherop import ConvergenceError, FisherOperator, LayerResponse, eigenpairs, images
from fisherop.models import OnOff

sys.path.append(str(pathlib.Path(__file__).parent))
from products import with_random_head

SPECTRA = pathlib.Path(__file__).parents[1] / "tests" / "spectra"
METHODS = ["auto", "auto, next image", "eigsh", "lobpcg", "svds", "power", "randomized_svd"]
if importlib.util.find_spec("primme"):
    METHODS.append("primme")
if importlib.util.find_spec("plenoptic"):
    from plenoptic._synthesize import eigendistortion
PLENOPTIC = {"plenoptic, 400 iterations": 400, "plenoptic, 2000 iterations": 2000}
MAXITER = {"power": 6000}


class Spectrum(nn.Module):
    """y = σ · Q x, with the orthogonal Q of a real Fourier transform after random signs."""

    def __init__(self, sigma: NDArray) -> None:
        super().__init__()
        n = len(sigma)
        self.register_buffer("sigma", torch.as_tensor(sigma))
        self.register_buffer("signs", torch.as_tensor(np.random.default_rng(0).choice([-1.0, 1.0], n)))

    def forward(self, x: Tensor) -> Tensor:
        z = torch.fft.rfft(self.signs * x.flatten(), norm="ortho")
        inner = z[1:-1] * 2**0.5  # N is even
        return self.sigma * torch.cat([z.real[:1], z.real[-1:], inner.real, inner.imag])


def problems() -> dict[str, Callable[[], tuple[Tensor, nn.Module, NDArray | None]]]:
    """Image, model, and all singular values where they are known."""
    found: dict[str, Callable] = {}
    for path in sorted(SPECTRA.glob("*.npy")):
        sigma = np.load(path)
        found[path.stem] = lambda s=sigma: (torch.zeros(1, 1, 1, len(s), dtype=torch.float64), Spectrum(s), s)
    found["On–Off"] = lambda: (images.photograph(as_gray=True, size=128), OnOff(), None)
    if importlib.util.find_spec("torchvision"):
        import torchvision.models as tv

        def network(build: Callable[[], nn.Module], size: int = 128) -> tuple[Tensor, nn.Module, None]:
            torch.manual_seed(0)
            return torch.rand(1, 3, size, size), build(), None

        for layer in ("maxpool", "layer2.0", "layer4"):
            found[f"ResNet18 {layer}"] = lambda x=layer: network(lambda: LayerResponse(tv.resnet18(), x))
        found["VGG16 features.11"] = lambda: network(lambda: LayerResponse(tv.vgg16(), "features.11"))
        found["ViT-B/16"] = lambda: network(lambda: with_random_head(tv.vit_b_16(), "heads.head"), 224)
    return found


def judge(operator: FisherOperator, vectors: NDArray) -> tuple[NDArray, NDArray]:
    """Rayleigh quotients of F, and residuals, in float64, of vectors by whoever found them: the independent word."""
    v = np.linalg.qr(np.asarray(vectors, dtype=np.float64))[0]
    u, sigma, rotation = np.linalg.svd(operator.jacobian.matmat(v), full_matrices=False)
    residuals = operator.jacobian.rmatmat(u * sigma) - v @ rotation.T * sigma**2
    return sigma**2, np.linalg.norm(residuals, axis=0)


class OutOfTimeError(Exception):
    """A method took longer than the limit."""


def by_plenoptic(
    image: Tensor, model: nn.Module, k: int, iterations: int, on_product: Callable[[float], None]
) -> tuple[NDArray, NDArray, int]:
    products, multiply = 0, eigendistortion._fisher_info_matrix_vector_product

    def counted(y: Tensor, x: Tensor, v: Tensor, dummy: Tensor) -> Tensor:
        nonlocal products
        products += v.shape[1]
        on_product(v.shape[1])
        return multiply(y, x, v, dummy)

    with unittest.mock.patch.object(eigendistortion, "_fisher_info_matrix_vector_product", counted):
        ed = eigendistortion.Eigendistortion(image, model)
        ed.synthesize(method="power", k=k, max_iter=iterations)
    vectors = ed.eigendistortions.detach().flatten(1).double().numpy().T
    return vectors[:, :k], vectors[:, k:], products


def run(
    method: str, image: Tensor, model: nn.Module, k: int, tol: float, limit: float
) -> tuple[dict, NDArray, NDArray]:
    if method.endswith("next image"):
        FisherOperator(image.flip(-1), model)
    else:
        model = copy.deepcopy(model)  # for which no program is kept
    start, done = time.perf_counter(), 0.0

    def on_product(count: float) -> None:
        nonlocal done
        done += count
        if time.perf_counter() - start > limit:
            raise OutOfTimeError

    nothing = np.empty((image.numel(), 0))
    try:
        row, top, bottom = solve(method, image, model, k, tol, on_product)
    except OutOfTimeError:
        row, top, bottom = {"products": done, "outcome": f"stopped after {limit:g} s"}, nothing, nothing
    return {"seconds": time.perf_counter() - start} | row, top, bottom


def solve(
    method: str, image: Tensor, model: nn.Module, k: int, tol: float, on_product: Callable[[float], None]
) -> tuple[dict, NDArray, NDArray]:
    if method in PLENOPTIC:
        torch.manual_seed(0)
        top, bottom, products = by_plenoptic(image, model, k, PLENOPTIC[method], on_product)
        return {"products": products, "outcome": ""}, top, bottom
    operator = FisherOperator(image, model)
    operator.linearization.on_product = on_product
    which = "largest" if method == "randomized_svd" else "both"
    try:
        result = eigenpairs(
            operator,
            k,
            which,
            method=method.removesuffix(", next image"),
            tol=tol,
            rng=0,
            maxiter=MAXITER.get(method),
            progress=False,
        )
        outcome = "converged"
    except ConvergenceError as error:
        result, outcome = error.result, "ConvergenceError"
    from_top = result.eigenindex < k
    row = {"products": result.n_products, "outcome": outcome}
    return row, result.eigenvectors[:, from_top], result.eigenvectors[:, ~from_top]


def main() -> None:
    names = problems()
    methods = [*METHODS, *(PLENOPTIC if importlib.util.find_spec("plenoptic") else ())]
    parser = argparse.ArgumentParser()
    parser.add_argument("--problems", nargs="+", default=list(names))
    parser.add_argument("--methods", nargs="+", default=methods)
    parser.add_argument("--k", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--tol", type=float, nargs="+", default=[1e-4, 1e-6])
    parser.add_argument("--limit", type=float, default=600, help="seconds for a method")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("both_ends.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    columns = (
        "problem|k|tol|method|products|seconds|error of the top|λ of the bottom|error of the bottom|residuals|outcome"
    )
    print("Errors, λ and residuals, of the worst of k pairs, are relative to λ_max.\n")
    print(f"| {columns.replace('|', ' | ')} |")
    print("|---" * (columns.count("|") + 1) + "|")
    rows = []
    for name in options.problems:
        image, model, sigma = names[name]()
        model = model.eval().requires_grad_(False)  # as plenoptic wants it
        exact = FisherOperator(image.double(), copy.deepcopy(model).double())
        for k in options.k:
            if sigma is None:
                long = {"tol": 1e-8, "maxiter": 1500, "on_failure": "warn"}
                truth = eigenpairs(exact, k, rng=1, progress=False, **long).eigenvalues
            else:
                truth = sigma[np.r_[:k, len(sigma) - k : len(sigma)]] ** 2
            for tol in options.tol:
                for method in options.methods:
                    if method in PLENOPTIC and tol != options.tol[0]:
                        continue
                    row, top, bottom = run(method, image, model, k, tol, options.limit)
                    (high, top_residuals), (low, bottom_residuals) = (judge(exact, v) for v in (top, bottom))
                    high, low = high / truth[0], low / truth[0]
                    residuals = [float(r.max(initial=0.0) / truth[0]) for r in (top_residuals, bottom_residuals)]
                    row |= {"residuals": residuals}
                    row |= {"problem": name, "k": k, "tol": tol, "method": method}
                    row["top_error"] = float(np.abs(high - truth[: len(high)] / truth[0]).max(initial=0.0))
                    row["bottom"] = float(low.max()) if len(low) else None
                    row["bottom_error"] = float(
                        np.abs(low - truth[len(truth) - len(low) :] / truth[0]).max(initial=0.0)
                    )
                    rows.append(row)
                    low_text = f"{row['bottom']:.2e} | {row['bottom_error']:.0e}" if len(low) else " | "
                    print(
                        f"| {name} | {k} | {tol:.0e} | {method} | {row['products']:g} | {row['seconds']:.2f} "
                        f"| {row['top_error']:.0e} | {low_text} | {residuals[0]:.0e}, {residuals[1]:.0e} "
                        f"| {row['outcome']} |",
                        flush=True,
                    )
                    options.out.write_text(json.dumps(rows, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
