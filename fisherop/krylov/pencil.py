"""Extremes of (vᵀA v) / (vᵀB v) for two regularized Fisher matrices: generalized Davidson with inner iterations.

A = F_A / λ_A + ε I and B = F_B / λ_B + ε I, λ the largest eigenvalue of each. Both are regularized, so that exchanging
the models inverts the quotient. Swapping them turns the smallest quotient into the largest one; here both ends come
from one space.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import scipy.linalg
import torch
from numpy.typing import NDArray
from torch import Tensor

from fisherop.jacobian import Jacobian
from fisherop.krylov.bounds import chance_of_missing
from fisherop.krylov.orthogonalize import combine, inner, orthonormalize, project

_PLAIN = 40  # products of each model before inner iterations
_INNER = 10  # steps of conjugate gradients
_BASIS, _KEPT = 80, 26
_CHANCE = 1e-3
_EPS64 = float(np.finfo(np.float64).eps)


@dataclass
class Side:
    """One of the matrices: F / scale + ε I, by products with rows."""

    J: Jacobian
    scale: float
    regularization: float
    n_products: int = 0

    def times_f(self, rows: Tensor) -> Tensor:
        self.n_products += len(rows)
        return self.J.normal(rows)[1] / self.scale

    def times(self, rows: Tensor) -> Tensor:
        return self.times_f(rows).add_(rows, alpha=self.regularization)


class Pairs(NamedTuple):
    """Quotients, descending, the vectors, as rows of unit B-norm, and relative bounds of the quotients' errors."""

    quotients: NDArray[np.float64]
    rows: Tensor
    bounds: NDArray[np.float64]


def search(
    a: Side,
    b: Side,
    top: int,
    bottom: int,
    tol: float,
    maxiter: int,
    start: Tensor,
    on_step: Callable[[dict[str, Any]], None],
) -> tuple[Pairs, bool]:
    """The largest and the smallest quotients, and whether all bounds are at most `tol`.

    R. B. Morgan and D. S. Scott, Generalizations of Davidson's method for computing eigenvalues of sparse symmetric
    matrices, SIAM J. Sci. Stat. Comput. 7 (1986), with the residual as the correction, and later what some steps of
    conjugate gradients make of it: G. H. Golub and Q. Ye, An inverse free preconditioned Krylov subspace method for
    symmetric generalized eigenvalue problems, SIAM J. Sci. Comput. 24 (2002).

    The bound is ‖r‖ / (ρ √ε ‖v‖_B) for the largest, r = A v − ρ B v: for some eigenvalue λ, |λ − ρ| is at most
    ‖r‖_{B⁻¹} / ‖v‖_B, and B ≥ ε I. For the smallest it is that of 1 / ρ with A and B exchanged.
    """
    n, eps = start.shape[1], a.regularization
    capacity = min(n, max(_BASIS, 4 * (top + bottom)))
    v, fa, fb = (start.new_empty(capacity, n) for _ in range(3))
    ga: NDArray = np.empty((0, 0))
    gb: NDArray = np.empty((0, 0))
    last: NDArray = np.empty((0, 0))
    m, new = 0, start
    for _ in range(maxiter):
        new = beside(new, v[:m])[: capacity - m]
        end = m + len(new)
        v[m:end], fa[m:end], fb[m:end] = new, a.times_f(new), b.times_f(new)
        ga, gb = (bordered(g, inner(v[:end], f[m:end])) for g, f in ((ga, fa), (gb, fb)))
        m = end
        found: Any = scipy.linalg.eigh(ga + eps * np.eye(m), gb + eps * np.eye(m))
        theta, y = found
        wanted = np.r_[m - 1 : m - 1 - min(top, m) : -1, min(bottom, m) - 1 : -1 : -1][: top + bottom]
        coefficients = torch.as_tensor(y[:, wanted].T, dtype=v.dtype, device=v.device)
        rho = torch.as_tensor(theta[wanted], dtype=v.dtype, device=v.device)[:, None]
        ritz = coefficients @ v[:m]
        residuals = coefficients @ fa[:m] + eps * ritz - rho * (coefficients @ fb[:m] + eps * ritz)
        norms = torch.linalg.vector_norm(residuals, dim=1, dtype=torch.float64).cpu().numpy()
        is_top = np.arange(len(wanted)) < top
        bounds = norms / (np.where(is_top, theta[wanted], theta[wanted] ** 0.5) * eps**0.5)
        on_step({"n_products": (a.n_products, b.n_products), "quotients": theta[wanted], "bounds": bounds})
        open_ = [i for i in (_first(bounds > tol, is_top), _first(bounds > tol, ~is_top)) if i is not None]
        if (not open_ and len(wanted) == top + bottom) or m == n:
            return Pairs(theta[wanted], ritz, bounds), True
        new = residuals[open_] if open_ else torch.randn_like(ritz[:1])
        if min(a.n_products, b.n_products) >= _PLAIN:
            new = torch.cat([solve(b if i < top else a, residuals[i : i + 1]) for i in open_])
        if m + len(new) > capacity < n:
            kept = _KEPT if not (top and bottom) else _KEPT // 2
            ends = np.unique(np.r_[: kept if bottom else 0, m - (kept if top else 0) : m])
            q = np.linalg.qr(np.hstack([y[:, ends], last[:m]] if len(last) == m else [y[:, ends]]))[0]
            rotation = torch.as_tensor(q.T, dtype=torch.float64, device=v.device)
            for block in (v, fa, fb):
                combine(block[:m], rotation)
            ga, gb, m = q.T @ ga @ q, q.T @ gb @ q, q.shape[1]
            last = np.empty((0, 0))
        else:
            last = np.pad(y[:, wanted], ((0, len(new)), (0, 0)))
    return Pairs(theta[wanted], ritz, bounds), False


