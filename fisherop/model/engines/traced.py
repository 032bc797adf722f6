"""The products of one recording of a model, without what depends on the image alone."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from fisherop.model.engines.compact import compact
from fisherop.model.engines.kernels import pair
from fisherop.model.engines.lower import layout, lower
from fisherop.model.engines.nodes import IMAGE, LINEAR, STATIC, Node, NotLinear, compile_nodes, device_of, early, needed
from fisherop.model.engines.plain import forward_mode, slope, with_graph
from fisherop.model.engines.reuse import in_place
from fisherop.model.engines.simplify import CLEAN, lay_out, replaced, rewrite, simplify
from fisherop.model.engines.tape import Tape
from fisherop.model.sparse import is_sparse, parts
from fisherop.model.undisturbed import alone

_LOG = logging.getLogger(__name__)
_MAX_CHUNK = 64
_MAX_BLOCKS = 8  # sizes and directions for which a program is kept
_PAGES_COST = 2**20  # bytes of a tensor in a block, from which on fresh pages cost time
_LARGEST_BYTES = 2**25 - 1  # of a tensor in a block: glibc's malloc takes fresh pages for each larger one


class Traced:
    """The operations of one J v and of one Jᵀu, without what depends on the image alone: that is computed once.

    Both are recorded in one run of the model by a `Tape`, simplified, and kept as programs (`fisherop.model.programs`).
    Another image then costs a forward pass.

    Attributes
    ----------
    program : Program
        What other images can resume.
    reference : Tensor or None
        J v as PyTorch computed it while it was recorded, flat.
    """

    name = "traced"
    is_recorded, calls_model = True, False

    def __init__(
        self, respond: Callable[[Tensor], Tensor], image: Tensor, response: Tensor, v: Tensor | None = None
    ) -> None:
        self._constants: list[Tensor] = []
        v = torch.ones_like(image) if v is None else v
        with _failing("tracing"):
            self.program, self.reference = _trace(respond, image, response, v)

    @classmethod
    def resume(cls, program: Program) -> Traced:
        """By the program that an earlier image left."""
        self = cls.__new__(cls)
        self.program, self.reference, self._constants = program, None, []
        return self

    def prepare(self, image: Tensor) -> Tensor:
        """Compute what depends on the image alone, which products need; return the response by the program, flat."""
        with _failing("its program"):
            response, *self._constants = self.program.prepare(image)
        return response

    def release(self) -> None:
        """Free what `prepare` computed."""
        self._constants = []

    def chunk_size(self, bytes_: int) -> int:
        return max(1, min(_MAX_CHUNK, _LARGEST_BYTES // self.program.largest_bytes))

    @staticmethod
    def slope(respond: Callable[[Tensor], Tensor], x: Tensor, v: Tensor) -> Tensor:
        return slope(respond, x, v)

    def by_program(self, x: Tensor, v: Tensor) -> Tensor:
        """J v at another image, flat."""
        return self.program.single["jvp"](v, *self.program.prepare(x)[1:])[0]

    def jvp(self, tangents: Tensor) -> Tensor:
        return self.program.product("jvp", self._constants, tangents)

    def vjp(self, cotangents: Tensor) -> Tensor:
        return self.program.product("vjp", self._constants, cotangents)

    def normal(self, tangents: Tensor) -> tuple[Tensor, Tensor]:
        """J v, its elements in an order of the program's own, and JᵀJ v."""
        return self.program.normal(self._constants, tangents)

    @property
    def held_bytes(self) -> tuple[int, int]:
        """The memory of what depends on the image, and of what the images of one model share, without parameters."""
        return _bytes(self._constants), _bytes(self.program.statics)


@contextlib.contextmanager
def _failing(what: str) -> Iterator[None]:
    """Any error rejects the engine, whatever an operation that we don't know may do to the rules."""
    try:
        yield
    except RuntimeError:
        raise
    except Exception as error:
        raise NotLinear(f"{what} failed, {type(error).__name__}: {error}") from error


