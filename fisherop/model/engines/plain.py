"""Products by PyTorch's own derivatives: dual numbers, the backward pass, and the backward pass of that."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fisherop.model.duals import Duals

_BLOCK_BYTES = 2**30  # that a block of products may compute on its way, by default
_MAX_CHUNK = 64


class _Plain:
    """What its two engines share: see `fisherop.model.engines`."""

    is_recorded = calls_model = False
    program = reference = None

    @staticmethod
    def chunk_size(bytes_: int) -> int:
        return max(1, min(_MAX_CHUNK, _BLOCK_BYTES // max(1, bytes_)))

    @staticmethod
    def slope(respond: Callable[[Tensor], Tensor], x: Tensor, v: Tensor) -> Tensor:
        return slope(respond, x, v)


class Functional(_Plain):
    """Dual numbers for J v, at every product anew; for Jᵀu the backward pass of one forward pass that is kept."""

    name = "functional"
    calls_model = True

    def __init__(
        self, respond: Callable[[Tensor], Tensor], image: Tensor, response: Tensor, v: Tensor | None = None
    ) -> None:
        self._respond = respond
        self._image = image
        self._graph = with_graph(respond, image)

    def jvp(self, tangents: Tensor) -> Tensor:
        if len(tangents) == 1:
            return forward_mode(self._respond, self._image, tangents[0])[1][None]
        images = self._image.expand(tangents.shape).contiguous()  # vmap has no rule for making dual numbers
        return forward_mode(torch.func.vmap(self._respond), images, tangents)[1]

    def vjp(self, cotangents: Tensor) -> Tensor:
        return _gradients(*self._graph, cotangents)


class DoubleBackward(_Plain):
    """For functions that have no forward mode: g(u) = Jᵀu is linear in u, and J v is the gradient of ⟨g(u), v⟩.

    Both graphs, of the function and of g, are built once and kept.
    """

    name = "double_backward"

    @staticmethod
    def slope(respond: Callable[[Tensor], Tensor], x: Tensor, v: Tensor) -> Tensor:
        """J v at x, flat, by differentiating the backward pass."""
        return DoubleBackward(respond, x, respond(x)).jvp(v[None])[0]

    def __init__(
        self, respond: Callable[[Tensor], Tensor], image: Tensor, response: Tensor, v: Tensor | None = None
    ) -> None:
        self._graph = with_graph(respond, image)
        with torch.enable_grad():
            self._u = torch.zeros_like(self._graph[0], requires_grad=True)
            (self._g,) = torch.autograd.grad(*self._graph, self._u, create_graph=True)

    def jvp(self, tangents: Tensor) -> Tensor:
        return _gradients(self._g, self._u, tangents)

    def vjp(self, cotangents: Tensor) -> Tensor:
        return _gradients(*self._graph, cotangents)


def forward_mode(respond: Callable[[Tensor], Tensor], image: Tensor, tangent: Tensor) -> tuple[Tensor, Tensor]:
    """The response and J v, flat, by PyTorch's dual numbers."""
    with forward_ad.dual_level(), Duals():
        response, jv = forward_ad.unpack_dual(respond(forward_ad.make_dual(image, tangent)))
    return response, torch.zeros_like(response) if jv is None else jv


def with_graph(respond: Callable[[Tensor], Tensor], image: Tensor) -> tuple[Tensor, Tensor]:
    """The response with the graph of its computation, and the image that this starts from."""
    with torch.enable_grad():
        start = image.detach().requires_grad_()
        response = respond(start)
    if not response.requires_grad:
        raise RuntimeError("the response has no gradient")
    return response, start


def slope(respond: Callable[[Tensor], Tensor], x: Tensor, v: Tensor) -> Tensor:
    """J v at x, flat, by dual numbers."""
    return forward_mode(respond, x, v)[1]


def _gradients(output: Tensor, wrt: Tensor, weights: Tensor) -> Tensor:
    if len(weights) == 1:
        return torch.autograd.grad(output, wrt, weights[0], retain_graph=True)[0][None]
    return torch.autograd.grad(output, wrt, weights, retain_graph=True, is_grads_batched=True)[0]