def _first(is_open: NDArray[np.bool_], there: NDArray[np.bool_]) -> int | None:
    found = np.flatnonzero(is_open & there)
    return int(found[0]) if len(found) else None


def beside(rows: Tensor, basis: Tensor) -> Tensor:
    """Unit vectors that span, with the basis, what the rows add to it."""
    new = rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
    for _ in range(3):
        project(new, basis)
        new, _ = orthonormalize(new, floor=100 * torch.finfo(rows.dtype).eps)
    return new


def bordered(g: NDArray, columns: NDArray) -> NDArray:
    """A symmetric matrix with new last columns (m, b)."""
    old = len(g)
    out = np.zeros((len(columns), len(columns)))
    out[:old, :old] = g
    out[:, old:] = columns
    out[old:, :old] = columns[:old].T
    out[old:, old:] = (columns[old:] + columns[old:].T) / 2
    return out


def solve(side: Any, residual: Tensor) -> Tensor:
    """Some steps of conjugate gradients on side · t = residual."""
    t, r = torch.zeros_like(residual), residual.clone()
    p, rr = r.clone(), float(inner(r, r)[0, 0])
    for _ in range(_INNER):
        if rr == 0:
            break
        bp = side.times(p)
        curvature = float(inner(p, bp)[0, 0])
        if curvature <= 0:  # of a vector that is only rounding
            break
        alpha = rr / curvature
        t.add_(p, alpha=alpha)
        r.add_(bp, alpha=-alpha)
        before, rr = rr, float(inner(r, r)[0, 0])
        p.mul_(rr / before).add_(r)
    return t


class Beyond(NamedTuple):
    """Whether no quotient lies beyond a limit, but for a chance of `_CHANCE`; a better direction, if there is one."""

    is_proven: bool
    better: Tensor | None
    steps: int


def look_beyond(a: Side, b: Side, limit: float, found: Pairs, rng: np.random.Generator, steps: int) -> Beyond:
    """Lanczos on A − limit · B, without what was found, from a random vector: positive where a quotient is larger.

    Of the pairs found, A is freed by ρ (B v)(B v)ᵀ each, so that they have the quotient 0.
    """
    n = found.rows.shape[1]
    steps = min(steps, n)
    like = found.rows
    weights = [(float(rho), b.times(row[None])[0]) for rho, row in zip(found.quotients, found.rows, strict=True)]

    def multiply(row: Tensor) -> Tensor:
        out = a.times(row) - limit * b.times(row)
        for rho, bv in weights:
            out -= rho * float(inner(row, bv[None])[0, 0]) * bv
        return out

    basis = like.new_empty(steps, n)
    w = torch.as_tensor(rng.standard_normal((1, n)), dtype=like.dtype, device=like.device)
    t, beta = np.zeros((0, 0)), 0.0
    for j in range(steps):
        new = beside(w, basis[:j])
        if len(new) == 0:
            break
        basis[j] = new[0]
        w = multiply(new)
        overlap = inner(basis[: j + 1], w)
        t = np.pad(t, ((0, 1), (0, 1)))
        t[j, j], t[j, j - 1 : j], t[j - 1 : j, j] = overlap[j, 0], beta, beta
        w = w - torch.as_tensor(overlap.T, dtype=w.dtype, device=w.device) @ basis[: j + 1]
        beta = float(torch.linalg.vector_norm(w.double()))
        if j % 5 < 4 and j + 1 < steps and beta > _EPS64:
            continue
        theta, y = np.linalg.eigh(t)
        if theta[-1] > 0:
            return Beyond(False, torch.as_tensor(y[:, -1:].T, dtype=w.dtype, device=w.device) @ basis[: j + 1], j + 1)
        noise = 4 * float(torch.finfo(like.dtype).eps) * float(np.abs(theta).max()) / n**0.5
        if j + 1 == n or beta <= _EPS64 * float(np.abs(theta).max()):
            return Beyond(True, None, j + 1)
        if chance_of_missing(0.0, theta, beta * y[-1:], y[:1], n, noise) <= _CHANCE:
            return Beyond(True, None, j + 1)
    return Beyond(False, None, steps)
