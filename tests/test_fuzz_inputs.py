"""Every argument of the public API gets every wrong kind of thing: it is refused by its name, or right."""

import re
import warnings

import numpy as np
import pytest
import torch
from inputs import everything, prepared
from matplotlib import pyplot
from unharmed import same

import fisherop
import fisherop.plenoptic as po
from fisherop import Eigendistortion, FisherOperator, JacobianOperator, images, plot, testing

REFUSED = (TypeError, ValueError, IndexError, OverflowError)
WRONG = {
    "None": None,
    "text": "text",
    "empty text": "",
    "bytes": b"bytes",
    "True": True,
    "0": 0,
    "-1": -1,
    "2": 2,
    "1.5": 1.5,
    "nan": np.nan,
    "inf": np.inf,
    "-inf": -np.inf,
    "huge": 10**400,
    "complex": 1j,
    "list": [],
    "nested list": [[1], [2, 3]],
    "list of None": [None],
    "dict": {},
    "object": object(),
    "class": int,
    "function": len,
    "array": np.ones((2, 2)),
    "number in an array": np.array(0.5),
    "integers": np.array([5, 6]),
    "empty array": np.empty((0, 2)),
    "complex array": np.full((2, 2), 1j),
    "texts": np.array(["a", "b"]),
    "objects": np.array([None, {}]),
    "nan array": np.full((2, 2), np.nan),
    "tensor": torch.ones(2, 2),
    "tensor with gradient": torch.ones(2, 2, requires_grad=True),
    "half": torch.ones(2, 2).half(),
    "bfloat16": torch.ones(2, 2).bfloat16(),
    "sparse": torch.ones(2, 2).to_sparse(),
    "meta": torch.ones(2, 2, device="meta"),
    "empty tensor": torch.ones(0),
    "bools": torch.ones(2, 2) > 0,
}


ANY_SIZE = {"array", "integers", "empty array", "tensor", "half", "bfloat16", "empty tensor", "bools", "list"}
SEEDS = {"None", "0", "2", "huge", "list", "nested list", "integers", "empty array", "empty tensor"}  # as NumPy has it
# What is right, by argument, or by function and argument where they differ.
RIGHT = {
    "alpha": {"0", "-1", "2", "1.5", "number in an array"},
    "as_gray": {"True"},
    "as_rgb": {"None", "True"},
    "call": {"0", "2", "huge"},
    "channel_idx": {"None", "0", "-1", "2"},
    "chunk_size": {"None", "2", "huge"},
    "color_wheel.size": {"2"},
    "details": {"None", "dict"},
    "device": {"None"},
    "distortion_scale": {"0", "-1", "2", "1.5", "number in an array"},
    "eigenindex": {"0", "-1"},
    "examine_saved_synthesis.map_location": set(WRONG),  # for plenoptic's files alone
    "ground": {"None", "text", "empty text"},
    "image": {"tensor", "tensor with gradient", "array", "integers", "bools", "half", "bfloat16"},
    "in_float64.scale": {"-1", "2", "1.5"},
    "index": {"0", "-1"},
    "indices": {"0", "-1"},
    "J.to_dense.max_bytes": {"0", "2", "1.5"},  # it is kept
    "k": {"None", "2"},
    "map_location": {"None"},
    "matrix": {"array", "empty array", "tensor", "half", "bfloat16", "bools"},
    "max_basis": {"None", "huge"},
    "max_bytes": {"None"},
    "max_iter": {"None", "2"},
    "maxiter": {"None", "2"},
    "certify.method": {"text", "empty text"},
    "m": {"2"},
    "n": {"2"},
    "ncv": {"None", "2"},
    "operator": {"array", "number in an array", "integers", "empty array", "complex array"},
    "p": {"None", "0", "2", "huge"},
    "page.indices": {"None", "0", "-1"},
    "probe": {"0", "2", "huge"},
    "progress": {"True"},
    "q": {"None", "0", "2", "huge"},
    "raise_on_checks": {"True"},
    "response_change.scale": {"0", "-1", "2", "1.5", "number in an array", *ANY_SIZE},
    "rng": SEEDS,
    "rtol": {"None", "0", "2", "1.5"},
    "scale": {"None", "0", "-1", "2", "1.5"},
    "sigma": {"list", "integers", "empty tensor"},
    "size": {"None", "2", "integers"},
    "state": {"None", "dict"},
    "stop_criterion": {"None"},
    "suptitle": {"None", "text", "empty text"},
    "tensor_equality_atol": {"0", "2", "1.5"},
    "tensor_equality_rtol": {"0", "2", "1.5"},
    "title": {"text", "empty text"},
    "to.device": {
        "None",
        "tensor",
        "tensor with gradient",
        "sparse",
        "empty tensor",
    }  # whose device and dtype is meant
    | ({"0"} if torch.cuda.is_available() else set()),  # the first GPU
    "tol": {"None"},
    "vrange": {"None", "integers"},
    "which": {"None"},
    "zoom": {"None", "2"},
}
OPTIONAL = ("ax", "callback", "names", "orthogonal_to", "preconditioner", "process_distortion", "process_image")
RIGHT |= {name: {"None"} for name in (*OPTIONAL, "sample", "v0")}
SKIPPED = {  # what is another's to say, or takes for ever
    ("image", "tensor"),
    ("image", "tensor with gradient"),
    ("operator", "nan array"),
    ("m", "huge"),
    ("n", "huge"),
    ("q", "huge"),
    ("x", "tensor with gradient"),
    ("X", "tensor with gradient"),
}
OWN = {"model", "method", "callback", "process_image", "process_distortion", "run"}  # whose errors are the user's
TAKE_ARRAYS = {"matvec", "matmat", "rmatvec", "rmatmat"}  # whose messages name the operator and the method


