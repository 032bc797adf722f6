"""Many images at once, on the workers of a Dask cluster: each holds the linearizations of its share of them."""

from __future__ import annotations

import collections
import importlib
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fisherop import checks
from fisherop.jacobian import Jacobian, triangle
from fisherop.model.recipe import Recipe, as_array, device_in_worker, here, packed, threads_in_worker, unpacked
from fisherop.observed import at
from fisherop.pooled import Pooled, checked, pool

_KEPT = 2  # operators of which a worker's process holds shares
_shares: collections.OrderedDict[str, dict[int, tuple[Pooled, str]]] = collections.OrderedDict()  # by operator
_lock = threading.Lock()  # building


class OnWorkers(Jacobian):
    """[√w₁ J₁; √w₂ J₂; …] of one model at many images, of which each worker has a share.

    A product sends its rows to each share and takes what comes back, in a fixed order. A task holds nothing that only
    one worker has: where the share isn't, the task says so, and is sent again with it. So a worker may die at any time.

    Parameters
    ----------
    client : distributed.Client
    shares : sequence of bytes
        What `_build` makes a `Pooled` of.
    recipe : Recipe
        Of the model.
    timeout : float
        Seconds without any worker after which a product is given up.
    like : Tensor
        An image.
    """

    is_stacked = True

    def __init__(self, client: Any, shares: Sequence[bytes], recipe: Recipe, timeout: float, like: Tensor) -> None:
        self.client, self.timeout = client, timeout
        self.image_shape = tuple(like.shape)
        self._key, self._shares, self._home = secrets.token_hex(16), list(shares), here()
        self._at: dict[int, str] = {}
        self._weights = ""
        self.dtype, self.device = like.dtype, like.device
        told = self._ask("told", [()] * len(shares), is_new=True)
        self._weights = told[0]["weights"]
        for one in told:
            recipe.check(one["weights"], self._weights)
        self._sizes = [one["shape"][0] for one in told]
        self.shape = sum(self._sizes), told[0]["shape"][1]
        self.mismatch, self.chunk_size = max(one["mismatch"] for one in told), told[0]["chunk_size"]

    def jvp(self, rows: Tensor) -> Tensor:
        return torch.cat(self._tensors("jvp", [rows] * len(self._sizes)), dim=1)

    def vjp(self, rows: Tensor) -> Tensor:
        products = self._tensors("vjp", list(rows.split(self._sizes, dim=1)))
        return torch.stack(products).sum(0)

    def normal(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        found = self._ask("normal", [(_sent(rows),)] * len(self._sizes))
        triangles = [torch.from_numpy(r).to(self.device) for r, _ in found]
        products = torch.zeros_like(rows)
        for _, product in found:
            products += self._received(product)
        return triangle(torch.cat(triangles).T), products

    def to_images(self, rows: Tensor) -> Tensor:
        return self._received(self._ask("to_images", [(_sent(rows),)])[0])  # of the first share

    def __reduce__(self) -> tuple:
        raise TypeError("an operator on a cluster holds its client, and can't be copied or pickled: make it anew there")

    def _tensors(self, name: str, blocks: list[Tensor]) -> list[Tensor]:
        return [self._received(x) for x in self._ask(name, [(_sent(block),) for block in blocks])]

    def _received(self, x: NDArray) -> Tensor:
        return torch.from_numpy(x).to(self.device)

    def _ask(self, name: str, given: list[tuple], *, is_new: bool = False) -> list[Any]:
        """What a method of each share gives, in the order of the shares; of the first ones, if fewer are given."""
        found: dict[int, Any] = {}
        futures = {self._submit(i, name, arguments, with_share=is_new): i for i, arguments in enumerate(given)}
        try:
            while futures:
                for future in self._done(list(futures)):
                    i, told = futures.pop(future), future.result()
                    if told is None:
                        futures[self._submit(i, name, given[i], with_share=True)] = i
                    else:
                        found[i] = told[0]
        finally:
            self.client.cancel(list(futures))
        return [found[i] for i in range(len(given))]

    def _submit(self, i: int, name: str, arguments: tuple, *, with_share: bool) -> Any:
        share = (self._shares[i], self._weights) if with_share else None
        where = {"workers": [self._place(i)], "allow_other_workers": True, "pure": False}
        # Dask would say of large arguments that they should be scattered, and what is scattered dies with a worker
        with _dask("dask.config").set({"distributed.admin.large-graph-warning-threshold": "1 TiB"}):
            return self.client.submit(answer, (self._key, i), share, self._home, name, arguments, **where)

    def _place(self, i: int) -> str:
        """The worker of a share: the one that it had, as long as that lives, else the one with the fewest."""
        workers = self._workers()
        if self._at.get(i) not in workers:
            loads = collections.Counter(place for place in self._at.values() if place in workers)
            self._at[i] = min(sorted(workers), key=lambda worker: loads[worker] / workers[worker])
        return self._at[i]

    def _workers(self) -> dict[str, int]:
        """Addresses and threads of those that live: at least one, or an error in time."""
        until = time.monotonic() + self.timeout
        while True:
            if self.client.status != "running":
                raise RuntimeError(f"{self.client} is closed: make a new operator with one that is not")
            workers = self.client.nthreads()
            if workers:
                return dict(workers)
            if time.monotonic() > until:
                raise RuntimeError(
                    f"the cluster of {self.client} has had no worker for {self.timeout:g} s: start workers and repeat "
                    "the call, or give a longer timeout"
                )
            time.sleep(0.2)

    def _done(self, futures: list[Any]) -> list[Any]:
        """Those that have ended, at least one."""
        distributed = _dask("distributed")
        while True:
            try:
                states = distributed.wait(futures, timeout=2.0, return_when="FIRST_COMPLETED")
                return list(states.done)
            except distributed.TimeoutError:
                self._workers()


def spread(
    images: Sequence[Tensor],
    model: Callable[..., Any],
    weights: Sequence[float] | None,
    memory: int,
    client: Any,
    timeout: float,
    options: dict[str, Any],
    observed: tuple[Any, Any, Any],
) -> OnWorkers:
    """The Jacobians of a model at images, on the workers of a Dask cluster, one share for each of their threads."""
    checks.instance("client", client, _dask("distributed").Client, "a dask.distributed.Client")
    if client.asynchronous:
        raise ValueError("client must be a synchronous one: Client(address, asynchronous=False)")
    timeout = checks.number("timeout", timeout, "seconds, a number above 0", lambda timeout: timeout > 0)
    memory = checks.memory("memory", memory)
    images, weights = checked(images, weights)
    workers = client.nthreads()
    n_shares = min(max(1, sum(workers.values())), len(images))
    recipe = Recipe(model, getattr(model, "__name__", type(model).__name__))
    recipe.pack()
    device = images[0].device.type
    shares = []
    for places in np.array_split(np.arange(len(images)), n_shares):
        arrays = np.stack([as_array(images[i]) for i in places])
        share = arrays, recipe, [weights[i] for i in places], memory, device, options, observed
        cure = "define what it holds at the top level of a module that the workers can import"
        shares.append(packed(share, "noise, subspace or metric", cure))
    return OnWorkers(client, shares, recipe, timeout, images[0])


def _dask(name: str) -> Any:
    """A module of an extra; types are checked without it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError("client= is for a Dask cluster: pip install 'fisherop[dask]'") from error


def answer(
    key: tuple[str, int], share: tuple[bytes, str] | None, home: tuple[int, str], name: str, arguments: tuple
) -> tuple | None:
    """In a worker: what a method of a share gives, as a tuple of one; None where the share isn't here and not sent."""
    with threads_in_worker(home, 1):
        kept = _kept(key, share)
        if kept is None:
            return None
        J, weights = kept
        if name == "told":
            return ({"shape": J.shape, "mismatch": J.mismatch, "chunk_size": J.chunk_size, "weights": weights},)
        rows = [torch.from_numpy(x.copy()).to(J.device) for x in arguments]
        out = getattr(J, name)(*rows)
        return (tuple(map(_sent, out)) if isinstance(out, tuple) else _sent(out),)


def _kept(key: tuple[str, int], share: tuple[bytes, str] | None) -> tuple[Pooled, str] | None:
    operator, i = key
    with _lock:
        held = _shares.get(operator, {})
        if i not in held:
            if share is None:
                return None
            held[i] = _build(*share)
            _shares[operator] = held
        _shares.move_to_end(operator)
        while len(_shares) > _KEPT:
            _shares.popitem(last=False)
        return held[i]


def _build(share: bytes, expected: str) -> tuple[Pooled, str]:
    """A share, and the identity of its model's weights, which must be those of the other shares, if these are known."""
    arrays, recipe, weights, memory, device, options, observed = unpacked(share, "the model or what is observed")
    device = device_in_worker(device)
    model = recipe.model(None, device)
    recipe.check(recipe.weights(), expected or recipe.weights())
    pooled = pool(
        [torch.from_numpy(array).to(device) for array in arrays.copy()],
        lambda image: at(image, model, options, observed),
        weights,
        memory,
    )
    return pooled, recipe.weights()


def _sent(x: Tensor) -> NDArray:
    return x.detach().cpu().numpy()
