"""The pair of distortions that several models rank most differently."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm.auto import tqdm

from fisherop import checks
from fisherop.krylov.box import Box, maximize_within
from fisherop.krylov.pencil import Side
from fisherop.krylov.several import Contrast, Pair, maximize, rounding
from fisherop.operators import FisherOperator, JacobianOperator, counted
from fisherop.result import ConvergenceError
from fisherop.sample import Sample
from fisherop.solve import eigenpairs

_MOST = 300  # vectors of a basis
_FLOAT32_LEAST = 1e-4  # of the regularization


@dataclass(frozen=True, eq=False, repr=False)
class PrincipalPair:
    """Distortions a and b that maximize f = var_n(log aᵀF_n a − log bᵀF_n b) over the models n.

    Each F_n / λ_n + ε I stands for F_n, λ_n the largest eigenvalue.

    Attributes
    ----------
    distortions : Tensor, shape ``(2, *image_shape)``
        a and b, of unit Euclidean norm. Exchanging them changes nothing: a is the one that the first model notices
        more, relative to the mean of the models.
    value : float
        f. For two models it is log²(λ_max / λ_min) / 4, of F_1 v = λ F_2 v.
    log_ratios : ndarray, shape (n,)
        log aᵀF_n a − log bᵀF_n b: where it is large, the model notices a, and hardly b.
    gradient : float
        The norm of the gradient of f on the unit spheres, relative to f, by fresh products; in a box that of what it
        leaves of the gradient.
    converged : bool
        Whether that is at most `tol`, or f is no more than rounding makes of models that are the same.
    values : ndarray, shape (n_starts,)
        What each start has reached.
    thresholds : ndarray, shape (2, n)
        By what a and b are multiplied, their Euclidean norm, for each model to notice them, d′ = 1 in units of its
        noise: 1 / √(vᵀF_n v). That is the linear prediction, see `Eigendistortion.linear_range`.
    phi : ndarray, shape (2, n)
        The regularization's share ε λ_n / (vᵀF_n v + ε λ_n) of each value.
    lambda_max : ndarray, shape (n,)
        λ_n, as they were found.
    regularization, tol : float
    n_products : ndarray, shape (n,)
        Of each model.
    details : dict
        ``history``: of each start a list of products, value and gradient of each step.
    """

    distortions: Tensor
    value: float
    log_ratios: NDArray[np.float64]
    gradient: float
    converged: bool
    values: NDArray[np.float64]
    thresholds: NDArray[np.float64]
    phi: NDArray[np.float64]
    lambda_max: NDArray[np.float64]
    regularization: float
    tol: float
    n_products: NDArray[np.float64]
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def n_best(self) -> int:
        """How many starts reached the best value, to 10⁻³."""
        return int((self.values >= self.values.max() * (1 - 1e-3)).sum())

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        n = self.distortions[0].numel()
        lines = [
            f"principal distortions of {len(self.log_ratios)} models: var(log aᵀF a − log bᵀF b) = {self.value:.6g}, "
            f"N = {n}, ε = {self.regularization:.0e}, {self.n_products.max():g} products of each model",
            "",
            f"{'model':>5}  {'log ratio':>9}  {'threshold a':>11}  {'threshold b':>11}  {'φ of a':>6}  {'φ of b':>6}",
        ]
        for i, ratio in enumerate(self.log_ratios):
            a, b = self.thresholds[:, i]
            lines.append(
                f"{i:>5}  {ratio:>9.4f}  {a:>11.3g}  {b:>11.3g}  {self.phi[0, i]:>6.2f}  {self.phi[1, i]:>6.2f}"
            )
        state = "converged" if self.converged else "not converged"
        if self.converged and self.gradient > self.tol:
            lines += ["", "the models do not differ at this image by more than rounding, but for their scale"]
        lines += [
            "",
            f"{state}: gradient {self.gradient:.1e} of the value, tol {self.tol:.0e}",
            f"the best value was found from {self.n_best} of {len(self.values)} starts",
        ]
        return "\n".join(lines)


def principal_pair(
    image: Tensor,
    models: Sequence[Callable[[Tensor], Any] | FisherOperator],
    *,
    regularization: float = 1e-3,
    tol: float | None = None,
    maxiter: int | None = None,
    rng: int | np.random.Generator | None = None,
    n_starts: int = 3,
    basis_memory: int = 2**30,
    box: tuple[float, float] | None = None,
    scale: float | None = None,
    progress: bool = True,
    on_failure: str = "raise",
    **options: Any,
) -> PrincipalPair:
    """The pair of distortions whose noticeability several models rank most differently.

    It maximizes f(a, b) = var_n(log aᵀF_n a − log bᵀF_n b) over unit vectors, each F_n regularized (Feather, Lipshutz,
    Harvey, Williams and Simoncelli, ICLR 2025, equation 6). There may be several maxima. Each start grows a subspace
    from random vectors; within it the problem is also solved from the extremes of every two models, and from random
    vectors, which costs no products.

    Parameters
    ----------
    image : Tensor, shape ``image_shape``
    models : sequence of callable, nn.Module or FisherOperator
        At least two; operators have noise, subspace and metric of their own.
    regularization : float
        The share ε of each largest eigenvalue. In float32 at least 1e-4, below which products can't tell.
    tol : float, optional
        For the norm of the gradient, relative to f; by default 1e-4, in float32 1e-3, in a box 1e-2. At 1e-2, f was
        within 10⁻³ of what further steps gave, in what was measured.
    maxiter : int, optional
        Steps of each start, by default 500, each of two products of each model.
    rng : int or Generator, optional
    n_starts : int
        Random starts, of which the best is returned; the result says how many reached its value. Take more where
        that is one of several.
    basis_memory : int
        Bytes for the vectors and their products with all models, of which at most 300 are kept; when they are full,
        the space is made smaller, and more products are needed.
    box : (float, float), optional
        The least and the largest value that an element of the image may have, when `scale` times a distortion is added.
        Without subspace and metric.
    scale : float, optional
        The norm of what is added to the image; for `box`.
    progress : bool
        Show the products done.
    on_failure : {"raise", "warn"}
        What happens where the gradient isn't below tol.
    **options
        Those of `FisherOperator`, for all models: noise, subspace, metric, engine and chunk_size.

    Returns
    -------
    PrincipalPair

    Raises
    ------
    ConvergenceError
        The gradient is above tol after `maxiter` steps; what was found is in its ``result``.
    TypeError, ValueError
        An argument can't be used, the models' images differ, or the response of one doesn't change with the image.
    """
    given = list(models) if isinstance(models, Sequence | nn.ModuleList) and not isinstance(models, str) else []
    if len(given) < 2:
        checks.refuse(TypeError, "models", "a sequence of at least two models", models)
    operators = [as_operator(f"models[{i}]", model, image, options) for i, model in enumerate(given)]
    check_same(operators, [f"models[{i}]" for i in range(len(operators))])
    dtype = operators[0].dtype
    eps = share(regularization, dtype)
    usual = 1e-2 if box is not None else 1e-3 if dtype == np.float32 else 1e-4
    tol = checks.number("tol", usual if tol is None else tol, "a number between 0 and 0.1", lambda tol: 0 < tol <= 0.1)
    steps = int(checks.integer("maxiter", maxiter, 1, optional=True) or 500)
    n_starts, basis_memory = checks.integer("n_starts", n_starts), checks.memory("basis_memory", basis_memory)
    checks.choice("on_failure", on_failure, ("raise", "warn"))
    progress, rng = checks.flag("progress", progress), checks.spawned(rng)
    if box is None and scale is not None:
        raise ValueError("scale is for box, the values that the image may have: give both, or none")
    limits = None if box is None else _limits(operators, box, scale)
    with watched(operators, progress) as own:
        return _find(own, eps, tol, steps, rng, n_starts, basis_memory, limits, on_failure)


def _find(
    operators: Sequence[FisherOperator],
    eps: float,
    tol: float,
    maxiter: int,
    rng: np.random.Generator,
    n_starts: int,
    basis_memory: int,
    limits: Box | None,
    on_failure: str,
) -> PrincipalPair:
    """From random starts; the best of them, measured anew."""
    sides = [Side(one.products, largest(str(i), one, rng), eps) for i, one in enumerate(operators)]
    J, n = sides[0].J, operators[0].shape[0]
    row_bytes = n * operators[0].dtype.itemsize * (len(sides) + 1)
    capacity, least = min(_MOST, int(basis_memory // row_bytes)), min(n, 4 * len(sides) + 12)
    if capacity < least:
        raise ValueError(
            f"basis_memory={basis_memory} holds {capacity} vectors and their products with {len(sides)} models, and "
            f"{least} are needed: pass basis_memory={least * row_bytes}"
        )
    histories, best, values = [], None, []
    for _ in range(n_starts):
        histories.append([])
        start = torch.as_tensor(rng.standard_normal((min(2, n), n)), dtype=J.dtype, device=J.device)
        pair = maximize(sides, start, capacity, tol, maxiter, rng, histories[-1].append)
        if limits is not None:
            pair = maximize_within(sides, pair, limits, tol, maxiter, histories[-1].append)
        values.append(pair.value)
        if best is None or pair.value > best.value:
            best = pair
    assert best is not None  # n_starts is at least 1
    result = _measured(operators, sides, best, limits, tol, values, histories)
    if not result.converged:
        why = (
            f"principal_pair did not reach tol={tol:g} in {maxiter} steps: the gradient is "
            f"{result.gradient:.1e} of the value; allow more steps (maxiter), a larger tol, or a larger regularization"
        )
        why += "" if limits is None else ", or a smaller scale"
        why += "" if J.dtype == torch.float64 else ", or use a float64 image and models"
        if on_failure == "raise":
            raise ConvergenceError(why, result)  # pyright: ignore[reportArgumentType]
        checks.warn(why)
    return result


def _measured(
    operators: Sequence[FisherOperator],
    sides: Sequence[Side],
    pair: Pair,
    box: Box | None,
    tol: float,
    values: list[float],
    histories: list[list[dict[str, Any]]],
) -> PrincipalPair:
    """By fresh products, in float64 where they are NumPy's."""
    rows = pair.rows  # in a box of unit norm to rounding, and not to be made longer
    if box is None:
        rows = (rows.double() / torch.linalg.vector_norm(rows.double(), dim=1, keepdim=True)).to(rows.dtype)
    eps, forms, products = sides[0].regularization, [], []
    for side in sides:
        images = side.J.jvp(rows).double() / side.scale**0.5
        forms.append((images**2).sum(dim=1).cpu().numpy())
        products.append(side.J.vjp((images / side.scale**0.5).to(rows.dtype)).double() + eps * rows.double())
    raw = np.array(forms).T
    regular = raw + eps
    found = Contrast.of(*regular)
    weights = torch.as_tensor(np.stack([found.of_a, found.of_b]), device=rows.device)
    gradients = torch.einsum("in,nik->ik", weights, torch.stack(products))
    size = float(torch.linalg.vector_norm(gradients)) if box is None else box.gradient_left(rows, gradients)
    has_converged = Pair(rows, found.value, size).has_converged(tol, rounding(sides))
    ratios = np.log(regular[0]) - np.log(regular[1])
    order = [0, 1] if ratios[0] >= ratios.mean() else [1, 0]
    ratios, raw, rows = ratios if order == [0, 1] else -ratios, raw[order], rows[order]
    scales = np.array([side.scale for side in sides])
    seen = raw > 4 * np.finfo(operators[0].dtype).eps ** 2  # what is less is rounding
    with np.errstate(divide="ignore"):
        thresholds = 1 / np.sqrt(np.where(seen, raw * scales, 0.0))
    images = operators[0].products.to_images(rows)
    lengths = torch.linalg.vector_norm(images.double(), dim=1, keepdim=True)
    lengths = lengths if box is None else torch.ones_like(lengths)
    images, thresholds = images / lengths.to(images.dtype), thresholds * lengths.cpu().numpy()
    return PrincipalPair(
        distortions=images.reshape(-1, *operators[0].image_shape),
        value=found.value,
        log_ratios=ratios,
        gradient=size / found.value if found.value else 0.0,
        converged=has_converged,
        values=np.array(values),
        thresholds=thresholds,
        phi=eps / (raw + eps),
        lambda_max=scales,
        regularization=eps,
        tol=tol,
        n_products=np.array([one.n_products for one in operators]),
        details={"history": histories},
    )


