"""The pair of vectors as in `several`, where each element of both has limits: on the sphere, within a box."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fisherop.krylov.orthogonalize import inner
from fisherop.krylov.pencil import Side
from fisherop.krylov.several import Contrast, Pair, rounding

_MEMORY = 10  # values that a step may be below the least of


class Box(NamedTuple):
    """Unit vectors whose elements lie between `low` and `high`, both (N,) and in float64; zero lies within."""

    low: Tensor
    high: Tensor

    @property
    def reach(self) -> float:
        """The norm of the corner that is farthest."""
        return float(torch.linalg.vector_norm(torch.maximum(self.high, -self.low)))

    def project(self, rows: Tensor) -> Tensor:
        """The nearest unit vectors within: what is left of t · row, t such that its norm is 1.

        By Lagrange: for a multiplier μ of the norm, the nearest point has the elements of row / (1 + μ), clipped.
        Shorter where no unit vector within has the signs of the row.
        """
        return torch.stack([self._nearest(row) for row in rows.double()]).to(rows.dtype)

    def _nearest(self, row: Tensor) -> Tensor:
        low, high = 0.0, 1.0 / float(torch.linalg.vector_norm(row))
        while torch.linalg.vector_norm(self._clipped(row, high)) < 1:
            low, high = high, 4 * high
            if high > 1e12:
                return self._clipped(row, high)
        for _ in range(60):
            middle = (low + high) / 2
            is_short = bool(torch.linalg.vector_norm(self._clipped(row, middle)) < 1)
            low, high = (middle, high) if is_short else (low, middle)
        return self._clipped(row, low)

    def gradient_left(self, rows: Tensor, gradients: Tensor) -> float:
        """The norm of what the box and the sphere leave of gradients: by a short step, since the sphere is curved."""
        step = 1e-2 / max(float(torch.linalg.vector_norm(gradients.double())), 1e-300)
        moved = self.project(rows.double() + step * gradients.double()) - rows.double()
        return float(torch.linalg.vector_norm(moved)) / step

    def _clipped(self, row: Tensor, t: float) -> Tensor:
        return torch.minimum(torch.maximum(t * row, self.low), self.high)


def maximize_within(
    sides: Sequence[Side],
    start: Pair,
    box: Box,
    tol: float,
    maxiter: int,
    on_step: Callable[[dict[str, Any]], None],
) -> Pair:
    """From the pair without limits, until what the box leaves of the gradient is at most tol · f.

    E. G. Birgin, J. M. Martínez and M. Raydan, Nonmonotone spectral projected gradient methods on convex sets, SIAM J.
    Optim. 10 (2000), algorithm SPG1; the set isn't convex here, but the projection is exact.
    """

    def measured(rows: Tensor) -> tuple[float, Tensor]:
        products = torch.stack([side.times(rows) for side in sides])
        found = Contrast.of(*np.array([np.diag(inner(rows, one)) for one in products]).T)
        weights = torch.as_tensor(np.stack([found.of_a, found.of_b]), dtype=rows.dtype, device=rows.device)
        gradients = torch.einsum("in,nik->ik", weights, products)
        return found.value, gradients

    signed = [box.project(sign * start.rows) for sign in (1, -1)]  # f is the same for both, the box is not
    starts = [torch.stack([a, b]) for a in (one[0] for one in signed) for b in (one[1] for one in signed)]
    fitting = [(*measured(rows), rows) for rows in starts if _norm(rows) > 0.999]
    if not fitting:
        raise ValueError("no unit vector like the best pair lies within the box: take a smaller scale")
    value, gradients, rows = max(fitting, key=lambda one: one[0])
    values, step = [value], 1.0 / max(float(torch.linalg.vector_norm(gradients)), 1e-300)
    for _ in range(maxiter):
        pair = Pair(rows, value, box.gradient_left(rows, gradients))
        on_step({"n_products": [side.n_products for side in sides], "value": value, "gradient": pair.gradient})
        if pair.has_converged(tol, rounding(sides)):
            break
        while True:
            new = box.project(rows + step * gradients)
            if _norm(new) < 0.999 and step > 1e-12:
                step /= 4
                continue
            gain = float(((new - rows) * gradients).double().sum())
            new_value, new_gradients = measured(new)
            if new_value >= min(values[-_MEMORY:]) + 1e-4 * gain or step < 1e-12:
                break
            step /= 4
        moved, turned = (new - rows).double(), (gradients - new_gradients).double()
        curvature = float((moved * turned).sum())
        step = float((moved**2).sum()) / curvature if curvature > 0 else 10 * step
        step = min(max(step, 1e-10), 1e10)
        rows, value, gradients = new, new_value, new_gradients
        values.append(value)
    return pair


def _norm(rows: Tensor) -> float:
    """The smallest of them."""
    return float(torch.linalg.vector_norm(rows.double(), dim=1).min())
