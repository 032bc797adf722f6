"""
A photograph and its extremes, in ten lines
===========================================

The most and the least noticeable change of a photograph, for a model of the early visual system.
"""

import torch

import fisherop.plot
from fisherop import Eigendistortion, images
from fisherop.models import OnOff

image = images.photograph(as_gray=True, size=96, dtype=torch.float64)
ed = Eigendistortion(image, OnOff().double().eval()).synthesize(rng=0)

print(ed.result)
most, least = ed.eigenvalues
print(f"\nThe least noticeable distortion must be {(most / least).sqrt():.1f} times as large as the most noticeable")
print("to change the model's response by as much.")

fisherop.plot.eigendistortions(ed).savefig("quickstart.png")
print("Figure: quickstart.png")
