"""How large distortions must be to be noticed, and how far the response moves in truth."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from fisherop.model.slopes import norm
from fisherop.operators import FisherOperator
from fisherop.result import EigenResult


def amplitudes_at_threshold(result: EigenResult) -> NDArray[np.float64]:
    """1 / √λ of each eigenvalue, shape (K,); infinite where λ can't be told from zero."""
    seen = result.eigenvalues > 4 * result.noise**2 * result.lambda_max_bounds[0]
    amplitudes = np.full(len(seen), np.inf)
    amplitudes[seen] = result.eigenvalues[seen] ** -0.5
    return amplitudes


def change_along(operator: FisherOperator, vector: NDArray, scale: ArrayLike) -> NDArray[np.float64]:
    """‖f(image + scale · vector) − f(image)‖₂ for a vector (N,), in the shape of `scale`."""
    lin, scale = operator.linearization, np.asarray(scale, dtype=np.float64)
    direction = operator.to_tensors(vector[:, None])[0]
    before = lin.response.flatten().double()
    change = [_size(lin.respond(lin.image + step * direction).double() - before) for step in scale.flatten().tolist()]
    return np.reshape(change, scale.shape)


def _size(change: Tensor) -> float:
    """Its norm, also where squares would leave float64's range; infinite or NaN where the response is."""
    peak = change.abs().max()
    return norm(change) if peak.isfinite() else peak.item()
