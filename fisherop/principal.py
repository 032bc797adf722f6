"""Principal distortions: the changes of an image that tell two models apart best.

The extremes of (vᵀF_A v) / (vᵀF_B v): model A notices v most, relative to model B, or least.
J. Feather, D. Lipshutz, S. E. Harvey, A. H. Williams and E. P. Simoncelli, Discriminating image representations with
principal distortions, ICLR 2025.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fisherop import checks
from fisherop.krylov.pencil import Pairs, Side, look_beyond, search
from fisherop.operators import FisherOperator
from fisherop.result import ConvergenceError
from fisherop.several_models import PrincipalPair, as_operator, check_same, largest, principal_pair, share, watched


@dataclass(frozen=True, eq=False, repr=False)
class PrincipalDistortions:
    """Certified extremes of F_A v = λ F_B v, both matrices regularized, and what each model makes of them.

    Attributes
    ----------
    eigenvalues : ndarray, shape (K,)
        Quotients of F_A / λ_A + ε I by F_B / λ_B + ε I, λ_A and λ_B the largest eigenvalues of F_A and F_B,
        descending: above 1 model A notices the distortion more, in these units.
    distortions : Tensor, shape ``(K, *image_shape)``
        Of unit Euclidean norm.
    error_bounds : ndarray, shape (K,)
        Relative: within that of each there is an eigenvalue. The true error is usually far smaller.
    converged : ndarray of bool, shape (K,)
        Whether the bound is at most `tol`.
    quotients : ndarray, shape (K,)
        (vᵀF_A v) / (vᵀF_B v) without regularization and in F's own units; infinite where the latter is zero.
    phi_a, phi_b : ndarray, shape (K,)
        The regularization's share, ε λ / (vᵀF v + ε λ), of each model's value. d log λ / d log ε = phi_a − phi_b.
    from_regularization : ndarray of bool, shape (K,)
        Whether the distortion is more one of the regularization than of the models: phi_b > 0.5 where the eigenvalue
        is above 1, phi_a > 0.5 where it is below. It changes with ε then.
    thresholds : ndarray, shape (K, 2)
        By what a distortion is multiplied, its Euclidean norm, for model A and model B to notice it, d′ = 1 in units of
        the noise: 1 / √(vᵀF v). That is the linear prediction, see `Eigendistortion.linear_range`.
    beyond : ndarray, shape (2,)
        No other eigenvalue is above the first and below the second, but for a chance of 10⁻³ each; infinity and 0 where
        this could not be shown.
    lambda_max : tuple of float
        λ_A and λ_B, as they were found: eigenvalues to a tolerance of 10⁻⁴, usually far nearer.
    regularization, tol : float
    n_products : tuple of float
        Of model A and of model B.
    details : dict
        ``history``: products, quotients and bounds of each step.
    """

    eigenvalues: NDArray[np.float64]
    distortions: Tensor
    error_bounds: NDArray[np.float64]
    converged: NDArray[np.bool_]
    quotients: NDArray[np.float64]
    phi_a: NDArray[np.float64]
    phi_b: NDArray[np.float64]
    from_regularization: NDArray[np.bool_]
    thresholds: NDArray[np.float64]
    beyond: NDArray[np.float64]
    lambda_max: tuple[float, float]
    regularization: float
    tol: float
    n_products: tuple[float, float]
    details: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        n = self.distortions[0].numel()
        lines = [
            f"principal distortions: {len(self.eigenvalues)} extremes of (F_A / λ_A + ε) v = λ (F_B / λ_B + ε) v, "
            f"N = {n}, ε = {self.regularization:.0e}, {self.n_products[0]:g} products of model A, "
            f"{self.n_products[1]:g} of B",
            "",
            f"{'eigenvalue':>12}  {'error ≤':>8}  {'φ_A':>5}  {'φ_B':>5}  {'threshold A':>11}  {'threshold B':>11}",
        ]
        for i, value in enumerate(self.eigenvalues):
            status = "converged" if self.converged[i] else "not converged"
            status += ", of the regularization" if self.from_regularization[i] else ""
            lines.append(
                f"{value:>12.5e}  {self.error_bounds[i]:>8.1e}  {self.phi_a[i]:>5.2f}  {self.phi_b[i]:>5.2f}  "
                f"{self.thresholds[i, 0]:>11.3g}  {self.thresholds[i, 1]:>11.3g}  {status}"
            )
        above, below = self.beyond
        if np.abs(np.log(self.eigenvalues)).max() < 1e-6:
            lines += ["", "the models do not differ at this image, but for their scale"]
        lines += ["", f"no other eigenvalue above {above:.4g} or below {below:.4g}, but for a chance of 0.001 each"]
        return "\n".join(lines)


@overload
def principal_distortions(
    image: Tensor, model_a: Any, model_b: Callable[[Tensor], Any] | FisherOperator, *args: Any, **options: Any
) -> PrincipalDistortions: ...
@overload
def principal_distortions(image: Tensor, model_a: Sequence[Any], **options: Any) -> PrincipalPair: ...
def principal_distortions(
    image: Tensor,
    model_a: Callable[[Tensor], Any] | FisherOperator | Sequence[Any],
    model_b: Callable[[Tensor], Any] | FisherOperator | None = None,
    k: int = 1,
    which: str = "both",
    *,
    regularization: float = 1e-3,
    tol: float | None = None,
    maxiter: int | None = None,
    rng: int | np.random.Generator | None = None,
    factor: float = 2.0,
    progress: bool = True,
    on_failure: str = "raise",
    **options: Any,
) -> PrincipalDistortions | PrincipalPair:
    """The distortions that model A notices most relative to model B, and least; or the pair that tells several apart.

    Both Fisher matrices are regularized by ε of their largest eigenvalues, so that exchanging the models inverts the
    eigenvalues, and directions which neither model notices don't win. Extremes within a subspace, or in a metric, or
    with noise on the responses: see `FisherOperator`.

    Parameters
    ----------
    image : Tensor, shape ``image_shape``
    model_a, model_b : callable, nn.Module or FisherOperator
        Models of the image, or operators of them at it, with noise, subspace and metric of their own. Or a sequence of
        two or more of them as `model_a`, and no `model_b`: that is `principal_pair`, which takes other options.
    k : int
        How many at each end.
    which : {"both", "largest", "smallest"}
        The ends: "largest" is what A notices most relative to B.
    regularization : float
        The share ε of each largest eigenvalue. In float32 at least 1e-4, below which products can't tell.
    tol : float, optional
        Relative, for the bound of an eigenvalue's error, by default 0.01; the error itself was below 1e-5 then in all
        that was measured at ε = 1e-3. A tol of 0.1 may settle on another eigenvalue.
    maxiter : int, optional
        Steps, by default 1,500, each of some products.
    rng : int or Generator, optional
    factor : float
        Another eigenvalue beyond those found is looked for, larger or smaller by this factor, by up to 300 products
        with each matrix; where there is one, the search goes on from it.
    progress : bool
        Show the products done.
    on_failure : {"raise", "warn"}
        What happens where a bound isn't below tol.
    **options
        Those of `FisherOperator`, for both models: noise, subspace, metric, engine and chunk_size.

    Returns
    -------
    PrincipalDistortions
        The k largest and the k smallest, by descending eigenvalue; of several models a `PrincipalPair`.

    Raises
    ------
    ConvergenceError
        A bound is above tol after `maxiter` steps; what was found is in its ``result``.
    TypeError, ValueError
        An argument can't be used, the models' images differ, or the response of one doesn't change with the image.
    """
    checks.choice("which", which, ("both", "largest", "smallest"))
    factor = checks.number("factor", factor, "a number above 1", lambda factor: factor > 1)
    if model_b is None:
        if (checks.integer("k", k), which, factor) != (1, "both", 2.0):
            raise TypeError("k, which and factor are for two models, model_a and model_b: of several there is one pair")
        common = {"regularization": regularization, "maxiter": maxiter, "rng": rng, "progress": progress}
        models: Any = model_a
        return principal_pair(image, models, tol=tol, on_failure=on_failure, **common, **options)
    several = sorted({"n_starts", "basis_memory", "box", "scale"} & set(options))
    if several or callable(k) or isinstance(k, FisherOperator):
        what = ", ".join(several) if several else "a third model"
        raise TypeError(f"{what} goes with a list of models, as in principal_distortions(image, [model_a, model_b])")
    operators = [as_operator(name, m, image, options) for name, m in (("model_a", model_a), ("model_b", model_b))]
    check_same(operators, ["model_a", "model_b"])
    n = operators[0].shape[0]
    k = int(checks.integer("k", k, 1, max(1, n // (1 + (which == "both")))))
    eps = share(regularization, operators[0].dtype)
    tol = checks.number("tol", 0.01 if tol is None else tol, "a number between 0 and 0.1", lambda tol: 0 < tol <= 0.1)
    steps = int(checks.integer("maxiter", maxiter, 1, optional=True) or 1500)
    checks.choice("on_failure", on_failure, ("raise", "warn"))
    progress, rng = checks.flag("progress", progress), checks.spawned(rng)
    top, bottom = (k if which in (end, "both") else 0 for end in ("largest", "smallest"))
    with watched(operators, progress) as own:
        return _find(own, top, bottom, eps, tol, steps, rng, factor, on_failure)


def _find(
    operators: list[FisherOperator],
    top: int,
    bottom: int,
    eps: float,
    tol: float,
    maxiter: int,
    rng: np.random.Generator,
    factor: float,
    on_failure: str,
) -> PrincipalDistortions:
    a, b = sides = [Side(one.products, largest(name, one, rng), eps) for name, one in zip("AB", operators, strict=True)]
    n = operators[0].shape[0]
    history: list[dict[str, Any]] = []

    def draw(count: int) -> Tensor:
        rows = rng.standard_normal((count, n))
        return torch.as_tensor(rows, dtype=a.J.dtype, device=a.J.device)

    start, beyond, looks = draw(min(n, max(1, (top + bottom) // 2))), np.array([np.inf, 0.0]), 0
    while True:
        pairs, is_done = search(a, b, top, bottom, tol, maxiter, start, history.append)
        better = []
        if is_done and top:
            limit = factor * pairs.quotients[top - 1]
            found = Pairs(pairs.quotients[:top], pairs.rows[:top], pairs.bounds[:top])
            look = look_beyond(a, b, limit, found, rng, 300)
            better += [] if look.better is None else [look.better]
            beyond[0] = limit if look.is_proven else np.inf
        if is_done and bottom:
            inverse = 1 / pairs.quotients[top:]
            norms = torch.as_tensor(inverse**0.5, dtype=a.J.dtype, device=a.J.device)[:, None]
            found, limit = Pairs(inverse, pairs.rows[top:] * norms, pairs.bounds[top:]), factor * inverse[0]
            look = look_beyond(b, a, limit, found, rng, 300)
            better += [] if look.better is None else [look.better]
            beyond[1] = 1 / limit if look.is_proven else 0.0
        looks += 1
        if not better or looks == 5:
            break
        start = torch.cat([*better, pairs.rows])
    result = _measured(operators, sides, pairs, top, eps, tol, beyond, history)
    if not result.converged.all() or not is_done:
        bounds = ", ".join(f"{x:.1e}" for x in result.error_bounds)
        why = (
            f"principal_distortions did not reach tol={tol:g} in {maxiter} steps: the bounds are {bounds}; allow more "
        )
        why += "steps (maxiter), a larger tol, or a larger regularization"
        why += "" if a.J.dtype == torch.float64 else ", or use a float64 image and models"
        if on_failure == "raise":
            raise ConvergenceError(why, result)  # pyright: ignore[reportArgumentType]
        checks.warn(why)
    return result


def _measured(
    operators: list[FisherOperator],
    sides: list[Side],
    pairs: Pairs,
    top: int,
    eps: float,
    tol: float,
    beyond: NDArray[np.float64],
    history: list[dict[str, Any]],
) -> PrincipalDistortions:
    """All anew, by fresh products, in float64 where that is NumPy's."""
    v = pairs.rows.double()
    v = v / torch.linalg.vector_norm(v, dim=1, keepdim=True)
    rows = v.to(pairs.rows.dtype)
    values, products = [], []
    for side in sides:
        images = side.J.jvp(rows).double() / side.scale**0.5
        values.append((images**2).sum(dim=1).cpu().numpy())
        products.append(side.J.vjp((images / side.scale**0.5).to(rows.dtype)).double() + eps * v)
    raw_a, raw_b = values
    quotients = (raw_a + eps) / (raw_b + eps)
    residuals = products[0] - torch.as_tensor(quotients, device=v.device)[:, None] * products[1]
    norms = torch.linalg.vector_norm(residuals, dim=1).cpu().numpy()
    is_top = np.arange(len(quotients)) < top
    bounds = norms / (np.where(is_top, quotients * (raw_b + eps) ** 0.5, (raw_a + eps) ** 0.5) * eps**0.5)
    order = np.argsort(-quotients, kind="stable")
    phi_a, phi_b = (eps / (raw + eps) for raw in values)
    scales = np.array([side.scale for side in sides])
    seen = [raw > 4 * np.finfo(operators[0].dtype).eps ** 2 for raw in values]  # what is less is rounding
    with np.errstate(divide="ignore"):
        own_a, own_b = (np.where(ok, raw * scale, 0.0) for ok, raw, scale in zip(seen, values, scales, strict=True))
        thresholds = 1 / np.sqrt(np.stack([own_a, own_b], axis=1))
        plain = np.where(seen[1], own_a, math.inf) / np.where(seen[1], own_b, 1.0)
    images = operators[0].products.to_images(rows)
    lengths = torch.linalg.vector_norm(images.double(), dim=1, keepdim=True)
    images, thresholds = images / lengths.to(images.dtype), thresholds * lengths.cpu().numpy()
    return PrincipalDistortions(
        eigenvalues=quotients[order],
        distortions=images.reshape(-1, *operators[0].image_shape)[torch.as_tensor(order)],
        error_bounds=bounds[order],
        converged=bounds[order] <= tol,
        quotients=plain[order],
        phi_a=phi_a[order],
        phi_b=phi_b[order],
        from_regularization=np.where(is_top, phi_b > 0.5, phi_a > 0.5)[order],
        thresholds=thresholds[order],
        beyond=beyond,
        lambda_max=(sides[0].scale, sides[1].scale),
        regularization=eps,
        tol=tol,
        n_products=(operators[0].n_products, operators[1].n_products),
        details={"history": history},
    )