def _limits(operators: Sequence[FisherOperator], box: tuple[float, float], scale: float | None) -> Box:
    """What the elements of a distortion may be, so that image + scale · distortion stays in the box."""
    if any({"subspace", "metric"} & set(one.observed) for one in operators):
        raise ValueError("box is for changes of an image's own elements: leave subspace and metric out")
    at = [one.linearization for one in operators if hasattr(one, "linearization")]
    if not at:
        raise ValueError("box needs an image: pass models, or operators of models at one image")
    what = "the least and the largest value of an element, an array"
    low, high = checks.array("box", box, (2,), what).astype(np.float64).tolist()
    if scale is None:
        raise ValueError("box needs scale, the norm of the distortion that is added to the image")
    scale = checks.number("scale", scale, "a number above 0", lambda scale: scale > 0)
    image = at[0].image.detach().double().flatten()
    if not low < high or float(image.min()) < low or float(image.max()) > high:
        raise ValueError(
            f"box must hold the image, whose values are from {float(image.min()):g} to {float(image.max()):g}, "
            f"got {low:g} to {high:g}"
        )
    margin = 4 * float(np.finfo(operators[0].dtype).eps) * max(abs(low), abs(high), scale)  # of the sum's rounding
    limits = Box((low + margin - image).clamp(max=0.0) / scale, (high - margin - image).clamp(min=0.0) / scale)
    if limits.reach < 1:
        most = scale * limits.reach
        raise ValueError(f"scale must be at most {most:.4g}, the distance of the box's farthest corner, got {scale:g}")
    return limits


