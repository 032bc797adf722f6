"""How products with a Jacobian are made: each engine takes a function of one tensor and the point to differentiate at.

An engine has ``jvp(tangents: (k, *image_shape)) -> (k, M)`` and ``vjp(cotangents: (k, M)) -> (k, *image_shape)``. It is
called without gradients being recorded. Where k = 1, nothing is vectorised.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fisherop.rewrite import lower, simplify
from fisherop.tape import IMAGE, LINEAR, STATIC, NotLinear, Tape, compile_nodes, needed


class Traced:
    """Both products as programs: the operations of one J v and one Jᵀu, without what depends on the image alone.

    That part is computed once per image and kept as constants.

    Attributes
    ----------
    response : Tensor or None
        The response to the image by a program that an earlier image left behind; None where it was made here.
    """

    def __init__(self, respond: Callable[[Tensor], Tensor], image: Tensor, *, model: Any = None) -> None:
        known = _PROGRAMS.get(model) if isinstance(model, nn.Module) else None
        key = _fingerprint(model, image) if isinstance(model, nn.Module) else None
        if known is not None and known[0] == key:
            self._program = known[1]
            self.response, *self._constants = self._program.prepare(image)
        else:
            self.response = None
            self._program, self._constants = _trace(respond, image)
            if key is not None and not self._program.reads_image:
                _PROGRAMS[model] = key, self._program
            elif isinstance(model, nn.Module):
                _PROGRAMS.pop(model, None)

    def jvp(self, tangents: Tensor) -> Tensor:
        return self._program.product("jvp", self._constants, tangents)

    def vjp(self, cotangents: Tensor) -> Tensor:
        return self._program.product("vjp", self._constants, cotangents)

    @property
    def held(self) -> list[Tensor]:
        return [*self._constants, *self._program.statics]


class _Program:
    """What tracing leaves behind: of a model, for images of one shape and dtype.

    ``prepare(image)`` gives the response, flat, and the constants; ``single["jvp"](v, *constants)`` is a tuple of J v.
    """

    def __init__(self, prepare: Callable, single: dict[str, Callable], statics: list[Tensor], reads_image: bool) -> None:
        self.prepare = prepare
        self.single = single
        self.statics = statics
        self.reads_image = reads_image
        self._blocks: dict[tuple[str, int], Callable] = {}

    def product(self, direction: str, constants: list[Tensor], block: Tensor) -> Tensor:
        """J v or Jᵀu of a block; the program of each block size is made when it first comes."""
        key = direction, len(block)
        if key not in self._blocks:
            self._blocks[key] = self._vectorised(self.single[direction], constants, block)
        return self._blocks[key](block, *constants)[0]

    @staticmethod
    def _vectorised(single: Callable, constants: list[Tensor], block: Tensor) -> Callable:
        tape = Tape()
        inputs = [tape.input(block, LINEAR), *(tape.input(c, IMAGE) for c in constants)]
        out = lower(tape, tape.record(lambda: _batched(lambda one: single(one, *constants)[0], block)))
        return compile_nodes(needed([out], above=STATIC), inputs, [out])


_PROGRAMS: weakref.WeakKeyDictionary[nn.Module, tuple[Hashable, _Program]] = weakref.WeakKeyDictionary()


def _trace(respond: Callable[[Tensor], Tensor], image: Tensor) -> tuple[_Program, list[Tensor]]:
    tape = Tape()
    x = tape.input(image, IMAGE)
    ones = torch.ones_like(image)
    v = tape.input(ones, LINEAR)
    # the image is an argument of what is functionalised, so that nothing computed from it is changed in place
    answer, forward = tape.record(
        lambda: torch.func.functionalize(lambda x, v: torch.func.jvp(respond, (x,), (v,)))(image, ones)
    )
    weights = torch.ones_like(answer.value)
    u = tape.input(weights, LINEAR)
    (backward,) = tape.record(
        lambda: torch.func.functionalize(lambda x, u: torch.func.vjp(respond, x)[1](u))(image, weights)
    )
    if forward.level != LINEAR or backward.level != LINEAR:
        raise NotLinear("the derivative recorded does not depend on the direction")
    outputs = {"jvp": (simplify(tape, forward), v), "vjp": (simplify(tape, backward), u)}
    nodes = {direction: needed([out], above=IMAGE) for direction, (out, _) in outputs.items()}
    parents = {p.index: p for node in itertools.chain(*nodes.values()) for p in node.parents}
    constants = [p for p in parents.values() if p.level == IMAGE]
    prepare = compile_nodes(needed([answer, *constants], above=STATIC), [x], [answer, *constants])
    single = {
        direction: compile_nodes(nodes[direction], [vector, *constants], [out])
        for direction, (out, vector) in outputs.items()
    }
    statics = [p.value for p in parents.values() if p.level == STATIC]
    return _Program(prepare, single, statics, tape.reads_image), [c.value for c in constants]


def _fingerprint(model: nn.Module, image: Tensor) -> Hashable:
    """What a program depends on beside the image's values: tensors, by their place and version, and plain attributes."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    plain = (bool, int, float, str, type(None), tuple, torch.dtype, torch.Size)
    return (
        image.shape,
        image.dtype,
        image.device,
        tuple((id(t), t.data_ptr(), t._version, t.shape) for t in tensors),
        tuple(
            (id(module), repr(sorted((k, a) for k, a in vars(module).items() if isinstance(a, plain))))
            for module in model.modules()
        ),
        torch.get_default_dtype(),
    )


def bytes_of(tensors: Iterable[Tensor], besides: Iterable[Tensor] = ()) -> int:
    """The memory that tensors take, each storage once, without those of `besides`."""
    theirs = {t.untyped_storage().data_ptr() for t in besides}
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(size for place, size in storages.items() if place not in theirs)


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


ENGINES = {"traced": Traced, "functional": Functional, "double_backward": DoubleBackward}


def _batched(one: Callable[[Tensor], Tensor], block: Tensor) -> Tensor:
    return one(block[0])[None] if len(block) == 1 else torch.func.vmap(one)(block)


def _gradients(output: Tensor, wrt: Tensor, weights: Tensor) -> Tensor:
    if len(weights) == 1:
        return torch.autograd.grad(output, wrt, weights[0], retain_graph=True)[0][None]
    return torch.autograd.grad(output, wrt, weights, retain_graph=True, is_grads_batched=True)[0]
