"""A search of `golub_kahan` in a file, so that a process that is killed loses little of it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from fisherop import checks
from fisherop.fields import (
    TEXT,
    Field,
    Header,
    check_common,
    check_sizes,
    check_types,
    parse_history,
    parse_json,
    wrong,
)
from fisherop.files import fingerprint, response_difference, same_response, unpack, write
from fisherop.krylov.bounds import Bounds
from fisherop.krylov.search import Found, Search, Start
from fisherop.model.linearize import Linearization
from fisherop.result import ConvergenceError, EigenResult, Nullity

_RARELY = 20  # times what the last write took, at least, until the next
_STREAMS = ("PCG64", "PCG64DXSM", "MT19937", "Philox", "SFC64")
_FLOAT, _INT = np.dtype(np.float64), np.dtype(np.int64)
_VERSION = 2
# single numbers, not negative
_FLOATS = ("largest", "chance", "accepted", "spent", "scale", "noise")
_INTS = ("starts", "restarts", "probes", "fresh", "seen", "is_restarted")
_FIELDS: dict[str, Field] = {
    "checkpoint": Field(_INT),
    "response_size": Field(_INT),
    "response_fingerprint": Field(_FLOAT, (256,)),
    "k": Field(_INT),
    "which": Field(TEXT),
    "tol": Field(_FLOAT),
    "max_basis": Field(_INT),
    "v": Field(None, ("m", "d")),
    "w": Field(None, ("b", "d")),
    "t": Field(_FLOAT, ("m", "m")),
    "c": Field(_FLOAT, ("b", "m")),
    "shares": Field(_FLOAT, ("s", None)),
    "random": Field(None, ("r", "d")),
    "found_vectors": Field(None, ("f", "d")),
    "found_values": Field(_FLOAT, ("f",)),
    "found_residuals": Field(_FLOAT, ("f",)),
    "fixed": Field(None, ("q", "d")),
    "fixed_values": Field(_FLOAT, ("q",)),
    "phase": Field(TEXT),
    "bounds": Field(_FLOAT, (2,)),
    "nullity": Field(_FLOAT, (None,)),
    "rng": Field(TEXT),
    "history": Field(TEXT, most_bytes=2**28),
    **{name: Field(_FLOAT) for name in _FLOATS},
    **{name: Field(_INT) for name in _INTS},
}


class Checkpoint:
    """What `golub_kahan` finds at ``"checkpoint"`` in its state: it writes the search there, and goes on from there.

    Parameters
    ----------
    path : str or path-like
        Where the search is, or will be.
    seconds : float
        From one write to the next. It becomes 20 times what a write takes, if that is more.
    asked : mapping
        ``k``, ``which`` and ``tol``, which a search that goes on from the file must share.

    Raises
    ------
    ValueError
        `seconds` is no number from 0.
    """

    def __init__(self, path: str | os.PathLike, seconds: float, asked: Mapping[str, Any]) -> None:
        self.path = pathlib.Path(os.path.realpath(os.fsdecode(checks.path("checkpoint", path, new=True))))
        self.seconds, self.asked = seconds, dict(asked)
        self.due = 0.0  # the first step is written, so that a path that can't be written to is known at once
        self.is_own = False  # the file is of this search
        self.kept: dict[str, NDArray] | None = None  # what was read, until a search has it

    def read(self, lin: Linearization, d: int, capacity: int) -> bool:
        """Read the file, if there is one, for a search in d dimensions with such a basis; whether there is one.

        Raises
        ------
        ValueError
            The file is damaged, or holds another search than this; the message says what differs.
        """
        self.identity = {
            "checkpoint": _VERSION,
            "image": lin.image.cpu().numpy(),
            "response_size": lin.response_size,
            "response_fingerprint": fingerprint(lin.response),
            "max_basis": capacity,
        } | {
            name: np.asarray(value, _FIELDS[name].dtype if name != "which" else str)
            for name, value in self.asked.items()
        }
        sizes = dict.fromkeys("Ndmbrqfs", lin.image_size) | {"K": 2 * int(self.asked["k"])}
        table = _FIELDS | {"image": Field(None, ("N",)), "versions": Field(TEXT, (None,))}

        def check(headers: Mapping[str, Header]) -> None:
            if "checkpoint" not in headers:
                raise ValueError(f"{self.path} is no checkpoint: it holds {', '.join(list(headers)[:30])}")
            image = headers.get("image")
            if image is not None and image.shape != tuple(lin.image.shape):
                raise ValueError(f"{self.path} is of an image {image.shape}, this one is {tuple(lin.image.shape)}")
            check_sizes(self.path, headers, table, sizes)

        try:
            self.kept = unpack(self.path, "checkpoint", check)
            self._check_same(self.kept, lin)
            _check(self.path, self.kept, d)
        except FileNotFoundError:
            return False
        except ValueError as error:
            raise self._refusal(error) from error
        self.is_own = True
        return True

    def _refusal(self, error: ValueError | str) -> ValueError:
        return ValueError(f"{error}.\nTo begin anew delete that file, or give another path as checkpoint")

    def _check_same(self, fields: Mapping[str, NDArray], lin: Linearization) -> None:
        check_common(self.path, fields)
        check_types(self.path, fields, {name: _FIELDS[name] for name in self.identity if name != "image"}, {})
        image, own = fields["image"], self.identity["image"]
        if image.dtype != own.dtype:
            raise ValueError(f"{self.path} is of an image of {image.dtype}, this one is of {own.dtype}")
        if not np.array_equal(image, own):
            by = np.abs(image - own).max()
            raise ValueError(f"{self.path} is of another image, which differs from this one by up to {by:.3g}")
        difference, norm = response_difference(fields, lin.response)
        if fields["response_size"] != lin.response_size or not difference <= same_response(fields) * norm:
            raise ValueError(f"{self.path} is of another model, whose response to the image is another")
        for name in ("k", "which", "tol", "max_basis"):
            if fields[name] != self.identity[name]:
                raise ValueError(f"{self.path} is of a search with {name}={fields[name]}, not {self.identity[name]}")

    def attach(self, search: Search) -> None:
        """Write this search from now on; if a file was read, let the search go on from it.

        Raises
        ------
        ValueError
            F times a vector, of the model as it is now, is not what the file's search says.
        """
        if self.kept is not None:
            kept, self.kept = self.kept, None
            _restore(search, kept)
            error, size = _mismatch(search)
            # what is more than rounding, and more than the tolerance leaves, would refute in the end what is found
            rounding = max(search.goal.eps, search.J.mismatch)
            if not error <= min(rounding**0.5, max(100 * rounding, float(self.asked["tol"]) / 10)) * size:
                raise self._refusal(
                    f"{self.path} is of another model: F times a vector differs by {error:.2g} from what it says"
                )
            if search.phase == "main":
                search.main = search.fact
            self.due = time.monotonic() + self.seconds
        search.log.checkpoint = self

    def offer(self, search: Search, at_once: bool = False) -> None:
        """Write the search if it is time to, or at once.

        Raises
        ------
        OSError
            The file can't be written. The last one that could be stays.
        """
        start = time.monotonic()
        if at_once or start >= self.due:
            write(self.path, self.identity | _contents(search))
            self.is_own = True
            end = time.monotonic()
            self.due = end + max(self.seconds, _RARELY * (end - start))

    def remove_after(self, result: EigenResult) -> None:
        """Remove the file, if it is of this search, unless the search was stopped before its end."""
        if self.is_own and "stopped" not in result.details:
            self.path.unlink(missing_ok=True)


@contextlib.contextmanager
def keeping(
    state: dict[str, Any],
    path: str | os.PathLike | None,
    seconds: float,
    method: Any,
    asked: Mapping[str, Any],
    options: Mapping[str, Any],
) -> Iterator[Any]:
    """Within it a search with this state is kept in a file at `path`, if there is one; gives the method to take.

    The file is removed when the search has come to its end, whether all that it found has converged or not. One that
    was stopped, by an interrupt, too few iterations or another error, stays.
    """
    seconds = checks.number("checkpoint_seconds", seconds, "a number of seconds from 0", lambda s: s >= 0)
    if path is None:
        yield method
        return
    if not isinstance(method, str) or method not in ("auto", "golub_kahan"):
        raise ValueError(f"checkpoint needs method='golub_kahan' or 'auto', got {method!r}: leave checkpoint out")
    for name in ("v0", "orthogonal_to"):
        if options.get(name) is not None:
            raise ValueError(f"checkpoint can't be combined with {name}: leave one of them out")
    checkpoint = state["checkpoint"] = Checkpoint(path, seconds, asked)
    before = state.get("result")
    try:
        yield "golub_kahan"
        checkpoint.remove_after(state["result"])
    except ConvergenceError as error:
        checkpoint.remove_after(error.result)
        raise
    except KeyboardInterrupt:  # maybe while its answer was certified
        if state["result"] is not None and state["result"] is not before:
            checkpoint.remove_after(state["result"])
        raise
    finally:
        state.pop("checkpoint", None)  # another thread may have taken it


def _contents(search: Search) -> dict[str, ArrayLike]:
    fact, log, start = search.fact, search.log, search.start
    stream = search.rng.bit_generator.state
    if stream["bit_generator"] not in _STREAMS:
        raise TypeError(f"rng must be of {', '.join(_STREAMS)} to be written, got {stream['bit_generator']}")
    rows = {
        "v": fact.v,
        "w": fact.w,
        "random": search.given[:0] if start.vectors is None else start.vectors,
        "found_vectors": search.found_rows,
        "fixed": search.fixed.rows,
    }
    return {
        **{name: block.cpu().numpy() for name, block in rows.items()},
        "t": fact.t,
        "c": fact.c,
        "shares": np.empty((0, 0)) if fact.shares is None else fact.shares,
        "scale": float(fact.scale),
        "noise": float(fact.noise),
        "is_restarted": int(fact.shares is None),
        "found_values": search.found.values,
        "found_residuals": search.found.norms,
        "fixed_values": search.fixed.values,
        "phase": search.phase,
        "seen": search.n_seen,
        "starts": start.count,
        "accepted": float(start.accepted),
        "largest": float(log.largest),
        "restarts": log.restarts,
        "probes": log.probes,
        "fresh": log.fresh,
        "chance": float(search.chance),
        "bounds": np.array([search.bounds.low, search.bounds.high]),
        "nullity": np.array([] if search.nullity is None else dataclasses.astuple(search.nullity)),
        "spent": float(search.J.n_products - log.before),
        "rng": json.dumps(stream, default=np.ndarray.tolist),
        "history": json.dumps(log.history, default=np.ndarray.tolist),
    }


def _check(path: pathlib.Path, fields: Mapping[str, NDArray], d: int) -> None:
    """Raise ValueError, which names the field, unless a search can have been like this."""
    sizes: dict[str, int] = {"N": fields["image"].size, "d": d}
    check_types(path, fields, _FIELDS, sizes)
    for name, array in fields.items():
        if array.dtype.kind == "f" and name != "bounds" and not np.isfinite(array).all():
            raise wrong(path, name, "holds infinity")
        if name in (*_FLOATS, *_INTS) and array < 0:
            raise wrong(path, name, f"is negative: {array}")
    if fields["checkpoint"] != _VERSION:
        raise ValueError(f"{path} is a checkpoint of format {fields['checkpoint']}, not {_VERSION}: update fisherop")
    phase, m, b, q, f = str(fields["phase"]), *(sizes[name] for name in "mbqf")
    if phase not in ("main", "probe", "join"):
        raise wrong(path, "phase", f"must be 'main', 'probe' or 'join', not {phase[:80]!r}")
    beside = q if phase == "probe" else 0
    if m + beside > fields["max_basis"] or m + b + beside > d:
        raise wrong(path, "v", f"has {m} vectors beside {beside} others, more than max_basis or N")
    if (phase == "main") != (f == 0) or (phase == "main") != (q == 0):
        raise wrong(path, "found_vectors", f"are {f} and fixed are {q} in the phase {phase!r}")
    if fields["shares"].size and fields["shares"].shape[1] != m + b:
        raise wrong(path, "shares", f"must have {m + b} columns, as v and w have rows")
    if (np.linalg.norm(fields["shares"], axis=1) < 0.9).any():
        raise wrong(path, "shares", "must be of random vectors of norm 1, or more")
    size = max(np.abs(fields[name]).max(initial=0.0) for name in ("t", "fixed_values", "found_values"))
    for name in ("largest", "noise"):
        if not fields[name] <= 2 * (m + 1) * size:
            raise wrong(path, name, f"doesn't fit t and the values found, of at most {size}: {fields[name]}")
    for name, least in (("starts", 1), ("fresh", 0)):
        if not least <= fields[name] <= d:
            raise wrong(path, name, f"must be from {least} to N, not {fields[name]}")
    if not np.allclose(fields["t"], fields["t"].T, rtol=1e-9, atol=1e-9 * np.abs(fields["t"]).max(initial=0.0)):
        raise wrong(path, "t", "is not symmetric")
    if fields["is_restarted"] not in (0, 1):
        raise wrong(path, "is_restarted", f"must be 0 or 1, not {fields['is_restarted']}")
    if m and not fields["scale"] > 0:
        raise wrong(path, "scale", "is zero")
    for name in ("found_values", "fixed_values"):
        if (np.diff(fields[name]) < 0).any():
            raise wrong(path, name, "must be in ascending order")
    if fields["nullity"].shape not in ((0,), (2,)) or (fields["nullity"] < 0).any():
        raise wrong(path, "nullity", f"must be none or two numbers from 0, not {fields['nullity']}")
    if not 0 <= fields["bounds"][0] <= fields["bounds"][1]:
        raise wrong(path, "bounds", f"must be an interval of numbers from 0, not {fields['bounds']}")
    checks: dict[str, Callable[[Any], Any]] = {
        "rng": lambda text: _stream(text),
        "history": lambda text: parse_history(parse_json(text, list)),
    }
    for name, check in checks.items():
        try:
            check(fields[name].item())
        except (ValueError, TypeError, KeyError, OverflowError, IndexError) as error:
            raise wrong(path, name, f"can't be right: {error!r}") from error
    for name in ("v", "w", "fixed", "found_vectors"):
        _check_rows(path, name, fields[name])


def _check_rows(path: pathlib.Path, name: str, rows: NDArray) -> None:
    """Raise ValueError unless rows are orthonormal, by what comes back of one random combination."""
    y = np.random.default_rng(1).standard_normal(len(rows))
    error = np.abs(rows @ (y.astype(rows.dtype) @ rows) - y).max(initial=0.0)
    if not error <= 1000 * np.finfo(rows.dtype).eps * np.linalg.norm(y):
        raise wrong(path, name, f"holds vectors that are not orthonormal, by {error:.1g}")


def _stream(text: str) -> np.random.Generator:
    state = parse_json(text, dict)
    if state.get("bit_generator") not in _STREAMS:
        raise ValueError(f"the stream must be one of {', '.join(_STREAMS)}, not {state.get('bit_generator')!r}")
    for name, most in (("pos", 624), ("buffer_pos", 4)):  # NumPy takes any, and reads there
        if not 0 <= {**state, **state.get("state", {})}.get(name, 0) <= most:
            raise ValueError(f"{name} must be from 0 to {most}")
    generator = getattr(np.random, state["bit_generator"])(0)
    generator.state = state
    return np.random.Generator(generator)


def _restore(search: Search, kept: Mapping[str, NDArray]) -> None:
    fact, log = search.fact, search.log
    search.main = None  # until all is there, and has been compared with the model
    numbers = {name: kept[name].item() for name in (*_FLOATS, *_INTS)}
    for name in ("largest", "restarts", "probes", "fresh"):
        setattr(log, name, numbers[name])
    log.earlier, log.before = numbers["spent"], search.J.n_products - numbers["spent"]
    log.history = parse_history(json.loads(kept["history"].item()))
    search.phase, search.n_seen, search.chance = kept["phase"].item(), numbers["seen"], numbers["chance"]
    search.bounds, search.rng = Bounds(*kept["bounds"].tolist()), _stream(kept["rng"].item())
    search.nullity = Nullity(*kept["nullity"].tolist()) if kept["nullity"].size else None
    rows = {name: fact.tensor(kept[name]) for name in ("v", "w", "random", "found_vectors", "fixed")}
    vectors = rows["random"] if len(rows["random"]) else None
    search.start = Start(vectors, numbers["starts"], numbers["accepted"])
    if search.phase != "main":
        search.found = Found(kept["found_values"], kept["found_residuals"], rows["found_vectors"])
        search.fixed = Found(kept["fixed_values"], np.zeros_like(kept["fixed_values"]), rows["fixed"])
    fact.reset(search.given, *([search.fixed.rows] if search.phase == "probe" else []))
    fact.scale, fact.noise = numbers["scale"], numbers["noise"]
    fact.restore(rows["v"], rows["w"], kept["t"], kept["c"], None if numbers["is_restarted"] else kept["shares"])


def _mismatch(search: Search) -> tuple[float, float]:
    """‖F V y − V T y − W C y‖ for a random y of unit norm, by one product, and the size of T."""
    fact = search.fact
    if fact.m == 0:
        return 0.0, 0.0
    y = np.random.default_rng(1).standard_normal(fact.m)
    y /= np.linalg.norm(y)
    _, product = fact.multiply(fact.vectors(y[:, None]))
    locked = fact.storage[: fact.n_locked]
    product = product - (product @ locked.T) @ locked
    expected = fact.vectors(fact.t @ y[:, None]) + fact.tensor(fact.c @ y[:, None]).T @ fact.w
    return float(torch.linalg.vector_norm((product - expected).double())), float(np.abs(fact.t).max())
