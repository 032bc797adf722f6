"""What the workers of a sweep import, and a sweep in a process of its own, to be killed."""

import time

import torch

import fisherop


class Net(torch.nn.Module):
    """Two layers, for grey images; it rejects an image that begins with −1."""

    def __init__(self, width=4):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.first = torch.nn.Conv2d(1, width, 3, padding=1)
        self.second = torch.nn.Conv2d(width, width, 3, padding=1)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=g) * 0.3

    def forward(self, x):
        if x.flatten()[0] == -1:
            raise ValueError("this image is rejected")
        return torch.tanh(self.second(torch.relu(self.first(x))))


def build():
    return Net().eval()


def smooth():
    """Without a branch, so that one recording serves all images."""
    return torch.nn.Sequential(build().first, torch.nn.Softplus()).eval()


def from_file(path):
    """What trainings write."""
    model = build()
    model.load_state_dict(torch.load(path))
    return model


def only_on(device):
    """It rejects images that are elsewhere."""
    model = Net().eval()

    def hook(module, inputs):
        if inputs[0].device.type != device:
            raise ValueError(f"the image is on {inputs[0].device}")

    model.register_forward_pre_hook(hook)
    return model


def unseeded():
    return torch.nn.Conv2d(1, 2, 3).eval()


def images(count, size=8):
    return [torch.rand(1, 1, size, size, generator=torch.Generator().manual_seed(i)) for i in range(count)]


def slow():
    """Each response to an image takes a while, so that a sweep of it can be killed in the middle."""
    model = Net().eval()

    def hook(module, inputs):
        time.sleep(0.05)

    model.register_forward_pre_hook(hook)
    return model


def study(folder):
    fisherop.sweep(images(8), [(slow, "first"), slow], store=folder, tol=1e-4, rng=0, progress=False)
