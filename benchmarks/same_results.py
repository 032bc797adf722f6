"""Two versions of fisherop on the same searches: products, and whether every claim holds.

    python benchmarks/same_results.py OLD NEW [--seeds 30] [--spectra NAME ...]

OLD and NEW are source trees, as ``git worktree add`` makes them; each runs in a process of its own, in turn. The
searches are `golub_kahan`'s on diagonal models of the real spectra (``tests/spectra``), k = 1 and 3, at tol = 1e-5 in
float32 and 1e-6 in float64. Prints a Markdown table: medians of products, the median of their ratios, and how many
claims were false, of eigenvalues by more than 2 √K tol.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys

import numpy as np

SPECTRA = pathlib.Path(__file__).parents[1] / "tests" / "spectra"


def search(name: str, k: int, dtype: str, seeds: int) -> list[tuple[float, int]]:
    """Products and false claims of each seed, by the fisherop that is on the path."""
    import torch

    from fisherop import ConvergenceError, FisherOperator, eigenpairs

    torch.set_num_threads(1)
    sigma = torch.as_tensor(np.load(SPECTRA / f"{name}.npy")).to(getattr(torch, dtype))
    truth = np.sort(sigma.double().numpy() ** 2)[::-1]
    tol, rows = {"float32": 1e-5, "float64": 1e-6}[dtype], []
    for seed in range(seeds):
        F = FisherOperator(torch.zeros_like(sigma), lambda x: sigma * x)
        try:
            result = eigenpairs(F, k, method="golub_kahan", tol=tol, rng=seed, progress=False)
        except ConvergenceError as error:
            result = error.result
        claimed = truth[result.eigenindex]
        off = abs(result.eigenvalues - claimed) > 2 * len(claimed) ** 0.5 * tol * truth[0]
        low, high = result.lambda_min_bounds[0] <= truth[-1], truth[0] <= result.lambda_max_bounds[1]
        rows.append((result.n_products, int((off & result.converged).sum()) + (not low) + (not high)))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old")
    parser.add_argument("new")
    parser.add_argument("--seeds", type=int, default=30)
    parser.add_argument("--one", nargs=3)
    parser.add_argument("--spectra", nargs="+", default=sorted(p.stem for p in SPECTRA.glob("*.npy")))
    asked = parser.parse_args()
    if asked.one:
        name, k, dtype = asked.one
        print(json.dumps(search(name, int(k), dtype, asked.seeds)))
        return
    print("| spectrum | k | dtype | products, old | new | new / old | false, old | new |")
    print("|---|---|---|---|---|---|---|---|")
    for name in asked.spectra:
        for k in (1, 3):
            for dtype in ("float32", "float64"):
                found = []
                for tree in (asked.old, asked.new):
                    command = [sys.executable, __file__, asked.old, asked.new, "--seeds", str(asked.seeds)]
                    command += ["--one", name, str(k), dtype]
                    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(tree).resolve()), "OMP_NUM_THREADS": "1"}
                    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
                    found.append(np.array(json.loads(done.stdout.splitlines()[-1])))
                old, new = found
                print(
                    f"| {name} | {k} | {dtype} | {np.median(old[:, 0]):g} | {np.median(new[:, 0]):g} |",
                    f"{np.median(new[:, 0] / old[:, 0]):.3f} | {old[:, 1].sum():g} | {new[:, 1].sum():g} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
