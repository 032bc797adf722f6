"""
What tells models apart
=======================

The changes of a photograph that tell models apart best: two of early vision, two layers of ResNet18, three models.

J. Feather, D. Lipshutz, S. E. Harvey, A. H. Williams and E. P. Simoncelli, Discriminating image representations with
principal distortions, ICLR 2025.
"""

# %%
# Two models of the early visual system
# -------------------------------------
# What does the one notice that the other does not?
import torch
from networks import Normalise, ResNet18, load_imagenet_weights
from torch import nn
from torch.nn import functional

import fisherop.plot
from fisherop import LayerResponse, images, principal_distortions
from fisherop.models import LinearNonlinear, LuminanceContrastGainControl, OnOff

face = images.photograph(dtype=torch.float64)[..., 110:366, 130:386]
grey = functional.avg_pool2d(face.mean(1, keepdim=True), 5)
found = principal_distortions(grey, OnOff().double().eval(), LinearNonlinear().double().eval(), rng=0)
print("A is On–Off, B the linear–nonlinear model\n", found, "\n", sep="")
titles = ["On–Off notices it,\nthe linear–nonlinear model less", "the linear–nonlinear model\nnotices it, On–Off less"]
fisherop.plot.distortions(grey, found.distortions, titles).savefig("principal_front_ends.png")

# %%
# Two layers of one network
# -------------------------
# In colour, of ResNet18.
torch.manual_seed(0)
network = ResNet18()
print(f"ResNet18 has {load_imagenet_weights(network, 'resnet18')}.")
layers = [nn.Sequential(Normalise(), LayerResponse(network, name)).double().eval() for name in ("maxpool", "layer2.0")]
colour = functional.avg_pool2d(face, 8)
found = principal_distortions(colour, *layers, rng=0, regularization=1e-2)
print("A is maxpool, B is layer2.0\n", found, "\n", sep="")
titles = ["maxpool notices it,\nlayer2.0 less", "layer2.0 notices it,\nmaxpool less"]
fisherop.plot.distortions(colour, found.distortions, titles).savefig("principal_layers.png")

# %%
# Three models
# ------------
# The pair of distortions that they rank most differently.
names = ["On–Off", "linear–nonlinear", "with gain control"]
models = [OnOff(), LinearNonlinear(), LuminanceContrastGainControl()]
models = [model.double().eval() for model in models]
pair = principal_distortions(grey, models, rng=0, tol=1e-3, n_starts=2)
print(pair)
for name, (first, second) in zip(names, pair.thresholds.T, strict=True):
    print(f"{name:>18} has a threshold for the first that is {first / second:.3g} times that for the second")
titles = ["the first of the pair", "the second"]
fisherop.plot.distortions(grey, pair.distortions, titles).savefig("principal_three.png")
print("\nFigures: principal_front_ends.png, principal_layers.png, principal_three.png")
