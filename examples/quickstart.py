"""
A photograph and its extremes, in a few lines
=============================================

The most and the least noticeable change of a photograph, for two models of the early visual system.
"""

import torch
from torch.nn.functional import avg_pool2d

import fisherop.plot
from fisherop import Eigendistortion, images
from fisherop.models import LuminanceGainControl, OnOff

photograph = avg_pool2d(images.photograph(as_gray=True, dtype=torch.float64), 4)  # the whole of it, 150 × 128 pixels
image = 0.1 + 0.8 * photograph  # between black and white, so that there is room for distortions
eds = {}
for name, model in {"On–Off": OnOff(), "luminance gain": LuminanceGainControl()}.items():
    eds[name] = Eigendistortion(image, model.double().eval()).synthesize(rng=0)
    most, least = eds[name].detection_thresholds()[0]
    print(f"{name}\n\n{eds[name].result}\n")
    print(f"The least noticeable distortion must be at least {least / most:.0f} times as large as the most noticeable")
    print("to change the model's response by as much, as far as the response is linear: up to")
    print(f"{eds[name].linear_range(-1):.3g} for the least, and {eds[name].linear_range(0):.3g} for the most.\n")

fisherop.plot.compare(list(eds.values()), list(eds)).savefig("quickstart.png")
print("Figure: quickstart.png")
