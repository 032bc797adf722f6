"""
Apertures, colours, frequencies, and another metric
===================================================

Eigendistortions within an aperture, achromatic, of low frequencies, and in a metric of contrast sensitivity.

J. L. Mannos and D. J. Sakrison, The effects of a visual fidelity criterion on the encoding of images, IEEE Trans. Inf.
Theory 20 (1974): the sensitivity of people to a grating of f cycles per degree is 2.6 (0.0192 + 0.114 f)
exp(−(0.114 f)^1.1).
"""

import numpy as np
import torch
from networks import Normalise, ResNet18, load_imagenet_weights
from scipy.sparse.linalg import LinearOperator
from torch import nn
from torch.nn import functional

import fisherop.plot
from fisherop import Eigendistortion, LayerResponse, images, spaces

SIZE, DEGREES = 64, 2  # the picture's width in pixels, and in degrees of visual angle

photograph = functional.avg_pool2d(images.photograph(dtype=torch.float64)[..., 110:366, 130:386], 4)
torch.manual_seed(0)
network = ResNet18()
print(f"ResNet18 has {load_imagenet_weights(network, 'resnet18')}.")
model = nn.Sequential(Normalise(), LayerResponse(network, "layer1")).double().eval()

# %%
# Subspaces
# ---------
# What lies outside is not in the search at all, so that no minimum is found there.
disc = np.hypot(*np.mgrid[-1 : 1 : SIZE * 1j, -1 : 1 : SIZE * 1j]) < 0.7
cases = {
    "whole image": {},
    "aperture": {"subspace": spaces.mask(disc)},
    "achromatic": {"subspace": spaces.channels([1, 1, 1])},
    "below 8 cycles per image": {"subspace": spaces.bandpass((SIZE, SIZE), 0, 8)},
}


# %%
# A metric
# --------
# ‖R z‖ counts as ‖z‖, R = W^(-1/2). With W the squared contrast sensitivity, unit distortions are equally visible by
# that formula, and F says what the model notices of them.
def sensitivity(f):
    """Of Mannos and Sakrison, f in cycles per degree, relative to its peak; from 5 % of it."""
    curve = 2.6 * (0.0192 + 0.114 * f) * np.exp(-((0.114 * f) ** 1.1))
    return np.maximum(curve / 0.98, 0.05)


frequencies = np.fft.fftfreq(SIZE, DEGREES / SIZE)
gain = 1 / sensitivity(np.hypot(frequencies[:, None], frequencies[: SIZE // 2 + 1].reshape(1, -1)))


def apply(z):
    image = z.reshape(-1, SIZE, SIZE)
    return np.fft.irfft2(gain * np.fft.rfft2(image), s=(SIZE, SIZE)).ravel()  # symmetric: its own adjoint


n = photograph.numel()
cases["contrast sensitivity"] = {"metric": LinearOperator((n, n), matvec=apply, rmatvec=apply, dtype=np.float64)}

# %%
# The same model, and five questions
# ----------------------------------
# Each is a search of its own.
eds = {name: Eigendistortion(photograph, model, **case).synthesize(tol=1e-4, rng=0) for name, case in cases.items()}
for name, ed in eds.items():
    top, bottom = ed.result.eigenvalues[[0, -1]]
    counts = f"{ed.result.image_size:>6} dimensions, {ed.result.n_products:>4g} products"
    print(f"{name:>26}: {counts}, λ from {bottom:.3g} to {top:.3g}")
print("The last λ are per unit of that metric; the figures show all distortions at one Euclidean norm.")
outside = eds["aperture"].eigendistortions[..., torch.as_tensor(~disc)].abs().max()
print(f"Outside the aperture the distortions are {outside:g}.")
for which, index in (("most", 0), ("least", -1)):
    changes = torch.stack([ed.eigendistortions[index] / ed.eigendistortions[index].norm() for ed in eds.values()])
    fisherop.plot.distortions(photograph, changes, list(eds), scale=6, zoom=3).savefig(f"restricted_{which}.png")
print("Figures: restricted_most.png, restricted_least.png")
