"""
A linear model, where algebra says what must come out
=====================================================

A linear model of a small "image", where linear algebra says what must come out.
"""

# %%
# The model
# ---------
# y = M x, from n = 25 pixels to m = 10 responses. Its Jacobian is M, at every image.
import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn

import fisherop.plot
from fisherop import ConvergenceError, Eigendistortion

n, m = 25, 10
torch.manual_seed(0)
model = nn.Linear(n, m, bias=False, dtype=torch.float64).eval()
matrix = model.weight.detach().numpy()
image = torch.ones(n, dtype=torch.float64)

# %%
# All eigendistortions
# --------------------
# By the Jacobian as a whole.
exact = Eigendistortion(image, model).synthesize("exact")
print(exact)
print(f"{len(exact.eigenvalues)} eigendistortions, each of shape {tuple(exact.eigendistortions[0].shape)}")

# %%
# What linear algebra says
# ------------------------
# They are the right singular vectors of M, and its squared singular values.
sigma = np.linalg.svd(matrix, compute_uv=False)
expected = np.r_[sigma**2, np.zeros(n - m)]
error = np.abs(exact.result.eigenvalues - expected).max() / sigma[0] ** 2
print(f"\nThe Jacobian is M: {np.array_equal(exact.jacobian, matrix)}")
print(f"Eigenvalues differ from the squared singular values of M by {error:.0e} λ_max")

figure, axes = plt.subplots(1, 3, figsize=(10, 3.6), layout="constrained", width_ratios=(1.4, 1, 1.2))
limit = np.abs(matrix).max()
drawn = axes[0].imshow(exact.jacobian.numpy(), cmap="coolwarm", vmin=-limit, vmax=limit)
figure.colorbar(drawn, ax=axes[0], shrink=0.5)
axes[0].set(title="Jacobian = weights M", xlabel="pixel", ylabel="response")
drawn = axes[1].imshow(exact.eigendistortions.T.numpy(), cmap="coolwarm", vmin=-1, vmax=1)
figure.colorbar(drawn, ax=axes[1], shrink=0.8)
axes[1].set(title="eigendistortions", xlabel="eigenindex", ylabel="pixel")
axes[2].plot(exact.result.eigenindex, exact.result.eigenvalues, "o", ms=4, label="exact")
axes[2].set(title="eigenvalues of F = MᵀM", xlabel="eigenindex", ylabel="eigenvalue")

# %%
# Both ends, by products alone
# ----------------------------
# A real image has too many pixels for that, so that methods must find both ends from products alone. The last
# eigendistortion is not the one above: every vector in the null space of M changes no response, and is as good.
null_space = np.linalg.qr(matrix.T, mode="complete")[0][:, m:]  # (n, n - m)
print(f"\n{'method':>15}  {'λ_max':>9}  {'error':>7}  {'λ_min':>7}  {'in null space':>13}  {'products':>8}")
for method in ("exact", "power", "golub_kahan", "eigsh", "lobpcg", "svds", "randomized_svd"):
    note = ""
    try:
        result = Eigendistortion(image, model).synthesize(method, rng=0).result
    except ConvergenceError as failure:
        result, note = failure.result, f"  {str(failure).splitlines()[1]}"
    largest = result.eigenvalues[0]
    line = f"{method:>15}  {largest:9.6f}  {abs(largest - sigma[0] ** 2) / sigma[0] ** 2:7.0e}"
    if result.eigenindex[-1] == n - 1:
        projection = np.linalg.norm(null_space.T @ result.eigenvectors[:, -1])
        line += f"  {result.eigenvalues[-1]:7.0e}  {projection:13.10f}"
    else:
        line += f"  {'':>7}  {'':>13}"
    print(f"{line}  {result.n_products:>8g}{note}")

power = Eigendistortion(image, model).synthesize("power", tol=1e-10, rng=0)
axes[2].plot(power.result.eigenindex, power.result.eigenvalues, "x", ms=9, label="power")
axes[2].legend()
figure.savefig("tutorial_linear.png", dpi=150)

first, last = power.eigendistortions
print(f"\nThe first is the same by both methods: {torch.allclose(first, exact.eigendistortions[0], atol=1e-5)}")
print(f"The last is the same by both methods: {torch.allclose(last, exact.eigendistortions[-1], atol=1e-5)}")
print(f"The last changes the response by {model(image + last).sub(model(image)).norm().item():.0e}")

projections = (exact.eigendistortions @ last).numpy()
figure, ax = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
ax.bar(np.arange(n), projections, color=["tab:blue" if value > 1e-12 else "tab:green" for value in expected])
ax.axhline(0, color="black", lw=0.8)
ax.set(xlabel="eigenindex of the exact eigendistortion, green where its eigenvalue is 0", ylabel="projection")
ax.set_title("The last eigendistortion by the power method lies in the null space of M", fontsize=10)
figure.savefig("tutorial_linear_null_space.png", dpi=150)
fisherop.plot.spectrum([exact.result, power.result]).savefig("tutorial_linear_spectrum.png", dpi=150)

# %%
# Another image
# -------------
# The Fisher information depends on the image, but not where the model is linear.
elsewhere = Eigendistortion(torch.randn(n, dtype=torch.float64), model)
print(f"\nThe Jacobian at another image is M: {np.array_equal(elsewhere.compute_jacobian(), matrix)}")
print("\nFigures: tutorial_linear.png, tutorial_linear_null_space.png, tutorial_linear_spectrum.png")