class Program:
    """What tracing leaves: of a model, for images of one shape and dtype.

    ``prepare(image)`` gives the response, flat, and the constants; ``single["jvp"](v, *constants)`` a tuple of J v, and
    so does `plain`, by operations that can be vectorized. `layout` is the shape (C, H, W) of a response that is best
    left in the order (H, W, C), or None. `reads` are the addresses of the tensors that the model read, beside the
    image.
    """

    def __init__(
        self,
        prepare: Callable[..., tuple],
        single: dict[str, Callable[..., tuple]],
        plain: dict[str, Callable[..., tuple]],
        layout: list[int] | None,
        statics: list[Tensor],
        largest_bytes: int,
        reads_image: bool,
        reads: set[int],
    ) -> None:
        self.prepare = prepare
        self.single = single
        self.plain = plain
        self.layout = layout
        self.statics = statics
        self.largest_bytes = largest_bytes
        self.reads_image = reads_image
        self.reads = reads
        self._blocks: dict[tuple[str, int], Callable[..., tuple] | None] = {}

    def product(self, direction: str, constants: list[Tensor], block: Tensor) -> Tensor:
        """J v or Jᵀu of a block; the program of each block size is made when it first comes, the oldest one goes."""
        block = block.contiguous()  # as in the recording, where layouts decided which copies were made
        if len(block) == 1:
            return self.single[direction](block[0], *constants)[0][None]
        program = self._of_size(direction, constants, block)
        if program is None:
            return torch.cat([self.product(direction, constants, one) for one in block.split(1)])
        return program(block, *constants)[0]

    def normal(self, constants: list[Tensor], block: Tensor) -> tuple[Tensor, Tensor]:
        """J v, in the order of `layout`, and JᵀJ v of a block, by one program: what J v ends with, Jᵀ doesn't undo."""
        block = block.contiguous()
        program = self._of_size("normal", constants, block)
        if program is not None:
            return program(block, *constants)[0]
        if len(block) == 1:
            images = self.product("jvp", constants, block)
            return self._laid_out(images), self.product("vjp", constants, images)
        images, products = zip(*(self.normal(constants, one) for one in block.split(1)), strict=True)
        return torch.cat(images), torch.cat(products)

    def _laid_out(self, images: Tensor) -> Tensor:
        """Responses (…, M) in the order of `layout`."""
        return images if self.layout is None else images.unflatten(-1, self.layout).movedim(-3, -1).flatten(-3)

    def _of_size(self, direction: str, constants: list[Tensor], block: Tensor) -> Callable[..., tuple] | None:
        program: Any = self._blocks.get((direction, len(block)), self)
        if program is self:
            program = alone(lambda _: self._keep_block(direction, constants, block), block.device)
        return program

    def _keep_block(self, direction: str, constants: list[Tensor], block: Tensor) -> Callable[..., tuple] | None:
        key = direction, len(block)
        if key not in self._blocks:  # another thread may have made it in the meantime
            made = self._of_block(direction, constants, block)
            for old in list(self._blocks)[: max(0, len(self._blocks) + 1 - _MAX_BLOCKS)]:
                del self._blocks[old]
            self._blocks[key] = made
        return self._blocks[key]

    def _of_block(self, direction: str, constants: list[Tensor], like: Tensor) -> Callable[..., tuple] | None:
        """The program of a block size; None where that of single vectors has to do: for two, one is not worth it."""
        if len(like) == 2:
            return None
        if like.device.type == "cpu" and len(like) * self.largest_bytes >= _PAGES_COST:
            _keep_pages()
        generator = torch.Generator("cpu").manual_seed(0)
        trial = torch.randn(like.shape, generator=generator, dtype=like.dtype, device="cpu").to(like.device)
        try:
            with warnings.catch_warnings():  # what has no batching rule is recorded as a loop
                warnings.filterwarnings("ignore", message=".*batching rule")
                program = self._made(direction, constants, trial)
            found = _parts(program(trial, *constants)[0])
            if direction == "normal":
                images = self.product("jvp", constants, trial[-1:])
                right = self._laid_out(images), self.product("vjp", constants, images)
            else:
                right = (self.product(direction, constants, trial[-1:]),)
            for last, one in zip((part[-1:] for part in found), right, strict=True):
                tolerance = torch.finfo(one.dtype).eps ** 0.5 * one.abs().max()
                if ((last - one).abs() > tolerance).any():
                    raise RuntimeError(f"{len(trial)} products at once differ from single ones")
        except RuntimeError as error:
            _LOG.info("products go through the model one at a time, since a block of them fails: %s", error)
            return None
        return program

    def _made(self, direction: str, constants: list[Tensor], trial: Tensor) -> Callable[..., tuple]:
        if len(trial) == 1:
            one = self.single[direction]
            return lambda block, *constants: (tuple(part[None] for part in _parts(one(block[0], *constants)[0])),)
        tape = Tape()
        inputs = [tape.input(trial, LINEAR), *(tape.input(c, IMAGE) for c in constants)]
        plain = self.plain[direction]
        found = _parts(tape.record(lambda: torch.func.vmap(lambda one: plain(one, *constants)[0])(trial)))
        out = lower(tape, found[0] if len(found) == 1 else tape.linear(None, pair, *found))
        return _running(needed([out], above=STATIC), inputs, out)


def _keep_pages() -> None:
    """Let glibc's malloc reuse memory from product to product.

    It gives back what is free beyond twice the largest block that was ever mapped and freed: every product would ask
    for these pages anew, and wait for them. A block that is freed untouched costs nothing.
    """
    torch.empty(_LARGEST_BYTES - 2**16, dtype=torch.uint8, device="cpu")


def _parts(results: Any) -> tuple:
    return results if isinstance(results, tuple) else (results,)


