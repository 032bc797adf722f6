"""What two random vectors tell of J: how large it is, and how exact its products are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fisherop.jacobian import POSSIBLE, check_size, comfortable_exponent
from fisherop.operators import scaled


@dataclass(frozen=True, eq=False)
class Sample:
    """J times two random unit vectors x and y: how large J is, and how exact its products are.

    Attributes
    ----------
    start : ndarray, shape (N,)
        A third random vector, standard normal, for who looks further.
    x, y : ndarray, shape (N,)
        Unit vectors in the operator's dtype.
    j_x, j_y : ndarray of float64, shape (M,)
        J x and J y.
    size : float
        The larger of their norms, which is at most ‖J‖₂ and about ‖J‖_F / √N. It is 0 only where J is zero.
    exponent : int
        That of the `Scaled` Jacobian with which F can be computed: 0 where it can with J itself.
    """

    start: NDArray[np.float64]
    x: NDArray[np.floating]
    y: NDArray[np.floating]
    j_x: NDArray[np.float64]
    j_y: NDArray[np.float64]
    size: float
    exponent: int

    @classmethod
    def of(cls, operator: Any, rng: np.random.Generator) -> Sample:
        """By one product with a `FisherOperator`'s J and one more; a zero is held against underflow by another.

        Raises
        ------
        OverflowError, FloatingPointError
            J is so large or so small that its products leave what the dtype can hold.
        """
        jacobian = operator.jacobian
        dtype = jacobian.dtype.name
        start = rng.standard_normal(jacobian.shape[1])
        xy = rng.standard_normal((jacobian.shape[1], 2))
        x, y = (xy / np.linalg.norm(xy, axis=0)).astype(jacobian.dtype).T
        # singly: a block is prepared for its size when it first comes, which takes longer than these products
        j_x, j_y = (jacobian.matvec(z).astype(np.float64) for z in (x, y))
        size = max(_norm(j_x), _norm(j_y))
        if size == 0:
            most = POSSIBLE[dtype]
            size = _norm(scaled(operator, most).jacobian.matvec(x).astype(np.float64)) * 2.0**-most
        check_size(size, dtype)
        return cls(start, x, y, j_x, j_y, size, comfortable_exponent(size, dtype))

    def noise(self, jacobian: Any, leading: NDArray, j_leading: NDArray, sigma_max: float) -> float:
        """ε = ‖J(x + y) − J x − J y‖ / σ_max, the largest of that for x and for the leading vector in its place.

        At least the linearization's `mismatch` of J v and Jᵀu, which steps in lower precision leave.

        Parameters
        ----------
        jacobian : JacobianOperator, shape (M, N)
            Of 2ᵉ J, e the sample's `exponent`.
        leading, j_leading : ndarray, shapes (N, 1) and (M, 1)
            A vector and its product, or none, of shapes (N, 0) and (M, 0).
        sigma_max : float
            The largest singular value of 2ᵉ J that is known.
        """
        if sigma_max == 0:
            return 0.0
        j_sums = [jacobian.matvec(z).astype(np.float64) for z in (self.x + self.y, *(leading.T + self.y))]
        j_x, j_y = (2.0**self.exponent * z for z in (self.j_x, self.j_y))
        errors = np.linalg.norm(j_sums - np.vstack([j_x, j_leading.T]) - j_y, axis=1)
        return max(float(errors.max() / sigma_max), jacobian.products.mismatch)


def _norm(x: NDArray[np.float64]) -> float:
    """Without squares of what is very large or small."""
    peak = float(np.abs(x).max(initial=0.0))
    return peak * float(np.linalg.norm(x / peak)) if peak else 0.0