def calls(names):
    """Each public function, and arguments with which it works; those that are tried are named after them."""
    F, ed, image, model, V = (names[name] for name in ("F", "ed", "image", "model", "V"))
    lin, J, path = F.linearization, F.jacobian, names["D"] + "/ok.npz"
    po_ed = po.Eigendistortion(image, model).synthesize(progress=False, rng=0)
    iterated = fisherop.eigenpairs(F, method="golub_kahan", progress=False, rng=0)
    quiet = {"progress": False, "rng": 0, "tol": 1e-3}
    built = {"image": image, "model": model, "engine": "auto", "chunk_size": None}
    shown = dict.fromkeys(("as_rgb", "channel_idx", "zoom", "vrange"))
    processed = shown | {"process_image": None}
    both = processed | {"process_distortion": None}
    krylov = dict.fromkeys(("max_basis", "v0", "orthogonal_to", "callback", "state")) | {"basis_memory": 2**20}
    certified = {"operator": F, "vectors": V, "eigenindex": [0, 191], "tol": 1e-6, "method": "m", "probe": 5, "rng": 0}

    def solve(method, **options):
        return fisherop.eigenpairs, {"operator": F, "k": 1, "which": "largest", "method": method} | quiet | options

    def resynthesize(**arguments):
        return Eigendistortion(image, model).synthesize(**arguments)

    def move(device):
        return Eigendistortion(image, model).to(device)

    return {
        "linearize": (fisherop.linearize, built),
        "FisherOperator": (FisherOperator, built),
        "JacobianOperator": (JacobianOperator, built),
        "Eigendistortion": (Eigendistortion, built),
        "po.Eigendistortion": (po.Eigendistortion, built),
        "jvp": (lin.jvp, {"tangents": image[None]}),
        "vjp": (lin.vjp, {"cotangents": torch.ones(1, 20)}),
        "respond": (lin.respond, {"image": image}),
        "from_linearization": (FisherOperator.from_linearization, {"linearization": lin}),
        "in_float64": (F.in_float64, {"scale": 2.0}),
        "to_tensors": (F.to_tensors, {"columns": V}),
        "to_dense": (FisherOperator(image, model).to_dense, {"max_bytes": 2**20}),
        "J.to_dense": (JacobianOperator(image, model).to_dense, {"max_bytes": 2**20}),
        "matvec": (F.matvec, {"x": V[:, 0]}),
        "matmat": (F.matmat, {"X": V}),
        "rmatvec": (J.rmatvec, {"x": np.ones(20)}),
        "rmatmat": (J.rmatmat, {"X": np.ones((20, 2))}),
        "eigenpairs": solve("auto", maxiter=None, on_failure="raise", state=None),
        "golub_kahan": solve("golub_kahan", **krylov),
        "exact": solve("exact", max_bytes=None),
        "eigsh": solve("eigsh", ncv=None, maxiter=None),
        "svds": solve("svds", ncv=None, maxiter=None),
        "lobpcg": solve("lobpcg", preconditioner=None, maxiter=None),
        "power": solve("power", maxiter=None, on_failure="warn"),
        "randomized_svd": solve("randomized_svd", p=5, q=2, on_failure="warn"),
        "certify": (fisherop.certify, certified | dict.fromkeys(("ground", "details", "sample"))),
        "synthesize": (
            resynthesize,
            dict(quiet, method="auto", k=1, max_iter=None, p=None, q=None, which="both", on_failure="raise")
            | {"stop_criterion": None},
        ),
        "compute_jacobian": (ed.compute_jacobian, {"progress": False}),
        "response_change": (ed.response_change, {"index": 0, "scale": 1.0}),
        "save": (ed.save, {"path": path}),
        "load": (ed.load, {"path": path}),
        "from_file": (Eigendistortion.from_file, {"path": path, "model": model, "device": "cpu"}),
        "to": (move, {"device": "cpu"}),
        "LayerResponse": (fisherop.LayerResponse, {"model": model, "layer": "0", "call": 0}),
        "center_crop": (images.center_crop, {"image": image, "size": 4}),
        "load_image": (
            images.load_image,
            {"path": names["photo"], "as_gray": False, "size": 8, "dtype": torch.float32},
        ),
        "photograph": (images.photograph, {"as_gray": False, "size": 8, "dtype": torch.float32}),
        "color_wheel": (images.color_wheel, {"size": 4, "dtype": torch.float32}),
        "imshow": (plot.imshow, {"image": image, "title": "", "ax": None} | shown),
        "plot.eigendistortions": (
            plot.eigendistortions,
            {"ed": ed, "indices": 0, "scale": 1.0, "vrange": None, "zoom": 1},
        ),
        "compare": (plot.compare, {"eds": [ed], "names": None, "scale": None, "vrange": None, "zoom": 1}),
        "page": (
            plot.page,
            {"source": ed, "path": names["D"] + "/page.html", "indices": None, "vrange": None, "title": ""},
        ),
        "spectrum": (plot.spectrum, {"results": ed.result, "names": None}),
        "convergence": (plot.convergence, {"result": iterated}),
        "display": (
            po.display_eigendistortion,
            {"eigendistortion": ed, "eigenindex": 0, "alpha": 5.0, "ax": None} | processed,
        ),
        "display_all": (
            po.display_eigendistortion_all,
            {"eigendistortion": ed, "eigenindex": 0, "alpha": 5.0, "suptitle": ""} | both,
        ),
        "imshow_all": (
            po.eigendistortion_imshow_all,
            {"eigendistortion": ed, "eigenindex": 0, "distortion_scale": 5.0} | both,
        ),
        "po.load": (
            lambda **arguments: po.Eigendistortion(image, model).load(**arguments),
            {"file_path": path, "map_location": None, "raise_on_checks": True}
            | {"tensor_equality_atol": 1e-8, "tensor_equality_rtol": 1e-5},
        ),
        "po.save": (po_ed.save, {"file_path": path}),
        "examine_saved_synthesis": (po.examine_saved_synthesis, {"file_path": path, "map_location": None}),
        "check_adjoint": (testing.check_adjoint, {"operator": F, "rng": 0, "rtol": None}),
        "matrix": (testing.matrix_with_singular_values, {"sigma": [1.0], "m": 2, "n": 3, "rng": 0}),
        "linear_model": (testing.linear_model, {"matrix": np.eye(2), "dtype": torch.float64}),
        "count_flops": (testing.count_flops, {"run": lambda: None}),
    }


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("fuzz"))


