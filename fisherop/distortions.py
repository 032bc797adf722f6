"""What was synthesized, as images, amplitudes and changes of the response."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from fisherop import checks, markup
from fisherop.model.pickles import BuiltAnew
from fisherop.model.slopes import norm
from fisherop.operators import FisherOperator
from fisherop.pictures import figure
from fisherop.progress import progress_bar
from fisherop.result import EigenResult
from fisherop.thresholds import amplitudes_at_threshold, are_bounds, change_along, check_response, linear_until


class Distortions(BuiltAnew):
    """An operator of a model at an image, and the distortions found, whoever found them."""

    def _build(self, image: Tensor, model: Callable[[Tensor], Any], products: dict[str, Any]) -> None:
        self._products = products
        self.operator = FisherOperator(image, model, **self._products)
        self.model = model
        self.result: EigenResult | None = None
        self._state: dict[str, Any] = {}  # of the search, to go on from

    def __repr__(self) -> str:
        found = "not synthesized" if self.result is None else f"{len(self.result.eigenvalues)} eigendistortions"
        return f"<Eigendistortion of {type(self.model).__name__} at an image {tuple(self.image.shape)}: {found}>"

    def _repr_html_(self) -> str:
        """For a notebook: the image with the first and the last distortion, and the certified table."""
        head, result = markup.paragraph(repr(self)[1:-1]), self.result
        if result is None or len(result.eigenvalues) == 0:
            return head + markup.paragraph("Nothing has been found yet: call synthesize().")
        ends = list(dict.fromkeys([0, len(result.eigenvalues) - 1]))
        changes = self.operator.to_tensors(result.eigenvectors[:, ends])
        try:
            shown = figure(self.image, changes, [f"distortion {result.eigenindex[i]}" for i in ends])
        except ValueError as error:  # an image that is no picture
            shown = markup.paragraph(f"No picture: {error}.")
        places = result._some()
        norms = [norm(self.operator.to_tensors(result.eigenvectors[:, [i]])[0].double()) for i in places]
        amplitudes = amplitudes_at_threshold(result)[places]
        rms = amplitudes * norms / self.image.numel() ** 0.5
        more = markup.thresholds(amplitudes.tolist(), rms.tolist(), are_bounds(result)[places].tolist())
        return head + shown + result._html(places, more)

    def compute_jacobian(self, *, progress: bool = True) -> Tensor:
        """The Jacobian (M, N) as a tensor on the image's device; it is kept in `jacobian`.

        Raises
        ------
        ValueError
            It would take more than 2 GiB.
        """
        progress = checks.flag("progress", progress)
        with progress_bar(self.operator, "jacobian", min(self.operator.jacobian.shape) / 2, progress) as (operator, _):
            dense = operator.jacobian.to_dense()
        return torch.tensor(dense, device=self.image.device)

    def detection_thresholds(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """How much of each distortion makes d′ = 1, a change of the response by its noise's standard deviation: 1 / √λ.

        Returns
        -------
        amplitudes, rms : ndarray, shape (K,)
            By what the distortion is multiplied, its norm in the image's units unless there is a metric or a mask of
            soft edge, and the root mean square of that per element of the image. Infinite where λ can't be told from
            zero, below 4 ε² λ_max with ε the `noise` of products; a lower bound, which depends on tol, where the pair
            is null to tol.

        Notes
        -----
        This is what F predicts for small changes. Beyond `linear_range` the response moves by another amount, which
        `response_change` tells.

        Raises
        ------
        ValueError
            Nothing has been synthesized yet.
        """
        result = self._found()
        amplitudes = amplitudes_at_threshold(result)
        norms = self.operator.to_tensors(result.eigenvectors).double().flatten(1).norm(dim=1).cpu().numpy()
        return amplitudes, amplitudes * norms / self.image.numel() ** 0.5

    def response_change(self, index: int, scale: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """How far the response moves when a distortion is added to the image: as F predicts it, and in truth.

        Where the two part, the linear picture ends: F knows the model only near the image, and a large step along the
        least noticeable distortion can move the response more than one along the most noticeable.

        Parameters
        ----------
        index : int
            Position among the distortions found: 0 for the most noticeable, −1 for the least.
        scale : float or array_like
            What the distortion is multiplied with, in the image's units; its sign is the direction.

        Returns
        -------
        predicted, actual : ndarray of the shape of `scale`
            ``√λ · |scale|``, and ‖f(image + scale · distortion) − f(image)‖₂, both in units of the noise at the image.
            The latter is only rounding if it is below the resolution of f in the image's dtype.

        Raises
        ------
        ValueError
            Nothing has been synthesized yet, or the image's dtype can't hold a step of that scale.
        IndexError
            There is no such distortion.
        """
        result = self._found()
        check_response(self.operator)
        index = checks.position("index", index, len(result.eigenvalues), "eigendistortions found")
        scale = checks.array("scale", scale, what="a number, or an array").astype(np.float64)
        largest = np.abs(scale).max(initial=0.0)
        if largest > (torch.finfo(self.image.dtype).max - self.image.abs().max().item()) / 2:
            checks.refuse(ValueError, "scale", f"steps that {self.image.dtype} can hold", float(largest))
        actual = change_along(self.operator, result.eigenvectors[:, index], scale)
        return result.eigenvalues[index] ** 0.5 * np.abs(scale), actual

    def linear_range(self, index: int, deviation: float = 0.1) -> float:
        """How far a distortion may be scaled before the response moves by another amount than F predicts.

        Parameters
        ----------
        index : int
            Position among the distortions found: 0 for the most noticeable, −1 for the least.
        deviation : float
            Relative to what is predicted.

        Returns
        -------
        float
            The smallest scale, of either sign, at which prediction and truth part by that much, to 1 %, as far as
            steps by factors of 2 see it. 0 where they do as soon as the rounding of the response lets it be seen, or
            where λ can't be told from zero; infinity where they don't up to ten times the norm of the image.

        Raises
        ------
        ValueError
            Nothing has been synthesized yet.
        IndexError
            There is no such distortion.
        """
        result = self._found()
        check_response(self.operator)
        index = checks.position("index", index, len(result.eigenvalues), "eigendistortions found")
        what = "a number above 0"
        deviation = checks.number("deviation", deviation, what, lambda deviation: deviation > 0)
        if not np.isfinite(amplitudes_at_threshold(result)[index]):
            return 0.0
        value = float(result.eigenvalues[index])
        return linear_until(self.operator, result.eigenvectors[:, index], value**0.5, deviation)

    def _found(self) -> EigenResult:
        if self.result is None:
            raise ValueError("there are no eigendistortions yet: call synthesize() first")
        return self.result

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
        """Changes of the image, shape (K, ...) where ... is the image's without a leading dimension of 1.

        Of unit Euclidean norm, or, with a metric or a mask of soft edge, of norm 1 in that.
        """
        if self.result is None:
            return None
        distortions = self.operator.to_tensors(self.result.eigenvectors)
        return distortions[:, 0] if self.image.ndim > 1 and self.image.shape[0] == 1 else distortions

    @property
    def eigenvalues(self) -> Tensor | None:
        """Eigenvalues (K,), descending, in float64, which holds what squares of the image's dtype may not."""
        return None if self.result is None else self._on_device(self.result.eigenvalues)

    @property
    def eigenindex(self) -> Tensor | None:
        """Rank (K,) of each among all N: 0 is the most noticeable, N − 1 the least."""
        return None if self.result is None else self._on_device(self.result.eigenindex)

    def _on_device(self, array: np.ndarray) -> Tensor:
        device = "cpu" if self.image.device.type == "mps" else self.image.device  # which has no float64
        return torch.tensor(array, device=device)
