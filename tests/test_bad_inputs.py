"""Bad input to the whole public API: what each gets, as bad_inputs.txt has it, and that nothing is changed by it.

Each line of that file is a call, ``=>``, and what it gets: an error and its message, in which ``...`` stands for what
differs from version to version; a warning; or "right", where the input isn't bad.
"""

import fnmatch
import importlib.util
import math
import pathlib
import re
import types
import warnings

import matplotlib.cbook
import numpy as np
import pytest
import scipy.sparse.linalg as sla
import torch
from matplotlib import pyplot
from matplotlib.figure import Figure
from torch import nn
from unharmed import flags, same, state

import fisherop
import fisherop.plenoptic as po
from fisherop import Eigendistortion, FisherOperator, images, plot, testing

pytestmark = pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad:UserWarning")  # PyTorch's own
TABLE = pathlib.Path(__file__).with_name("bad_inputs.txt").read_text(encoding="utf-8").splitlines()


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


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("bad"))


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


def attempt(expression, names):
    """What a call gets, in the words of the table."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            eval(expression, dict(names))
        except Exception as error:
            return f"{type(error).__name__}: {error}".replace(names["D"], "D").replace("\n", " | ")
        finally:
            pyplot.close("all")
    caught = [w for w in caught if "requires_grad=True to a scalar" not in str(w.message)]
    return f"{caught[0].category.__name__}: {caught[0].message}" if caught else "right"


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


@pytest.mark.parametrize("line", TABLE, ids=[f"{number}: {line[:50]}" for number, line in enumerate(TABLE)])
def test_bad_input(line, names):
    expression, expected = line.split("  => ")
    if "'primme'" in expected and importlib.util.find_spec("primme") and expected.startswith("ModuleNotFoundError"):
        pytest.skip("PRIMME is installed")
    before = everything(names)
    got = attempt(expression, names)
    pattern = fnmatch.translate(re.sub(r"([\[\]*?])", r"[\1]", expected).replace("...", "*"))
    assert re.match(pattern, got), f"{expression}\n     got {got}\nexpected {expected}"
    after = everything(names)
    assert after.rest == before.rest
    assert all(same(after.tensors[path], tensor) for path, tensor in before.tensors.items())


def test_all_are_here():
    """The 371 inputs of the study, each of a kind, in its order."""
    assert len(TABLE) >= 371
