"""Singular triplets of any matrix at both ends: `eigenpairs` of AᵀA or AAᵀ, and the vectors of the other side."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fisherop import checks
from fisherop.from_operator import as_jacobian
from fisherop.jacobian import Transposed
from fisherop.operators import FisherOperator, JacobianOperator
from fisherop.result import EigenResult
from fisherop.solve import eigenpairs


@dataclass(frozen=True, eq=False, repr=False)
class SingularTriplets:
    """Certified singular triplets (u, σ, v) of A (M × N): A v = σ u and Aᵀu = σ v. It unpacks as ``u, s, vh``.

    Where `status` is "null to tol", σ may be much smaller in truth, and of the pair the vector with the large residual
    is no singular vector: u, or, if M < N, v.

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
        The certificate: of AᵀA and the columns v, or, if M < N, of AAᵀ and the columns u.
    """

    u: NDArray[np.floating]
    s: NDArray[np.float64]
    vh: NDArray[np.floating]
    index: NDArray[np.intp]
    left_residuals: NDArray[np.float64]
    right_residuals: NDArray[np.float64]
    n_products: float
    eigen: EigenResult

    def __post_init__(self) -> None:
        for array in (self.u, self.s, self.vh, self.index, self.left_residuals, self.right_residuals):
            array.flags.writeable = False

    def __iter__(self) -> Iterator[NDArray[np.floating]]:
        return iter((self.u, self.s, self.vh))

    @property
    def status(self) -> NDArray[np.object_]:
        """What is known of each, shape (K,): the `Status` of its eigenpair."""
        return self.eigen.status

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        scale = self.eigen.lambda_max_bounds[0] ** 0.5 or 1.0
        (m, n), of = (self.u.shape[0], self.vh.shape[1]), min(self.u.shape[0], self.vh.shape[1])
        lines = [
            f"{len(self.s)} singular triplets of A ({m} × {n}), of {of}, {self.n_products:g} products",
            "",
            f"{'index':>9}  {'σ':>12}  {'‖A v − σ u‖ / σ_max':>20}  {'‖Aᵀu − σ v‖ / σ_max':>20}  status",
        ]
        residuals = self.left_residuals / scale, self.right_residuals / scale
        for row in zip(self.index, self.s, *residuals, self.status, strict=True):
            lines.append("{:>9}  {:>12.5e}  {:>20.1e}  {:>20.1e}  {}".format(*row))
        by = (
            "by eigenpairs of AᵀA, where λ = σ² and J is A"
            if m >= n
            else "by eigenpairs of AAᵀ, where λ = σ² and J is Aᵀ"
        )
        return "\n".join([*lines, "", f"{by}: {self.eigen}"])


def singular_triplets(A: Any, k: int = 1, which: str = "both", **options: Any) -> SingularTriplets:
    """The k largest and the k smallest singular triplets of a matrix, certified.

    They are the eigenpairs of AᵀA and the columns of Q in A V = Q R, by one more product each; if M < N, the
    eigenpairs of AAᵀ and Q in AᵀU = Q R. So both sides are orthonormal. Where a pair is null to tol, σ = ‖A v‖ is only
    known to be at most √tol · σ_max, and the vector of the other side is an arbitrary one, as its residual shows.

    Parameters
    ----------
    A : of shape (M, N)
        A SciPy ``LinearOperator`` with an adjoint, a sparse or dense matrix, a PyLops operator, a dense tensor, a
        `Linearization` or a `JacobianOperator`: see `JacobianOperator.of`.
    k, which, **options
        As in `eigenpairs`, for λ = σ². Its `tol` is relative to σ_max²: singular values below √tol · σ_max are null to
        tol, so that the default of 1e-6 tells those above 1e-3 σ_max, and ``tol=1e-12`` those above 1e-6 σ_max. An
        eigenpair's σ is right to within tol σ_max² / σ. `v0` and `orthogonal_to` are vectors of the shorter side: v
        if M ≥ N, else u. A search goes on with `state` if `A` is the same object as before.

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
    if isinstance(A, FisherOperator):
        checks.refuse(TypeError, "A", "a matrix, or the operator of J", A, "its eigenpairs are found by eigenpairs()")
    jacobian = JacobianOperator.of(A)
    m, n = jacobian.shape
    narrow = jacobian
    if m < n:
        narrow, against = JacobianOperator.of(Transposed(jacobian.products)), options.get("against")
        if against is not None and not isinstance(against, torch.dtype):
            options["against"] = JacobianOperator.of(Transposed(as_jacobian(against)))
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
        s=s.copy(),
        vh=v.T.astype(narrow.dtype),
        index=eigen.eigenindex.copy(),
        left_residuals=left,
        right_residuals=right,
        n_products=eigen.n_products + len(s),
        eigen=eigen,
    )
