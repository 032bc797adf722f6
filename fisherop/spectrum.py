"""The whole spectrum of F at a glance: its density, its trace, and how many directions a model does not notice."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import scipy.linalg
import torch

from fisherop import checks
from fisherop.density import Quadrature, SpectralDensity
from fisherop.jacobian import Jacobian, Transposed
from fisherop.krylov.lanczos import LanczosFactorization
from fisherop.operators import FisherOperator, JacobianOperator
from fisherop.progress import progress_bar
from fisherop.sample import Sample
from fisherop.solve import as_fisher

_DENSE_BYTES = 2**31
_MOST = 10_000  # random vectors that rtol may take


def spectral_density(
    operator: FisherOperator | JacobianOperator,
    n_probes: int = 10,
    n_steps: int = 30,
    rng: int | np.random.Generator | None = None,
    *,
    rtol: float | None = None,
    progress: bool = True,
) -> SpectralDensity:
    """Estimate how the eigenvalues of F are spread, by stochastic Lanczos quadrature, with bands for every number.

    Each random vector starts a Krylov space; the nodes and the weights of its quadrature stand for the whole spectrum.
    Where M < N, the vectors are responses, and N − M eigenvalues are known to be zero.

    Parameters
    ----------
    operator : FisherOperator or JacobianOperator
    n_probes : int
        Random vectors; with `rtol`, at least so many.
    n_steps : int
        Products of each. 30 will do for the trace and for thresholds down to 10⁻² λ_max; take 100 for 10⁻⁴. What more
        steps would tell is part of the band of a count.
    rng : int or Generator, optional
    rtol : float, optional
        Add random vectors until the standard error of tr F is at most so much of it; their number grows as its square.
    progress : bool
        Show the products done, once a second has passed.

    Returns
    -------
    SpectralDensity
        Exact, and it says so, where the dense J costs no more products than this and takes less than 2 GiB.

    Raises
    ------
    TypeError, ValueError
        An argument can't be used, or `rtol` takes more than 10,000 random vectors.
    OverflowError, FloatingPointError
        J is so large or so small that its products leave what the dtype can hold.
    """
    operator = as_fisher(operator)
    n_probes, n_steps = checks.integer("n_probes", n_probes), checks.integer("n_steps", n_steps, 2)
    if rtol is not None:
        rtol = checks.number("rtol", rtol, "a number between 0 and 1, or None", lambda rtol: 0 < rtol < 1)
    progress, rng = checks.flag("progress", progress), checks.spawned(rng)
    total = None if rtol is not None else float(n_probes * n_steps)
    with progress_bar(operator, "spectral density", total, progress) as (own, _):
        return _measured(own, n_probes, n_steps, rng, rtol)


def _measured(
    operator: FisherOperator, n_probes: int, n_steps: int, rng: np.random.Generator, rtol: float | None
) -> SpectralDensity:
    m, n = operator.jacobian.shape
    size, n_zeros = min(m, n), n - min(m, n)
    needs = 0 if operator.jacobian.dense is not None else size / 2
    may_be_dense = m * n * 8 <= _DENSE_BYTES

    def found(runs: list[Quadrature], is_exact: bool) -> SpectralDensity:
        return SpectralDensity.of_runs(runs, n, operator.n_products, n_zeros, is_exact)

    if Sample.of(operator, rng).size == 0:
        return found([Quadrature([0.0], [1.0], [0.0], 0.0)], is_exact=True)
    if may_be_dense and needs <= n_probes * n_steps:
        return found([_exact(operator)], is_exact=True)
    J = operator.products if m >= n else Transposed(operator.products)
    storage = torch.empty(min(n_steps, size), size, dtype=J.dtype, device=J.device)
    runs: list[Quadrature] = []
    wanted = n_probes
    while len(runs) < wanted:
        runs.append(_run(J, storage, rng))
        if len(runs) == wanted and rtol is not None:
            density = found(runs, is_exact=False)
            wanted = math.ceil(len(runs) * (density.trace_error / (rtol * density.trace)) ** 2)
            if may_be_dense and wanted > len(runs) and needs <= n_steps * (wanted - len(runs)):
                return found([_exact(operator)], is_exact=True)
            if wanted > _MOST:
                raise ValueError(
                    f"rtol={rtol:g} takes about {wanted} random vectors: ask for at least "
                    f"{rtol * (wanted / _MOST) ** 0.5:.1g}, or for n_probes in its place"
                )
    return found(runs, is_exact=False)


def _run(J: Jacobian, storage: torch.Tensor, rng: np.random.Generator) -> Quadrature:
    """One Krylov space, of as many vectors as the storage has rows, from a random vector."""
    fact = LanczosFactorization(J, storage[:0], storage)
    fact.extend(fact.tensor(rng.standard_normal((1, J.shape[1]))))
    while not (fact.is_exhausted or fact.is_complete or fact.m == len(storage)):
        fact.expand()
    return fact.quadratures(1)[0]


def _exact(operator: FisherOperator) -> Quadrature:
    """The eigenvalues that aren't known to be zero, as squares of the singular values of the dense J."""
    dense: Any = operator.jacobian.to_dense().astype(np.float64)
    dense = dense if dense.shape[0] >= dense.shape[1] else dense.T
    sigma: Any = scipy.linalg.svdvals(scipy.linalg.qr(dense, mode="r", overwrite_a=True)[0][: dense.shape[1]])
    n = len(sigma)
    return Quadrature(sigma[::-1] ** 2, np.full(n, n**-0.5), np.zeros(n), 0.0)
