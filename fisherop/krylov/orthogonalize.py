"""Blocks of vectors, kept as rows: projected, made orthonormal, combined.

Vectors have the dtype of the image, sums of their products are float64. Classical Gram–Schmidt is repeated until little
is left to remove: J. W. Daniel, W. B. Gragg, L. Kaufman and G. W. Stewart, Reorthogonalization and stable algorithms
for updating the Gram–Schmidt QR factorization, Math. Comp. 30 (1976).
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fisherop.jacobian import triangle

_PIECE = 2**12  # columns in one sum
_SLAB = 2**16  # columns that go through temporary memory at a time


def project(block: Tensor, basis: Tensor) -> Tensor:
    """Leave, of each row, what is orthogonal to the rows of an orthonormal basis; the inner products of before."""
    # A sum in float32 that holds one large product loses the small ones that come after it: by pieces, each from zero.
    n = block.shape[1] // _PIECE * _PIECE
    pieces, others = (rows[:, :n].unflatten(1, (-1, _PIECE)) for rows in (block, basis))
    overlaps = torch.bmm(pieces.transpose(0, 1), others.permute(1, 2, 0)).sum(dim=0, dtype=torch.float64)
    overlaps += block[:, n:] @ basis[:, n:].T
    block.addmm_(overlaps.to(block.dtype), basis, alpha=-1)
    return overlaps


def combine(rows: Tensor, y: Tensor) -> Tensor:
    """Overwrite the first rows with y times them, in y's precision: there may be no memory for a copy."""
    for columns in rows.split(_SLAB, dim=1):
        columns[: len(y)] = y @ columns[: y.shape[1]].to(y.dtype)
    return rows[: len(y)]


def inner(a: Tensor, b: Tensor) -> NDArray[np.float64]:
    """Inner products of rows."""
    if a is b and len(a) == 1:
        return torch.linalg.vector_norm(a, dim=1, dtype=torch.float64).square()[:, None].cpu().numpy()
    products = a.new_zeros(len(a), len(b), dtype=torch.float64)
    for x, y in zip(a.split(_SLAB, dim=1), b.split(_SLAB, dim=1), strict=True):
        products += x.double() @ y.double().T
    return products.cpu().numpy()


def orthonormalize(block: Tensor, floor: float) -> tuple[Tensor, NDArray[np.float64]]:
    """Q in the place of `block`, and C, with block = Q C; without directions shorter than `floor`."""
    if len(block) == 1:
        s, right = np.sqrt(inner(block, block))[0], np.ones((1, 1))
    else:
        _, s, right = np.linalg.svd(triangle(block).cpu().numpy(), full_matrices=False)
    s, right = s[s > floor, None], right[s > floor]
    return combine(block, torch.as_tensor(right / s, device=block.device)), s * right


def orthonormalize_beside(block: Tensor, basis: Tensor, floor: float) -> tuple[Tensor, NDArray[np.float64]]:
    """As `orthonormalize`, with Q also orthogonal to the rows of `basis`, as the longer directions already are."""
    block, c = orthonormalize(block, floor)
    kept = 0.0 if len(block) > 1 else 1.0  # of the shortest vector
    while kept < 0.9:
        project(block, basis)
        block, again = _reorthonormalize(block)
        c, kept = again @ c, np.abs(np.diag(again)).min(initial=1.0)
    return block, c


def _reorthonormalize(block: Tensor) -> tuple[Tensor, NDArray[np.float64]]:
    """Q and R of unit vectors that are nearly orthogonal, but for the last ones, which are rounding and are dropped.

    Each vector keeps its direction beside those before it, so that a longer one loses nothing to shorter ones.
    """
    r = triangle(block).cpu().numpy()
    count = int(np.cumprod(np.abs(np.diag(r)) > 0.5).sum())
    return combine(block, torch.as_tensor(np.linalg.inv(r[:count, :count]).T, device=block.device)), r[:count]


def eigh(t: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Eigenvalues, ascending, and eigenvectors, in columns, of a small symmetric matrix."""
    # by torch: NumPy's own threads contend with torch's for the cores, at up to 5 × the time
    values, vectors = torch.linalg.eigh(torch.from_numpy(t))
    return values.numpy(), vectors.numpy()
