"""Extreme eigenvectors of the Fisher information of any PyTorch model at an image, with certificates.

For vision scientists: ``ed = Eigendistortion(image, model).synthesize()`` finds the changes of an image that a model
notices most and least; ``print(ed.result)`` shows the certificate, and ``fisherop.plot.eigendistortions(ed)`` a figure.

For users of SciPy: `JacobianOperator` and `FisherOperator` are SciPy's ``LinearOperator``s, of a model at an
image or, by their method ``of``, of any matrix. `eigenpairs` finds both ends of F's spectrum, `singular_triplets` those
of any matrix, and `certify` judges vectors that another solver found.

`principal_distortions` finds the changes that tell two models, or several, apart best. `spectral_density` estimates how
all eigenvalues are spread. `sweep` does many images, layers and models, here or on a cluster.

Modules: `fisherop.noise` and `fisherop.spaces` (noise of the response, subspaces of the image), `fisherop.models` (of
early vision), `fisherop.plot` (figures), `fisherop.stimuli` (pictures for an experiment), `fisherop.images`
(photographs and test images), `fisherop.testing` (for your own tests), `fisherop.plenoptic` (the names of plenoptic),
`fisherop.jacobian` (the protocol behind the operators) and `fisherop.combinators` (Jacobians made of others). They are
loaded when they are first used.
"""

import importlib
from typing import Any

from fisherop.certificate import certify
from fisherop.density import SpectralDensity
from fisherop.eigendistortion import Eigendistortion
from fisherop.model.layers import LayerResponse
from fisherop.model.linearize import Linearization, linearize
from fisherop.operators import FisherOperator, JacobianOperator
from fisherop.principal import PrincipalDistortions, principal_distortions
from fisherop.result import Answer, ConvergenceError, EigenResult, SolverStopped, Status
from fisherop.several_models import PrincipalPair, principal_pair
from fisherop.solve import eigenpairs
from fisherop.spectrum import spectral_density
from fisherop.sweeps import Record, SweepError, SweepResult, sweep
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
    "PrincipalDistortions",
    "PrincipalPair",
    "Record",
    "SingularTriplets",
    "SolverStopped",
    "SpectralDensity",
    "Status",
    "SweepError",
    "SweepResult",
    "certify",
    "eigenpairs",
    "linearize",
    "principal_distortions",
    "principal_pair",
    "singular_triplets",
    "spectral_density",
    "sweep",
]
_MODULES = ("combinators", "images", "jacobian", "models", "noise", "plenoptic", "plot", "spaces", "stimuli", "testing")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"fisherop.{name}")
    raise AttributeError(f"module 'fisherop' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
