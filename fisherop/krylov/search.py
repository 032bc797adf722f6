"""What is searched for, how far the search is, and all of it that another call, or another process, goes on from."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fisherop import checks
from fisherop.density import Quadrature
from fisherop.jacobian import Products
from fisherop.krylov.bounds import DELTA, Bounds, RitzPairs
from fisherop.krylov.lanczos import LanczosFactorization
from fisherop.krylov.orthogonalize import combine, eigh, inner
from fisherop.result import Answer, Evidence, Nullity

CHANCE = 0.3  # a first run may end once an eigenvalue more than 2 tol beyond those claimed is so improbable
_CHEAP, _SMALL = 30, 1000  # for at most so many basis vectors, or N up to that, only once it is at most δ


class Found(NamedTuple):
    """Ritz values, ascending, the norms of their residuals, and their vectors, as rows; none where others hold them."""

    values: NDArray[np.float64]
    norms: NDArray[np.float64]
    rows: Tensor


@dataclass(frozen=True)
class Start:
    """What a Krylov space began from: `count` vectors; the `vectors` themselves, if all are random.

    The `quadratures` are what each of these says of the whole spectrum, once there is a space; `accepted` is the chance
    of an eigenvalue beyond those found at which the first run may end.
    """

    vectors: Tensor | None = None
    count: int = 1
    accepted: float = CHANCE
    quadratures: tuple[Quadrature, ...] = ()


@dataclass(frozen=True)
class Goal:
    """So many pairs at the `top` and at the `bottom` of the spectrum of F in n dimensions, to `tol`.

    At least `zeros` eigenvalues are known to be zero, where n > M. `eps` is the machine epsilon of the vectors.
    """

    top: int
    bottom: int
    tol: float
    n: int
    zeros: int
    eps: float

    @property
    def k(self) -> int:
        return max(self.top, self.bottom)

    def wanted(self, m: int) -> NDArray[np.intp]:
        """Of m ascending values."""
        top = min(self.top, m)
        return np.r_[: min(self.bottom, m - top), m - top : m]

    def met_by(self, ritz: RitzPairs, largest: float) -> bool:
        """Whether the wanted pairs have converged, and each stands for one eigenvalue."""
        m = len(ritz)
        if m < self.top + self.bottom:
            return False
        wanted = self.wanted(m)
        # rounding adds to residuals, hardly to null values
        residual_tol = max(self.tol / 2, self.tol - 4 * self.eps)
        # a pair stands for one eigenvalue, and the next has its index, only if it does not blend two
        allowed = np.full(len(wanted), 0.1 * residual_tol * largest)
        if self.n > _SMALL or ritz.start is not None:
            allowed[max(0, len(wanted) - self.top - 1) : len(wanted) - self.top + 1] *= 10
        settled = ritz.norms[wanted] <= allowed
        null = ritz.values[: self.bottom] <= self.tol * largest
        settled[: self.bottom] = null if self.zeros >= self.bottom else settled[: self.bottom] | null
        return bool(settled.all())

    def risk(self, m: int, accepted: float) -> float:
        """The chance of an eigenvalue more than 2 tol beyond the pairs at which a run of m vectors may end."""
        return accepted if m > _CHEAP and self.n > _SMALL else DELTA

    def chance_of_more(self, ritz: RitzPairs, largest: float, noise: float | None = None) -> float:
        """The chance of an eigenvalue more than 2 tol beyond those wanted: two so close may blend in one pair.

        A later probe would not show it, since the rest of its vector is no eigenvector in the complement. After a
        restart the chance is unknown, and 0 is returned.
        """
        if ritz.start is None:
            return 0.0
        theta, aim, chance = ritz.values, self.tol * largest, 0.0
        if self.top:
            others = slice(len(theta) - self.top + 1)
            chance = ritz.chance_of(theta[-self.top] + 2 * aim, others, noise)
        if self.bottom and theta[self.bottom - 1] > aim:
            others = slice(self.bottom - 1, None)
            chance = max(chance, ritz.chance_of(theta[self.bottom - 1] - 2 * aim, others, noise))
        return chance


class Stop(Exception):
    """The search can't go on, and why; `by_rounding` says that more steps would not help."""

    def __init__(self, message: str, by_rounding: bool = False) -> None:
        super().__init__(message)
        self.by_rounding = by_rounding


