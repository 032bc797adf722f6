"""What the solvers that search one end at a time share."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator

from fisherop.certificate import ritz_extremes
from fisherop.operators import FisherOperator
from fisherop.result import Answer, SolverStopped


def estimate_norm(operator: FisherOperator, rng: np.random.Generator, steps: int = 1) -> float:
    """‖F‖₂ from below, by some Lanczos steps from a random vector: what a solver needs for a scale, and no more."""
    n = operator.shape[0]
    return ritz_extremes(operator, np.empty((n, 0)), min(n, steps), rng.standard_normal(n))[1]


def each_end(
    which: str,
    n: int,
    search: Callable[[str], NDArray],
    stops: type[Exception] | tuple[type[Exception], ...],
    name: str,
) -> Answer:
    """Search the ends asked for, the largest first.

    Parameters
    ----------
    which : {"both", "largest", "smallest"}
    n : int
        N.
    search : callable
        Takes ``"largest"`` or ``"smallest"``, and gives columns (N, k) by descending eigenvalue.
    stops : type
        What it raises where it does not converge; its ``eigenvectors``, if it has any, are kept.
    name : str
        Of the package that searches.

    Raises
    ------
    SolverStopped
        One of `stops` was raised; it carries what was found.
    """
    found: dict[str, NDArray] = dict.fromkeys(("largest", "smallest"), np.empty((n, 0)))
    for end in found if which == "both" else (which,):
        try:
            found[end] = search(end)
        except stops as error:
            found[end] = getattr(error, "eigenvectors", found[end])
            raise SolverStopped(
                f"{name} at the {end} end: {error}", Answer(found["largest"], found["smallest"])
            ) from error
    return Answer(found["largest"], found["smallest"])


def from_products(shape: tuple[int, int], **products: Callable[[NDArray], NDArray]) -> LinearOperator:
    """SciPy's operator of functions, in float64."""
    return LinearOperator(shape, dtype=np.float64, **products)  # pyright: ignore[reportCallIssue]
