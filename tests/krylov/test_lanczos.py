"""The factorization is its relation, in each arithmetic and after restarts."""

import numpy as np
import pytest
import torch
from helpers import DTYPES, assert_close, diagonal, linear_operator

from fisherop.krylov.lanczos import LanczosFactorization
from fisherop.testing import matrix_with_singular_values


@pytest.mark.parametrize("block", [1, 3])
def test_a_restart_keeps_the_relation(block):
    """F V = V T + W C, V and W orthonormal, though the harmonic problem is as ill-conditioned as its shift is small."""
    sigma = torch.as_tensor(np.r_[np.sqrt(np.linspace(1, 0.1, 195)), [1e-5] * 5])
    J = diagonal(sigma).products
    space = LanczosFactorization(J, torch.empty(0, 200).double(), torch.empty(40, 200).double(), 1.0)
    space.extend(torch.as_tensor(np.random.default_rng(0).standard_normal((block, 200))))
    for _ in range(3):
        while not space.is_full:
            space.expand()
        space.restart(8, 8, 1e-9)
        v, w = space.v.numpy(), space.w.numpy()
        relation = v * sigma.numpy() ** 2 - space.t @ v - space.c.T @ w
        assert np.abs(relation).max() <= 1e-11
        both = np.vstack([v, w])
        assert np.abs(both @ both.T - np.eye(len(both))).max() <= 1e-12


@pytest.mark.parametrize("dtype", DTYPES)
def test_directions_from_rounding_take_nothing_from_the_others(dtype):
    """A block of 3 whose products have rank 2, the shorter direction 1e-5 long: T was wrong by 0.1 of its norm."""
    for seed in range(40):
        matrix = matrix_with_singular_values([1.0, 10**-2.5], 2, 12, rng=seed)
        J = linear_operator(matrix, dtype).products
        space = LanczosFactorization(J, torch.empty(0, 12, dtype=dtype), torch.empty(12, 12, dtype=dtype), 1.0)
        space.extend(torch.randn(3, 12, generator=torch.Generator().manual_seed(seed), dtype=dtype))
        while len(space.w):
            space.expand()
        v = space.v.double().numpy()
        assert_close(space.t, v @ matrix.T @ matrix @ v.T, dtype, factor=30)
        assert_close(v @ v.T, np.eye(len(v)), dtype, factor=30)
        assert_close(np.linalg.eigvalsh(space.t)[-2:], [1e-5, 1], dtype, factor=30)


def test_vectors_of_few_pixels_keep_the_basis_orthonormal():
    """In float32 a long sum that holds a product near 1 loses the small ones: V was wrong by 1e-4, T by 4e-4."""
    sigma = torch.cat([torch.tensor([4.0, 4.0, 3.0]), torch.linspace(2, 1, 2**20 - 3)])
    J = diagonal(sigma).products
    space = LanczosFactorization(J, torch.empty(0, len(sigma)), torch.empty(20, len(sigma)), 1.0)
    space.extend(torch.randn(1, len(sigma), generator=torch.Generator().manual_seed(0)))
    for _ in range(12):
        space.expand()
    v = space.v.double()
    assert (v @ v.T - torch.eye(12, dtype=torch.float64)).abs().max() <= 5e-6
    assert np.abs((v * sigma.double() ** 2 @ v.T).numpy() - space.t).max() <= 16 * 5e-6
