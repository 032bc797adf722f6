"""Both ends of the spectrum from one factorisation: block Golub–Kahan–Lanczos with thick restart."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fisherop import checks
from fisherop.jacobian import check_size, shared
from fisherop.model.undisturbed import uninterrupted
from fisherop.operators import FisherOperator
from fisherop.result import Answer, Evidence, Nullity, SolverStopped

_DELTA = 1e-3  # the probability of a wrong bound, or of a vector that a probe misses
_CHANCE = 0.3  # of an eigenvalue beyond those claimed, by more than 2 tol, at which a first run may end
_CHEAP, _SMALL = 30, 1000  # up to so many vectors, or for N up to that, it may not end before that chance is below δ
_RANDOM_PART = 0.1  # of a start from v0
_PIECE = 2**12  # columns in one sum
_EPS64 = float(np.finfo(np.float64).eps)
_FRESH = 30  # random vectors that may join against rounding
_SLAB = 2**16  # columns that go through temporary memory at a time


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
    """The largest and the smallest eigenvalues of F together, by Golub–Kahan–Lanczos bidiagonalisation of J.

    The basis V of the input side is orthogonalised in full, the left vectors are not kept: with ``J V = U B`` only
    ``T = BᵀB = VᵀF V`` is needed, and V [1]_. T is small, in float64; its eigenpairs give the Ritz pairs of F and, for
    free, their residuals. Where V is full, harmonic Ritz vectors of both ends replace it [2]_ [3]_.

    A Krylov space from one random vector holds one vector of each eigenspace. For k > 1 further random vectors join:
    in a block from the start, where N − M ≥ k zeros are known; as soon as the share of the start vector in the smallest
    Ritz vectors says that several eigenvalues lie there; or after convergence, orthogonal to what was found, to look
    for eigenvalues that were missed.

    Parameters
    ----------
    maxiter : int, optional
        Block steps, by default 10,000.
    max_basis : int, optional
        Vectors in V, by default as many as `basis_memory` holds, at most 1500.
    basis_memory : int
        Bytes for V; all that is held beside it is at most a fifth of that. (The process may grow by more, where glibc
        is older than 2.38 and can't use again the holes that aligned tensors leave: set ``MALLOC_MMAP_THRESHOLD_`` to
        1000000 in its environment.)
    v0 : ndarray, shape (N,) or (N, p), optional
        Where to start: from the sum of these, of unit norm each, and a random vector of norm 0.1, so that no
        eigenvector is left out.
    orthogonal_to : ndarray, shape (N, q), optional
        Eigenvectors found before at the ends asked for, orthonormal: the next k pairs at each end are found.
        `eigenpairs` puts both in its result, and examines them together.
    callback : callable, optional
        Called after each check of convergence with the newest entry of the history: a dict of the products so far, and
        the Ritz values and residuals (by descending value) that are wanted at the ``"largest"`` and ``"smallest"`` end.
    state : dict, optional
        Empty, for the search to stay in it, however it ends; with a search of this operator, to go on from there, by
        its own random stream, for more pairs, the other end, a smaller tol, or after it was stopped. For k > 1 the look
        for missed eigenvalues starts over, so that `maxiter` must cover it. V takes memory as long as the dict lives.
        A search begins anew with `v0` or `orthogonal_to`, which also discard the one that was kept; for more pairs or
        the other end after a restart, which kept no more than was wanted then; with another `max_basis`, where V took
        more than a sixth of it; and where the look for missed eigenvalues needed the memory of V: where V could hold
        all N, or took more than about a third of `max_basis`. A `fisherop.checkpoint.Checkpoint` at ``"checkpoint"``
        writes the search to a file as it goes, and a search that it has read goes on from there.

    Returns
    -------
    Answer
        In its details: ``nullity``, where some eigenvalues are null to tol (too large where others follow without a
        gap, since Ritz vectors hold a part of those); ``history``, a list, which counts the products of a search that
        this call went on from, too; ``restarts``. Its bounds hold with probability 0.998 over the random start, see
        `chance_of_missing`.

    Raises
    ------
    SolverStopped
        Not converged in `maxiter` steps, or, with `state`, interrupted from the keyboard (then its cause is the
        `KeyboardInterrupt`, which `eigenpairs` raises in the end); it carries the Ritz vectors.
    ValueError
        `max_basis` or `basis_memory` is too small, or `v0` or `orthogonal_to` has another shape than these.

    References
    ----------
    .. [1] G. H. Golub and W. Kahan, Calculating the singular values and pseudo-inverse of a matrix, SIAM J. Numer.
       Anal. 2 (1965). G. H. Golub and R. Underwood, The block Lanczos method for computing eigenvalues, in:
       Mathematical Software III (1977). H. D. Simon and H. Zha, Low-rank matrix approximation using the Lanczos
       bidiagonalization process, SIAM J. Sci. Comput. 21 (2000): one-sided reorthogonalisation; when to repeat it:
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
    deviation = np.abs(given.T @ given - np.eye(given.shape[1])).max(initial=0.0)
    if deviation > 1000 * np.finfo(operator.dtype).eps or given.shape[1] + top + bottom > n:
        raise ValueError(
            f"orthogonal_to must have at most N - {top + bottom} = {n - top - bottom} orthonormal columns, got "
            f"{given.shape[1]} that deviate from orthonormality by {deviation:.1g}: use numpy.linalg.qr"
        )
    capacity = _capacity(n - given.shape[1], k, operator.dtype.itemsize, max_basis, basis_memory)
    lin = operator.linearization
    search = checkpoint = None
    if state is not None:
        if state.setdefault("linearization", shared(lin)) is not shared(lin):
            raise ValueError("state belongs to another operator: pass an empty dict")
        checkpoint = state.get("checkpoint")
        is_read = checkpoint is not None and checkpoint.read(lin, capacity)
        kept = checks.instance("state['search']", state.get("search"), (_Search, type(None)), "what a search left")
        search = None if is_read else kept
        state.pop("search", None)
    if len(given.T) or v0 is not None:
        rng, search = _independent(rng, given, v0), None
    if search is not None and not search.reopen(top, bottom, capacity):
        search = None  # before there is another
    if search is None:
        rows = torch.as_tensor(given.T, dtype=lin.image.dtype, device=lin.image.device)
        search = _Search(lin, rows, rng, capacity)
    search.lin = search.main.lin = lin  # the one that counts for this run
    search.ask(top, bottom, tol, maxiter or 10_000, callback)
    try:
        if checkpoint is not None:
            checkpoint.attach(search)
        if search.phase == "main":
            search.find(k if bottom and search.zeros >= k else 1, v0)
        search.look_for_missed()
        return search.answer()
    except (KeyboardInterrupt, SystemExit) as interrupt:
        search._write_last()
        if isinstance(interrupt, SystemExit) or state is None or not search.has_partial:
            raise
        raise SolverStopped("golub_kahan was interrupted", search.partial()) from interrupt
    finally:
        if state is not None and search.close():
            state["search"] = search


