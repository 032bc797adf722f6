"""Every argument of the public API gets every wrong kind of thing: it is refused by its name, or right."""

import inspect
import warnings

import numpy as np
import pytest
import torch
from matplotlib import pyplot
from test_bad_inputs import everything, prepared
from unharmed import same

import fisherop
import fisherop.plenoptic as po
from fisherop import Eigendistortion, FisherOperator, JacobianOperator, images, plot, testing

REFUSED = (TypeError, ValueError, IndexError, OverflowError, FileNotFoundError, IsADirectoryError)
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


def calls(names):
    """Each public function, and arguments with which it works; those that are tried are named after them."""
    F, ed, image, model, V = (names[name] for name in ("F", "ed", "image", "model", "V"))  # noqa: N806
    lin, J, path = F.linearization, F.jacobian, names["D"] + "/ok.npz"  # noqa: N806
    po_ed = po.Eigendistortion(image, model).synthesize(progress=False, rng=0)
    quiet = {"progress": False, "rng": 0, "tol": 1e-3}
    built = {"image": image, "model": model, "engine": "auto", "chunk_size": None}
    shown = {"process_image": None, "as_rgb": None, "channel_idx": None, "zoom": None, "vrange": None}
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
        "imshow": (plot.imshow, {"image": image, "title": "", **shown, "ax": None}),
        "plot.eigendistortions": (
            plot.eigendistortions,
            {"ed": ed, "indices": 0, "scale": 1.0, "vrange": None, "zoom": 1},
        ),
        "compare": (plot.compare, {"eds": [ed], "names": None, "scale": None, "vrange": None, "zoom": 1}),
        "spectrum": (plot.spectrum, {"results": ed.result, "names": None}),
        "convergence": (plot.convergence, {"result": ed.result}),
        "display": (
            po.display_eigendistortion,
            {"eigendistortion": ed, "eigenindex": 0, "alpha": 5.0, "ax": None} | shown,
        ),
        "display_all": (
            po.display_eigendistortion_all,
            {"eigendistortion": ed, "eigenindex": 0, "alpha": 5.0, "process_distortion": None, "suptitle": ""} | shown,
        ),
        "imshow_all": (
            po.eigendistortion_imshow_all,
            {"eigendistortion": ed, "eigenindex": 0, "distortion_scale": 5.0, "process_distortion": None} | shown,
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
