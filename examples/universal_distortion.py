"""
One change for many images
==========================

One change that a model notices most in many photographs, on average, and one that it notices least.
"""

import torch

import fisherop.plot
from fisherop import Eigendistortion, FisherOperator, eigenpairs, images
from fisherop.models import OnOff

# %%
# Twelve patches
# --------------
# Of one photograph, in grey.
photograph = images.photograph(as_gray=True, dtype=torch.float64)
patches = [photograph[..., y : y + 64, x : x + 64] for y in (60, 180, 300) for x in (60, 170, 280, 390)]
model = OnOff().double().eval()

# %%
# F of all of them
# ----------------
# The mean of their Fisher matrices, as products; what memory does not hold is linearized again.
F = FisherOperator.pooled(patches, model, memory=2**28)
result = eigenpairs(F, tol=1e-4, rng=0)
print(result)
universal = F.to_tensors(result.eigenvectors)

# %%
# Each patch's own extremes
# -------------------------
# How noticeable are they in each patch, beside that patch's own extremes?
print("\nHow far unit distortions move the response in each patch, ‖J v‖")
print(f"{'patch':>5}  {'own most':>9}  {'common +':>9}  {'common −':>9}  {'own least':>9}")
for i, patch in enumerate(patches[:6]):
    ed = Eigendistortion(patch, model).synthesize(tol=1e-4, rng=0)
    moved = ed.operator.linearization.jvp(universal.reshape(2, *ed.operator.image_shape)).flatten(1).norm(dim=1)
    own = ed.eigenvalues.sqrt()
    print(f"{i:>5}  {own[0]:>9.3g}  {moved[0]:>9.3g}  {moved[1]:>9.3g}  {own[1]:>9.3g}")

# %%
# What they look like
# -------------------
# The same two changes, added to several patches.
shown = [patches[i] for i in (0, 1, 5, 9)]
rows = [torch.cat([patch, *(patch + 3 * change.reshape(patch.shape) for change in universal)], -1) for patch in shown]
title = "a patch, with the most, and with the least noticeable change of all twelve"
fisherop.plot.imshow(torch.cat(rows, -2), title, vrange=(0, 1), zoom=3).savefig("universal_distortion.png")
titles = ["most noticeable on average", "least noticeable on average"]
fisherop.plot.distortions(patches[0], universal, titles, scale=3).savefig("universal_alone.png")
print("\nFigures: universal_distortion.png, universal_alone.png")
