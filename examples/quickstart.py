"""The most and the least noticeable change of a photograph, for a model of the early visual system."""

import matplotlib.cbook
import matplotlib.pyplot as plt
import torch
from models import OnOff

import fisherop.plot
from fisherop import Eigendistortion

with matplotlib.cbook.get_sample_data("grace_hopper.jpg") as file:
    photo = torch.tensor(plt.imread(file, format="jpg"), dtype=torch.float64) / 255
grey = photo @ torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)
top, left = (grey.shape[0] - 96) // 2, (grey.shape[1] - 96) // 2
image = grey[None, None, top : top + 96, left : left + 96]

ed = Eigendistortion(image, OnOff().double().eval()).synthesize(rng=0)

print(ed.result)
most, least = ed.eigenvalues
print(f"\nThe least noticeable distortion must be {(most / least).sqrt():.1f} times as large as the most noticeable")
print("to change the model's response by as much.")

fisherop.plot.eigendistortions(ed).savefig("quickstart.png", dpi=150)
print("Figure: quickstart.png")
