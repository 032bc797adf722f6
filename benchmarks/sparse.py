"""Both ends of the singular values of sparse matrices: `singular_triplets` beside SciPy's and PRIMME's solvers.

    python benchmarks/sparse.py [--seconds 60] [names of matrices]

k = 2 at each end, float64, one thread, each method in a process of its own that is stopped after so many seconds. A
product is one with A and one with Aᵀ. The vectors that a method returns are judged by fresh products: σ, ‖AᵀA v − σ² v‖
relative to σ_max², of the worse of the two pairs at each end. `tol` is 1e-10 relative to σ_max², so that what is null
to tol is below 1e-5 σ_max; for svds and eigsh it is the same number in their own sense. Prints a Markdown table.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time

import numpy as np
import scipy.sparse as sp
import scipy.sparse.linalg as sla

K, TOL = 2, 1e-10


def random() -> sp.csr_array:
    return sp.random_array((20_000, 10_000), density=1e-3, rng=np.random.default_rng(0), format="csr")


def incidence() -> sp.csr_array:
    """Of a random graph with 10,000 vertices and 20,000 edges: AᵀA is its Laplacian."""
    rng = np.random.default_rng(0)
    ends = rng.integers(10_000, size=(20_000, 2))
    ends[:, 1] += ends[:, 0] == ends[:, 1]
    values = np.tile([1.0, -1.0], 20_000)
    return sp.csr_array((values, (np.repeat(np.arange(20_000), 2), ends.ravel() % 10_000)), shape=(20_000, 10_000))


def convection_diffusion() -> sp.csr_array:
    """−Δu + 50 (1, 1)·∇u on the unit square, 60 × 60 points, upwind: not symmetric."""
    n, b = 60, 50.0
    h = 1 / (n + 1)
    one = sp.diags_array([np.full(n - 1, -1 / h**2 - b / h), np.full(n, 2 / h**2 + b / h), np.full(n - 1, -1 / h**2)],
                         offsets=[-1, 0, 1])  # fmt: skip
    eye = sp.eye_array(n)
    return sp.csr_array(sp.kron(one, eye) + sp.kron(eye, one))


def rank_deficient() -> sp.csr_array:
    """5,000 × 3,000, of rank 2,990."""
    rng = np.random.default_rng(0)
    left = sp.random_array((5_000, 2_990), density=2e-3, rng=rng, format="csr")
    left = left + sp.eye_array(5_000, 2_990)
    right = sp.hstack([sp.eye_array(2_990), sp.random_array((2_990, 10), density=0.1, rng=rng)])
    return sp.csr_array(left @ right)


MATRICES = {"random": random, "incidence": incidence, "convection–diffusion": convection_diffusion,
            "rank-deficient": rank_deficient}  # fmt: skip


class Counted(sla.LinearOperator):
    def __init__(self, matrix: sp.csr_array) -> None:
        self.matrix, self.transposed, self.n = matrix, sp.csr_array(matrix.T), 0.0
        super().__init__(matrix.dtype, matrix.shape)

    def _matvec(self, x):
        return self._matmat(x.reshape(-1, 1))

    def _rmatvec(self, x):
        return self._rmatmat(x.reshape(-1, 1))

    def _matmat(self, x):
        self.n += x.shape[1] / 2
        return self.matrix @ x

    def _rmatmat(self, x):
        self.n += x.shape[1] / 2
        return self.transposed @ x


def triplets(A):
    import fisherop

    found = fisherop.singular_triplets(A, K, tol=TOL, rng=0, progress=False, method="golub_kahan")
    return found.vh.T


def svds(solver):
    def run(A):
        ends = [
            sla.svds(A, K, which=which, solver=solver, tol=TOL, rng=0, maxiter=100_000)[2] for which in ("LM", "SM")
        ]
        return np.vstack([vh[np.argsort(-np.linalg.norm(A.matrix @ vh.T, axis=0))] for vh in ends]).T

    return run


def eigsh(A):
    gram = sla.LinearOperator((A.shape[1],) * 2, lambda x: A.rmatvec(A.matvec(x)), dtype=np.float64)
    v0 = np.random.default_rng(0).standard_normal(A.shape[1])
    ends = [sla.eigsh(gram, K, which=which, tol=TOL, v0=v0, maxiter=100_000)[1][:, ::-1] for which in ("LA", "SA")]
    return np.hstack(ends)


def primme(A):
    import primme as package

    ends = [package.svds(A, K, tol=TOL, which=which, return_singular_vectors=True)[2] for which in ("LM", "SM")]
    return np.vstack([vh[np.argsort(-np.linalg.norm(A.matrix @ vh.T, axis=0))] for vh in ends]).T


METHODS = {"singular_triplets": triplets, "svds, arpack": svds("arpack"), "svds, lobpcg": svds("lobpcg"),
           "svds, propack": svds("propack"), "eigsh of AᵀA": eigsh, "primme.svds": primme}  # fmt: skip


def run(matrix: str, method: str) -> dict:
    A = Counted(MATRICES[matrix]())
    start = time.perf_counter()
    v = METHODS[method](A)
    seconds = time.perf_counter() - start
    v = v / np.linalg.norm(v, axis=0)
    images = A.matrix @ v
    values = (images**2).sum(axis=0)
    residuals = np.linalg.norm(A.matrix.T @ images - values * v, axis=0)
    top = values.max()
    return {
        "seconds": seconds,
        "products": A.n,
        "sigma": np.sqrt(values).tolist(),
        "residuals": (residuals / top).tolist(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--one", nargs=2)
    parser.add_argument("matrices", nargs="*", default=list(MATRICES))
    asked = parser.parse_args()
    if asked.one:
        print(json.dumps(run(*asked.one)))
        return
    print("| matrix | method | seconds | products | σ_1 | σ_min | residuals of the top, of the bottom |")
    print("|---|---|---|---|---|---|---|")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    for matrix in asked.matrices:
        shape = " × ".join(map(str, MATRICES[matrix]().shape))
        for method in METHODS:
            row = f"| {matrix}, {shape} | {method} |"
            if method.startswith("primme") and importlib.util.find_spec("primme") is None:
                print(row, "not installed | | | | |")
                continue
            command = [sys.executable, __file__, "--one", matrix, method]
            try:
                done = subprocess.run(
                    command, env=environment, capture_output=True, text=True, timeout=asked.seconds + 20
                )
            except subprocess.TimeoutExpired:
                print(row, f"stopped after {asked.seconds:.0f} | | | | |", flush=True)
                continue
            if done.returncode:
                print(row, f"failed: {done.stderr.strip().splitlines()[-1][:100]} | | | | |", flush=True)
                continue
            found = json.loads(done.stdout.splitlines()[-1])
            sigma, residuals = found["sigma"], found["residuals"]
            print(
                row,
                f"{found['seconds']:.2f} | {found['products']:g} | {sigma[0]:.8g} | {sigma[-1]:.4g} |",
                f"{max(residuals[:K]):.0e}, {max(residuals[K:]):.0e} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
