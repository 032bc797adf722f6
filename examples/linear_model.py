"""The linear model y = M x, whose Jacobian is M at every image: each method against what linear algebra says."""

import matplotlib.pyplot as plt
import numpy as np
import torch

import fisherop.plot
from fisherop import ConvergenceError, Eigendistortion

n, m = 25, 10
matrix = np.random.default_rng(0).standard_normal((m, n))
sigma = np.linalg.svd(matrix, compute_uv=False)
null_space = np.linalg.qr(matrix.T, mode="complete")[0][:, m:]  # (n, n - m): along these, no response changes


def model(x):
    return x @ torch.from_numpy(matrix).T


for name, x in (("ones", torch.ones(1, n).double()), ("random", torch.tensor(np.random.default_rng(1).random((1, n))))):
    ed = Eigendistortion(x, model)
    assert np.array_equal(ed.compute_jacobian(), matrix)
    print(f"\nx of {name}: the Jacobian is M. Largest eigenvalue {sigma[0] ** 2:.6f}, smallest 0.")
    print(f"{'method':>15}  {'λ_max':>9}  {'error':>7}  {'λ_min':>7}  {'in null space':>13}  {'products':>8}")
    for method in ("exact", "golub_kahan", "eigsh", "lobpcg", "svds", "power", "randomized_svd"):
        note = ""
        try:
            result = ed.synthesize(method, rng=0).result
        except ConvergenceError as error:
            result, note = error.result, f"  {str(error).splitlines()[1]}"
        largest = result.eigenvalues[0]
        line = f"{method:>15}  {largest:9.6f}  {abs(largest - sigma[0] ** 2) / sigma[0] ** 2:7.0e}"
        if result.eigenindex[-1] == n - 1:
            projection = np.linalg.norm(null_space.T @ result.eigenvectors[:, -1])
            line += f"  {result.eigenvalues[-1]:7.0e}  {projection:13.10f}"
        else:
            line += f"  {'':>7}  {'':>13}"
        print(f"{line}  {result.n_products:>8g}{note}")

ed.synthesize("exact")
fisherop.plot.spectrum(ed.result).savefig("linear_model_spectrum.png", dpi=150)

ed.synthesize("eigsh", rng=0)  # from a random start: some direction of the null space, not one of its basis vectors
coefficients = null_space.T @ ed.result.eigenvectors[:, [0, -1]]
figure, ax = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
for which, offset, column in (("first", -0.2, coefficients[:, 0]), ("last", 0.2, coefficients[:, 1])):
    label = f"{which} eigendistortion: norm {np.linalg.norm(column):.3f}"
    ax.bar(np.arange(n - m) + offset, column, 0.4, label=label)
ax.axhline(0, color="black", lw=0.8)
ax.set_xlabel("basis vector of the null space of M")
ax.set_ylabel("projection")
ax.set_title("Projections on the null space of M: the last eigendistortion lies in it", fontsize=9)
ax.legend(fontsize=8)
figure.savefig("linear_model_null_space.png", dpi=150)
print("\nFigures: linear_model_spectrum.png, linear_model_null_space.png")
