"""Models, devices and tolerances that the tests share."""

import importlib.util
import pathlib

import numpy as np
import torch
from hypothesis import strategies as st
from torch import nn

from fisherop import FisherOperator
from fisherop.testing import linear_model, matrix_with_singular_values

SPECTRA = {p.stem: np.load(p) for p in sorted((pathlib.Path(__file__).parent / "spectra").glob("*.npy"))}
DTYPES = (torch.float32, torch.float64)
DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
ITERATIVE = ("golub_kahan", "eigsh", "lobpcg", "svds", "power")
METHODS = ("exact", *ITERATIVE)
if importlib.util.find_spec("primme"):
    METHODS = (*METHODS, "primme")


def eps(dtype) -> float:
    return torch.finfo(dtype).eps


def rtol(dtype, factor=1e3) -> float:
    """The one tolerance: `factor` roundings, relative to the largest magnitude compared."""
    return factor * eps(dtype)


def assert_close(actual, desired, dtype, factor=1e3):
    actual, desired = (np.asarray(a, dtype=np.float64) for a in (actual, desired))
    scale = max(np.abs(desired).max(initial=0.0), np.abs(actual).max(initial=0.0))
    np.testing.assert_allclose(actual, desired, rtol=0, atol=rtol(dtype, factor) * scale)


def assert_truthful(result, matrix):
    """Everything the result says, against dense float64 algebra; `converged` for the claimed index, too."""
    n = matrix.shape[1]
    truth = np.zeros(n)
    sigma = np.linalg.svd(matrix, compute_uv=False)
    truth[: len(sigma)] = sigma**2
    v = result.eigenvectors.astype(np.float64)
    eps = np.finfo(result.eigenvectors.dtype).eps
    assert np.abs(v.T @ v - np.eye(v.shape[1])).max(initial=0) <= 1e3 * eps
    assert (np.diff(result.eigenvalues) <= 0).all() and (result.eigenvalues >= 0).all()
    quotient = (np.linalg.norm(matrix @ v, axis=0) / np.linalg.norm(v, axis=0)) ** 2
    residual = np.linalg.norm(matrix.T @ (matrix @ v) - quotient * v, axis=0)
    allowed = result.tol * truth[0]
    np.testing.assert_allclose(result.eigenvalues, quotient, rtol=1e3 * eps, atol=1e3 * eps * truth[0])
    for i in np.flatnonzero(result.converged):
        assert residual[i] <= allowed or quotient[i] <= allowed
    margin = 2 * len(v.T) ** 0.5 * allowed + 100 * eps * truth[0]
    wrong = abs(result.eigenvalues - truth[result.eigenindex]) > margin
    assert not (wrong & result.converged).any(), f"claimed {result}, but the spectrum is {truth}"


def linear_operator(matrix, dtype=torch.float64, shape=None, device="cpu") -> FisherOperator:
    n = matrix.shape[1]
    image = torch.linspace(0, 1, n, dtype=dtype, device=device).reshape(shape or (n,))
    return FisherOperator(image, linear_model(matrix, dtype))


def diagonal(sigma):
    """The model y = σ x: from a random start, every model of these singular values takes the same course."""
    sigma = torch.as_tensor(sigma)
    return FisherOperator(torch.zeros(len(sigma), dtype=sigma.dtype), lambda x: sigma * x)


@st.composite
def matrices(draw, max_m=30, max_n=24):
    """Matrices (m, n) of drawn shape, rank, conditioning, repetition and scale, with float32 entries."""
    m, n = draw(st.integers(1, max_m)), draw(st.integers(1, max_n))
    rank = draw(st.integers(0, min(m, n)))
    kind = draw(st.sampled_from(["flat", "geometric", "random", "repeated", "outlier"]))
    decades = draw(st.floats(0, 6))
    scale = 10.0 ** draw(st.floats(-6, 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    sigma = {
        "flat": np.ones(rank),
        "geometric": 10 ** -np.linspace(0, decades, rank),
        "random": rng.random(rank),
        "repeated": rng.choice([1.0, 0.5, 0.01], rank),
        "outlier": np.r_[100.0, np.ones(rank)][:rank],
    }[kind]
    matrix = matrix_with_singular_values(np.sort(sigma)[::-1] * scale, m, n, rng=rng)
    return matrix.astype(np.float32).astype(np.float64)  # exact in both dtypes


class Small(nn.Module):
    """A nonlinear convolutional model: norm, in-place activation, skip connection, pooling, several outputs."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.act = nn.Softplus()
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            for p in self.parameters():
                nn.init.normal_(p, std=0.4)
            self.norm.running_mean.normal_()

    def forward(self, x):
        h = self.act(self.norm(self.first(x)))
        h = h + self.relu(self.second(h))
        return {"pooled": nn.functional.avg_pool2d(h, 2), "parts": (h.mean((2, 3)), [h[..., :2].sin()])}


def small_image(dtype=torch.float64, device="cpu"):
    return torch.randn(1, 2, 6, 4, generator=torch.Generator().manual_seed(1), dtype=dtype).to(device)


def small_model(dtype=torch.float64, device="cpu"):
    return Small().to(device, dtype).eval()


def flat_small(model, x):
    out = model(x)
    return torch.cat([t.flatten() for t in (out["pooled"], out["parts"][0], out["parts"][1][0])])
