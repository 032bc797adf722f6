"""How large distortions must be to be noticed, and how far the response moves in truth."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from fisherop.model.slopes import norm
from fisherop.operators import FisherOperator
from fisherop.result import EigenResult, Status


def amplitudes_at_threshold(result: EigenResult) -> NDArray[np.float64]:
    """1 / √λ of each eigenvalue, shape (K,); infinite where λ can't be told from zero."""
    seen = result.eigenvalues > 4 * result.noise**2 * result.lambda_max_bounds[0]
    amplitudes = np.full(len(seen), np.inf)
    amplitudes[seen] = result.eigenvalues[seen] ** -0.5
    return amplitudes


def are_bounds(result: EigenResult) -> NDArray[np.bool_]:
    """Whether each threshold is a lower bound, shape (K,): of a pair that is null to tol."""
    return result.status == Status.NULL


def change_along(operator: FisherOperator, vector: NDArray, scale: ArrayLike) -> NDArray[np.float64]:
    """‖f(image + scale · vector) − f(image)‖₂ for a vector (N,), in units of the noise, in the shape of `scale`."""
    lin, scale = operator.linearization, np.asarray(scale, dtype=np.float64)
    direction = operator.to_tensors(vector[:, None])[0]
    before = lin.response.flatten().double()
    changes = (lin.respond(lin.image + step * direction).double() - before for step in scale.flatten().tolist())
    if "noise" in operator.observed:
        changes = (operator.products.to_noise(change[None].to(lin.response.dtype))[0].double() for change in changes)
    change = [_size(one) for one in changes]
    return np.reshape(change, scale.shape)


def check_response(operator: FisherOperator) -> None:
    """Raise RuntimeError where the model's response to the image is no longer the one that products belong to."""
    lin = operator.linearization
    lin.check_current()
    before = lin.response.flatten().double()
    change = _size(lin.respond(lin.image).double() - before)
    if not change <= torch.finfo(lin.image.dtype).eps ** 0.5 * _size(before):
        raise RuntimeError(
            f"the model has changed since the distortions were found: its response to the image is {change:.3g} from "
            "what it was; make a new Eigendistortion"
        )


def _size(change: Tensor) -> float:
    """Its norm, also where squares would leave float64's range; infinite or NaN where the response is."""
    peak = change.abs().max()
    return norm(change) if peak.isfinite() else peak.item()


def linear_until(operator: FisherOperator, vector: NDArray, slope: float, deviation: float) -> float:
    """The smallest scale of a vector, of either sign, at which the change of the response is not slope · |scale|."""
    lin = operator.linearization
    images = operator.to_tensors(vector[:, None]).double()
    n, size = lin.image.numel(), float(torch.linalg.vector_norm(images))
    most = 10 * max(float(torch.linalg.vector_norm(lin.image.double())), n**0.5) / size
    response = operator.products.to_noise(lin.response.reshape(1, -1)).double()
    rounding = torch.finfo(lin.image.dtype).eps * (float(torch.linalg.vector_norm(response)) + slope * most / 10)

    def parts(scale: float) -> bool:
        changes = change_along(operator, vector, [scale, -scale])
        return not bool((np.abs(changes - slope * scale) <= deviation * slope * scale).all())

    low = min(10 * rounding / (deviation * slope), most)
    if parts(low):
        return 0.0
    high = 2 * low
    while not parts(high):
        low, high = high, 2 * high
        if low > most:
            return np.inf
    while high > 1.01 * low:
        middle = (low * high) ** 0.5
        low, high = (low, middle) if parts(middle) else (middle, high)
    return high
