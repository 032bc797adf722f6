"""
The noise of the responses
==========================

How the noise of the responses changes what a model notices: the same model, four assumptions, and a classifier.
"""

# %%
# Four kinds of noise
# -------------------
# The On–Off model of the early visual system. Its responses are rates: Poisson noise lets a weak one tell more.
import torch
from networks import Normalise, ResNet18, load_imagenet_weights
from torch import nn
from torch.nn import functional

import fisherop.plot
from fisherop import Eigendistortion, images, noise
from fisherop.models import OnOff

face = images.photograph(dtype=torch.float64)[..., 110:366, 130:386]
photograph = functional.avg_pool2d(face.mean(1, keepdim=True), 4)
noises = {
    "white": None,
    "Poisson": noise.Poisson(),
    "variance 0.05 f²": noise.Gaussian(lambda f: 0.05 * f**2),  # a constant coefficient of variation
    "negative binomial, r = 2": noise.NegativeBinomial(2.0),
}
eds = {
    name: Eigendistortion(photograph, OnOff().double().eval(), noise=kind).synthesize(rng=0)
    for name, kind in noises.items()
}
print("Norm at threshold, d′ = 1 in units of each noise, as F predicts it; and how far its prediction holds, to 10 %")
print(f"{'noise':>26}  {'most noticeable':>15}  {'holds to':>8}  {'least noticeable':>16}  {'holds to':>8}")
for name, ed in eds.items():
    most, least = ed.detection_thresholds()[0]
    near, far = ed.linear_range(0), ed.linear_range(-1)
    print(f"{name:>26}  {most:>15.3g}  {near:>8.2g}  {least:>16.3g}  {far:>8.2g}")
print("Beyond that, ed.response_change tells how far the response moves in truth.")
fisherop.plot.compare(list(eds.values()), list(eds), zoom=3).savefig("noise_models.png")

# %%
# A classifier
# ------------
# A classifier gives probabilities. What changes them most? Only differences of the logits count, so that the
# information has rank M − 1 = 999, and nearly all changes of 3 × 51 × 51 pixels are not noticed at all.
torch.manual_seed(0)
network = ResNet18()
print(f"\nResNet18 has {load_imagenet_weights(network, 'resnet18')}.")
classifier = nn.Sequential(Normalise(), network).double().eval()
colour = functional.avg_pool2d(face, 5)
ed = Eigendistortion(colour, classifier, noise=noise.Categorical()).synthesize(rng=0)
print(ed.result)
fisherop.plot.eigendistortions(ed).savefig("noise_categorical.png")
print("\nFigures: noise_models.png, noise_categorical.png")