def _independent(rng: np.random.Generator, *given: NDArray | None) -> np.random.Generator:
    """A stream that has nothing to do with vectors that may have been found with the same seed."""
    place = zlib.crc32(b"".join(array.tobytes() for array in given if array is not None))
    sequence = rng.bit_generator.seed_seq
    return np.random.default_rng(np.random.SeedSequence(sequence.entropy, spawn_key=(*sequence.spawn_key, place)))


def _columns(array: Any, name: str, n: int) -> NDArray[np.float64]:
    columns = checks.array(name, array)
    columns = columns[:, None] if columns.ndim == 1 else columns
    if columns.ndim != 2 or len(columns) != n or not columns.any(axis=0).all():
        checks.refuse(ValueError, name, f"an array of shape ({n},) or ({n}, p), without zero columns", array)
    return columns.astype(np.float64)


def chance_of_missing(
    x: float, theta: NDArray, residuals: NDArray, start: NDArray, n: int, noise: float = 0.0
) -> float:
    """A bound on the probability that F has an eigenvalue x, beyond all Ritz values, that a Krylov space doesn't show.

    Let F V = V T + W C + E, E the rounding of products, and h the unit eigenvector. Then hᵀ(F V − x V) = 0 gives ``(T
    − x) Vᵀh = −Cᵀ Wᵀh − Eᵀh``, so that the share of h in p random unit vectors V S within the space, ``SᵀVᵀh``, has a
    norm of at most ``q = ‖C (T − x)⁻¹ S‖₂ + noise · ‖(T − x)⁻¹ S‖₂``, where ``|hᵀE y| ≤ noise · ‖y‖``: see "Bounds
    under rounding" in docs/design.md. For random vectors in n dimensions, n times the square of that share is nearly
    χ² with p degrees of freedom. For p = 1 this is the bound by Lanczos polynomials of J. L. M. van Dorsselaer, M. E.
    Hochstenbach and H. A. van der Vorst, Computing probabilistic bounds for extreme eigenvalues of symmetric matrices
    with the Lanczos method, SIAM J. Matrix Anal. Appl. 22 (2001). It takes the polynomial of this run; that of J.
    Kuczyński and H. Woźniakowski, Estimating the largest eigenvalue by the power and Lanczos algorithms with a random
    start, SIAM J. Matrix Anal. Appl. 13 (1992), holds for any spectrum and is wider. q falls as x goes outwards: what
    holds for x holds for anything beyond.

    Parameters
    ----------
    x : float
    theta : ndarray, shape (m,)
        Ritz values.
    residuals : ndarray, shape (b, m)
        C times the eigenvectors of T.
    start : ndarray, shape (p, m)
        Sᵀ times the eigenvectors of T.
    n : int
    noise : float
        Of the rounding of a product, the part along one unit vector, in the units of `theta`.
    """
    p, q, distances = len(start), 0.0, theta - x
    if p == 0:  # nothing is known of a start
        return 1.0
    if noise == 0 and not residuals.any():
        return 0.0
    if not distances.all():  # x is rounded to a Ritz value
        return 1.0
    if residuals.any():
        q += np.linalg.norm((residuals / distances) @ start.T, 2)
    if noise > 0 and len(theta):
        q += noise * np.linalg.norm(start / distances, 2)
    if q == 0:
        return 0.0
    return math.exp(min(0.0, p / 2 * math.log(n * q**2 / 2) - math.lgamma(p / 2 + 1)))


