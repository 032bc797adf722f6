"""The pair of vectors whose quadratic forms several matrices rank most differently: a subspace that gradients enlarge.

f(a, b) = var_n(log aᵀF_n a − log bᵀF_n b), of regularized matrices F_n / λ_n + ε I. Each step solves the problem within
a subspace whose products with all matrices are known, and enlarges that by the gradients of f in the whole space: what
Davidson's method does for eigenvalues.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.linalg
import scipy.optimize
import torch
from numpy.typing import NDArray
from torch import Tensor

from fisherop.krylov.orthogonalize import combine, inner
from fisherop.krylov.pencil import Side, beside, bordered, solve

_DIVIDED = 5  # models, of which all divisions into two parts are considered
_TRIED = 8  # of the divisions, those that the small problem is solved from


class Pair(NamedTuple):
    """Unit vectors a and b, as rows, f there, and the norm of its gradient on the unit spheres."""

    rows: Tensor
    value: float
    gradient: float

    def has_converged(self, tol: float, floor: float) -> bool:
        """Whether the gradient is at most tol · f, or f is no more than rounding makes of equal matrices."""
        return self.gradient <= tol * self.value or self.value <= floor


class Mixture:
    """Σ wₙ Fₙ, by products with rows."""

    def __init__(self, sides: Sequence[Side], weights: NDArray[np.float64]) -> None:
        self.sides, self.weights = sides, weights

    def times(self, rows: Tensor) -> Tensor:
        """This times each row, by the matrices whose weight isn't zero."""
        out = torch.zeros_like(rows)
        for side, weight in zip(self.sides, self.weights.tolist(), strict=True):
            if weight:
                out.add_(side.times(rows), alpha=weight)
        return out


class Contrast(NamedTuple):
    """f, from the quadratic forms of each matrix: what its gradients weigh the products F_n a and F_n b by."""

    value: float
    of_a: NDArray[np.float64]
    of_b: NDArray[np.float64]

    @classmethod
    def of(cls, a: NDArray[np.float64], b: NDArray[np.float64]) -> Contrast:
        """Of aᵀF_n a and bᵀF_n b, each (n,): ∇_a f = Σ of_a[n] F_n a, ∇_b f = Σ of_b[n] F_n b."""
        ratios = np.log(a) - np.log(b)
        centred = ratios - ratios.mean()
        return cls(float((centred**2).mean()), 4 / len(a) * centred / a, -4 / len(a) * centred / b)

    @classmethod
    def at(cls, gram: NDArray[np.float64], x: NDArray[np.float64]) -> Contrast:
        """Of the rows a and b of x (2, m), for matrices (n, m, m)."""
        return cls.of(*np.einsum("im,nmk,ik->in", x, gram, x, optimize=True))


