"""Models that stop at a named layer."""

from __future__ import annotations

import difflib
import threading
from typing import Any

from torch import nn

from fisherop import checks


class _Reached(Exception):
    """Carries a layer's output out of the forward pass that it ends."""

    def __init__(self, output: Any) -> None:
        self.output = output


class LayerResponse(nn.Module):
    """The response of a named submodule; nothing beyond it runs.

    Parameters
    ----------
    model : nn.Module
        The whole.
    layer : str
        The submodule's name in ``model.named_modules()``, like ``"layer2.0"``.
    call : int
        Which of its calls in a forward pass is meant, where there are several: 0 for the first.

    Raises
    ------
    ValueError
        The model has no such layer (the message lists the nearest names), or `call` is negative.
    RuntimeError
        In the forward pass: the layer is not called that often.

    Notes
    -----
    The layer's output passes through as it is, tuples included. Between calls the model carries no hook.
    """

    def __init__(self, model: nn.Module, layer: str, *, call: int = 0) -> None:
        super().__init__()
        checks.instance("model", model, nn.Module, "an nn.Module")
        names = [name for name, _ in model.named_modules() if name]
        if checks.instance("layer", layer, str, "the name of a submodule, a str") not in names:
            near = difflib.get_close_matches(layer, names, n=5, cutoff=0.3) or names[:5]
            raise ValueError(
                f"{type(model).__name__} has no layer {layer!r}; the nearest are {', '.join(map(repr, near)) or 'none'}"
                "; all are in dict(model.named_modules())"
            )
        self.model = model
        self.layer = layer
        self.call = checks.integer("call", call, 0)
        self.training = model.training  # of this wrapper alone: train() would reach into the model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's output, whatever the model takes."""
        calls = 0
        thread = threading.get_ident()

        def stop(module: nn.Module, inputs: Any, output: Any) -> None:
            nonlocal calls
            if threading.get_ident() == thread:  # other threads may be using the same model
                calls += 1
                if calls > self.call:
                    raise _Reached(output)

        hook = self.model.get_submodule(self.layer).register_forward_hook(stop)
        try:
            self.model(*args, **kwargs)
        except _Reached as reached:
            return reached.output
        finally:
            hook.remove()
        raise RuntimeError(
            f"layer {self.layer!r} was called {calls} times in the forward pass, so that call={self.call} never came"
        )

    def extra_repr(self) -> str:
        return f"layer={self.layer!r}, call={self.call}"
