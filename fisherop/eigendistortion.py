"""Eigendistortions: the changes of an image that a model notices most and least."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fisherop.operators import FisherOperator
from fisherop.result import EigenResult
from fisherop.solvers import eigenpairs, progress_bar


class Eigendistortion:
    """The extreme eigenvectors of a model's Fisher information at an image, as images.

    Parameters
    ----------
    image : Tensor, shape ``image_shape``
        One image of N elements, float32 or float64; usually ``(1, channels, height, width)``.
    model : callable or nn.Module
        Maps the image to its response, in evaluation mode; see `linearize` for what is accepted and what is refused.
    engine, chunk_size
        How products are made, and how many at a time; see `linearize`.

    Attributes
    ----------
    operator : FisherOperator, shape (N, N)
    model : callable or nn.Module
    result : EigenResult or None
        The certified pairs, after `synthesize`.

    References
    ----------
    Berardino, Ballé, Laparra and Simoncelli 2017, Eigen-distortions of hierarchical representations, NeurIPS 30.

    Examples
    --------
    >>> ed = Eigendistortion(image, model).synthesize()  # doctest: +SKIP
    >>> print(ed.result)  # doctest: +SKIP
    """

    def __init__(
        self, image: Tensor, model: Callable[[Tensor], Any], *, engine: str = "auto", chunk_size: int | None = None
    ) -> None:
        self.operator = FisherOperator(image, model, engine=engine, chunk_size=chunk_size)
        self.model = model
        self.result: EigenResult | None = None

    def __repr__(self) -> str:
        found = "not synthesized" if self.result is None else f"{len(self.result.eigenvalues)} eigendistortions"
        return f"<Eigendistortion of {type(self.model).__name__} at an image {tuple(self.image.shape)}: {found}>"

    def synthesize(
        self,
        method: str | Callable[..., tuple] = "auto",
        k: int | None = None,
        max_iter: int | None = None,
        p: int | None = None,
        q: int | None = None,
        stop_criterion: float | None = None,
        *,
        which: str | None = None,
        tol: float | None = None,
        rng: int | np.random.Generator | None = None,
        progress: bool = True,
        on_failure: str = "raise",
        **options: Any,
    ) -> Eigendistortion:
        """Find the eigendistortions.

        Parameters
        ----------
        method : str or callable
            The solver, as in `eigenpairs`.
        k : int, optional
            How many at each end; by default 1, and all N with ``method="exact"``.
        max_iter : int, optional
            The solver's own iterations.
        p, q : int, optional
            Oversampling and power iterations of ``"randomized_svd"``.
        which : {"both", "largest", "smallest"}, optional
            The ends; by default both, and the largest with ``"randomized_svd"``, which finds no other.
        tol : float, optional
            As in `eigenpairs`, 1e-6 by default. `stop_criterion` is an older name for it.
        rng, progress, on_failure, **options
            As in `eigenpairs`.

        Returns
        -------
        Eigendistortion
            Itself.

        Raises
        ------
        ConvergenceError
            Not everything converged; the object is unchanged, and what was found is in the error's ``result``.
        """
        if tol is not None and stop_criterion is not None:
            raise ValueError(f"tol={tol:g} and stop_criterion={stop_criterion:g} mean the same: give one of them")
        tolerance = next(t for t in (tol, stop_criterion, 1e-6) if t is not None)
        options |= {name: value for name, value in (("p", p), ("q", q)) if value is not None}
        if k is None:
            k = self.operator.shape[0] if method == "exact" else 1
        if which is None:
            which = "largest" if method == "randomized_svd" else "both"
        self.result = eigenpairs(
            self.operator,
            k,
            which,
            method=method,
            tol=tolerance,
            maxiter=max_iter,
            rng=rng,
            progress=progress,
            on_failure=on_failure,
            **options,
        )
        return self

    def compute_jacobian(self, *, progress: bool = True) -> Tensor:
        """The Jacobian (M, N) as a tensor on the image's device; it is kept in `jacobian`.

        Raises
        ------
        ValueError
            It would take more than 2 GiB.
        """
        jacobian = self.operator.jacobian
        with progress_bar(self.operator, "jacobian", min(jacobian.shape) / 2, progress):
            jacobian.to_dense()
        return self.jacobian

    @property
    def image(self) -> Tensor:
        """The image, shape ``image_shape``."""
        return self.operator.linearization.image

    @property
    def jacobian(self) -> Tensor | None:
        """The Jacobian (M, N), once ``method="exact"`` or `compute_jacobian` has computed it."""
        dense = self.operator.jacobian.dense
        return None if dense is None else torch.tensor(dense, device=self.image.device)

    @property
    def eigendistortions(self) -> Tensor | None:
        """Unit-norm changes of the image, shape (K, ...) where ... is the image's without a leading dimension of 1."""
        if self.result is None:
            return None
        distortions = self.operator.to_tensors(self.result.eigenvectors)
        return distortions[:, 0] if self.image.ndim > 1 and self.image.shape[0] == 1 else distortions

    @property
    def eigenvalues(self) -> Tensor | None:
        """Eigenvalues (K,), descending, in the image's dtype."""
        return None if self.result is None else self._on_device(self.result.eigenvalues).to(self.image.dtype)

    @property
    def eigenindex(self) -> Tensor | None:
        """Rank (K,) of each among all N: 0 is the most noticeable, N − 1 the least."""
        return None if self.result is None else self._on_device(self.result.eigenindex)

    def _on_device(self, array: np.ndarray) -> Tensor:
        return torch.tensor(array, device=self.image.device)
