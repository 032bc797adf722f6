"""What a random start says of eigenvalues that are not seen: as often as promised."""

import numpy as np
import pytest
import torch
from helpers import diagonal

from fisherop.krylov.bounds import chance_of_missing
from fisherop.krylov.lanczos import LanczosFactorization


def test_the_chance_of_missing_an_eigenvalue():
    """λ_max lies beyond the bound at δ in at most a share δ of runs; here δ = 0.1 and few Lanczos steps."""
    rng = np.random.default_rng(0)
    for block in (1, 2):
        missed = []
        for _ in range(600):
            values = np.r_[1, np.linspace(0.9, 0, 59)] if rng.random() < 0.5 else np.sort(rng.random(60))[::-1]
            v = np.linalg.qr(rng.standard_normal((60, block)))[0]
            for _ in range(6 // block):
                v = np.linalg.qr(np.hstack([v, values[:, None] * v[:, -block:]]))[0]
            theta, y = np.linalg.eigh(v.T @ (values[:, None] * v))
            residual = values[:, None] * (v @ y) - (v @ y) * theta
            w = np.linalg.svd(residual)[0][:, :block].T @ residual  # C Y
            if theta[-1] < values[0]:
                missed.append(chance_of_missing(values[0], theta, w, y[:block], 60))
        share = np.mean(np.array(missed) <= 0.1)
        assert share <= 0.1 + 3 * (0.1 * 0.9 / len(missed)) ** 0.5 and len(missed) > 300


def test_the_chance_for_many_start_vectors():
    theta, residuals = np.linspace(0, 1, 700), np.full((700, 700), 1e-3)
    assert chance_of_missing(2.0, theta, residuals, np.eye(700), 700) < 1e-60
    assert chance_of_missing(2.0, theta, 1e6 * residuals, np.eye(700), 700) == 1


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("family", ["flat", "clustered", "spread"])
def test_the_chance_under_rounding(family, dtype):
    """As often as promised, in each arithmetic: a missed eigenvalue of a chance below δ = 0.1 is as rare as δ.

    A Krylov space of few steps, as the solver makes it, from one or several random vectors; eigenvalues are within some
    tens of the rounding of float32.
    """
    rng = np.random.default_rng(5)
    eps, n, delta, missed = float(np.finfo(np.float32).eps), 300, 0.1, []
    for _ in range(400):
        gap = eps * 10 ** rng.uniform(0.3, 2)
        values = {"flat": np.ones(n), "clustered": 1 - gap * rng.random(n), "spread": rng.random(n)}[family]
        values[0] = values.max() + gap
        sigma = np.sqrt(values).astype(dtype)
        J = diagonal(sigma).products
        nothing = torch.empty(0, n, dtype=J.dtype)
        space = LanczosFactorization(J, nothing, nothing.new_empty(40, n), 1.0)
        space.extend(space.tensor(rng.standard_normal((int(rng.integers(1, 4)), n))))
        for _ in range(int(rng.integers(1, 8))):
            space.expand()
            if len(space.w) == 0:  # exact products of a flat spectrum
                space.extend(space.tensor(rng.standard_normal((1, n))))
        ritz = space.ritz()
        truth = float(sigma[0].astype(float) ** 2)
        if ritz.values[-1] < truth - 1e-3 * gap:
            missed.append(ritz.chance_of(truth))
    share = np.mean(np.array(missed) <= delta)
    assert len(missed) > 50 and share <= delta + 3 * (delta * (1 - delta) / len(missed)) ** 0.5
