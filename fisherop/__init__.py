"""Extreme eigenvectors of the Fisher information of any PyTorch model at an image, with certificates."""

from fisherop.eigendistortion import Eigendistortion
from fisherop.layers import LayerResponse
from fisherop.linearize import Linearization, linearize
from fisherop.operators import FisherOperator, JacobianOperator
from fisherop.result import ConvergenceError, EigenResult, SolverStopped, Status, certify
from fisherop.solvers import eigenpairs

__version__ = "0.1.0"

__all__ = [
    "ConvergenceError",
    "EigenResult",
    "Eigendistortion",
    "FisherOperator",
    "JacobianOperator",
    "LayerResponse",
    "Linearization",
    "SolverStopped",
    "Status",
    "certify",
    "eigenpairs",
    "linearize",
]
