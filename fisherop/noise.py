"""Noise on the response: F = JᵀΣ⁻¹J and its kin, by a root S of the information that the responses carry.

With S (M' × M) such that SᵀS is the Fisher information of the responses themselves, F = (S J)ᵀ(S J): so every solver
works on S J, to its full precision. A change v of the image then has the discriminability d′ = √(vᵀF v), in units of
the noise. Pass one of these as ``noise=`` to `FisherOperator`, `JacobianOperator` or `Eigendistortion`, or an object of
your own with a method ``root(response) -> (apply, adjoint)``, see `Noise`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from scipy.sparse import issparse
from torch import Tensor

from fisherop import checks
from fisherop.from_operator import as_jacobian
from fisherop.jacobian import Jacobian

_Map = Callable[[Tensor], Tensor]


class Noise(Protocol):
    """What a noise has to have."""

    def root(self, response: Tensor) -> tuple[_Map, _Map]:
        """S and Sᵀ at a response.

        Parameters
        ----------
        response : Tensor
            As the model gave it, of M elements in its own shape, ``(M,)`` if it consists of several tensors.

        Returns
        -------
        apply, adjoint : callable
            Rows of tensors ``(k, M) -> (k, M')``, and ``(k, M') -> (k, M)``, in the response's dtype, on its device.
        """
        ...


class Root(Jacobian):
    """S (M' × M) of a noise at a response, as products with rows.

    Raises
    ------
    TypeError, ValueError
        The noise has no `root`, its two functions are not each other's adjoint, or give what isn't finite.
    """

    def __init__(self, noise: Any, response: Tensor) -> None:
        self.noise, self.response = noise, response
        if isinstance(noise, type) or not callable(getattr(noise, "root", None)):
            what = "one of fisherop.noise, or an object with root(response) -> (apply, adjoint)"
            checks.refuse(TypeError, "noise", what, noise, _cure(noise))
        pair = checks.instance("noise.root(response)", noise.root(response), tuple, "a tuple (apply, adjoint)")
        if len(pair) != 2 or not all(map(callable, pair)):
            checks.refuse(TypeError, "noise.root(response)", "a tuple (apply, adjoint) of two functions", pair)
        self._apply, self._adjoint = pair
        self.dtype, self.device = response.dtype, response.device
        m = response.numel()
        self.shape = 0, m
        x = torch.randn(1, m, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(response)
        sx = self._checked("apply", self._apply(x))
        self.shape = sx.shape[1], m
        y = torch.randn(sx.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(response)
        sy = self._checked("adjoint", self._adjoint(y))
        if sy.shape != x.shape:
            raise ValueError(f"the adjoint of noise.root(response) gives {sy.shape[1]} elements a row, not M = {m}")
        there, here = float((sx.double() * y.double()).sum()), float((x.double() * sy.double()).sum())
        size = float(torch.linalg.vector_norm(sx.double()) * torch.linalg.vector_norm(y.double()))
        if abs(there - here) > torch.finfo(self.dtype).eps ** 0.5 * size:
            raise ValueError(
                f"noise.root(response) must give a function and its adjoint: ⟨S x, y⟩ = {there:.6g}, but ⟨x, Sᵀy⟩ = "
                f"{here:.6g} for random x and y"
            )

    def _checked(self, name: str, rows: Any) -> Tensor:
        what = f"a tensor (1, ·) of {self.dtype} on {self.device}, and finite"
        checks.instance(f"what {name} of noise.root(response) gives", rows, Tensor, what)
        if rows.ndim != 2 or len(rows) != 1 or (rows.dtype, rows.device) != (self.dtype, self.device):
            checks.refuse(ValueError, f"what {name} of noise.root(response) gives", what, rows)
        if not checks.is_finite(rows):
            checks.refuse(ValueError, f"what {name} of noise.root(response) gives", what, rows)
        return rows

    def __reduce__(self) -> tuple:
        return type(self), (self.noise, self.response)

    def jvp(self, rows: Tensor) -> Tensor:
        return self._apply(rows)

    def vjp(self, rows: Tensor) -> Tensor:
        return self._adjoint(rows)


@dataclass(frozen=True, eq=False)
class Gaussian:
    """Gaussian noise: F = JᵀΣ⁻¹J.

    Parameters
    ----------
    variance : float, Tensor, ndarray, LinearOperator or callable
        A number, the variance of each response. An array of the response's shape, or (M,): the variance of each. A
        matrix (M, M): their covariance Σ. A `LinearOperator` (M', M): a root S of Σ⁻¹ = SᵀS, as Σ^(-1/2). A function
        of the response that gives the variance of each element from that element alone: then the variance tells of the
        image, too, by S = √(1/v + v′²/(2 v²)), and F is that of S. M. Kay, Fundamentals of Statistical Signal
        Processing: Estimation Theory (1993), eq. 3.31. It must be made of PyTorch's operations.

    Raises
    ------
    ValueError
        When it is used: a variance isn't positive, the covariance isn't symmetric and positive definite, or of another
        size than the response, or an element's variance depends on other elements.
    """

    variance: Any

    def root(self, response: Tensor) -> tuple[_Map, _Map]:
        """S and Sᵀ, see `Noise.root`."""
        variance = self.variance
        if issparse(variance):
            cure = "pass a LinearOperator of the inverse root, or a dense matrix"
            checks.refuse(TypeError, "variance", "a number, an array, a LinearOperator or a function", variance, cure)
        if hasattr(variance, "matvec") or Jacobian in type(variance).__mro__:
            return _given_root(variance, response)
        if callable(variance):
            return _diagonal(_signal_dependent(variance, response), response)
        values = _numbers("variance", variance)
        if values.shape == (response.numel(),) * 2 != response.shape:
            return _covariance(values, response)
        shape = f"a number, of the response's shape {tuple(response.shape)}, ({response.numel()},), or square"
        if values.ndim and values.shape not in (response.shape, (response.numel(),)):
            checks.refuse(ValueError, "variance", shape, variance)
        if not (values > 0).all():
            checks.refuse(ValueError, "variance", "positive", float(values.min()))
        return _diagonal(values.to(response.device).reshape(-1).rsqrt().expand(response.numel()), response)


@dataclass(frozen=True)
class Poisson:
    """Counts whose mean is the response, F = Jᵀ diag(1/f) J.

    Parameters
    ----------
    floor : float, optional
        A dark rate: responses below it are taken to be it. Without it, a response that isn't positive is an error.
    """

    floor: float | None = None

    def root(self, response: Tensor) -> tuple[_Map, _Map]:
        """S and Sᵀ, see `Noise.root`: diag(1/√f)."""
        return _diagonal(_rates(response, self.floor, "Poisson(floor=...)").rsqrt(), response)


@dataclass(frozen=True)
class NegativeBinomial:
    """Counts whose mean f is the response, and whose variance is f + f²/r.

    Parameters
    ----------
    r : float
        The dispersion, positive: the larger, the nearer to `Poisson`.
    floor : float, optional
        As of `Poisson`.
    """

    r: float
    floor: float | None = None

    def root(self, response: Tensor) -> tuple[_Map, _Map]:
        """S and Sᵀ, see `Noise.root`: diag(1/√(f + f²/r))."""
        r = checks.number("r", self.r, "a positive number", lambda r: r > 0)
        rates = _rates(response, self.floor, "NegativeBinomial(r, floor=...)")
        return _diagonal((rates + rates**2 / r).rsqrt(), response)


@dataclass(frozen=True)
class Bernoulli:
    """Independent decisions, whose logits are the response, F = Jᵀ diag(p (1 − p)) J."""

    def root(self, response: Tensor) -> tuple[_Map, _Map]:
        """S and Sᵀ, see `Noise.root`: diag(√(p (1 − p)))."""
        logits = response.double().reshape(-1)
        halves = torch.nn.functional.logsigmoid(logits) + torch.nn.functional.logsigmoid(-logits)
        return _diagonal((halves / 2).exp(), response)


@dataclass(frozen=True)
class Categorical:
    """A choice, whose logits are the response: F = Jᵀ(diag p − p pᵀ)J with p = softmax of the response.

    Parameters
    ----------
    dim : int
        The dimension of the classes, as of `torch.softmax`; a choice is made at each place of the others. Of a map
        (1, C, h, w) whose channels are classes it is 1.
    """

    dim: int = -1

    def root(self, response: Tensor) -> tuple[_Map, _Map]:
        """S and Sᵀ, see `Noise.root`: an exact root with one row less than classes, in O(M).

        With q = √p and c the most probable class, S u = q_i (u_i − u_c − Σⱼ pⱼ (uⱼ − u_c) / (1 + q_c)) for i ≠ c. This
        is (I − q qᵀ) diag(q) but for an orthogonal factor, the Householder reflection that takes q to the axis of c,
        and it holds no difference of nearly equal numbers other than u_i − u_c.
        """
        ndim = response.ndim
        if not isinstance(self.dim, int) or not -ndim <= self.dim < max(ndim, 1):
            checks.refuse(ValueError, "dim", f"a dimension of the response, of shape {tuple(response.shape)}", self.dim)
        shape = response.movedim(self.dim, -1).shape
        classes = shape[-1]
        if classes < 2:
            checks.refuse(ValueError, "the response", f"logits of at least 2 classes in dimension {self.dim}", response)
        log_p = torch.log_softmax(response.double().movedim(self.dim, -1).reshape(-1, classes), dim=-1)
        best = log_p.argmax(dim=-1, keepdim=True)
        others = torch.arange(classes - 1, device=response.device).expand(len(log_p), -1)
        others = others + (others >= best)
        p, q = log_p.exp().to(response.dtype), (log_p / 2).exp().to(response.dtype)
        q_best, p_others, q_others = q.gather(1, best), p.gather(1, others), q.gather(1, others)

        def apply(rows: Tensor) -> Tensor:
            u = rows.reshape(-1, *response.shape).movedim(self.dim + (self.dim >= 0), -1).reshape(-1, *log_p.shape)
            k = len(u)
            u = u.gather(2, others.expand(k, -1, -1)) - u.gather(2, best.expand(k, -1, -1))
            mean = (p_others * u).sum(dim=2, keepdim=True)
            return (q_others * (u - mean / (1 + q_best))).reshape(k, -1)

        def adjoint(rows: Tensor) -> Tensor:
            w = q_others * rows.reshape(-1, *p_others.shape)
            k = len(w)
            u = w - p_others * (w.sum(dim=2, keepdim=True) / (1 + q_best))
            out = rows.new_empty(k, *log_p.shape)
            out.scatter_(2, others.expand(k, -1, -1), u)
            out.scatter_(2, best.expand(k, -1, -1), -u.sum(dim=2, keepdim=True))
            return out.reshape(k, *shape).movedim(-1, self.dim + (self.dim >= 0)).reshape(k, -1)

        return apply, adjoint


def _diagonal(elements: Tensor, response: Tensor) -> tuple[_Map, _Map]:
    elements = elements.to(response.dtype)
    return (lambda rows: rows * elements), (lambda rows: rows * elements)


def _numbers(name: str, value: Any) -> Tensor:
    if isinstance(value, Tensor):
        value = value.detach()
    array = checks.array(name, value, what="a number, an array, a LinearOperator or a function")
    return torch.from_numpy(np.array(array, dtype=np.float64))


def _rates(response: Tensor, floor: float | None, cure: str) -> Tensor:
    rates = response.double().reshape(-1)
    if floor is not None:
        return rates.clamp(min=checks.number("floor", floor, "a positive number", lambda floor: floor > 0))
    wrong = (rates <= 0).nonzero()
    if len(wrong):
        where = tuple(int(i) for i in np.unravel_index(int(wrong[0]), response.shape)) if response.ndim else ()
        raise ValueError(
            f"the response, a mean count, must be positive, but {len(wrong)} of its {len(rates)} elements are not, the "
            f"first {float(rates[wrong[0]]):.3g} at {where}: give a dark rate, {cure}"
        )
    return rates


def _covariance(matrix: Tensor, response: Tensor) -> tuple[_Map, _Map]:
    """L⁻¹ of Σ = L Lᵀ, by solving with it in float64."""
    if not torch.allclose(matrix, matrix.T, rtol=1e-8, atol=1e-10 * float(matrix.abs().max())):
        raise ValueError("variance, as a covariance matrix, must be symmetric")
    factor, info = torch.linalg.cholesky_ex(matrix)
    if int(info):
        raise ValueError(
            f"variance, as a covariance matrix, must be positive definite, but its leading minor of order {int(info)} "
            "is not: add a little to its diagonal"
        )
    factor = factor.to(response.device)

    def apply(rows: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(factor, rows.double().T, upper=False).T.to(rows.dtype)

    def adjoint(rows: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(factor.T, rows.double().T, upper=True).T.to(rows.dtype)

    return apply, adjoint


def _given_root(operator: Any, response: Tensor) -> tuple[_Map, _Map]:
    root = as_jacobian(operator)
    if root.shape[1] != response.numel():
        what = f"an operator (M', {response.numel()}), a root of the inverse covariance"
        checks.refuse(ValueError, "variance", what, operator)
    to = {"dtype": root.dtype, "device": root.device}
    return (lambda rows: root.jvp(rows.to(**to)).to(rows)), (lambda rows: root.vjp(rows.to(**to)).to(rows))


def _signal_dependent(variance: Callable[..., Any], response: Tensor) -> Tensor:
    """√(1/v + v′²/(2 v²)) of each element."""
    with torch.inference_mode(False), torch.enable_grad():
        f = response.detach().double().clone().requires_grad_()
        v = checks.instance("what the variance function gives", variance(f), Tensor, "a tensor")
        if v.shape != f.shape:
            checks.refuse(ValueError, "what the variance function gives", f"of the shape {tuple(f.shape)}", v)
        slope, along = torch.zeros_like(f), torch.zeros_like(f)
        if v.requires_grad:
            slope = torch.autograd.grad(v.sum(), f, retain_graph=True)[0]
            weights = torch.randn(f.shape, generator=torch.Generator().manual_seed(0), dtype=f.dtype).to(f.device)
            along = torch.autograd.grad((weights * v).sum(), f)[0] - weights * slope
    v, slope = v.detach().reshape(-1), slope.reshape(-1)
    if not (v > 0).all():
        checks.refuse(ValueError, "the variance", "positive", float(v.min()))
    if float(along.abs().max()) > 1e-8 * max(float(slope.abs().max()), float(along.abs().max())):
        raise ValueError(
            "the variance function must give the variance of each element from that element alone: for others pass an "
            "object of your own with root(response) -> (apply, adjoint)"
        )
    return (1 / v + slope**2 / (2 * v**2)).sqrt()


def _cure(noise: Any) -> str:
    return "call it, as noise.Poisson()" if isinstance(noise, type) else "as noise.Gaussian(variance)"