class Monitor:
    """The course of a search: its counts, its history, when to look, when to write it to a checkpoint.

    Attributes
    ----------
    history : list of dict
        See `golub_kahan`.
    largest : float
        The largest Ritz value that there was, which stands for λ_max.
    restarts, probes, fresh, n_steps : int
        Restarts, looks for missed eigenvalues, vectors that joined against rounding, and block steps.
    before, earlier : float
        The linearization's count when the search began, and the products of earlier calls.
    """

    def __init__(self) -> None:
        self.largest = 0.0
        self.restarts, self.spent = 0, 0.0
        self.checkpoint: Any = None

    def begin(self, J: Products, maxiter: int, callback: Callable[[dict[str, Any]], None] | None) -> None:
        """Another call, for the same factorization or a new one."""
        self.J, self.maxiter, self.callback = J, maxiter, callback
        self.history: list[dict[str, Any]] = []
        self.probes = self.fresh = self.n_steps = self.next_check = 0
        self.earlier, self.before = self.spent, J.n_products - self.spent

    def end(self) -> None:
        self.spent = self.J.n_products - self.before
        self.history, self.callback, self.checkpoint = [], None, None

    def record(self, goal: Goal, values: NDArray, norms: NDArray, scale: float) -> None:
        values, norms = (scale**2 * x[::-1] for x in (values, norms))
        top = min(goal.top, len(values))
        entry = {
            "n_products": self.J.n_products - self.before,
            "largest": (values[:top], norms[:top]),
            "smallest": (values[top:], norms[top:]),
        }
        self.history.append(entry)
        if self.callback is not None:
            self.callback(entry)

    def step(self, fact: LanczosFactorization) -> bool:
        """Count a block step; whether it is time to look at the Ritz pairs."""
        self.n_steps += 1
        if fact.m >= self.next_check or fact.is_full or fact.is_exhausted:
            self.next_check = fact.m + max(1, fact.m // 50)
            return True
        return False


class Search:
    """A search of `golub_kahan`: what it consists of, and what of it is kept for another call.

    Attributes
    ----------
    given : Tensor, shape (q, N)
        Eigenvectors found before, which all is orthogonal to.
    main, fact : LanczosFactorization or None
        The first factorization, None once its memory was used again; and the current one.
    phase : str
        ``"main"`` until the wanted pairs have converged; ``"look"`` between looks for missed ones, ``"probe"`` in one,
        ``"join"`` while what it found converges with the rest.
    n_seen : int
        How many vectors of one eigenspace can have been seen.
    found, fixed : Found
        What is wanted, as far as it is found; and, where missed ones are looked for, that and some more. Else empty.
    bounds : Bounds
        In the units of T.
    chance : float
        Of an eigenvalue more than 2 tol beyond those found by the first run.
    """

    def __init__(self, J: Products, given: Tensor, rng: np.random.Generator, capacity: int) -> None:
        self.J, self.given, self.rng = J, given, rng
        self.fact = LanczosFactorization(J, given, self._memory(capacity))
        self.main: LanczosFactorization | None = self.fact
        self.start = Start()
        self.bounds = Bounds()
        self.log = Monitor()

    def ask(self, goal: Goal, J: Products, maxiter: int, callback: Callable[[dict[str, Any]], None] | None) -> None:
        """What to search for, from the start or in the factorization that is there."""
        self.goal, self.J, self.fact.J = goal, J, J
        self.phase, self.n_seen = "main", 0
        self.found = self.fixed = self._nothing
        self.chance = 0.0
        self.nullity: Nullity | None = None
        if self.fact.shares is not None:
            self.bounds = Bounds()
        self.log.begin(J, maxiter, callback)

    def close(self) -> bool:
        """Hold no more than a later search can go on from; whether it can."""
        self.log.end()
        main = self.main
        self.found = self.fixed = self._nothing
        if main is None or main.is_empty or len(self.given):
            return False
        self.fact = main
        if 6 * main.m < len(main.storage):  # while there are two, they take no more than a search may take
            main.move(self._memory(main.m))
        return True

    def reopen(self, top: int, bottom: int, capacity: int) -> bool:
        """Make room for that many vectors; whether those that are there fit in, and can lead to what is asked for."""
        main = self.fact
        if main.shares is None and (top > self.goal.top or bottom > self.goal.bottom):  # a restart left those out
            return False
        if 6 * len(main.w) > capacity < self.goal.n:  # or there is no room for the next restart
            return False
        if len(main.storage) != capacity:
            if 6 * len(main.storage) > capacity:  # both are more than a search may take
                return False
            main.move(self._memory(capacity))
        return True

    def _memory(self, capacity: int) -> Tensor:
        return self.given.new_empty(len(self.given) + capacity, self.J.shape[1])

    def draw(self, p: int) -> Tensor:
        return self.fact.tensor(self.rng.standard_normal((p, self.J.shape[1])))

    def set_apart(self, ritz: RitzPairs) -> None:
        """Keep what was found and some more in `fixed`, and leave `fact` for what is orthogonal to it."""
        # what is missed is orthogonal to all of V: any part of it may be left out of the search, the ends help most
        fact = self.fact
        ends = self._ends(fact.m, fact.m if fact.is_exhausted else min(fact.m // 4, fact.capacity // 32))
        self.found = self.found._replace(rows=self._nothing.rows)  # they are among the others
        self.fixed = Found(ritz.values[ends], ritz.norms[ends], fact.vectors(ritz.coefficients[:, ends]))
        room = fact.capacity - fact.m - len(ends)
        is_enough = room >= max(0.6 * fact.capacity, 6 * self.goal.k + 20)
        if len(self.given) == 0 and fact.capacity < fact.n and is_enough:
            self.fact = LanczosFactorization(self.J, self.given, fact.storage[fact.m :], fact.scale)
        else:
            self.main = None

    def _ends(self, m: int, more: int) -> NDArray[np.intp]:
        """Of m ascending values, what is wanted and some more, as long as a probe has room beside them to restart."""
        goal, capacity = self.goal, len(self.fact.storage) - len(self.given)
        if capacity < goal.n:
            more = min(more, (capacity - 4 * goal.k - 20 - goal.top - goal.bottom) // 2)
        low = min(goal.bottom + more, m)
        return np.r_[:low, max(low, m - goal.top - more) : m]

    def join(self, new: Tensor) -> None:
        """Rayleigh–Ritz of what was found and what joins it, by F times the latter."""
        fact, old = self.fact, len(self.fixed.rows)
        _, f_new = fact.multiply(new)
        rows = torch.cat([self.fixed.rows, new])
        beside = inner(rows, f_new)
        t = np.zeros((len(rows), len(rows)))
        t[:old, :old] = np.diag(self.fixed.values)
        t[:, old:], t[old:, :] = beside, beside.T
        theta, y = eigh((t + t.T) / 2)
        wanted, ends = self.goal.wanted(len(theta)), self._ends(len(theta), len(theta))
        nothing = np.zeros(len(theta))
        self.found = Found(theta[wanted], nothing[wanted], self._nothing.rows)
        self.fixed = Found(theta[ends], nothing[ends], combine(rows, fact.tensor(y[:, ends].T)))

    def estimate_number(self, y: NDArray) -> Nullity | None:
        """How many of N eigenvalues stand behind Ritz vectors: N × the random start's share in them."""
        if self.start.vectors is None:
            return None
        b = len(self.start.vectors)
        share = np.square(np.einsum("ij,ik", y, inner(self.fact.v, self.start.vectors))).sum() / b
        count = share * self.goal.n
        return Nullity(count, math.sqrt(2 * count / b))

    def answer(self) -> Answer:
        """What is found, and why it is believed to be the extreme pairs."""
        evidence = Evidence(
            "krylov",
            n_start=0 if self.start.vectors is None else len(self.start.vectors),
            is_probed=self.log.probes > 0,
            chance=self.chance,
            confidence=0.0 if self.bounds == Bounds() else 1 - 2 * DELTA,
        )
        bounds = self.bounds.times(self.fact.scale**2)
        details = {}
        if self.nullity is not None:
            proven = np.count_nonzero(self.found.values <= self.goal.tol * self.log.largest)
            details["nullity"] = replace(self.nullity, estimate=max(self.nullity.estimate, float(proven)))
        return self._answer(self.found_rows, evidence, (bounds.low, bounds.high), details)

    def partial(self) -> Answer:
        """What there is."""
        if self.has_found:
            return self._answer(self.found_rows)
        y = self.fact.ritz().coefficients
        return self._answer(self.fact.vectors(y[:, self.goal.wanted(self.fact.m)]))

    @property
    def _nothing(self) -> Found:
        return Found(np.empty(0), np.empty(0), self.given[:0])

    @property
    def has_found(self) -> bool:
        """Whether the wanted pairs have converged once."""
        return len(self.found.values) > 0

    @property
    def has_partial(self) -> bool:
        return self.has_found or self.fact.m > 0

    def _answer(
        self,
        rows: Tensor,
        evidence: Evidence | None = None,
        bounds: tuple[float, float] = (0.0, np.inf),
        details: Mapping[str, Any] | None = None,
    ) -> Answer:
        vectors = rows.flip(0).T.cpu().numpy()
        top = min(self.goal.top, vectors.shape[1])
        details = {"restarts": self.log.restarts, "history": self.log.history} | dict(details or {})
        ends, earlier = (vectors[:, :top], vectors[:, top:]), self.log.earlier
        return Answer(*ends, evidence, bounds, details, n_earlier=earlier, quadratures=self.start.quadratures)

    @property
    def found_rows(self) -> Tensor:
        """The vectors of what was found, which may be the first and the last of those set apart."""
        rows = self.fixed.rows
        if len(self.found.rows) or len(rows) == 0:
            return self.found.rows
        return torch.cat([rows[: self.goal.bottom], rows[len(rows) - self.goal.top :]])

    def write(self, at_once: bool = False) -> None:
        """To the checkpoint, when it is time to; nothing but the factorization has changed since the phase began."""
        is_over = self.phase == "look" or (self.phase == "main" and self.has_found)
        if self.log.checkpoint is not None and not self.fact.is_empty and not is_over:
            self.log.checkpoint.offer(self, at_once)

    def write_last(self) -> None:
        """Before the search is left, which it is in any case."""
        try:
            self.write(at_once=True)
        except OSError as error:
            checks.warn(f"the search could not be written to its checkpoint, where it is older now: {error}")
