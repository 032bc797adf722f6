"""Singular triplets of any matrix at both ends: `eigenpairs` of AᵀA or AAᵀ, and the vectors of the other side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fisherop.jacobian import Transposed
from fisherop.operators import JacobianOperator
from fisherop.result import EigenResult
from fisherop.solve import eigenpairs


@dataclass(frozen=True, eq=False, repr=False)
class SingularTriplets:
    """Certified singular triplets (u, σ, v) of A (M × N): A v = σ u and Aᵀu = σ v.

    Attributes
    ----------
    u : ndarray, shape (M, K)
        Orthonormal columns.
    s : ndarray, shape (K,)
        Singular values, descending, float64.
    vh : ndarray, shape (K, N)
        Orthonormal rows.
    index : ndarray of int, shape (K,)
        Which of the min(M, N) singular values each is, from 0 for the largest.
    left_residuals, right_residuals : ndarray, shape (K,)
        ‖A v − σ u‖₂ and ‖Aᵀu − σ v‖₂, by fresh products.
    n_products : float
        Products spent; one is one with A and one with Aᵀ.
    eigen : EigenResult
        The certificate: of AᵀA and the columns v, or, where M < N, of AAᵀ and the columns u.
    """

    u: NDArray[np.floating]
    s: NDArray[np.float64]
    vh: NDArray[np.floating]
    index: NDArray[np.intp]
    left_residuals: NDArray[np.float64]
    right_residuals: NDArray[np.float64]
    n_products: float
    eigen: EigenResult

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        scale = self.eigen.lambda_max_bounds[0] ** 0.5 or 1.0
        (m, n), of = (self.u.shape[0], self.vh.shape[1]), min(self.u.shape[0], self.vh.shape[1])
        lines = [
            f"{len(self.s)} singular triplets of A ({m} × {n}), of {of}, {self.n_products:g} products",
            "",
            f"{'index':>9}  {'σ':>12}  {'‖A v − σ u‖ / σ_max':>20}  {'‖Aᵀu − σ v‖ / σ_max':>20}",
        ]
        for row in zip(self.index, self.s, self.left_residuals / scale, self.right_residuals / scale, strict=True):
            lines.append("{:>9}  {:>12.5e}  {:>20.1e}  {:>20.1e}".format(*row))
        return "\n".join([*lines, "", f"by eigenpairs, where λ = σ²: {self.eigen}"])


def singular_triplets(A: Any, k: int = 1, which: str = "both", **options: Any) -> SingularTriplets:
    """The k largest and the k smallest singular triplets of a matrix, certified.

    They are the eigenpairs of AᵀA and the columns of Q in A V = Q R, by one more product each; where M < N, the
    eigenpairs of AAᵀ and Q in AᵀU = Q R. So both sides are orthonormal, and u is A v / σ where σ is more than rounding.
    If A v is rounding alone, u is an arbitrary direction orthogonal to the others, and not a left singular vector, as
    its residual ‖Aᵀu − σ v‖ shows; the null space of Aᵀ holds one.

    Parameters
    ----------
    A : of shape (M, N)
        A SciPy ``LinearOperator`` with an adjoint, a sparse or dense matrix, a PyLops operator, a dense tensor, a
        `Linearization` or an operator of this library: see `JacobianOperator.of`.
    k, which, **options
        As in `eigenpairs`, for λ = σ². Its `tol` is relative to σ_max²: singular values below √tol · σ_max are null to
        tol, so that ``tol=1e-12`` tells those above 1e-6 σ_max.

    Returns
    -------
    SingularTriplets
        Both sides, their residuals, and the certificate.

    Raises
    ------
    ConvergenceError
        A triplet did not converge, or is shown not to be the extreme one; the error's ``result`` is that of
        `eigenpairs`.
    TypeError, ValueError
        An argument can't be used; the message says what to do.

    References
    ----------
    G. H. Golub and W. Kahan, Calculating the singular values and pseudo-inverse of a matrix, SIAM J. Numer. Anal. 2
    (1965).
    """
    jacobian = JacobianOperator.of(A)
    m, n = jacobian.shape
    narrow = jacobian if m >= n else JacobianOperator.of(Transposed(jacobian.products))
    eigen = eigenpairs(narrow, k, which, **options)
    v = eigen.eigenvectors.astype(np.float64)
    images = narrow.matmat(eigen.eigenvectors).astype(np.float64)
    s = np.sqrt(eigen.eigenvalues)
    u, r = np.linalg.qr(images)
    u = u * np.where(np.diag(r) < 0, -1.0, 1.0)
    left = np.linalg.norm(images - s * u, axis=0)
    right = np.linalg.norm(narrow.rmatmat(u.astype(narrow.dtype)) - s * v, axis=0)
    if m < n:
        u, v, left, right = v, u, right, left
    return SingularTriplets(
        u=u.astype(narrow.dtype),
        s=s,
        vh=v.T.astype(narrow.dtype),
        index=eigen.eigenindex,
        left_residuals=left,
        right_residuals=right,
        n_products=eigen.n_products + len(s),
        eigen=eigen,
    )
