"""
The operators in other people's solvers
=======================================

The operators in other people's solvers: SciPy's, PRIMME and PyLops; each answer certified by fresh products.
"""

# %%
# A model, and an image
# ---------------------
# The image has dark and bright parts.
import importlib.util
import warnings

import numpy as np
import torch
from networks import ResNet18
from scipy.sparse.linalg import LinearOperator, eigsh, lobpcg, lsmr, svds

import fisherop.plot
from fisherop import FisherOperator, JacobianOperator, LayerResponse, certify, images
from fisherop.models import OnOff
from fisherop.testing import check_adjoint

shirt = images.photograph(as_gray=True, dtype=torch.float64)[..., 400:448, 200:248]
F = FisherOperator(shirt, OnOff().double().eval())
J = F.jacobian
n, rng = F.shape[0], np.random.default_rng(0)
check_adjoint(J)  # ⟨J v, u⟩ = ⟨v, Jᵀ u⟩ for random v and u, as every solver takes for granted


def report(name, solve, index):
    """Run a solver, then certify its vectors, by descending eigenvalue, as those of this index."""
    before = F.n_products
    vectors = np.linalg.qr(solve())[0]
    products = F.n_products - before
    order = np.argsort(-np.linalg.norm(J @ vectors, axis=0))
    result = certify(F, vectors[:, order], index, tol=1e-6, rng=0)
    scale = result.lambda_max_bounds[0]
    values = ", ".join(f"{value / scale:8.1e}" for value in result.eigenvalues)
    residuals = ", ".join(f"{residual / scale:.0e}" for residual in result.residual_norms)
    print(f"{name:<32} {products:>8g}  {values:<20} {residuals:<14} {', '.join(map(str, result.status))}")
    return result


print(f"\n{'':<32} products  {'λ / λ_max':<20} {'residuals':<14} status")

# %%
# eigsh
# -----
# ``scipy.sparse.linalg.eigsh``: the implicitly restarted Lanczos method of ARPACK, one end at a time. Its tolerance is
# relative to each eigenvalue, which takes forever where that is zero; in scale I - F the smallest of F are the largest.
start = rng.standard_normal(n)
largest = report("eigsh, largest", lambda: eigsh(F, 1, which="LA", v0=start)[1], [0])
scale = largest.eigenvalues[0]
shifted = LinearOperator(F.shape, matvec=lambda v: scale * v - F @ v, dtype=F.dtype)
report("eigsh, smallest", lambda: eigsh(F, 1, which="SA", v0=start, tol=1e-3)[1], [-1])
report("eigsh, smallest, shifted", lambda: eigsh(shifted, 1, which="LA", v0=start, tol=1e-7)[1], [-1])


# %%
# lobpcg
# ------
# ``scipy.sparse.linalg.lobpcg``, with a preconditioner. F is no matrix, but the mean of v ⊙ F v over random signs v
# estimates its diagonal (C. Bekas, E. Kokiopoulou and Y. Saad, Appl. Numer. Math. 57, 2007).
def stochastic_diagonal(operator, samples):
    signs = rng.choice([-1.0, 1.0], (operator.shape[0], samples))
    return np.mean(signs * (operator @ signs), axis=1)


diagonal = stochastic_diagonal(F, 40)
inverse = 1 / np.maximum(diagonal, 0.1 * diagonal.max())[:, None]  # an estimate from 40 is too rough for the smallest
M = LinearOperator(F.shape, matvec=lambda v: inverse[:, 0] * v.ravel(), matmat=lambda v: inverse * v, dtype=F.dtype)
block = rng.standard_normal((n, 4))  # more than are wanted converge faster
options = {"largest": False, "tol": 1e-6 * scale, "maxiter": 200}
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it warns where the others of the block have not converged
    report("lobpcg, smallest", lambda: lobpcg(F, block.copy(), **options)[1][:, :1], [-1])
    report("lobpcg, preconditioned", lambda: lobpcg(F, block.copy(), M=M, **options)[1][:, :1], [-1])

# %%
# svds
# ----
# ``scipy.sparse.linalg.svds``: singular vectors of J, which are the eigenvectors of F.
report("svds, largest", lambda: svds(J, 1, rng=0)[2].T, [0])

# %%
# PRIMME
# ------
# Where it is installed.
if importlib.util.find_spec("primme"):
    import primme

    report("PRIMME, smallest", lambda: primme.eigsh(F, 1, which="SA", tol=1e-7, v0=block[:, :1])[1], [-1])
else:
    print("PRIMME is not installed: pip install primme")

# %%
# lsmr
# ----
# ``scipy.sparse.linalg.lsmr``: what of a change of an image does a layer of fewer responses than pixels not notice? The
# change less its part in the row space of J, which is the shortest x with J x = J change.
torch.manual_seed(0)
photograph = images.photograph(dtype=torch.float64)[..., 190:222, 218:250]
J = JacobianOperator(photograph, LayerResponse(ResNet18().double().eval(), "layer2.0"))
change = rng.standard_normal(J.shape[1])
change *= 0.1 * J.shape[1] ** 0.5 / np.linalg.norm(change)  # an RMS of 0.1
x, _, iterations, *_ = lsmr(J, J @ change, atol=1e-8, btol=1e-8, maxiter=2000)
unnoticed = change - x
noticed = x * np.linalg.norm(unnoticed) / np.linalg.norm(x)
norms = [np.linalg.norm(v) for v in (change, unnoticed, J @ unnoticed, J @ noticed)]
print(f"\nlsmr, J {J.shape[0]} × {J.shape[1]}, {iterations} iterations: of a change of norm {norms[0]:.3g}, a part of")
print(f"norm {norms[1]:.3g} is in the null space of J, and moves the response by {norms[2]:.0e}; the rest, at the")
print(f"same norm, by {norms[3]:.2g}.")

# %%
# PyLops
# ------
# Where it is installed: it has solvers of its own.
if importlib.util.find_spec("pylops"):
    import pylops

    same, _, iterations, *_ = pylops.cgls(pylops.aslinearoperator(J), J @ change, niter=2000, tol=0, rtol=1e-6)
    print(f"PyLops, cgls, {iterations} iterations: differs from that by {np.linalg.norm(same - x):.0e}")
else:
    print("PyLops is not installed: pip install pylops")

pictures = [photograph + J.to_tensors(part[:, None])[0] for part in (0 * change, unnoticed, noticed)]
gap = torch.ones_like(photograph[..., :1])
title = "a photograph; with noise that the layer does not notice; with as much noise that it does"
strip = torch.cat([pictures[0], gap, pictures[1], gap, pictures[2]], dim=-1)
fisherop.plot.imshow(strip, title, vrange=(0, 1), zoom=8).savefig("scipy_solvers.png")
print("\nFigure: scipy_solvers.png")