def maximize(
    sides: Sequence[Side],
    start: Tensor,
    capacity: int,
    tol: float,
    maxiter: int,
    rng: np.random.Generator,
    on_step: Callable[[dict[str, Any]], None],
) -> Pair:
    """Enlarge the space of `start` until the gradient is at most tol · f.

    Once there are more than `capacity` vectors, the space is made smaller, and some steps of conjugate gradients on
    the part of the Hessian that is definite take the place of gradients.
    """
    n, eps = start.shape[1], sides[0].regularization
    capacity = min(n, capacity)
    v = start.new_empty(capacity, n)
    products = [start.new_empty(capacity, n) for _ in sides]
    gram = np.empty((len(sides), 0, 0))
    m, new, was_full = 0, start, False
    x = last = np.empty((2, 0))
    for step in range(maxiter):
        new = beside(new, v[:m])[: capacity - m]
        end = m + len(new)
        v[m:end] = new
        for f, side in zip(products, sides, strict=True):
            f[m:end] = side.times_f(new)
        old, m = m, end
        gram = np.array([bordered(g, inner(v[:m], f[old:m])) for g, f in zip(gram, products, strict=True)])
        regular = gram + eps * np.eye(m)
        last = np.pad(x, ((0, 0), (0, m - x.shape[1])))
        starts = [last] if last.any() else []
        if step & (step - 1) == 0 and step not in (1, 2):
            starts += _anew(regular, rng, 1)
        x = _within(regular, starts)
        pair, gradients = _measured(v[:m], [f[:m] for f in products], regular, eps, x)
        if pair.has_converged(tol, rounding(sides)):
            x = _within(regular, [x, *_anew(regular, rng, 10)])
            pair, gradients = _measured(v[:m], [f[:m] for f in products], regular, eps, x)
        on_step({"n_products": [side.n_products for side in sides], "value": pair.value, "gradient": pair.gradient})
        has_converged = pair.has_converged(tol, rounding(sides) if step > 10 else 0.0)  # at first f is small, too
        if has_converged or m == n:
            break
        norms = torch.linalg.vector_norm(gradients, dim=1)
        new = gradients[norms > 0.05 * norms.max()]
        if m + 2 > capacity < n:
            kept = np.vstack([x, last, *_of_parts(regular)])[: capacity // 2]
            q = np.linalg.qr(kept.T)[0]
            rotation = torch.as_tensor(q.T, dtype=torch.float64, device=v.device)
            for block in (v, *products):
                combine(block[:m], rotation)
            gram, x, m, was_full = q.T @ gram @ q, x @ q, q.shape[1], True
        if was_full:
            found = Contrast.at(gram + eps * np.eye(m), x)
            # where a is the best, Σ wₙ Fₙ a = 0, so that a is an extreme of the positive part against the negative one
            parts = (Mixture(sides, (-weights).clip(min=0.0)) for weights in (found.of_a, found.of_b))
            new = torch.cat([solve(part, one[None]) for part, one in zip(parts, gradients, strict=True)])
    return pair


def rounding(sides: Sequence[Side]) -> float:
    """What f may be for equal matrices: logarithms of quotients are in error by eps / ε."""
    return (10 * torch.finfo(sides[0].J.dtype).eps / sides[0].regularization) ** 2


def _measured(
    v: Tensor, products: list[Tensor], regular: NDArray[np.float64], eps: float, x: NDArray[np.float64]
) -> tuple[Pair, Tensor]:
    """The pair x V, and its gradients, as rows, from V and the products F_n V."""
    found = Contrast.at(regular, x)
    both, of = (torch.as_tensor(a, dtype=v.dtype, device=v.device) for a in (x, np.stack([found.of_a, found.of_b])))
    rows = both @ v
    gradients = eps * of.sum(dim=1, keepdim=True) * rows
    for weights, f in zip(of.T, products, strict=True):
        gradients += (weights[:, None] * both) @ f
    return Pair(rows, found.value, float(torch.linalg.vector_norm(gradients.double()))), gradients


def _anew(gram: NDArray[np.float64], rng: np.random.Generator, count: int) -> list[NDArray[np.float64]]:
    """Starts within the space, which cost no products."""
    return [*_of_parts(gram), *rng.standard_normal((count, 2, gram.shape[1]))]


def _of_parts(gram: NDArray[np.float64]) -> list[NDArray[np.float64]]:
    """The extremes of the mean of some matrices against that of others, (2, m), the largest contrasts first.

    These are near the maxima: there, too, some models notice a more than b, and the others b. Of two models they are
    the answer. There are all divisions of up to `_DIVIDED` models, else all pairs, and each one against the rest.
    """
    n, found = len(gram), []
    divisions: list[tuple[tuple[int, ...], ...]] = [((i,), (j,)) for i in range(n) for j in range(i)]
    sizes = range(1, n // 2 + 1) if n <= _DIVIDED else [1]
    for size in sizes:
        for part in itertools.combinations(range(n), size):
            if n > 2 and (2 * size < n or 0 in part):
                divisions.append((part, tuple(i for i in range(n) if i not in part)))
    for one, other in divisions:
        _, y = scipy.linalg.eigh(gram[list(one)].mean(axis=0), gram[list(other)].mean(axis=0))
        x = y[:, [-1, 0]].T / np.linalg.norm(y[:, [-1, 0]], axis=0)[:, None]
        found.append((Contrast.at(gram, x).value, x))
    return [x for _, x in sorted(found, key=lambda one: -one[0])[:_TRIED]]


def _within(gram: NDArray[np.float64], starts: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Where f is the largest, (2, m), near starts, by L-BFGS for log f in coordinates that whiten the mean matrix.

    Of two matrices that is known.
    """
    if len(gram) == 2:
        return _of_parts(gram)[0]
    lower = np.linalg.cholesky(gram.mean(axis=0))
    inverse = scipy.linalg.solve_triangular(lower, np.eye(len(lower)), lower=True)
    white = inverse @ gram @ inverse.T
    size, m = len(gram), len(lower)

    def objective(z: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        ab = z.reshape(2, m)
        images = (white.reshape(-1, m) @ ab.T).reshape(size, m, 2)
        found = Contrast.of(*np.einsum("nmi,im->in", images, ab))
        f = max(found.value, np.finfo(float).tiny)
        return -np.log(f), -np.stack([found.of_a @ images[:, :, 0], found.of_b @ images[:, :, 1]]).ravel() / f

    def climbed(z: NDArray[np.float64], iterations: int, ftol: float) -> tuple[float, NDArray[np.float64]]:
        options = {"maxcor": 20, "maxiter": iterations, "gtol": 1e-10, "ftol": ftol}
        done = scipy.optimize.minimize(objective, z, jac=True, method="L-BFGS-B", options=options)
        return -float(done.fun), done.x

    first = [one @ lower for one in starts]
    found = [(one / np.linalg.norm(one, axis=1)[:, None]).ravel() for one in first]
    if len(found) > 1:  # a rough climb from each
        found = [z for _, z in sorted((climbed(z, 50, 1e-5) for z in found), key=lambda one: -one[0])]
    x = climbed(found[0], 1000, 1e-15)[1].reshape(2, m) @ inverse
    return x / np.linalg.norm(x, axis=1)[:, None]