def largest(name: str, operator: FisherOperator, rng: np.random.Generator) -> float:
    """λ_max, from below: what regularization is relative to."""
    if Sample.of(operator, rng).size == 0:
        raise ValueError(f"the response of model {name} doesn't change with the image: J is zero")
    found = eigenpairs(operator, 1, "largest", tol=1e-4, rng=rng, progress=False, method="golub_kahan")
    return float(found.eigenvalues[0])


@contextmanager
def watched(operators: Sequence[FisherOperator], progress: bool) -> Iterator[list[FisherOperator]]:
    """The same operators with counts of their own, and all their products on the screen."""
    own = [counted(operator) for operator in operators]
    with tqdm(desc="principal distortions", unit=" products", delay=1, disable=not progress) as bar:
        for operator in own:
            operator.products.on_product = bar.update
        try:
            yield own
        finally:
            for operator in own:
                operator.products.on_product = None


def share(value: float, dtype: np.dtype) -> float:
    """The regularization, checked."""
    least = _FLOAT32_LEAST if dtype == np.float32 else 0.0
    eps = checks.number("regularization", value, "a number between 0 and 1", lambda eps: 0 < eps < 1)
    if eps < least:
        checks.refuse(ValueError, "regularization", f"at least {least:g} in float32", value, "use a float64 image")
    return eps


