"""What the tables of bad inputs speak of, and what no call may change."""

import math
import pathlib
import types

import matplotlib.cbook
import numpy as np
import scipy.sparse.linalg as sla
import torch
from matplotlib.figure import Figure
from torch import nn
from unharmed import flags, state

import fisherop
import fisherop.plenoptic as po
from fisherop import Eigendistortion, FisherOperator, images, plot, testing


class Counter(nn.Module):
    """It counts its calls, and so changes at every one."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return x * 2


def part_without_grad(x):
    with torch.no_grad():
        y = x.sin()
    return x * (2 + y)


def inference(x):
    with torch.inference_mode():
        return x.clone()


def prepared(folder):
    """What the calls of the table speak of: N = 192, M = 20, float32."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        image, small = torch.rand(1, 3, 8, 8), torch.rand(6)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Softplus(), nn.Flatten(), nn.Linear(144, 20)).eval()
    F = FisherOperator(image, model)
    ed, top = (Eigendistortion(image, model) for _ in range(2))
    ed.synthesize(progress=False, rng=0)
    top.synthesize(which="largest", progress=False, rng=0)
    (folder / "txt").write_text("hello")
    (folder / "empty").write_bytes(b"")
    np.savez(folder / "other.npz", a=1)
    torch.save({"a": 1}, folder / "t.pt")
    ed.save(folder / "ok.npz")
    return vars(fisherop) | {
        "D": str(folder),
        "F": F,
        "J": F.jacobian,
        "V": ed.result.eigenvectors,
        "Counter": Counter,
        "axes": Figure().subplots(),
        "ed": ed,
        "ed0": Eigendistortion(image, model),
        "ed1d": Eigendistortion(small, torch.sin).synthesize(progress=False, rng=0),
        "image": image,
        "images": images,
        "inf": math.inf,
        "inference": inference,
        "lin": F.linearization,
        "linearize": fisherop.linearize,  # the function, not the module
        "model": model,
        "nan": math.nan,
        "nn": nn,
        "np": np,
        "part_without_grad": part_without_grad,
        "photo": matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False),
        "plot": plot,
        "po": po,
        "sla": sla,
        "testing": testing,
        "top": top,
        "torch": torch,
    }


def everything(names):
    """What no call may change: the model, the image, the objects, what was found, and the global generators."""
    ed = names["ed"]
    return types.SimpleNamespace(
        tensors={path: tensor.clone() for path, (_, _, tensor) in state(names["model"]).items()}
        | {"image": names["image"].clone(), "global generator": torch.get_rng_state()},
        rest=[
            flags(names["model"]),
            np.random.get_state()[1].tobytes(),  # noqa: NPY002
            [id(ed.result), sorted(vars(ed)), ed.image.dtype, id(ed.operator), names["ed0"].result],
            names["V"].tobytes(),
            names["lin"].on_product,
            sorted(p.name for p in pathlib.Path(names["D"]).iterdir()),
        ],
    )
