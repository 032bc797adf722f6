"""
Two layers of ResNet18
======================

Two layers of ResNet18 as models of what people notice in a picture, in colour and in grey.
"""

# %%
# An image
# --------
# Three channels, values from 0 to 1.
import torch
from networks import Normalise, ResNet18, load_imagenet_weights
from torch import nn

import fisherop.plot
from fisherop import Eigendistortion, JacobianOperator, LayerResponse, images
from fisherop.models import OnOff

photograph = images.photograph()[..., 150:278, 198:326]
print(f"Image: {tuple(photograph.shape)}, from {photograph.min():.2g} to {photograph.max():.2g}")

# %%
# Models
# ------
# ResNet18 up to its maxpool, and up to the first block of its second layer. The normalisation that the network was
# trained with is part of the model, so that distortions are in the units of the picture.
torch.manual_seed(0)
network = ResNet18()
print(f"ResNet18 has {load_imagenet_weights(network, 'resnet18')}.")
layers = {name: nn.Sequential(Normalise(), LayerResponse(network, name)).eval() for name in ("maxpool", "layer2.0")}

# %%
# Both ends of the spectrum
# -------------------------
# With a proof: residuals, bounds, and on what ground they are the extreme ones.
eds = {name: Eigendistortion(photograph, model).synthesize(tol=1e-5, rng=0) for name, model in layers.items()}
for name, ed in eds.items():
    print(f"\n{name}\n{ed.result}")

# %%
# What they look like
# -------------------
# One row a layer, all at the same scale.
fisherop.plot.compare(list(eds.values()), list(eds)).savefig("tutorial_resnet_color.png")
for name, ed in eds.items():
    fisherop.plot.eigendistortions(ed).savefig(f"tutorial_resnet_{name.replace('.', '_')}.png")

# %%
# Which layer's are more plausible?
# ---------------------------------
# In the end people must say: the better model's most noticeable distortion is the easier one to see, its least
# noticeable the harder one. A first answer without an experiment is what a model says that was fitted to human
# judgements of distortions.
observer = JacobianOperator(photograph.mean(1, keepdim=True), OnOff().eval())


def visibility(distortion):
    """How far a distortion of norm 1, in grey, moves the responses of the On–Off model of the early visual system."""
    return observer.linearization.jvp(distortion.mean(0).reshape(1, *observer.image_shape)).norm().item()


print("\nOf distortions of norm 1, how far each moves the responses of the layers, and of a model of human vision:")
print(f"{'distortion':>22}  {'maxpool':>9}  {'layer2.0':>9}  {'On–Off':>9}")
ratios = {}
for name, ed in eds.items():
    for which, distortion in zip(("most", "least"), ed.eigendistortions, strict=True):
        moves = [other.operator.linearization.jvp(distortion[None, None]).norm().item() for other in eds.values()]
        print(f"{name:>14}'s {which:>5}  {moves[0]:>9.2e}  {moves[1]:>9.2e}  {visibility(distortion):>9.2e}")
    ratios[name] = visibility(ed.eigendistortions[0]) / visibility(ed.eigendistortions[-1])
best = max(ratios, key=ratios.get)
print(
    "For On–Off the most noticeable is "
    + ", ".join(f"{ratio:.3g} times as visible as the least for {name}" for name, ratio in ratios.items())
    + f":\nby this measure, and with these weights, the distortions of {best} are the more plausible ones."
)

# %%
# A grey image
# ------------
# Another image has other eigendistortions: a grey one, repeated over the channels.
grey = images.photograph(as_gray=True)[..., 400:528, 200:328].repeat(1, 3, 1, 1)
eds = [Eigendistortion(grey, model).synthesize(tol=1e-5, rng=0) for model in layers.values()]
fisherop.plot.compare(eds, list(layers)).savefig("tutorial_resnet_grey.png")
for name, ed in zip(layers, eds, strict=True):
    most, least = ed.detection_thresholds()[1]
    print(f"\nGrey image, {name}: a change of the response by 1 takes an RMS of {most:.2g} along the most noticeable")
    print(f"distortion, of {least:.2g} along the least, if the response were linear that far: linear_range tells.")
print(
    "\nFigures: tutorial_resnet_color.png, tutorial_resnet_maxpool.png, tutorial_resnet_layer2_0.png, "
    "tutorial_resnet_grey.png"
)
