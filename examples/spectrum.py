"""
The whole spectrum
==================

The whole spectrum: how many directions does a model not notice, and how far does the linear picture reach?
"""

import torch
from networks import Normalise, ResNet18, load_imagenet_weights
from torch import nn
from torch.nn import functional

import fisherop.plot
from fisherop import Eigendistortion, FisherOperator, LayerResponse, images, spectral_density
from fisherop.models import LuminanceGainControl, OnOff

# %%
# Three spectra
# -------------
# Two models of the early visual system, and a layer of ResNet18, by five random vectors each.
face = images.photograph(dtype=torch.float64)[..., 110:366, 130:386]
grey, colour = functional.avg_pool2d(face.mean(1, keepdim=True), 5), functional.avg_pool2d(face, 8)
torch.manual_seed(0)
network = ResNet18()
print(f"ResNet18 has {load_imagenet_weights(network, 'resnet18')}.")
layer = nn.Sequential(Normalise(), LayerResponse(network, "layer2.0")).double().eval()
operators = {
    "On–Off": FisherOperator(grey, OnOff().double().eval()),
    "luminance gain": FisherOperator(grey, LuminanceGainControl().double().eval()),
    "ResNet18 layer2.0": FisherOperator(colour, layer),
}
densities = {name: spectral_density(F, n_probes=5, n_steps=100, rng=0) for name, F in operators.items()}
for name, density in densities.items():
    count = density.count_below(1e-4)
    print(f"\n{name}: {density}\n")
    print(f"{count.value:.0f} of {density.image_size} directions are noticed less than 1 % as well as the first one,")
    print(f"between {count.low:.0f} and {count.high:.0f} with 95 % confidence.")
fisherop.plot.density(list(densities.values()), list(densities)).savefig("spectrum_density.png")

# %%
# For nothing
# -----------
# A search for the extremes has a one-vector estimate of all this, for nothing.
ed = Eigendistortion(grey, OnOff().double().eval()).synthesize(rng=0)
free, more = ed.result.density, densities["On–Off"]
print(f"\nFor nothing, with the {ed.result.n_products:g} products for both ends: ", end="")
print(f"tr F = {free.trace:.4g} ± {free.trace_error:.1g}")
print(f"By {more.n_probes} vectors: {more.trace:.4g} ± {more.trace_error:.1g}")

# %%
# How far the linear picture reaches
# ----------------------------------
# Along the most, and along the least noticeable distortion.
for index in (0, -1):
    end = ed.linear_range(index)
    print(f"Index {ed.result.eigenindex[index]}: F's prediction holds to 10 % up to a norm of {end:.3g}")
fisherop.plot.response_change(ed).savefig("spectrum_linear_range.png")
print("Figures: spectrum_density.png, spectrum_linear_range.png")
