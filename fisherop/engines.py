"""How products with a Jacobian are made: each engine takes a function of one tensor and the point to differentiate at.

An engine has ``jvp(tangents: (k, *image_shape)) -> (k, M)`` and ``vjp(cotangents: (k, M)) -> (k, *image_shape)``. It is
called without gradients being recorded. Where k = 1, nothing is vectorised.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Functional:
    """Forward-mode for J v, at every product anew; for Jᵀu the backward pass of one forward pass that is kept."""

    def __init__(self, respond: Callable[[Tensor], Tensor], image: Tensor) -> None:
        self._respond = respond
        self._image = image
        _, self._backward = torch.func.vjp(respond, image)

    def jvp(self, tangents: Tensor) -> Tensor:
        return _batched(lambda tangent: torch.func.jvp(self._respond, (self._image,), (tangent,))[1], tangents)

    def vjp(self, cotangents: Tensor) -> Tensor:
        return _batched(lambda cotangent: self._backward(cotangent)[0], cotangents)


class DoubleBackward:
    """For functions that have no forward mode: g(u) = Jᵀu is linear in u, and J v is the gradient of ⟨g(u), v⟩.

    Both graphs, of the function and of g, are built once and kept.
    """

    def __init__(self, respond: Callable[[Tensor], Tensor], image: Tensor) -> None:
        with torch.enable_grad():
            self._image = image.clone().requires_grad_()
            self._response = respond(self._image)
            self._u = torch.zeros_like(self._response, requires_grad=True)
            (self._g,) = torch.autograd.grad(self._response, self._image, self._u, create_graph=True)

    def jvp(self, tangents: Tensor) -> Tensor:
        return _gradients(self._g, self._u, tangents)

    def vjp(self, cotangents: Tensor) -> Tensor:
        return _gradients(self._response, self._image, cotangents)


ENGINES = {"functional": Functional, "double_backward": DoubleBackward}


def _batched(one: Callable[[Tensor], Tensor], block: Tensor) -> Tensor:
    return one(block[0])[None] if len(block) == 1 else torch.func.vmap(one)(block)


def _gradients(output: Tensor, wrt: Tensor, weights: Tensor) -> Tensor:
    if len(weights) == 1:
        return torch.autograd.grad(output, wrt, weights[0], retain_graph=True)[0][None]
    return torch.autograd.grad(output, wrt, weights, retain_graph=True, is_grads_batched=True)[0]
