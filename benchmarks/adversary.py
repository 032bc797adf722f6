"""Searches that are drawn at random, each claim held against the truth: is a number that is printed ever false?

    python benchmarks/adversary.py [--searches 1000] [--seed 0] [--method golub_kahan] [--large]

The models are matrices of known singular values: flat, clustered within the tolerance, repeated, rank-deficient, with
outliers, decaying, random; of all shapes, scales, dtypes, ends, tolerances and solvers; a third of the searches by
golub_kahan are interrupted by too small a maxiter, and go on by ``state=``. What is held against the singular values:
the index of each pair that is called converged, its residual, what is null to tol, and the bounds of λ_max and λ_min.
Prints a table by solver and dtype, and each false claim with the seed that draws it again.
"""

from __future__ import annotations

import argparse
import collections
import warnings
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from fisherop import ConvergenceError, EigenResult, FisherOperator, eigenpairs
from fisherop.testing import linear_model, matrix_with_singular_values

METHODS = ("golub_kahan", "exact", "eigsh", "svds", "lobpcg", "power", "randomized_svd", "primme", "auto")
COLUMNS = ("searches", "claims", "not converged", "index", "residual", "null", "λ_max", "λ_min", "crashes")


class Search(NamedTuple):
    matrix: NDArray[np.float64]
    dtype: torch.dtype
    family: str
    k: int
    which: str
    method: str
    tol: float
    options: dict[str, Any]
    interrupted: bool


