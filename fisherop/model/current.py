"""Whether a model is still the one that was linearized, and whose products these are where it isn't."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fisherop.checks import warn
from fisherop.model.compat import clean_failure
from fisherop.model.contents import Contents
from fisherop.model.guard import Guard
from fisherop.model.response import Response, check_mode
from fisherop.model.slopes import norm
from fisherop.model.trial import ROUNDINGS, Trial
from fisherop.model.undisturbed import alone

_LOG = logging.getLogger(__name__)


class Current:
    """Looks at a model before products with it.

    A product of the traced engine reads some tensors of the model as they are and has computed with others before; one
    by dual numbers runs the model as it is, and Jᵀu the graph of the model as it was. So after a change they may be of
    neither model. Which it is, is not derived but seen: by the two products that were tried first, once more.

    Parameters
    ----------
    contents : Contents
        Of the model when it was linearized.
    trial : Trial
        The products tried, by `engine`.
    image, response : Tensor
    """

    def __init__(
        self, respond: Response, contents: Contents, engine: Any, trial: Trial, image: Tensor, response: Tensor
    ) -> None:
        self._respond, self._contents, self._engine = respond, contents, engine
        self._trial, self._image, self._response = trial, image, response
        self._stale: str | None = None

    def check(self, *, thoroughly: bool = False) -> None:
        """Look at the identity, the place and the version of tensors, or at everything that `Contents` reaches.

        Raises
        ------
        RuntimeError
            The model has changed, and products may be neither of the model as it was nor of the model as it is.

        Warns
        -----
        RuntimeWarning
            The model has changed, and products are still of the model as it was; once for each change.
        """
        if thoroughly or self._contents.moved():
            alone(self._look_again, self._image.device, lambda: self._respond.draws)
        if self._stale is not None:
            raise RuntimeError(self._stale)

    def _look_again(self, last: list[Callable]) -> None:
        contents = Contents(self._respond.model)
        changed = contents.changes(self._contents)
        if not changed:
            self._contents = contents
            return
        last.append(Guard(self._respond.model, values=True).restore)
        trains = ""
        try:
            check_mode(self._respond.model)
        except ValueError as error:  # it isn't called, which would change it further
            trains = f": {error}"
        names = ", ".join(changed[:3]) + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")
        what = f"the model has changed since it was linearized (in {names}{trains})"
        stale = warning = None
        with torch.inference_mode(False), torch.no_grad():
            if (trains and self._engine.calls_model) or not self._agrees(
                self._multiplied, self._trial.jv, self._trial.jtu
            ):
                stale = (
                    f"{what}, so that products by the {type(self._engine).__name__} engine may be neither of the "
                    "model as it was nor of the model as it is: linearize it again"
                )
            elif trains or not self._agrees(self._differentiated, self._response.flatten(), self._trial.jv[0]):
                warning = (
                    f"{what}; products are still of the model as it was: linearize it again for those of the model as "
                    "it is"
                )
        self._contents, self._stale = contents, stale
        if warning is not None:
            warn(warning)

    def _multiplied(self) -> tuple[Tensor, Tensor]:
        return self._engine.jvp(self._trial.v), self._engine.vjp(self._trial.u)

    def _differentiated(self) -> tuple[Tensor, Tensor]:
        slope = self._engine.slope(self._respond, self._image, self._trial.v[0])
        return self._respond(self._image), slope

    def _agrees(self, compute: Callable[[], tuple[Tensor, Tensor]], *expected: Tensor) -> bool:
        """Whether these are what they were, but for rounding; not where computing them fails."""
        error = self._trial.error if math.isfinite(self._trial.error) else 0.0
        allowed = ROUNDINGS * max(torch.finfo(self._image.dtype).eps, error)
        try:
            with clean_failure():
                found = compute()
                return all(
                    norm(a.flatten() - b.flatten()) <= allowed * norm(b) for a, b in zip(found, expected, strict=True)
                )
        except Exception as error:  # whatever a changed model raises, and PyTorch where tensors of a graph have changed
            _LOG.info("with the model as it is: %s", error)
            return False
