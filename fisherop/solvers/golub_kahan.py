"""Both ends of the spectrum from one factorisation: block Golub–Kahan–Lanczos with thick restart."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fisherop.operators import FisherOperator
from fisherop.result import SolverStopped


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
    callback: Callable[[dict[str, Any]], None] | None = None,
) -> tuple[NDArray, NDArray, dict[str, Any]]:
    """The largest and the smallest eigenvalues of F together, by Golub–Kahan–Lanczos bidiagonalisation of J.

    The basis V of the input side is orthogonalised in full, the left vectors are not kept: with ``J V = U B`` only
    ``T = BᵀB = VᵀF V`` is needed, and V [1]_. T is small, in float64; its eigenpairs give the Ritz pairs of F and, for
    free, their residuals. Where V is full, harmonic Ritz vectors of both ends replace it [2]_ [3]_.

    A Krylov space from one random vector holds one vector of each eigenspace. For k > 1 further random vectors join:
    in a block from the start, where N − M ≥ k zeros are known; as soon as the share of the start vector in the smallest
    Ritz vectors says that several eigenvalues lie there; or after convergence, orthogonal to what was found, to look for
    eigenvalues that were missed.

    Parameters
    ----------
    maxiter : int, optional
        Block steps, by default 10,000.
    max_basis : int, optional
        Vectors in V, by default as many as `basis_memory` holds, at most 1000.
    basis_memory : int
        Bytes for V.
    v0 : ndarray, shape (N,) or (N, p), optional
        Where to start: from the sum of these, of unit norm each, and a random vector of norm 0.01, so that no
        eigenvector is left out.
    callback : callable, optional
        Called after each check of convergence with the newest entry of the history: a dict of the products so far, and
        the Ritz values and residuals (by descending value) that are wanted at the ``"largest"`` and ``"smallest"`` end.

    Returns
    -------
    values (K,), vectors (N, K), details
        In details: ``nullity``, an estimate of the number of eigenvalues that are null to tol and its standard error,
        where some are; ``history``; ``restarts``; ``lambda_max_upper``, an upper bound of λ_max that holds with
        probability 0.999 over the random start.

    Raises
    ------
    SolverStopped
        Not converged in `maxiter` steps, or interrupted from the keyboard; it carries the Ritz vectors.

    References
    ----------
    .. [1] G. H. Golub and W. Kahan, Calculating the singular values and pseudo-inverse of a matrix, SIAM J. Numer.
       Anal. 2 (1965). H. D. Simon and H. Zha, Low-rank matrix approximation using the Lanczos bidiagonalization
       process, SIAM J. Sci. Comput. 21 (2000): one-sided reorthogonalisation.
    .. [2] K. Wu and H. Simon, Thick-restart Lanczos method for large symmetric eigenvalue problems, SIAM J. Matrix
       Anal. Appl. 22 (2000).
    .. [3] J. Baglama and L. Reichel, Augmented implicitly restarted Lanczos bidiagonalization methods, SIAM J. Sci.
       Comput. 27 (2005): harmonic Ritz vectors for the smallest end.
    """
    m, n = operator.jacobian.shape
    capacity = _capacity(n, k, operator.dtype.itemsize, max_basis, basis_memory)
    if v0 is not None:
        v0 = np.asarray(v0, dtype=np.float64)
        v0 = v0[:, None] if v0.ndim == 1 else v0
        if v0.ndim != 2 or len(v0) != n or not np.isfinite(v0).all() or not v0.any(axis=0).all():
            raise ValueError(f"v0 must have shape ({n},) or ({n}, p), finite and without zero columns, got {v0.shape}")
    top, bottom = (k if which in (end, "both") else 0 for end in ("largest", "smallest"))
    search = _Search(operator.linearization, top, bottom, tol, rng, capacity, maxiter or 10_000, callback)
    try:
        search.find(k if bottom and n - m >= k else 1, v0)
        search.look_for_missed()
    except KeyboardInterrupt:
        message = "golub_kahan was interrupted; v0=result.eigenvectors goes on from there"
        raise SolverStopped(message, *search.partial()) from None
    return search.answer()


def failure_bound(n: int, steps: int, delta: float = 1e-3) -> float:
    """ε such that after so many Lanczos steps from a random start λ_max ≤ θ / (1 − ε), with probability 1 − δ.

    J. Kuczyński and H. Woźniakowski, Estimating the largest eigenvalue by the power and Lanczos algorithms with a
    random start, SIAM J. Matrix Anal. Appl. 13 (1992), Theorem 4.2: the probability that the relative error of the
    largest Ritz value θ of a positive definite matrix exceeds ε is at most ``1.648 √n exp(−√ε (2 steps − 1))``.
    """
    root = math.log(1.648 * math.sqrt(n) / delta) / (2 * steps - 1)
    return min(1.0, root) ** 2


def _capacity(n: int, k: int, itemsize: int, max_basis: int | None, basis_memory: int) -> int:
    least = min(n, 6 * k + 20)
    if max_basis is not None and max_basis < least:
        raise ValueError(f"max_basis must be at least 6 k + 20, or N, here {least}, got {max_basis}")
    affordable = min(1000 + 10 * k, basis_memory // (n * itemsize)) if max_basis is None else max_basis
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

    def __init__(self, linearization: Any, fixed: Tensor, capacity: int, scale: float) -> None:
        self.lin = linearization
        self.n_fixed = len(fixed)
        self.n = linearization.image_size - len(fixed)  # the dimension of the complement
        self.capacity = min(capacity, self.n)
        self.eps = torch.finfo(fixed.dtype).eps
        self.rows = fixed.new_empty(len(fixed) + self.capacity, linearization.image_size)
        self.rows[: len(fixed)] = fixed
        self.w = fixed[:0]
        self.t, self.c = np.empty((0, 0)), np.empty((0, 0))
        self.scale = scale
        self.n_steps = 0

    @property
    def m(self) -> int:
        return len(self.t)

    @property
    def v(self) -> Tensor:
        return self.rows[self.n_fixed : self.n_fixed + self.m]

    @property
    def is_full(self) -> bool:
        return self.m + len(self.w) > self.capacity

    def tensor(self, array: NDArray) -> Tensor:
        return torch.as_tensor(array, dtype=self.rows.dtype, device=self.rows.device)

    def append(self, block: NDArray) -> None:
        """Let vectors (p, N) join the next block; F V has no part in them."""
        new = self.tensor(block / np.linalg.norm(block, axis=1).max())
        for _ in range(2):
            new = _project(_project(new, self.rows[: self.n_fixed + self.m]), self.w)
            new, _ = self._orthonormal(new, floor=100 * self.eps)
        self.w = torch.cat([self.w, new])[: self.n - self.m]
        self.c = np.vstack([self.c, np.zeros((len(new), self.m))])[: len(self.w)]

    def expand(self) -> None:
        """W becomes part of V; what F makes of it, beyond V, becomes W."""
        m, b, w = self.m, len(self.w), self.w
        images = self.lin.jvp(w.reshape(b, *self.lin.image_shape))
        self.scale = self.scale or float(images.double().norm()) or 1.0
        images = images / self.scale
        fw = self.lin.vjp(images).reshape(b, -1) / self.scale
        images = images.double().cpu().numpy()
        h = images @ images.T
        # what is known of F W: its part in V, by symmetry, and in W
        linked = slice(np.flatnonzero(self.c.any(axis=0))[0], m) if self.c.any() else slice(0, 0)
        fw = fw - self.tensor(self.c[:, linked]) @ self.v[linked] - self.tensor(h) @ w
        basis = self.rows[: self.n_fixed + m + b]
        basis[self.n_fixed + m :] = w
        for _ in range(3):  # reorthogonalisation
            before = torch.linalg.vector_norm(fw, dim=1)
            fw = _project(fw, basis)
            if bool((torch.linalg.vector_norm(fw, dim=1) > 0.5 * before).all()):
                break
        t = np.block([[self.t, self.c.T], [self.c, h]])
        w, r = self._orthonormal(fw, floor=self.eps * np.abs(t).max())
        w, r = w[: self.n - m - b], r[: self.n - m - b]
        self.t, self.w, self.c = t, w, np.hstack([np.zeros((len(r), m)), r])
        self.n_steps += 1

    def _orthonormal(self, block: Tensor, floor: float) -> tuple[Tensor, NDArray]:
        """Q and C with block = Q C, without directions shorter than `floor`."""
        if len(block) == 0:
            return block, np.zeros((0, 0))
        q, r = torch.linalg.qr(block.T)
        left, s, right = np.linalg.svd(r.double().cpu().numpy())
        kept = s > floor
        return self.tensor(left[:, kept].T) @ q.T, s[kept, None] * right[kept]

    def ritz(self) -> tuple[NDArray, NDArray, NDArray]:
        """Ritz values, ascending; the norms of their residuals; their vectors in V's coordinates, columns."""
        theta, y = np.linalg.eigh(self.t)
        return theta, np.linalg.norm(self.c @ y, axis=0), y

    def vectors(self, y: NDArray) -> Tensor:
        return self.tensor(y.T) @ self.v

    def restart(self, low: int, high: int, shift: float) -> None:
        """Keep the smallest and the largest harmonic Ritz vectors, of F + shift, and what continues from them.

        With A = T + shift and K = [A; C] they satisfy A q = μ KᵀK q. For kept vectors Q the residuals of F V Q lie in
        W − V A⁻¹ Cᵀ, orthogonalised to V Q.
        """
        a = self.t + shift * np.eye(self.m)
        r = np.linalg.qr(np.vstack([a, self.c]), mode="r")
        inverse = np.linalg.solve(r.T, np.linalg.solve(r.T, a).T)
        harmonic = np.linalg.solve(r, np.linalg.eigh((inverse + inverse.T) / 2)[1])
        kept = harmonic[:, np.r_[:high, self.m - low : self.m]]
        q = np.linalg.qr(kept / np.linalg.norm(kept, axis=0))[0]
        w = self.w - self.vectors(np.linalg.solve(a, self.c.T))
        c = self.c @ q
        t = q.T @ self.t @ q
        self.rows[self.n_fixed : self.n_fixed + low + high] = self.vectors(q)
        self.t = (t + t.T) / 2
        for _ in range(2):
            w = _project(w, self.rows[: self.n_fixed + self.m])
        self.w, r = self._orthonormal(w, floor=0.0)
        self.c = r @ c


