"""Extreme eigenvectors of the Fisher information of any PyTorch model at an image, with certificates."""

from fisherop.certificate import certify
from fisherop.eigendistortion import Eigendistortion
from fisherop.model.layers import LayerResponse
from fisherop.model.linearize import Linearization, linearize
from fisherop.operators import FisherOperator, JacobianOperator
from fisherop.result import Answer, ConvergenceError, EigenResult, SolverStopped, Status
from fisherop.solve import eigenpairs
from fisherop.triplets import SingularTriplets, singular_triplets

__version__ = "0.1.0"

__all__ = [
    "Answer",
    "ConvergenceError",
    "EigenResult",
    "Eigendistortion",
    "FisherOperator",
    "JacobianOperator",
    "LayerResponse",
    "Linearization",
    "SingularTriplets",
    "SolverStopped",
    "Status",
    "certify",
    "eigenpairs",
    "linearize",
    "singular_triplets",
]
