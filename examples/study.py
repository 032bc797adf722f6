"""
A study: from photographs to stimuli
====================================

Three photographs and two models: what each model notices most and least in each picture, how much of it takes a
response to change by 1, and pictures for an experiment.
"""

# %%
# The photographs and the models
# ------------------------------
# Three patches of a photograph stand for a folder of pictures: `images.load_image` reads a file. Names are given, since
# the records, the figures and the page show them.
import csv

import torch

import fisherop.plot
from fisherop import images, stimuli, sweep
from fisherop.models import LinearNonlinear, OnOff

photograph = images.photograph(as_gray=True, dtype=torch.float64)
corners = {"eye": (160, 185), "mouth": (245, 230), "ribbons": (485, 360)}
photographs = {name: photograph[..., y : y + 64, x : x + 64] for name, (y, x) in corners.items()}
models = {"On–Off": OnOff().double().eval(), "linear–nonlinear": LinearNonlinear().double().eval()}

# %%
# Each picture with each model
# ----------------------------
# A task that is done is a file in the store. Run the script again, with more pictures if you like: what is there is not
# done again. A task that fails is a record that says why, and does not end the sweep.
table = sweep(photographs, models, store="study", tol=1e-4, rng=0)
print(table)
table.to_csv("study.csv")  # a row for each eigendistortion

# %%
# Thresholds
# ----------
# How large each distortion must be for the response to change by 1, which is d′ = 1 for white noise of unit variance.
fisherop.plot.sweep(table).savefig("study_thresholds.png")
for record in table:
    most, least = record.thresholds
    print(f"{record.image:>10}, {record.model:>16}: most noticeable from {most:8.3g}, least from {least:8.3g}")

# %%
# Pictures
# --------
# The models side by side, for one photograph, at one scale; and all six on a page to look at in a browser, with a
# slider for the amplitude: one file, which needs no network.
chosen = [record for record in table if record.image == "eye"]
loaded = [table.load(record) for record in chosen]
fisherop.plot.compare(loaded, [record.model for record in chosen], zoom=3).savefig("study_eye.png")
fisherop.plot.page(table, "study.html")

# %%
# Stimuli
# -------
# The photograph with its most and its least noticeable distortion, at the same root mean square, as PNG files, and a
# table of what their pixels are. Files of 16 bits, since to round to 256 levels would move the response more than the
# least noticeable distortion does. A folder takes the stimuli of one photograph and one model.
for record, ed in zip(chosen, loaded, strict=True):
    path = stimuli.export(ed, f"stimuli/{record.name}", [0, -1], [0.01, 0.02], unit="rms", bits=16, clip=True)
    print(f"\n{record.name}: root mean square, d′ as F predicts it, and the response's true change")
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            numbers = "  ".join(f"{float(row[key]):>9.3g}" for key in ("rms", "predicted", "actual"))
            print(f"{row['file'].removesuffix('.png'):>20}  {numbers}")
print("\nFigures: study_thresholds.png, study_eye.png")
