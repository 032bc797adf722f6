"""
On–Off against VGG16, after Berardino et al. 2017
=================================================

What a model of the early visual system and a layer of VGG16 notice most and least in a photograph of 254 × 254.

The comparison of A. Berardino, J. Ballé, V. Laparra and E. Simoncelli, Eigen-distortions of hierarchical
representations, NeurIPS 2017, in some minutes; with random weights where those of ImageNet can't be had.
"""

# %%
# The photograph
# --------------
# In grey, as both models see it.
import time

import torch
from networks import Normalise, VGG16Features, load_imagenet_weights
from torch import nn

import fisherop.plot
from fisherop import Eigendistortion, LayerResponse, images
from fisherop.models import OnOff

photograph = images.photograph(as_gray=True)[..., 90:344, 135:389]


# %%
# The models
# ----------
# VGG16 wants three channels, with the statistics of ImageNet; that is made part of the model, so that both have the
# same pixels, and their distortions can be compared.
class GreyToColour(nn.Module):
    def forward(self, x):
        return x.expand(-1, 3, -1, -1)


torch.manual_seed(0)
vgg = VGG16Features()
print(f"VGG16 has {load_imagenet_weights(vgg, 'vgg16')}.")
models = {
    "On–Off": OnOff(),
    "VGG16 features.11": nn.Sequential(GreyToColour(), Normalise(), LayerResponse(vgg, "features.11")),
}

# %%
# Both ends of both spectra
# -------------------------
# The number of pairs and the tolerance are each model's own.
eds = {}
for (name, model), (k, tol) in zip(models.items(), ((3, 1e-5), (2, 1e-3)), strict=True):
    start = time.perf_counter()
    eds[name] = Eigendistortion(photograph, model.eval()).synthesize(k=k, tol=tol, rng=0)
    print(f"\n{name}: {time.perf_counter() - start:.0f} s\n{eds[name].result}")

# %%
# Side by side
# ------------
# The same scale for all, so that what is seen can be compared.
fisherop.plot.compare(list(eds.values()), list(eds), scale=15).savefig("berardino.png")
fisherop.plot.eigendistortions(eds["On–Off"], (0, 1, -2, -1), scale=15).savefig("berardino_onoff.png")

# %%
# Each model's distortions, to the other
# --------------------------------------
# Does a model notice what the other one calls most, or least, noticeable? And how far does the linear picture reach?
print(f"\nHow far a distortion of norm 1 moves each model's response: {' ' * 16}{'  '.join(models)}")
for name, ed in eds.items():
    for which, distortion in (("most", ed.eigendistortions[0]), ("least", ed.eigendistortions[-1])):
        moved = [other.operator.linearization.jvp(distortion[None, None]).norm().item() for other in eds.values()]
        print(f"{name:>30}'s {which:>5} noticeable: {moved[0]:>19.2e}  {moved[1]:>17.2e}")
for name, ed in eds.items():
    print(f"\n{name}: the response's change as F predicts it, and in truth, for distortions of these norms")
    for which, index in (("most", 0), ("least", -1)):
        predicted, actual = ed.response_change(index, [1.0, 5.0, 15.0])
        pairs = ", ".join(f"{p:.3g} and {a:.3g}" for p, a in zip(predicted, actual, strict=True))
        print(f"{which:>6}, norm 1, 5 and 15: {pairs}")
print("\nFigures: berardino.png, berardino_onoff.png")