def spectrum(family: str, count: int, tol: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """Eigenvalues of F that are not zero, of which the largest is about 1."""
    near = tol * 10 ** rng.uniform(-1, 1.5)  # a distance about the tolerance
    if family == "flat":
        return np.ones(count)
    if family == "flat, an outlier":
        values = np.ones(count)
        values[0] += near * rng.choice([-1, 1]) * (1 if near < 0.5 else 0.5)
        return values
    if family == "clustered":
        return 1 - near * rng.random(count)
    if family == "clusters":
        return np.repeat(rng.random(5), count // 5 + 1)[:count] + near * rng.random(count)
    if family == "repeated":
        return np.repeat(rng.random(max(1, count // 4)), 5)[:count]
    if family == "small repeated":
        ones = int(rng.integers(1, count + 1))
        return np.r_[np.ones(ones), np.full(count - ones, 10 ** rng.uniform(-10, -3))]
    if family == "rank-deficient":
        return np.r_[rng.random(max(1, count // 2))]
    if family == "decaying":
        return 10.0 ** -np.linspace(0, rng.uniform(1, 14), count)
    if family == "gapless":
        return np.linspace(1, rng.choice([0.0, 0.5, 1e-4]), count)
    if family == "one large":
        return np.r_[1, 10 ** rng.uniform(-8, -1) * rng.random(count - 1)]
    return rng.random(count)


FAMILIES = (
    "flat",
    "flat, an outlier",
    "clustered",
    "clusters",
    "repeated",
    "small repeated",
    "rank-deficient",
    "decaying",
    "gapless",
    "one large",
    "random",
)


def draw(seed: int, method: str | None, large: bool) -> Search:
    rng = np.random.default_rng([2017, seed])
    top = 4000 if large else 250
    low = 1000 if large else 1
    n = int(rng.integers(low, top + 1)) if rng.random() < 0.7 or large else int(rng.integers(1, 12))
    m = n if rng.random() < 0.5 else int(rng.integers(low, top + 1))
    tol = float(10 ** rng.uniform(-7.5, -3)) if rng.random() < 0.5 else 1e-6
    family = str(rng.choice(FAMILIES))
    values = spectrum(family, min(m, n), tol, rng)
    scale = 10 ** rng.uniform(-15, 15) if rng.random() < 0.4 else 1.0
    dtype = torch.float32 if rng.random() < 0.6 else torch.float64
    sigma = np.sqrt(np.maximum(values, 0)) * scale
    if m == n and rng.random() < 0.3:
        matrix = np.zeros((n, n))
        np.fill_diagonal(matrix, np.r_[sigma, np.zeros(n - len(sigma))][rng.permutation(n)])
    else:
        matrix = matrix_with_singular_values(sigma, m, n, rng=rng)
    if method is None:
        choices = [x for x in METHODS if x != "primme"]  # drawn alike everywhere; --method asks for it
        method = "golub_kahan" if rng.random() < 0.5 else str(rng.choice(choices))
    which = "largest" if method == "randomized_svd" else str(rng.choice(["both", "largest", "smallest"]))
    most = n // 2 if which == "both" and method != "exact" else n
    k = int(min(rng.integers(1, 8), max(1, most)))
    options: dict[str, Any] = {}
    if method == "golub_kahan" and rng.random() < 0.3:
        options["max_basis"] = min(n, 6 * k + 20 + int(rng.integers(0, 40)))
    interrupted = method == "golub_kahan" and rng.random() < 0.3
    return Search(matrix, dtype, family, k, which, method, tol, options, interrupted)


def run(search: Search, seed: int) -> EigenResult:
    image = torch.linspace(0, 1, search.matrix.shape[1], dtype=search.dtype)
    operator = FisherOperator(image, linear_model(search.matrix, search.dtype))
    state: dict[str, Any] | None = {} if search.interrupted else None
    steps = 3
    while True:
        try:
            return eigenpairs(
                operator,
                search.k,
                search.which,
                method=search.method,
                tol=search.tol,
                maxiter=min(steps, 10_000) if search.interrupted else None,
                rng=seed,
                progress=False,
                state=state,
                **search.options,
            )
        except ConvergenceError as error:
            if not search.interrupted or steps > 5000 or "stopped" not in error.result.details:
                return error.result
            steps *= 3


def false_claims(search: Search, result: EigenResult) -> list[str]:
    """What of a result does not hold, beyond the noise that it prints."""
    held = torch.tensor(search.matrix, dtype=search.dtype).double().numpy()  # as the model holds it
    unit = np.abs(held).max() or 1.0
    held = held / unit
    n = held.shape[1]
    truth = np.zeros(n)
    sigma = np.linalg.svd(held, compute_uv=False)
    truth[: len(sigma)] = sigma**2
    top = truth[0] or 1.0
    values = result.eigenvalues / unit**2
    v = result.eigenvectors.astype(np.float64)
    v = v / np.linalg.norm(v, axis=0)
    wrong = []
    ok = result.converged
    slack = 2 * len(ok) ** 0.5 * result.tol + 2 * result.noise
    off = np.abs(values - truth[result.eigenindex]) / top
    if (off[ok] > slack).any():
        wrong.append(f"index: off by {off[ok].max() / result.tol:.2g} tol")
    jv = held @ v
    residual = np.linalg.norm(held.T @ jv - v * (jv**2).sum(axis=0), axis=0) / top
    pairs = result.status == "eigenpair"
    if (residual[pairs] > result.tol + result.noise).any():
        wrong.append(f"residual: {residual[pairs].max() / result.tol:.3g} tol")
    null = result.status == "null to tol"
    if null.any() and np.linalg.norm(jv[:, null], 2) ** 2 / top > result.tol + result.noise**2:
        wrong.append(f"null: {np.linalg.norm(jv[:, null], 2) ** 2 / top / result.tol:.3g} tol")
    exact = 1e-14 * top  # of the truth itself
    for name, (low, high), true in (
        ("λ_max", result.lambda_max_bounds, truth[0]),
        ("λ_min", result.lambda_min_bounds, truth[-1]),
    ):
        if not low / unit**2 - exact <= true <= high / unit**2 + exact:
            wrong.append(f"{name}: {true:.9g} not in ({low / unit**2:.9g}, {high / unit**2:.9g})")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--searches", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="of the first search; the others count on from it")
    parser.add_argument("--method", choices=METHODS)
    parser.add_argument("--large", action="store_true", help="N and M from 1,000 to 4,000 in place of 1 to 250")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows: dict[tuple[str, str], collections.Counter] = collections.defaultdict(collections.Counter)
    products = 0.0
    for seed in range(arguments.seed, arguments.seed + arguments.searches):
        search = draw(seed, arguments.method, arguments.large)
        count = rows[search.method, str(search.dtype).removeprefix("torch.")]
        count["searches"] += 1
        shape = "{} × {}".format(*search.matrix.shape)
        drawn = (
            f"{search.family}, {shape}, {search.dtype}, {search.method}, k={search.k}, {search.which}, {search.tol:.0e}"
        )
        try:
            result = run(search, seed)
        except Exception as error:
            if not isinstance(error, ValueError) or "k" not in str(error):
                count["crashes"] += 1
                print(f"seed {seed}: {drawn}: {type(error).__name__}: {error}", flush=True)
            continue
        products += result.n_products
        count["claims"] += int(result.converged.sum())
        count["not converged"] += not result.converged.all() or "stopped" in result.details
        for claim in false_claims(search, result):
            count[claim.split(":")[0]] += 1
            print(f"seed {seed}: {drawn}: {claim}", flush=True)
    print(f"\n{products:g} products\n\n| solver | dtype | {' | '.join(COLUMNS)} |\n|---|---|{'---|' * len(COLUMNS)}")
    for (method, dtype), count in sorted(rows.items()):
        print(f"| {method} | {dtype} | {' | '.join(str(count[name]) for name in COLUMNS)} |")


if __name__ == "__main__":
    main()