def _trace(respond: Callable[[Tensor], Tensor], image: Tensor, response: Tensor, v: Tensor) -> tuple[Program, Tensor]:
    tape = Tape()
    u = torch.ones_like(response)
    x = tape.input(image, IMAGE)
    vectors = {"jvp": tape.input(v, LINEAR), "vjp": tape.input(u, LINEAR)}
    computed: list[Tensor] = []

    def run() -> tuple[Tensor, Tensor, Tensor]:
        results = _products(respond, image, v, u)
        computed.append(results[1])
        return results

    answer, forward, backward = tape.record(run)
    recorded = tape.count
    if forward.level != LINEAR or backward.level != LINEAR:
        raise NotLinear("the derivative recorded does not depend on the direction")
    simple = {"jvp": simplify(tape, forward), "vjp": simplify(tape, backward)}
    order = layout(simple["jvp"])
    simple["normal"] = _composed(tape, simple["jvp"], simple["vjp"], vectors["vjp"], order)
    single = {direction: compact(tape, lower(tape, out)) for direction, out in simple.items()}
    plain = {direction: compact(tape, out) for direction, out in simple.items()}
    nodes = needed([*plain.values(), *single.values()], above=IMAGE)
    parents = {p.index: p for node in nodes for p in node.parents}
    constants = [p for p in parents.values() if p.level == IMAGE]
    results = [answer, *constants]
    prepare = compile_nodes(early(needed(results, above=STATIC), recorded), [x], results)
    inputs = {d: [vectors["vjp" if d == "vjp" else "jvp"], *constants] for d in plain}
    single = {d: _Later(_running, needed([out], above=IMAGE), inputs[d], out) for d, out in single.items()}
    plain = {d: _Later(compile_nodes, needed([out], above=IMAGE), inputs[d], [out]) for d, out in plain.items()}
    statics = [p.value for p in parents.values() if p.level == STATIC]
    own = [p for t in statics for p in parts(t) if p.untyped_storage().data_ptr() not in tape.external]
    largest_bytes = max(_largest(n) for n in nodes if isinstance(n.value, Tensor) and not is_sparse(n.value))
    program = Program(prepare, single, plain, order, own, largest_bytes, tape.reads_image, tape.external)
    return program, computed[0]


class _Later:
    """A program that is made when it is first called."""

    def __init__(self, make: Callable[..., Callable[..., tuple]], *args: Any) -> None:
        self._make = functools.partial(make, *args)

    @functools.cached_property
    def _made(self) -> Callable[..., tuple]:
        return self._make()

    def __call__(self, *args: Tensor) -> tuple:
        return self._made(*args)


def _composed(tape: Tape, jvp: Node, vjp: Node, u: Node, order: list[int] | None) -> Node:
    """J v, in the order of `Program.layout`, and Jᵀ times J v."""
    new = {u.index: jvp}
    for node in needed([vjp], above=IMAGE):
        if node is not u:
            args, kwargs = replaced(node.args, new), replaced(node.kwargs, new)
            new[node.index] = tape.linear(node.value, node.op, *args, **kwargs)
    images = jvp
    if order is not None:
        images = tape.linear(jvp.value.reshape(order), torch.reshape, jvp, order)
        images = tape.linear(images.value.permute(1, 2, 0), torch.ops.aten.permute.default, images, [1, 2, 0])
        images = tape.linear(jvp.value, torch.reshape, images, list(jvp.value.shape))
    both = tape.linear(None, pair, images, new[vjp.index])
    return lay_out(tape, rewrite(tape, both, CLEAN))  # now that Jᵀ begins in the layout that J v ends with


def _running(nodes: list[Node], inputs: list[Node], out: Node) -> Callable[..., tuple]:
    """The program that runs as it is, so that it may work in place, which what is vectorized must not."""
    return compile_nodes(nodes, inputs, [out], in_place(nodes, [out]))


def _largest(node: Node) -> int:
    """Of the tensor that an operation gives, and of the columns that PyTorch makes of a convolution in float64."""
    value: Tensor = node.value
    if (
        node.op is not torch.ops.aten.convolution.default
        or value.dtype != torch.float64
        or device_of(value).type != "cpu"
    ):
        return value.nbytes
    x, weight, transposed = (a.value if isinstance(a, Node) else a for a in (*node.args[:2], node.args[6]))
    places = math.prod((x if transposed else value).shape[2:])
    return max(value.nbytes, weight[0].numel() * places * value.element_size())


def _bytes(tensors: Iterable[Tensor]) -> int:
    """The memory that tensors take, each storage once."""
    storages = [part.untyped_storage() for tensor in tensors for part in parts(tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _products(respond: Callable, image: Tensor, v: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The response, J v and Jᵀu, by operations that a tape can hold."""
    with torch.autograd.set_detect_anomaly(False):  # which looks at every gradient
        response, jv = forward_mode(respond, image, v)
        (jtu,) = torch.autograd.grad(*with_graph(respond, image), u)
    return response, jv, jtu
