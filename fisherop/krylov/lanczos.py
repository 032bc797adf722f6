"""The block Lanczos factorization of F, from products with J."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fisherop import checks
from fisherop.density import Quadrature
from fisherop.jacobian import Jacobian, Scaled, check_size, comfortable_exponent, triangle
from fisherop.krylov.bounds import RitzPairs
from fisherop.krylov.orthogonalize import combine, eigh, inner, orthonormalize, orthonormalize_beside, project
from fisherop.model.undisturbed import uninterrupted

_EPS64 = float(np.finfo(np.float64).eps)


class _Relation(NamedTuple):
    """The relation without V, which is in the storage. Its parts are replaced by one assignment, so that an interrupt
    never finds them inconsistent.
    """

    w: Tensor
    t: NDArray[np.float64]
    c: NDArray[np.float64]
    shares: NDArray[np.float64] | None


class LanczosFactorization:
    """F V = V T + W C: orthonormal columns V (N, m), the next block W (N, b), T = VᵀF V (m, m), C (b, m).

    Vectors are kept as rows. F stands for P F P / scale², P a projection on the complement of the locked vectors, and
    `scale` keeps norms from overflow.

    Parameters
    ----------
    J : Jacobian
    locked : Tensor, shape (q, N)
        Orthonormal.
    storage : Tensor, shape (q + capacity, N)
        Memory for the locked vectors and V.
    scale : float
        0 where it isn't known yet: then the first product tells.

    Attributes
    ----------
    n, capacity : int
        The dimension of the complement, and how many vectors V may have.
    w, t, c : Tensor, ndarray, ndarray
    shares : ndarray, shape (p, at most m + b), or None
        The random unit vectors that joined, in the coordinates of V and W. None after a restart, which loses them.
    noise : float
        The component of the rounding error of F v along one unit vector, in the units of T.
    """

    def __init__(self, J: Jacobian, locked: Tensor, storage: Tensor, scale: float = 0.0) -> None:
        self.J = J
        self.storage = storage
        self._block = locked[:0]
        self.scale = scale
        self.noise = 0.0
        self.eps = torch.finfo(locked.dtype).eps
        self.reset(locked)

    def reset(self, *locked: Tensor) -> None:
        """Empty, beside what is locked now, in the same memory."""
        self.n_locked, self._block = 0, self._block.new_empty(0, self.storage.shape[1])
        self._publish(self._block, np.empty((0, 0)), np.empty((0, 0)), np.empty((0, 0)))
        for rows in locked:
            self.storage[self.n_locked : self.n_locked + len(rows)] = rows
            self.n_locked += len(rows)
        self.n = self.J.shape[1] - self.n_locked
        self.capacity = min(len(self.storage) - self.n_locked, self.n)

    def restore(self, v: Tensor, w: Tensor, t: NDArray, c: NDArray, shares: NDArray | None) -> None:
        """As it once was, beside what is locked now."""
        self.storage[self.n_locked : self.n_locked + len(v)] = v
        self._publish(self._buffered(w), t, c, shares)

    def move(self, storage: Tensor) -> None:
        """To other memory."""
        used = self.n_locked + self.m
        storage[:used] = self.storage[:used]
        self.storage, self.capacity = storage, min(len(storage) - self.n_locked, self.n)

    def _publish(self, w: Tensor, t: NDArray, c: NDArray, shares: NDArray | None) -> None:
        self._relation = _Relation(w, t, c, shares)

    def _buffered(self, w: Tensor) -> Tensor:
        """In one place: new memory for W at every step would leave holes between older pieces."""
        if len(w) > len(self._block):
            self._block = torch.empty_like(w)
        return self._block[: len(w)].copy_(w)

    @property
    def m(self) -> int:
        return len(self.t)

    @property
    def v(self) -> Tensor:
        return self.storage[self.n_locked : self.n_locked + self.m]

    @property
    def w(self) -> Tensor:
        return self._relation.w

    @property
    def t(self) -> NDArray[np.float64]:
        return self._relation.t

    @property
    def c(self) -> NDArray[np.float64]:
        return self._relation.c

    @property
    def shares(self) -> NDArray[np.float64] | None:
        """With zeros for what has joined V and W since."""
        shares = self._relation.shares
        return shares if shares is None else np.pad(shares, ((0, 0), (0, self.m + len(self.w) - shares.shape[1])))

    @property
    def is_empty(self) -> bool:
        return self.m + len(self.w) == 0

    @property
    def is_complete(self) -> bool:
        """Whether V spans the whole complement, so that T has all eigenvalues of F there."""
        return self.m == self.n

    @property
    def is_exhausted(self) -> bool:
        """Whether V is invariant, so that it takes another vector to go on."""
        return len(self.w) == 0

    @property
    def is_full(self) -> bool:
        return self.m + len(self.w) > self.capacity

    def tensor(self, array: NDArray | Tensor) -> Tensor:
        return torch.as_tensor(array, dtype=self.storage.dtype, device=self.storage.device)

    def extend(self, block: Tensor, random_part: float = 1.0) -> None:
        """Append vectors (p, N) to W, of which the fraction `random_part` is random; their rows of C are zero."""
        norms = torch.linalg.vector_norm(block, dim=1, dtype=torch.float64).cpu().numpy()[:, None]
        new = block / norms.max()
        for _ in range(2):
            project(new, self.storage[: self.n_locked + self.m])
            project(new, self.w)
            new, _ = orthonormalize(new, floor=100 * self.eps)
        w = (torch.cat([self.w, new]) if len(self.w) else new)[: self.n - self.m]
        c = np.vstack([self.c, np.zeros((len(new), self.m))])[: len(w)]
        shares = self.shares
        if shares is not None:
            shares = np.pad(shares, ((0, 0), (0, len(w) - len(self.w))))
        if random_part > 0 and shares is not None:
            joined = np.hstack([inner(block, self.v), inner(block, w)]) / norms
            locked = inner(block, self.storage[: self.n_locked]) / norms
            beside = 1 - np.square(locked).sum(axis=1)
            beside, length = np.sqrt(beside.clip(min=0.0)), np.linalg.norm(joined, axis=1)
            is_inside = length > 0.99 * beside
            joined = joined[is_inside] / (random_part * length[is_inside, None])
            shares = np.vstack([shares, joined])
        self._publish(self._buffered(w), self.t, c, shares)

    def expand(self) -> None:
        """W becomes part of V; what F makes of it, beyond V, becomes W."""
        m, b, w, shares = self.m, len(self.w), self.w, self._relation.shares
        h, fw = self.multiply(w)
        # W ← F W − V Cᵀ − W H: what is known of F W is its part in V, by symmetry, and in W
        linked = slice(np.flatnonzero(self.c.any(axis=0))[0], m) if self.c.any() else slice(0, 0)
        fw.addmm_(self.tensor(self.c[:, linked]), self.v[linked], alpha=-1).addmm_(self.tensor(h), w, alpha=-1)
        basis = self.storage[: self.n_locked + m + b]
        basis[self.n_locked + m :] = w  # beyond what is published
        overlaps = []
        for _ in range(3):  # reorthogonalization
            before = torch.linalg.vector_norm(fw, dim=1)
            overlaps.append(project(fw, basis))
            if bool((torch.linalg.vector_norm(fw, dim=1) > 0.5 * before).all()):
                break
        t = np.block([[self.t, self.c.T], [self.c, h]])
        size = np.abs(t).max()
        # F W has no part in what it isn't linked to, so that the first overlaps there are rounding
        rounding = overlaps[0][:, self.n_locked : self.n_locked + linked.start].abs().max() if linked.start else 0.0
        self.noise = max(self.noise, float(rounding), 4 * self.eps / self.n**0.5 * size)
        # directions at float32 rounding level are kept: dropping one may hide eigenvalues beyond the Ritz values
        w, r = orthonormalize_beside(fw, basis, floor=_EPS64 * size)
        w, r = w[: self.n - m - b], r[: self.n - m - b]
        # the relation is unchanged, but W now lies in the storage, and its buffer is free
        self._publish(basis[self.n_locked + m :], self.t, self.c, shares)
        self._publish(self._buffered(w), t, np.hstack([np.zeros((len(r), m)), r]), shares)

    def multiply(self, rows: Tensor) -> tuple[NDArray[np.float64], Tensor]:
        """The Gram matrix of J times rows, and F times rows before the projection, both / scale²."""
        dtype = str(rows.dtype).removeprefix("torch.")
        if self.scale == 0:  # the first product tells
            images = self.J.jvp(rows)
            self.scale = float(triangle(images).norm()) or 1.0
            check_size(max(self.scale, 1.0), dtype)
            images /= self.scale
            r, products = triangle(images), self.J.vjp(images).div_(self.scale)
        else:
            exponent = comfortable_exponent(self.scale, dtype)  # not 0 where F itself would leave the dtype's range
            r, products = Scaled(self.J, exponent).normal(rows) if exponent else self.J.normal(rows)
            unit = self.scale * 2.0**exponent
            r, products = r / unit, products.div_(unit**2)
        r = r.cpu().numpy()
        if not (np.isfinite(r).all() and checks.is_finite(products)):
            raise OverflowError(f"a product with F holds NaN or infinity, or more than {dtype} can hold")
        return r.T @ r, products

    def ritz(self) -> RitzPairs:
        theta, y = eigh(self.t)
        residuals = (torch.from_numpy(self.c) @ torch.from_numpy(y)).numpy()
        start, shares = None, self.shares
        if shares is not None:  # those that have come into V
            start = shares[~shares[:, self.m :].any(axis=1), : self.m]
        return RitzPairs(theta, residuals, y, start, self.n, self.noise, self.eps)

    def quadratures(self, count: int) -> list[Quadrature]:
        """What each of the first random vectors says of the spectrum of F itself; nothing after a restart."""
        shares, unit, found = self.shares, self.scale**2, []
        for start in [] if shares is None else shares[:count, : self.m]:
            t, beta = _jacobi(self.t, self.c, start)
            theta, y = eigh(t)
            noise = unit * self.noise * self.n**0.5
            found.append(Quadrature(unit * theta, y[0], unit * beta * y[-1], noise))
        return found

    def vectors(self, y: NDArray) -> Tensor:
        """V y, as rows, for coefficients in columns."""
        return self.tensor(y.T) @ self.v

    def restart(self, low: int, high: int, shift: float) -> None:
        """Keep the smallest and the largest harmonic Ritz vectors, of F + shift, and what continues from them.

        With A = T + shift and K = [A; C] they satisfy A q = μ KᵀK q. Where A = L Lᵀ, the right singular vectors of
        [L; C L⁻ᵀ] are Lᵀq, accurate at both ends. For kept vectors Q the residuals of F V Q lie in W − V A⁻¹ Cᵀ,
        orthogonalized to V Q.
        """
        t, c = torch.from_numpy(self.t), torch.from_numpy(self.c)
        factor = torch.linalg.cholesky(t + shift * torch.eye(self.m, dtype=t.dtype, device=t.device))
        beside = torch.linalg.solve_triangular(factor, c.T, upper=False).T
        z = torch.linalg.svd(torch.cat([factor, beside]), full_matrices=False)[2].T
        kept = torch.linalg.solve_triangular(factor.T, z[:, np.r_[:high, self.m - low : self.m]], upper=True)
        q = torch.linalg.qr(kept / torch.linalg.vector_norm(kept, dim=0))[0]
        with uninterrupted():
            v, w = self.v, self._buffered(self.w)
            self._publish(w[:0], np.empty((0, 0)), np.empty((0, 0)), None)  # an error on the way leaves it empty
            w.addmm_(self.tensor(torch.cholesky_solve(c.T, factor).T), v, alpha=-1)
            t = q.T @ t @ q
            basis = self.storage[: self.n_locked + len(combine(v, self.tensor(q.T)))]
            for _ in range(2):
                project(w, basis)
            w, r = orthonormalize_beside(w, basis, floor=0.0)
            self._publish(w, ((t + t.T) / 2).numpy(), r @ (c @ q).numpy(), None)


def _jacobi(t: NDArray, c: NDArray, start: NDArray) -> tuple[NDArray[np.float64], float]:
    """The Jacobi matrix, and β, of the Krylov space of one vector V s within V: as far as F V q = V T q, or C q = 0.

    With one start vector that is T itself.
    """
    q, diagonal, beside = start[:, None] / np.linalg.norm(start), [], []
    while True:
        w = t @ q[:, -1]
        diagonal.append(float(q[:, -1] @ w))
        for _ in range(2):
            w -= q @ (q.T @ w)
        outside = np.linalg.norm(c @ q[:, -1])
        beta = float(np.hypot(np.linalg.norm(w), outside))
        is_invariant = beta <= len(t) * _EPS64 * np.abs(t).max()
        if outside > 0 or is_invariant or q.shape[1] == len(t):
            beta = 0.0 if is_invariant else beta
            return np.diag(diagonal) + np.diag(beside, 1) + np.diag(beside, -1), beta
        beside.append(beta)
        q = np.column_stack([q, w / beta])