FUNCTIONS = re.findall(
    r"\S+",
    "linearize FisherOperator JacobianOperator Eigendistortion po.Eigendistortion jvp vjp respond from_linearization "
    "in_float64 to_tensors to_dense J.to_dense matvec matmat rmatvec rmatmat eigenpairs golub_kahan exact eigsh svds "
    "lobpcg power randomized_svd certify synthesize compute_jacobian response_change save load from_file to "
    "LayerResponse center_crop load_image photograph color_wheel imshow plot.eigendistortions compare page spectrum "
    "convergence display display_all imshow_all po.load po.save examine_saved_synthesis check_adjoint matrix "
    "linear_model count_flops",
)


@pytest.mark.slow
@pytest.mark.parametrize("function", FUNCTIONS)
def test_wrong_kinds(function, names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # for what is saved as "text"
    call, arguments = calls(names)[function]
    assert outcome(call, arguments, "") == "taken"
    before, faults = everything(names), []
    for name in arguments:
        right = RIGHT.get(f"{function}.{name}", RIGHT.get(name, set()))
        right = right | {"text", "bytes"} if "path" in name else right  # which may not exist
        for kind, value in WRONG.items():
            if (name, kind) in SKIPPED or (name in OWN and kind in ("class", "function")):
                continue
            got = outcome(call, arguments | {name: value}, name if function not in TAKE_ARRAYS else "")
            if got and not (got == "taken" and kind in right):
                faults.append(f"{name}={kind}: {got}")
    assert not faults, "\n".join(faults)
    after = everything(names)
    assert after.rest == before.rest
    assert all(same(after.tensors[path], tensor) for path, tensor in before.tensors.items())


def outcome(call, arguments, name):
    """Nothing, where it is refused by name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            call(**arguments)
        except (fisherop.ConvergenceError, FileNotFoundError):
            return "taken"
        except REFUSED as error:
            return "" if re.search(rf"\b{name}\b", str(error)) else f"{type(error).__name__}: {error}"
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        finally:
            pyplot.close("all")
    return "taken"
