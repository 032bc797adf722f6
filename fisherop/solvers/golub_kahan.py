"""Both ends of the spectrum from one factorization: block Golub–Kahan–Lanczos with thick restart."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fisherop import checks
from fisherop.jacobian import is_same, uncounted
from fisherop.krylov.bounds import DELTA, RitzPairs, outer_bounds, would_show
from fisherop.krylov.search import Found, Goal, Search, Start, Stop
from fisherop.operators import FisherOperator
from fisherop.result import Answer, SolverStopped

_EPS64 = float(np.finfo(np.float64).eps)
_RANDOM_PART = 0.1  # of a start from v0
_FRESH = 30  # random vectors that may be added because of rounding


def golub_kahan(
    operator: FisherOperator,
    k: int,
    which: str,
    *,
    tol: float,
    maxiter: int | None,
    rng: np.random.Generator,
    max_basis: int | None = None,
    basis_memory: int = 2**30,
    v0: NDArray | None = None,
    orthogonal_to: NDArray | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
    state: dict[str, Any] | None = None,
) -> Answer:
    """The largest and the smallest eigenvalues of F together, by Golub–Kahan–Lanczos bidiagonalization of J.

    Only the right vectors V are kept, with full reorthogonalization: with J V = U B, all that is needed beside them is
    T = BᵀB = VᵀF V [1]_. T is small, in float64; its eigenpairs give the Ritz pairs of F and, without further products,
    their residuals. When V is full, the search restarts from harmonic Ritz vectors of both ends [2]_ [3]_.

    A Krylov space from one random vector holds one vector of each eigenspace. So for k > 1 further random vectors are
    added: as a block from the start, if N − M ≥ k eigenvalues are known to be zero; during the run, if the start
    vector's share in the nearly null Ritz vectors shows that there are several; or after convergence, orthogonal to
    what was found, to look for missed eigenvalues.

    Parameters
    ----------
    maxiter : int, optional
        Block steps, by default 10,000.
    max_basis : int, optional
        Vectors in V, by default as many as `basis_memory` holds, at most 1500.
    basis_memory : int
        Bytes for V. All else that is held takes at most a fifth of that, and products need temporary memory. With glibc
        before 2.38 the process may grow further, since it does not use the gaps between aligned tensors again: set
        ``MALLOC_MMAP_THRESHOLD_`` to 1000000 in its environment.
    v0 : ndarray, shape (N,) or (N, p), optional
        Where to start: from the sum of these, of unit norm each, and a random vector of norm 0.1, so that no
        eigenvector is left out.
    orthogonal_to : ndarray, shape (N, q), optional
        Eigenvectors found before at the ends asked for, orthonormal: the next k pairs at each end are found.
        `eigenpairs` puts both in its result, and examines them together.
    callback : callable, optional
        Called after each check of convergence with the newest entry of the history, a dict: ``"n_products"``, and under
        ``"largest"`` and ``"smallest"`` a pair (Ritz values, residual norms) of the wanted pairs, by descending value.
    state : dict, optional
        Pass ``{}`` at first. The search is stored there, however it ends; pass the same dict again to go on, for more
        pairs, the other end, a smaller tol, or after it was stopped. It goes on by its own random stream. The basis V
        takes memory as long as the dict lives. "Resuming" in docs/design.md lists when a search starts over
        nevertheless.

    Returns
    -------
    Answer
        In its details: ``nullity``, an estimate of how many eigenvalues are null to tol, if any are (too large if no
        gap separates them from the next); ``history``, a list, whose product counts include earlier calls on the same
        search; ``restarts``. Its bounds hold with probability 0.998 over the random start, see `chance_of_missing`.

    Raises
    ------
    SolverStopped
        Not converged in `maxiter` steps, or, with `state`, interrupted from the keyboard (then its cause is the
        `KeyboardInterrupt`, which `eigenpairs` raises in the end); it carries the Ritz vectors.
    ValueError
        `max_basis` or `basis_memory` is too small; `v0` or `orthogonal_to` has another shape than these, or the columns
        of the latter are not orthonormal; or `state` is that of another operator.

    References
    ----------
    .. [1] G. H. Golub and W. Kahan, Calculating the singular values and pseudo-inverse of a matrix, SIAM J. Numer.
       Anal. 2 (1965). G. H. Golub and R. Underwood, The block Lanczos method for computing eigenvalues, in:
       Mathematical Software III (1977). H. D. Simon and H. Zha, Low-rank matrix approximation using the Lanczos
       bidiagonalization process, SIAM J. Sci. Comput. 21 (2000): one-sided reorthogonalization; when to repeat it:
       J. W. Daniel, W. B. Gragg, L. Kaufman and G. W. Stewart, Reorthogonalization and stable algorithms for updating
       the Gram–Schmidt QR factorization, Math. Comp. 30 (1976).
    .. [2] K. Wu and H. Simon, Thick-restart Lanczos method for large symmetric eigenvalue problems, SIAM J. Matrix
       Anal. Appl. 22 (2000).
    .. [3] R. B. Morgan, Computing interior eigenvalues of large matrices, Linear Algebra Appl. 154–156 (1991): harmonic
       Ritz vectors. J. Baglama and L. Reichel, Augmented implicitly restarted Lanczos bidiagonalization methods, SIAM
       J. Sci. Comput. 27 (2005): with restarts, for the smallest end.
    """
    n = operator.shape[0]
    top, bottom = (k if which in (end, "both") else 0 for end in ("largest", "smallest"))
    v0 = None if v0 is None else _columns(v0, "v0", n)
    given = np.empty((n, 0)) if orthogonal_to is None else _columns(orthogonal_to, "orthogonal_to", n)
    if callback is not None:
        checks.function("callback", callback, "callable, or None")
    q = given.shape[1]
    if q + top + bottom > n:
        raise ValueError(
            f"{top + bottom} pairs beside {q} columns of orthogonal_to are more than N = {n}: ask for fewer"
        )
    deviation = np.abs(given.T @ given - np.eye(q)).max(initial=0.0)
    if deviation > 1000 * np.finfo(operator.dtype).eps:
        raise ValueError(
            f"orthogonal_to must have orthonormal columns, got {q} that deviate from that by {deviation:.1g}: use "
            "numpy.linalg.qr"
        )
    capacity = _capacity(n - q, k, n * operator.dtype.itemsize, max_basis, basis_memory)
    J = operator.products
    goal = Goal(top, bottom, tol, n - q, n - q - J.shape[0], float(np.finfo(operator.dtype).eps))
    search = checkpoint = None
    if state is not None:
        if not is_same(J, state.setdefault("products", uncounted(J))):
            raise ValueError("state belongs to another operator: pass an empty dict")
        checkpoint = state.get("checkpoint")
        is_read = checkpoint is not None and checkpoint.read(operator.linearization, n, capacity)
        kept = checks.instance("state['search']", state.get("search"), (Search, type(None)), "what a search left")
        search = None if is_read else kept
        state.pop("search", None)
    if len(given.T) or v0 is not None:
        rng, search = _independent(rng, given, v0), None
    if search is not None and not search.reopen(top, bottom, capacity):
        search = None  # before there is another
    if search is None:
        rows = torch.as_tensor(given.T, dtype=J.dtype, device=J.device)
        search = Search(J, rows, rng, capacity)
    search.ask(goal, J, maxiter or 10_000, callback)
    try:
        if checkpoint is not None:
            checkpoint.attach(search)
        if search.phase == "main":
            _begin(search, v0)
            ritz = converge(search)
            is_random = search.start.vectors is not None and len(search.given) == 0
            seen = search.fact.quadratures(search.start.count) if is_random else []
            search.start = replace(search.start, quadratures=tuple(seen))
            null = ritz.values <= goal.tol * search.log.largest
            if goal.bottom and null.any():
                search.nullity = search.estimate_number(ritz.coefficients[:, null])
            search.n_seen = search.start.count  # a start vector shows one vector of each eigenspace
            if search.n_seen < k:
                search.phase = "look"
                search.set_apart(ritz)
        while search.phase == "join" or search.n_seen < k:
            if search.phase != "join" and not probe(search, 1 if search.n_seen == search.start.count else k):
                break
            converge(search)
            search.phase = "look"
        return search.answer()
    except Stop as stop:
        raise SolverStopped(str(stop), search.partial(), by_rounding=stop.by_rounding) from None
    except (KeyboardInterrupt, SystemExit) as interrupt:
        search.write_last()
        if isinstance(interrupt, SystemExit) or state is None or not search.has_partial:
            raise
        raise SolverStopped("golub_kahan was interrupted", search.partial()) from interrupt
    finally:
        if state is not None and search.close():
            state["search"] = search


def _begin(search: Search, v0: NDArray | None) -> None:
    """Start from v0 and one random vector, or from random vectors: as many as eigenvalues are wanted at the bottom, if
    so many are known to be zero, else one.
    """
    goal, fact = search.goal, search.fact
    block = goal.k if goal.bottom and goal.zeros >= goal.k else 1
    if not fact.is_empty:  # of an earlier call
        if len(fact.w) < block:
            fact.extend(search.draw(block - len(fact.w)))
    elif v0 is None:
        start = search.draw(block)
        fact.extend(start)
        search.start = Start(fact.w.clone(), len(start))
    else:
        start = search.draw(1)
        columns = v0 / np.abs(v0).max(axis=0)
        given = fact.tensor((columns / np.linalg.norm(columns, axis=0)).sum(axis=1))
        start = _RANDOM_PART * start / torch.linalg.vector_norm(start) + given
        search.start = Start(None, 1, DELTA)  # v0 may hold what was found before, and hide the rest
        fact.extend(start, _RANDOM_PART / float(torch.linalg.vector_norm(start)))


def converge(search: Search) -> RitzPairs:
    """Expand and restart until the wanted pairs have converged and, in a first run, further ones are improbable."""
    fact, goal, log = search.fact, search.goal, search.log
    is_first, log.next_check = not search.has_found, 0
    may_grow = is_first and search.start.count < goal.k <= goal.bottom
    ritz = fact.ritz() if fact.m > 0 else _advance(search)
    while True:
        log.largest = max(log.largest, ritz.values[-1])
        wanted = goal.wanted(len(ritz))
        log.record(goal, ritz.values[wanted], ritz.norms[wanted], fact.scale)
        if fact.is_complete or (goal.met_by(ritz, log.largest) and not (is_first and _may_lack(search, ritz))):
            break
        nearly_null = ritz.values <= 100 * goal.tol * log.largest
        if fact.is_exhausted:
            fact.extend(search.draw(goal.k))
        elif may_grow and len(fact.w) < goal.k and nearly_null[0]:
            may_grow = False
            number = search.estimate_number(ritz.coefficients[:, nearly_null])
            if number is None or number.estimate - 2 * number.standard_error > 1:
                fact.extend(search.draw(goal.k - len(fact.w)))
        make_room(search, ritz)
        ritz = _advance(search)
    if is_first:
        search.bounds &= outer_bounds(ritz)
    search.found = Found(ritz.values[wanted], ritz.norms[wanted], fact.vectors(ritz.coefficients[:, wanted]))
    return ritz


def _may_lack(search: Search, ritz: RitzPairs) -> bool:
    """Whether an eigenvalue more than 2 tol beyond the pairs is still so probable that the search must go on."""
    goal, largest = search.goal, search.log.largest
    risk = goal.risk(len(ritz), search.start.accepted)
    search.chance = goal.chance_of_more(ritz, largest)
    if search.chance > risk >= goal.chance_of_more(ritz, largest, noise=0.0):
        _outweigh_rounding(search)
    return search.chance > risk


def probe(search: Search, p: int) -> bool:
    """Look for missed eigenvalues, from p random vectors orthogonal to what was found; return whether any were found.

    It ends when each Ritz pair that belongs among the wanted ones has converged, and others are improbable. What it
    finds starts a new factorization together with the earlier vectors, because the two sets converged separately.
    """
    goal, log, fact, found = search.goal, search.log, search.fact, search.found
    aim = goal.tol * log.largest
    low, high = found.values[: goal.bottom], found.values[len(found.values) - goal.top :]
    below = goal.bottom and low[-1] > aim and low[0] < low[-1] - aim
    above = goal.top and high[-1] > high[0] + aim
    is_on = search.phase == "probe"
    if not (below or above) or (not is_on and goal.n <= len(search.fixed.rows)):
        # a missed vector belongs to an eigenvalue already found: if these are equal, or null to tol, no index changes
        return False
    log.next_check = 0
    if not is_on:
        log.probes += 1
        fact.reset(search.given, search.fixed.rows)
        fact.extend(search.draw(p))
        search.phase = "probe"
    ritz = fact.ritz() if is_on and fact.m > 0 else _advance(search)
    while True:
        log.record(goal, found.values, found.norms, fact.scale)
        t, norms = ritz.values, ritz.norms
        # the pairs that belong among the wanted ones, at most as many as are wanted
        i = min(np.count_nonzero(t < low[-1] - aim), goal.bottom) if below else 0
        j = min(np.count_nonzero(t > high[0] + aim), goal.top) if above else 0
        joined = np.r_[:i, len(t) - j : len(t)]
        has_converged = (norms[joined] <= aim) | ((t[joined] <= aim) & (joined < i))
        ends = [low[-1] - aim] if below and i < min(goal.bottom, len(t)) else []
        ends += [high[0] + aim] if above and j < min(goal.top, len(t)) else []
        if has_converged.all() and (fact.is_complete or i + j < len(t)):
            others = slice(i, len(t) - j)
            if fact.is_complete or all(would_show(ritz, x, others, aim) for x in ends):
                break
            if all(would_show(ritz, x, others, aim, noise=0.0) for x in ends):
                _outweigh_rounding(search)
        if fact.is_exhausted:
            fact.extend(search.draw(goal.k))
        make_room(search, ritz)
        ritz = _advance(search)
    search.phase = "look"  # write no checkpoint until the next phase: `found` and `fixed` change now, too
    if len(joined):
        search.join(fact.vectors(ritz.coefficients[:, joined]))
        fact.reset(search.given)
        fact.extend(search.found_rows, random_part=0.0)
        search.phase = "join"
    search.n_seen += p
    return len(joined) > 0


def _advance(search: Search) -> RitzPairs:
    """Expand until it is time to look."""
    log = search.log
    while True:
        if log.n_steps == log.maxiter:
            search.write_last()
            raise Stop(f"golub_kahan took {log.maxiter} steps")
        search.fact.expand()
        search.write()
        if log.step(search.fact):
            return search.fact.ritz()


def make_room(search: Search, ritz: RitzPairs) -> None:
    """Restart, where V is full, with the wanted pairs and some more."""
    goal, log, fact = search.goal, search.log, search.fact
    if not fact.is_full or fact.is_complete:
        return
    if not search.has_found:
        search.bounds &= outer_bounds(ritz)  # a restart loses the random start
    log.restarts += 1
    spare = (fact.capacity - goal.k) // 3
    low, high = (goal.bottom + spare, goal.top + 3) if goal.bottom else (0, goal.top + spare)
    # negative Ritz values are rounding, and T + shift must be positive definite; its condition, too, costs precision
    relative = max(goal.tol / 10, 10 * goal.eps, (10 * _EPS64 / goal.tol) ** 2) if goal.bottom else 1.0
    shift = max(relative * log.largest, -2 * ritz.values[0])
    fact.restart(low, high, shift)
    log.next_check = 0


def _outweigh_rounding(search: Search) -> None:
    """Add a random start vector: rounding may hide an eigenvector from some start vectors, but hardly from all."""
    search.log.fresh += 1
    if search.log.fresh > _FRESH:
        raise Stop("rounding of the products hides what eigenvalues may lie 2 tol beyond those found", by_rounding=True)
    search.fact.extend(search.draw(1))


def _independent(rng: np.random.Generator, *given: NDArray | None) -> np.random.Generator:
    """A stream that has nothing to do with vectors that may have been found with the same seed."""
    place = zlib.crc32(b"".join(array.tobytes() for array in given if array is not None))
    sequence: Any = rng.bit_generator.seed_seq
    return np.random.default_rng(np.random.SeedSequence(sequence.entropy, spawn_key=(*sequence.spawn_key, place)))


def _columns(array: Any, name: str, n: int) -> NDArray[np.float64]:
    columns = checks.array(name, array)
    columns = columns[:, None] if columns.ndim == 1 else columns
    if columns.ndim != 2 or len(columns) != n or not columns.any(axis=0).all():
        checks.refuse(ValueError, name, f"an array of shape ({n},) or ({n}, p), without zero columns", array)
    return columns.astype(np.float64)


def _capacity(n: int, k: int, row_bytes: int, max_basis: int | None, basis_memory: int) -> int:
    """How many vectors of so many bytes V may have, in n dimensions."""
    least = min(n, 6 * k + 20)
    what = f"an integer of at least min(N, 6 k + 20) = {least}"
    max_basis = checks.integer("max_basis", max_basis, least, what=what, optional=True)
    basis_memory = checks.memory("basis_memory", basis_memory)
    affordable = min(1500, int(basis_memory // row_bytes)) if max_basis is None else max_basis
    if affordable < least:
        raise ValueError(
            f"basis_memory={basis_memory} holds {affordable} vectors of {row_bytes} bytes, but k={k} needs {least}: "
            f"pass basis_memory={least * row_bytes}"
        )
    return min(n, affordable)