def _capacity(n: int, k: int, itemsize: int, max_basis: int | None, basis_memory: int) -> int:
    least = min(n, 6 * k + 20)
    what = f"an integer from 6 k + 20, or N, here {least}"
    max_basis = checks.integer("max_basis", max_basis, least, what=what, optional=True)
    basis_memory = checks.memory("basis_memory", basis_memory)
    affordable = min(1500, int(basis_memory // (n * itemsize))) if max_basis is None else max_basis
    if affordable < least:
        raise ValueError(
            f"basis_memory={basis_memory} holds {affordable} vectors of {n} elements, of at least {least} that k={k} "
            f"needs: pass basis_memory={least * n * itemsize}"
        )
    return min(n, affordable)


class _Space:
    """F V = V T + W C: orthonormal columns V (N, m), the next block W (N, b), T = VᵀF V (m, m), C (b, m).

    Vectors are kept as rows. F stands for P F P / scale², P a projection on the complement of the orthonormal `fixed`,
    and `scale` keeps norms from overflow.
    """

    def __init__(self, linearization: Any, fixed: Tensor, rows: Tensor, scale: float) -> None:
        self.lin = linearization
        self.eps = torch.finfo(fixed.dtype).eps
        self.rows = rows  # memory for fixed and V
        self._block = fixed[:0]
        self.scale = scale
        self.noise = 0.0  # of F v, the part along one unit vector, in units of T
        self.begin(fixed)

    def begin(self, *fixed: Tensor) -> None:
        """Empty, beside what is fixed now, in the same memory."""
        self.n_fixed = 0
        for rows in fixed:
            self.rows[self.n_fixed : self.n_fixed + len(rows)] = rows
            self.n_fixed += len(rows)
        self.n = self.lin.image_size - self.n_fixed  # the dimension of the complement
        self.capacity = min(len(self.rows) - self.n_fixed, self.n)
        self.w = self._block[:0]
        self.t, self.c = np.empty((0, 0)), np.empty((0, 0))
        self.shares = np.empty((0, 0))  # the random vectors that joined, (p, m + b): in coordinates of V and W
        self.is_restarted = False
        self.is_whole = True  # an interrupt came not in the midst of a change

    def restore(self, v: Tensor, w: Tensor, t: NDArray, c: NDArray, shares: NDArray) -> None:
        """As it once was, beside what is fixed now."""
        self.is_whole = False
        self.rows[self.n_fixed : self.n_fixed + len(v)] = v
        self.t, self.c, self.shares = t, c, shares
        self._keep(w)
        self.is_whole = True

    def move(self, rows: Tensor) -> None:
        """To other memory."""
        used = self.n_fixed + self.m
        rows[:used] = self.rows[:used]
        self.rows, self.capacity = rows, min(len(rows) - self.n_fixed, self.n)

    @property
    def m(self) -> int:
        return len(self.t)

    @property
    def v(self) -> Tensor:
        return self.rows[self.n_fixed : self.n_fixed + self.m]

    @property
    def is_full(self) -> bool:
        return self.m + len(self.w) > self.capacity

    def tensor(self, array: NDArray | Tensor) -> Tensor:
        return torch.as_tensor(array, dtype=self.rows.dtype, device=self.rows.device)

    def _keep(self, w: Tensor) -> None:
        """As the next block, in one place: new memory at every step would leave holes between older pieces."""
        if len(w) > len(self._block):
            self._block = torch.empty_like(w)
        self.w = self._block[: len(w)].copy_(w)

    def append(self, block: Tensor, random_part: float = 1.0) -> None:
        """Let vectors (p, N) join the next block, of which so large a part is random; F V has no part in them."""
        unit = block / torch.linalg.vector_norm(block, dim=1, keepdim=True)
        new = block / torch.linalg.vector_norm(block, dim=1).max()
        for _ in range(2):
            _project(new, self.rows[: self.n_fixed + self.m])
            _project(new, self.w)
            new, _ = _orthonormalise(new, floor=100 * self.eps)
        self.is_whole = False
        self._keep(torch.cat([self.w, new])[: self.n - self.m])
        self.c = np.vstack([self.c, np.zeros((len(new), self.m))])[: len(self.w)]
        if random_part > 0 and not self.is_restarted:
            shares = np.hstack([_inner(unit, self.v), _inner(unit, self.w)])
            beside = 1 - np.square(_inner(unit, self.rows[: self.n_fixed])).sum(axis=1)  # what is fixed
            beside, length = np.sqrt(beside.clip(min=0.0)), np.linalg.norm(shares, axis=1)
            is_inside = length > 0.99 * beside
            shares = shares[is_inside] / (random_part * length[is_inside, None])
            self.shares = np.vstack([self.padded_shares(), shares])
        self.is_whole = True

    def padded_shares(self) -> NDArray[np.float64]:
        """With zeros for what has joined V and W since."""
        return np.pad(self.shares, ((0, 0), (0, self.m + len(self.w) - self.shares.shape[1])))

    @property
    def start(self) -> NDArray[np.float64]:
        """The random unit vectors that V holds, in its coordinates (p, m); none after a restart."""
        shares = self.padded_shares()
        return shares[~shares[:, self.m :].any(axis=1), : self.m]

    def expand(self) -> None:
        """W becomes part of V; what F makes of it, beyond V, becomes W."""
        m, b, w = self.m, len(self.w), self.w
        images, fw = self.multiply(w)
        h = _inner(images, images)
        # what is known of F W: its part in V, by symmetry, and in W
        linked = slice(np.flatnonzero(self.c.any(axis=0))[0], m) if self.c.any() else slice(0, 0)
        fw.addmm_(self.tensor(self.c[:, linked]), self.v[linked], alpha=-1).addmm_(self.tensor(h), w, alpha=-1)
        basis = self.rows[: self.n_fixed + m + b]
        basis[self.n_fixed + m :] = w
        overlaps = []
        for _ in range(3):  # reorthogonalisation
            before = torch.linalg.vector_norm(fw, dim=1)
            overlaps.append(_project(fw, basis))
            if bool((torch.linalg.vector_norm(fw, dim=1) > 0.5 * before).all()):
                break
        t = np.block([[self.t, self.c.T], [self.c, h]])
        size = np.abs(t).max()
        # F W has no part in what it isn't linked to, so that the first overlaps there are rounding
        rounding = overlaps[0][:, self.n_fixed : self.n_fixed + linked.start].abs().max() if linked.start else 0.0
        self.noise = max(self.noise, float(rounding), 4 * self.eps / self.n**0.5 * size)
        # also what is rounding in float32 stays: a direction that is dropped may hold what is beyond the Ritz values
        w, r = _orthonormalise_beside(fw, basis, floor=_EPS64 * size)
        w, r = w[: self.n - m - b], r[: self.n - m - b]
        self.is_whole = False
        self.t, self.c = t, np.hstack([np.zeros((len(r), m)), r])
        self._keep(w)
        self.is_whole = True

    def multiply(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """J times rows, and F times rows, before the projection."""
        images = self.lin.jvp(rows.reshape(len(rows), *self.lin.image_shape))
        if self.scale == 0:
            self.scale = float(images.double().norm()) or 1.0
            check_size(max(self.scale, 1.0), str(rows.dtype).removeprefix("torch."))
        images /= self.scale
        return images, self.lin.vjp(images).reshape(len(rows), -1).div_(self.scale)

    def ritz(self) -> tuple[NDArray, NDArray, NDArray]:
        """Ritz values, ascending; their residuals C y in W's coordinates (b, m); their vectors y in V's, columns."""
        theta, y = _eigh(self.t)
        return theta.numpy(), (torch.from_numpy(self.c) @ y).numpy(), y.numpy()

    def vectors(self, y: NDArray) -> Tensor:
        return self.tensor(y.T) @ self.v

    def restart(self, low: int, high: int, shift: float) -> None:
        """Keep the smallest and the largest harmonic Ritz vectors, of F + shift, and what continues from them.

        With A = T + shift and K = [A; C] they satisfy A q = μ KᵀK q. Where A = L Lᵀ, the right singular vectors of
        [L; C L⁻ᵀ] are Lᵀq, accurate at both ends. For kept vectors Q the residuals of F V Q lie in W − V A⁻¹ Cᵀ,
        orthogonalised to V Q.
        """
        t, c = torch.from_numpy(self.t), torch.from_numpy(self.c)
        factor = torch.linalg.cholesky(t + shift * torch.eye(self.m, dtype=t.dtype, device=t.device))
        beside = torch.linalg.solve_triangular(factor, c.T, upper=False).T
        z = torch.linalg.svd(torch.cat([factor, beside]), full_matrices=False)[2].T
        kept = torch.linalg.solve_triangular(factor.T, z[:, np.r_[:high, self.m - low : self.m]], upper=True)
        q = torch.linalg.qr(kept / torch.linalg.vector_norm(kept, dim=0))[0]
        with uninterrupted():
            self.is_whole = False
            w = self.w.addmm_(self.tensor(torch.cholesky_solve(c.T, factor).T), self.v, alpha=-1)
            t = q.T @ t @ q
            _combine(self.v, self.tensor(q.T))
            self.t = ((t + t.T) / 2).numpy()
            self.shares = np.empty((0, 0))
            basis = self.rows[: self.n_fixed + self.m]
            for _ in range(2):
                _project(w, basis)
            self.w, r = _orthonormalise_beside(w, basis, floor=0.0)
            self.c = r @ (c @ q).numpy()
            self.is_restarted = self.is_whole = True


class _Search:
    """When to stop, when to restart, and whether eigenvalues have been missed."""

    def __init__(self, linearization: Any, given: Tensor, rng: np.random.Generator, capacity: int) -> None:
        self.lin, self.given, self.rng = linearization, given, rng
        self.n = linearization.image_size - len(given)
        self.zeros = self.n - linearization.response_size  # as many eigenvalues, at least, are known to be zero
        self.main: _Space | None = _Space(linearization, given, self._memory(capacity), 0.0)
        self.random: Tensor | None = None  # the random start, if there was one
        self.bounds: tuple[float, float] | None = None  # of all eigenvalues, with probability 1 − 2 δ
        self.starts = 1  # how many vectors of an eigenspace the main space can have seen
        self.accepted = _CHANCE  # see `_chance_of_more`
        self.largest = 0.0  # Ritz value
        self.restarts, self.spent = 0, 0.0
        self.checkpoint: Any = None

    def ask(
        self, top: int, bottom: int, tol: float, maxiter: int, callback: Callable[[dict[str, Any]], None] | None
    ) -> None:
        """What to search for, from the start or in the space that is there."""
        self.top, self.bottom, self.k, self.tol = top, bottom, max(top, bottom), tol
        self.maxiter, self.callback = maxiter, callback
        self.space = self.main
        # "main" until `find` ends; then "look", "probe" in `_probe`, and "join" where what it found converges
        self.phase, self.seen, self.p = "main", 0, 1
        self.found: tuple[NDArray, NDArray, Tensor] | None = None  # values, ascending, residuals, rows: what is wanted
        self.history: list[dict[str, Any]] = []
        self.probes = self.fresh = self.n_steps = self.next_check = 0
        self.chance = 0.0
        self.residual_tol = max(tol / 2, tol - 4 * self.space.eps)  # rounding adds to residuals, hardly to null values
        self.nullity: tuple[float, float] | None = None
        if not self.space.is_restarted:
            self.bounds = None
        self.earlier, self.before = self.spent, self.lin.n_products - self.spent

    def close(self) -> bool:
        """Hold no more than a later search can go on from; whether it can."""
        self.spent = self.lin.n_products - self.before
        space = self.space = self.main
        self.found = self.fixed = self.callback = self.checkpoint = None
        if space is None or not space.is_whole or len(self.given):
            return False
        self.ritz, self.history = None, []
        if 6 * space.m < len(space.rows):  # while there are two, they take no more than a search may take
            space.move(self._memory(space.m))
        return True

    def reopen(self, top: int, bottom: int, capacity: int) -> bool:
        """Make room for that many vectors; whether those that are there fit in, and can lead to what is asked for."""
        space = self.main
        if space.is_restarted and (top > self.top or bottom > self.bottom):  # what it left out would be missed
            return False
        if 6 * len(space.w) > capacity < self.n:  # or there is no room for the next restart
            return False
        if len(space.rows) != capacity:
            if 6 * len(space.rows) > capacity:  # both are more than a search may take
                return False
            space.move(self._memory(capacity))
        return True

    def _memory(self, capacity: int) -> Tensor:
        return self.given.new_empty(len(self.given) + capacity, self.lin.image_size)

    def find(self, block: int, v0: NDArray | None) -> None:
        """The wanted pairs, where repeated eigenvalues may be missed."""
        space = self.space
        if space.m + len(space.w) == 0:
            self._begin(block, v0)
        elif len(space.w) < block:
            space.append(self._draw(block - len(space.w)))
        self._run()
        theta, _, y = self.ritz
        null = theta <= self.tol * self.largest
        if self.bottom and null.any() and self.random is not None:
            self.nullity = self._estimate_number(y[:, null])

    def _begin(self, block: int, v0: NDArray | None) -> None:
        start, random_part = self._draw(block if v0 is None else 1), 1.0
        if v0 is not None:
            v0 = v0 / np.abs(v0).max(axis=0)
            given = self.space.tensor((v0 / np.linalg.norm(v0, axis=0)).sum(axis=1))
            start = _RANDOM_PART * start / torch.linalg.vector_norm(start) + given
            self.accepted, random_part = _DELTA, _RANDOM_PART / float(torch.linalg.vector_norm(start))
        self.starts = len(start)
        self.space.append(start, random_part)
        self.random = self.space.w.clone() if v0 is None else None

    def look_for_missed(self) -> None:
        """Vectors of repeated eigenvalues, of which a Krylov space holds one for each vector that it began with."""
        if self.phase == "main":
            if self.starts >= self.k:
                return
            self.seen, self.p, self.phase = self.starts, 1, "look"
            self._set_apart()
        while True:
            if self.phase != "join":
                if self.phase == "look" and not (self.seen < self.k and self.n > len(self.fixed)):
                    break
                joined = self._probe(self.p)
                self.seen, self.p, self.phase = self.seen + self.p, self.k, "look"
                if not joined:
                    break
                # what joins has converged beside the rest, not together with it
                self.space.begin(self.given)
                self.space.append(self.found[2], 0.0)
                self.phase = "join"
            self._run()
            self.phase = "look"

    def _set_apart(self) -> None:
        """What was found, in `fixed`, and a space for what is orthogonal to it."""
        # what is missed is orthogonal to all of V: any part of it may be left out of the search, the ends help most
        space, (theta, _, y) = self.space, self.ritz
        ends = self._ends(space.m, space.m if len(space.w) == 0 else min(space.m // 4, space.capacity // 16))
        self.fixed, self.fixed_theta = space.vectors(y[:, ends]), theta[ends]
        room = space.capacity - space.m - len(ends)
        if len(self.given) == 0 and space.capacity < space.n and room >= max(0.6 * space.capacity, 6 * self.k + 20):
            self.space = _Space(self.lin, self.given, space.rows[space.m :], space.scale)
        else:
            self.main = None

    def _run(self) -> None:
        """Go on until the wanted pairs have converged."""
        space, self.next_check = self.space, 0
        may_grow = self.found is None and self.starts < self.k <= self.bottom
        goes_on = space.m > 0
        while True:
            self.ritz = theta, residuals, y = space.ritz() if goes_on else self._next_ritz()
            goes_on, rho = False, np.linalg.norm(residuals, axis=0)
            self.largest = max(self.largest, theta[-1])
            aim = self.tol * self.largest
            wanted = self._wanted(len(theta))
            self._record(theta[wanted], rho[wanted])
            # a pair stands for one eigenvalue, and the next has its index, only if it does not blend two
            goal = np.full(len(wanted), 0.1 * self.residual_tol * self.largest)
            if self.n > _SMALL or not space.is_restarted:
                goal[max(0, len(wanted) - self.top - 1) : len(wanted) - self.top + 1] *= 10
            settled = rho[wanted] <= goal
            null = theta[: self.bottom] <= aim
            settled[: self.bottom] = null if self.zeros >= self.bottom else settled[: self.bottom] | null
            if space.m == space.n:
                break
            if space.m >= self.top + self.bottom and settled.all():
                accepted = self.accepted if space.m > _CHEAP and self.n > _SMALL else _DELTA
                self.chance = self._chance_of_more()
                if self.chance <= accepted:
                    break
                if self._chance_of_more(noise=0.0) <= accepted:
                    self._outweigh_rounding()
            if len(space.w) == 0:
                space.append(self._draw(self.k))
            elif may_grow and len(space.w) < self.k and theta[0] <= 100 * aim:
                may_grow = False
                if self.random is None or self._are_several(y[:, theta <= 100 * aim]):
                    space.append(self._draw(self.k - len(space.w)))
            self._make_room()
        self._bound()
        self.found = theta[wanted], rho[wanted], space.vectors(y[:, wanted])

    def _probe(self, p: int) -> bool:
        """Start from random vectors orthogonal to what was found; go on until the ends of the spectrum there are known.

        They are when each Ritz pair that belongs among the wanted ones has converged, and others are improbable.
        """
        theta, rho, _ = self.found
        aim = self.tol * self.largest
        low_end, high_end = theta[: self.bottom], theta[len(theta) - self.top :]
        below = self.bottom and low_end[-1] > aim and low_end[0] < low_end[-1] - aim
        above = self.top and high_end[-1] > high_end[0] + aim
        if not (below or above):
            return False  # nothing that is missed could change an index
        space, self.next_check = self.space, 0
        goes_on = self.phase == "probe" and space.m > 0
        if self.phase != "probe":
            self.probes += 1
            space.begin(self.given, self.fixed)
            space.append(self._draw(p))
            self.phase = "probe"
        while True:
            self.ritz = t, residuals, y = space.ritz() if goes_on else self._next_ritz()
            goes_on, r = False, np.linalg.norm(residuals, axis=0)
            self._record(theta, rho)
            # the pairs that belong among the wanted ones, so many as there can be of them, and the next
            i = min(np.count_nonzero(t < low_end[-1] - aim), self.bottom) if below else 0
            j = min(np.count_nonzero(t > high_end[0] + aim), self.top) if above else 0
            joined = np.r_[:i, len(t) - j : len(t)]
            converged = (r[joined] <= aim) | ((t[joined] <= aim) & (joined < i))
            settled = i + j < len(t) or space.m == space.n
            ends = [low_end[-1] - aim] if below and i < min(self.bottom, len(t)) else []
            ends += [high_end[0] + aim] if above and j < min(self.top, len(t)) else []
            if converged.all() and settled:
                others = slice(i, len(t) - j)
                if space.m == space.n or all(self._would_show(x, others) for x in ends):
                    break
                if all(self._would_show(x, others, noise=0.0) for x in ends):
                    self._outweigh_rounding()
            if len(space.w) == 0:
                space.append(self._draw(self.k))
            self._make_room()
        if len(joined):
            self.phase = "look"  # from here on more than the space changes
            self._join(space.vectors(y[:, joined]))
        return len(joined) > 0

    def _would_show(self, x: float, pairs: slice, noise: float | None = None) -> bool:
        """Whether an eigenvalue x is improbable, since some Ritz pairs of the space, not all converged, don't show it.

        The random start may be lost in a restart. Then the residual of the nearest pair decides, relative to the
        distance: the missed vector, whose share in the random start is about that of the pair's own, would show in it.
        """
        theta, residuals, y = (a[..., pairs] for a in self.ritz)
        rho = np.linalg.norm(residuals, axis=0)
        aim = self.tol * self.largest
        noise = self.space.noise if noise is None else noise
        is_open = (rho > 0.01 * aim) | (abs(theta - x) > 2 * aim)
        theta, rho, residuals, y = theta[is_open], rho[is_open], residuals[:, is_open], y[:, is_open]
        if self.space.is_restarted:
            distance = abs(theta - x)
            return not len(distance) or bool((rho / distance)[np.argmin(distance)] <= _DELTA)
        return chance_of_missing(x, theta, residuals, self.space.start @ y, self.space.n, noise) <= _DELTA

    def _outweigh_rounding(self) -> None:
        """Another random vector: where an eigenvector hides in the rounding from some, it has to hide from all."""
        self.fresh += 1
        if self.fresh > _FRESH:
            message = "rounding of the products hides what eigenvalues may lie 2 tol beyond those found"
            raise SolverStopped(message, self.partial(), by_rounding=True)
        self.space.append(self._draw(1))

    def _missing(self, x: float, pairs: slice = slice(None), noise: float | None = None) -> float:
        """`chance_of_missing` for an eigenvector orthogonal to the other Ritz vectors, by the random vectors in V.

        A part of the start that is given, v0, shifts the share of h in it by a constant, so that small ones become less
        probable.
        """
        theta, residuals, y = (a[..., pairs] for a in self.ritz)
        noise = self.space.noise if noise is None else noise
        return chance_of_missing(x, theta, residuals, self.space.start @ y, self.space.n, noise)

    def _chance_of_more(self, noise: float | None = None) -> float:
        """The chance of an eigenvalue more than 2 tol beyond those of a first run: two so close may blend in one pair.

        A look for missed ones that follows would not show it: what is left of its vector is no eigenvector there. Not
        known, and 0, once the random start may have been lost.
        """
        if self.found is not None or self.space.is_restarted:
            return 0.0
        theta, aim = self.ritz[0], self.tol * self.largest
        top, bottom = self.top, self.bottom
        chance = 0.0
        if top:
            chance = self._missing(theta[-top] + 2 * aim, slice(len(theta) - top + 1), noise)
        if bottom and theta[bottom - 1] > aim:
            chance = max(chance, self._missing(theta[bottom - 1] - 2 * aim, slice(bottom - 1, None), noise))
        return chance

    def _bound(self) -> None:
        """Where no eigenvalue lies, but with probability 2 δ; from the random start, as long as the space holds it."""
        theta = self.ritz[0]
        if self.found is not None or self.bounds is not None or self.space.is_restarted:
            return

        def distance(end: float, sign: int, largest: float) -> float:
            """The smallest at which the chance is at most δ."""
            low, high = largest * self.space.eps, largest
            if self._missing(end + sign * high) > _DELTA:
                return np.inf
            while high > 1.01 * low:
                middle = math.sqrt(low * high)
                low, high = (low, middle) if self._missing(end + sign * middle) <= _DELTA else (middle, high)
            return high

        lowest = max(theta[0], 0.0)
        below = distance(lowest, -1, lowest) if lowest > 0 else np.inf
        rounding = 10 * self.space.eps * theta[-1]  # of T
        above = distance(theta[-1], 1, 1e3 * theta[-1])
        self.bounds = max(lowest - below - rounding, 0.0), theta[-1] + above + rounding

    def _join(self, new: Tensor) -> None:
        """Ritz vectors from what was found and what joins it, by F times the latter."""
        space, old = self.space, len(self.fixed)
        _, f_new = space.multiply(new)
        self.fixed = torch.cat([self.fixed, new])
        beside = _inner(self.fixed, f_new)
        t = np.zeros((len(self.fixed), len(self.fixed)))
        t[:old, :old] = np.diag(self.fixed_theta)
        t[:, old:], t[old:, :] = beside, beside.T
        theta, y = (x.numpy() for x in _eigh((t + t.T) / 2))
        wanted, ends = self._wanted(len(theta)), self._ends(len(theta), len(theta))
        self.found = theta[wanted], np.zeros(len(wanted)), space.tensor(y[:, wanted].T) @ self.fixed
        self.fixed, self.fixed_theta = _combine(self.fixed, space.tensor(y[:, ends].T)), theta[ends]

    def _next_ritz(self) -> tuple[NDArray, NDArray, NDArray]:
        """Go on until it is time to look."""
        space = self.space
        while True:
            if self.n_steps == self.maxiter:
                self._write_last()
                raise SolverStopped(f"golub_kahan took {self.maxiter} steps", self.partial())
            space.expand()
            self._write()
            self.n_steps += 1
            if space.m >= self.next_check or space.is_full or len(space.w) == 0:
                self.next_check = space.m + max(1, space.m // 50)
                return space.ritz()

    def _write(self, at_once: bool = False) -> None:
        """To the checkpoint, when it is time to; nothing but the space has changed since the phase began."""
        is_over = self.phase == "look" or (self.phase == "main" and self.found is not None)
        if self.checkpoint is not None and self.space.is_whole and not is_over:
            self.checkpoint.offer(self, at_once)

    def _write_last(self) -> None:
        """Before the search is left, which it is in any case."""
        try:
            self._write(at_once=True)
        except OSError as error:
            checks.warn(f"the search could not be written to its checkpoint, where it is older now: {error}")

    def _make_room(self) -> None:
        space = self.space
        if space.is_full and space.m < space.n:
            self._bound()
            self.restarts += 1
            spare = (space.capacity - self.k) // 3
            low, high = (self.bottom + spare, self.top + 3) if self.bottom else (0, self.top + spare)
            # what is below zero is rounding
            shift = max(max(self.tol / 10, 10 * space.eps) * self.largest, -2 * self.ritz[0][0])
            space.restart(low, high, shift)
            self.next_check = 0

    def _ends(self, m: int, more: int) -> NDArray:
        """Of m ascending values, what is wanted and some more, as long as a probe has room beside them to restart."""
        capacity = len(self.space.rows) - len(self.given)
        if capacity < self.n:
            more = min(more, (capacity - 4 * self.k - 20 - self.top - self.bottom) // 2)
        low = min(self.bottom + more, m)
        return np.r_[:low, max(low, m - self.top - more) : m]

    def _wanted(self, m: int) -> NDArray:
        """Of m ascending values."""
        top = min(self.top, m)
        return np.r_[: min(self.bottom, m - top), m - top : m]

    def _draw(self, p: int) -> Tensor:
        return self.space.tensor(self.rng.standard_normal((p, self.lin.image_size)))

    def _estimate_number(self, y: NDArray) -> tuple[float, float]:
        """How many of N eigenvalues stand behind Ritz vectors: N × the random start's share in them; its deviation."""
        b = len(self.random)
        share = np.square(np.einsum("ij,ik", y, _inner(self.space.v, self.random))).sum() / b
        count = share * self.n
        return count, math.sqrt(2 * count / b)

    def _are_several(self, y: NDArray) -> bool:
        count, deviation = self._estimate_number(y)
        return count - 2 * deviation > 1

    def _record(self, theta: NDArray, rho: NDArray) -> None:
        values, residuals = (self.space.scale**2 * x[::-1] for x in (theta, rho))
        top = min(self.top, len(values))
        entry = {
            "n_products": self.lin.n_products - self.before,
            "largest": (values[:top], residuals[:top]),
            "smallest": (values[top:], residuals[top:]),
        }
        self.history.append(entry)
        if self.callback is not None:
            self.callback(entry)

    def answer(self) -> Answer:
        evidence = Evidence(
            "krylov",
            n_start=0 if self.random is None else len(self.random),
            is_probed=self.probes > 0,
            chance=self.chance,
            confidence=0.0 if self.bounds is None else 1 - 2 * _DELTA,
        )
        details = self.details() | ({} if self.nullity is None else {"nullity": Nullity(*self.nullity)})
        low, high = self.bounds or (0.0, np.inf)
        bounds = self.space.scale**2 * low, self.space.scale**2 * high
        return self._answer(self.found[2], evidence, bounds, details)

    def _answer(self, rows: Tensor, *said: Any) -> Answer:
        vectors = rows.flip(0).T.cpu().numpy()
        top = min(self.top, vectors.shape[1])
        return Answer(vectors[:, :top], vectors[:, top:], *said, n_earlier=self.earlier)

    def details(self) -> dict[str, Any]:
        return {"restarts": self.restarts, "history": self.history}

    @property
    def has_partial(self) -> bool:
        """Whether there are vectors to return before the end."""
        return self.found is not None or (self.space.is_whole and self.space.m > 0)

    def partial(self) -> Answer:
        """What there is."""
        if self.found is not None:
            return self._answer(self.found[2], None, (0.0, np.inf), self.details())
        _, _, y = self.space.ritz()
        rows = self.space.vectors(y[:, self._wanted(self.space.m)])
        return self._answer(rows, None, (0.0, np.inf), self.details())


def _eigh(t: NDArray) -> tuple[Tensor, Tensor]:
    # by torch, here and in a restart: NumPy's own threads contend with torch's for the cores, at up to 5 × the time
    return torch.linalg.eigh(torch.from_numpy(t))


def _project(block: Tensor, basis: Tensor) -> Tensor:
    """Leave, of each row, what is orthogonal to the rows of an orthonormal basis; the inner products of before."""
    # A sum in float32 that holds one large product loses the small ones that come after it: by pieces, each from zero.
    n = block.shape[1] // _PIECE * _PIECE
    pieces, others = (rows[:, :n].unflatten(1, (-1, _PIECE)) for rows in (block, basis))
    overlaps = torch.bmm(pieces.transpose(0, 1), others.permute(1, 2, 0)).sum(dim=0, dtype=torch.float64)
    overlaps += block[:, n:] @ basis[:, n:].T
    block.addmm_(overlaps.to(block.dtype), basis, alpha=-1)
    return overlaps


def _combine(rows: Tensor, y: Tensor) -> Tensor:
    """y times the first rows, by y's precision, in their place, which may be all the memory that there is."""
    for columns in rows.split(_SLAB, dim=1):
        columns[: len(y)] = y @ columns[: y.shape[1]].to(y.dtype)
    return rows[: len(y)]


def _orthonormalise(block: Tensor, floor: float) -> tuple[Tensor, NDArray]:
    """Q in the place of `block`, and C, with block = Q C; without directions shorter than `floor`.

    In float64, or T would be too large by what norms are wrong by.
    """
    if len(block) == 1:
        s, right = np.sqrt(_inner(block, block))[0], np.ones((1, 1))
    else:
        _, s, right = np.linalg.svd(_triangle(block), full_matrices=False)
    s, right = s[s > floor, None], right[s > floor]
    return _combine(block, torch.as_tensor(right / s, device=block.device)), s * right


def _orthonormalise_beside(block: Tensor, basis: Tensor, floor: float) -> tuple[Tensor, NDArray]:
    """The same, and Q orthogonal to the rows of an orthonormal basis, to which a long direction of the block was."""
    block, r = _orthonormalise(block, floor)
    kept = 0.0 if len(block) > 1 else 1.0  # of the shortest vector
    while kept < 0.9:
        _project(block, basis)
        block, again = _reorthonormalise(block)
        r, kept = again @ r, np.abs(np.diag(again)).min(initial=1.0)
    return block, r


def _reorthonormalise(block: Tensor) -> tuple[Tensor, NDArray]:
    """Q and R of unit vectors that are nearly orthogonal but for the last, which come from rounding and are left out.

    Each vector keeps its direction beside those before it, so that a longer one loses nothing to shorter ones.
    """
    r = _triangle(block)
    count = int(np.cumprod(np.abs(np.diag(r)) > 0.5).sum())
    return _combine(block, torch.as_tensor(np.linalg.inv(r[:count, :count]).T, device=block.device)), r[:count]


def _triangle(block: Tensor) -> NDArray[np.float64]:
    """R of the QR factorisation of the columns whose rows these are, slab by slab."""
    r = block.new_empty(0, len(block), dtype=torch.float64)
    for columns in block.split(_SLAB, dim=1):
        r = torch.linalg.qr(torch.cat([r, columns.T.double()]), mode="r")[1]
    return r.cpu().numpy()


def _inner(a: Tensor, b: Tensor) -> NDArray[np.float64]:
    """Inner products of rows, in float64."""
    if a is b and len(a) == 1:
        return torch.linalg.vector_norm(a, dim=1, dtype=torch.float64).square()[:, None].cpu().numpy()
    slabs = zip(a.split(_SLAB, dim=1), b.split(_SLAB, dim=1), strict=True)
    return sum(x.double() @ y.double().T for x, y in slabs).cpu().numpy()
