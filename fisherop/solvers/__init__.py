"""Solvers for the extreme eigenpairs of F: each a plain function in a file of its name, and the table of them.

A solver is called as ``solver(operator, k, which, tol=, maxiter=, rng=, **its own options)`` with a `FisherOperator`,
and returns an `Answer`, or raises `SolverStopped` with one. `fisherop.eigenpairs` certifies it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import NamedTuple

from fisherop.result import Answer
from fisherop.solvers import eigsh, exact, golub_kahan, lobpcg, power, primme, randomized_svd, svds


class Method(NamedTuple):
    """A solver, and what its caller must know of it.

    `is_robust`: it takes J of any size, and sees to it that rounding doesn't decide whether pairs converge. All other
    solvers are given J times a power of two where F would leave the range of its dtype, and a tolerance that leaves
    room for rounding.
    """

    solve: Callable[..., Answer]
    is_robust: bool = False

    @property
    def options(self) -> set[str]:
        """The solver's own."""
        keywords = {p.name for p in inspect.signature(self.solve).parameters.values() if p.kind == p.KEYWORD_ONLY}
        return keywords - {"tol", "maxiter", "rng", "state"}

    @property
    def resumes(self) -> bool:
        """Whether a search can be stored in a `state`, and gone on with."""
        return "state" in inspect.signature(self.solve).parameters


SOLVERS = {
    "golub_kahan": Method(golub_kahan.golub_kahan, is_robust=True),
    "exact": Method(exact.exact, is_robust=True),
    "eigsh": Method(eigsh.eigsh),
    "lobpcg": Method(lobpcg.lobpcg),
    "svds": Method(svds.svds),
    "primme": Method(primme.primme),
    "power": Method(power.power),
    "randomized_svd": Method(randomized_svd.randomized_svd),
}