def as_operator(name: str, model: Any, image: Tensor, options: dict[str, Any]) -> FisherOperator:
    """The operator of a model, or that which is given."""
    unknown = sorted(set(options) - {"noise", "subspace", "metric", "engine", "chunk_size"})
    if unknown:
        raise TypeError(f"there is no option {', '.join(unknown)}")
    model = model.fisher if isinstance(model, JacobianOperator) else model
    if isinstance(model, FisherOperator):
        if options:
            raise TypeError(f"{name} is an operator, which has options of its own: make it with {', '.join(options)}")
        own = model.linearization.image if hasattr(model, "linearization") else None
        if own is not None and isinstance(image, Tensor) and not (image.shape == own.shape and (image == own).all()):
            raise ValueError(f"{name} is an operator at another image: make all at one, and pass that")
        return model
    return FisherOperator(image, model, **options)


def check_same(operators: Sequence[FisherOperator], names: Sequence[str]) -> None:
    """Raise ValueError unless vectors mean the same change of the same image for all."""
    first, z = operators[0], None
    for one, name in zip(operators, names, strict=True):
        if one.shape[0] != first.shape[0] or one.dtype != first.dtype:
            raise ValueError(
                f"{names[0]} and {name} must have the same image, got {first.shape[0]} elements of {first.dtype} and "
                f"{one.shape[0]} of {one.dtype}"
            )
        if hasattr(one, "linearization") and hasattr(first, "linearization"):
            own, other = one.linearization.image, first.linearization.image
            if own.shape != other.shape or not bool((own == other).all()):
                raise ValueError(f"{names[0]} and {name} must be at the same image, and these are at two")
        z = np.random.default_rng(0).standard_normal((first.shape[0], 1)) if z is None else z
        changes = [two.to_tensors(z).double().flatten() for two in (first, one)]
        if changes[0].shape != changes[1].shape or not torch.allclose(*changes, rtol=1e-4, atol=1e-4):
            raise ValueError(f"{names[0]} and {name} must have the same subspace and metric, and these differ")