class _Search:
    """When to stop, when to restart, and whether eigenvalues have been missed."""

    def __init__(
        self,
        linearization: Any,
        top: int,
        bottom: int,
        tol: float,
        rng: np.random.Generator,
        capacity: int,
        maxiter: int,
        callback: Callable[[dict[str, Any]], None] | None,
    ) -> None:
        self.lin = linearization
        self.top, self.bottom, self.k, self.tol = top, bottom, max(top, bottom), tol
        self.rng, self.capacity, self.maxiter, self.callback = rng, capacity, maxiter, callback
        self.space = _Space(linearization, linearization.image.new_empty(0, linearization.image_size), capacity, 0.0)
        self.found: tuple[NDArray, NDArray, Tensor] | None = None  # values, ascending, residuals, rows: what is wanted
        self.history: list[dict[str, Any]] = []
        self.restarts = self.probes = self.n_steps = self.next_check = 0
        self.random: Tensor | None = None  # the random start, if there was one
        self.random_steps = 0  # from it to the first restart
        self.starts = 1  # how many vectors of an eigenspace can have been seen
        self.nullity: tuple[float, float] | None = None
        self.before = linearization.n_products

    def find(self, block: int, v0: NDArray | None) -> None:
        """The wanted pairs, where repeated eigenvalues may be missed."""
        space = self.space
        start = self._draw(block)
        if v0 is not None:
            block = 1
            start = 0.01 * start[:1] / np.linalg.norm(start[0]) + (v0 / np.linalg.norm(v0, axis=0)).sum(axis=1)
        space.append(start)
        self.starts = block
        self.random = space.w if v0 is None else None
        grown = False
        while True:
            theta, rho, y = self._next_ritz()
            aim = self.tol * theta[-1]
            wanted = self._wanted(len(theta))
            self._record(theta[wanted], rho[wanted])
            bottom = slice(0, self.bottom)
            settled = rho[wanted] <= aim
            settled[bottom] |= theta[bottom] <= aim
            if space.m == space.n or (space.m >= self.top + self.bottom and settled.all()):
                break
            if len(space.w) == 0:
                space.append(self._draw(self.k))
            elif (
                self.random is not None and not grown and self.starts < self.k <= self.bottom and theta[0] <= 100 * aim
            ):
                grown = True
                count, deviation = self._estimate_number(y[:, theta <= 100 * aim])
                if count - 2 * deviation > 1:
                    space.append(self._draw(self.k - self.starts))
            self._make_room(theta[-1])
        self.random_steps = self.random_steps or space.n_steps
        if self.bottom and theta[0] <= aim and self.random is not None:
            self.nullity = self._estimate_number(y[:, theta <= aim])
        self.found = theta[wanted], rho[wanted], space.vectors(y[:, wanted])
        # what is missed is orthogonal to all of V: any part of it may be left out of the search, the ends help most
        more = space.m if len(space.w) == 0 else space.m // 8
        low = min(self.bottom + more, space.m)
        self.fixed = space.vectors(y[:, np.r_[:low, max(low, space.m - self.top - more) : space.m]])

    def look_for_missed(self) -> None:
        """Vectors of repeated eigenvalues, of which a Krylov space holds one for each vector that it began with."""
        p = 1
        while self.starts < self.k and self._may_miss() and self.lin.image_size > len(self.fixed):
            joined = self._probe(p)
            self.probes += 1
            self.starts += p
            if not joined:
                break
            p = self.k

    def _may_miss(self) -> bool:
        """Where k = 1 any vector of the eigenspace will do, and there is nothing below zero."""
        theta = self.found[0]
        return self.top > 1 or (self.bottom > 1 and theta[self.bottom - 1] > self.tol * theta[-1])

    def _probe(self, p: int) -> bool:
        """Start from random vectors orthogonal to what was found; go on until the ends of the spectrum there are known.

        They are when each Ritz pair that belongs among the wanted ones has converged, and the residual of the next says
        that its eigenvalue does not.
        """
        theta, rho, rows = self.found
        aim = self.tol * theta[-1]
        below = theta[self.bottom - 1] - aim if self.bottom > 1 else -np.inf
        above = theta[-self.top] + aim if self.top > 1 else np.inf
        below = -np.inf if below <= 0 else below
        self.space = space = _Space(self.lin, self.fixed, self.capacity - len(self.fixed), self.space.scale)
        self.next_check = 0
        space.append(self._draw(p))
        while True:
            t, r, y = self._next_ritz()
            self._record(theta, rho)
            low, high = t < below, t > above
            settled = (r <= aim) | (low & (t <= aim))
            inner = ~(low | high)
            first, last = np.argmax(inner), len(t) - 1 - np.argmax(inner[::-1])
            known = inner.any() and t[first] - r[first] >= below and t[last] + r[last] <= above
            if settled[~inner].all() and (known or space.m == space.n):
                break
            if len(space.w) == 0:
                space.append(self._draw(self.k))
            self._make_room(theta[-1])
        new = space.vectors(y[:, ~inner])
        self.fixed = torch.cat([self.fixed, new])
        theta, rho, rows = np.r_[theta, t[~inner]], np.r_[rho, r[~inner]], torch.cat([rows, new])
        order = np.argsort(theta, kind="stable")
        order = order[self._wanted(len(order))]
        self.found = theta[order], rho[order], rows[torch.as_tensor(order, device=rows.device)]
        return len(new) > 0

    def _next_ritz(self) -> tuple[NDArray, NDArray, NDArray]:
        """Go on until it is time to look."""
        space = self.space
        while True:
            if self.n_steps == self.maxiter:
                raise SolverStopped(f"golub_kahan took {self.maxiter} steps", *self.partial())
            space.expand()
            self.n_steps += 1
            if space.m >= self.next_check or space.is_full or len(space.w) == 0:
                self.next_check = space.m + max(1, space.m // 50)
                return space.ritz()

    def _make_room(self, largest: float) -> None:
        space = self.space
        if space.is_full and space.m < space.n:
            self.random_steps = self.random_steps or space.n_steps
            self.restarts += 1
            spare = (space.capacity - self.k) // 3
            space.restart(self.bottom + spare, self.top + 3, max(self.tol / 10, 10 * space.eps) * largest)
            self.next_check = 0

    def _wanted(self, m: int) -> NDArray:
        """Of m ascending values."""
        top = min(self.top, m)
        return np.r_[: min(self.bottom, m - top), m - top : m]

    def _draw(self, p: int) -> NDArray:
        return self.rng.standard_normal((p, self.lin.image_size))

    def _estimate_number(self, y: NDArray) -> tuple[float, float]:
        """How many of N eigenvalues stand behind some Ritz vectors: N × the random start's share in them; its deviation."""
        b = len(self.random)
        share = (self.space.vectors(y) @ self.random.T).double().square().sum().item() / b
        count = share * self.lin.image_size
        return count, math.sqrt(2 * count / b)

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

    def answer(self) -> tuple[NDArray, NDArray, dict[str, Any]]:
        theta, _, rows = self.found
        start = "v0 and a random vector" if self.random is None else f"{len(self.random)} random vector(s)"
        ground = f"the extreme Ritz pairs of a Krylov space from {start}"
        if self.probes:
            ground += f"; random vectors orthogonal to them, {self.probes} time(s), led to none beyond"
        details: dict[str, Any] = {"ground": ground, "restarts": self.restarts, "history": self.history}
        if self.nullity is not None:
            details["nullity"] = "about {:.3g} ± {:.1g} eigenvalues are null to tol, by an estimate".format(
                *self.nullity
            )
        if self.random is not None:
            epsilon = failure_bound(self.lin.image_size, self.random_steps)
            if epsilon < 1:
                details["ground"] += "; λ_max's upper bound holds with probability 0.999"
                details["lambda_max_upper"] = self.space.scale**2 * theta[-1] / (1 - epsilon)
        return self.space.scale**2 * theta[::-1], rows.flip(0).T.cpu().numpy(), details

    def partial(self) -> tuple[NDArray, NDArray]:
        """What there is, largest and smallest, columns by descending value."""
        if self.found is None:
            _, _, y = self.space.ritz()
            rows = self.space.vectors(y[:, self._wanted(self.space.m)])
        else:
            rows = self.found[2]
        vectors = rows.flip(0).T.cpu().numpy()
        top = min(self.top, vectors.shape[1])
        return vectors[:, :top], vectors[:, top:]


def _project(block: Tensor, basis: Tensor) -> Tensor:
    """The part of each row that is orthogonal to the rows of an orthonormal basis."""
    return block - (block @ basis.T) @ basis
