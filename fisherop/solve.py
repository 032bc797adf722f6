"""The extreme eigenpairs of F: choose a solver, run it, certify its answer, and go on from an earlier one."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fisherop import checks
from fisherop.advice import explain
from fisherop.certificate import PROBE_STEPS, certify, judging
from fisherop.jacobian import is_same
from fisherop.operators import FisherOperator, JacobianOperator, scaled
from fisherop.progress import progress_bar
from fisherop.result import Answer, ConvergenceError, EigenResult, SolverStopped
from fisherop.sample import Sample
from fisherop.solvers import SOLVERS, Method

_SMALL = 2**24  # elements of a Jacobian that "auto" makes dense


def eigenpairs(
    operator: FisherOperator | JacobianOperator,
    k: int = 1,
    which: str = "both",
    *,
    method: str | Callable[..., tuple] = "auto",
    tol: float = 1e-6,
    maxiter: int | None = None,
    rng: int | np.random.Generator | None = None,
    progress: bool = True,
    on_failure: str = "raise",
    state: dict[str, Any] | None = None,
    against: torch.dtype | FisherOperator | None = None,
    **options: Any,
) -> EigenResult:
    """The k most and the k least noticeable directions of an image: extreme eigenpairs of F, certified.

    Parameters
    ----------
    operator : FisherOperator or JacobianOperator
        Of the model at the image, N elements.
    k : int
        How many pairs at each end.
    which : {"both", "largest", "smallest"}
        The ends of the spectrum.
    method : str or callable
        ``"auto"`` is ``"exact"`` where min(M, N) ≤ 100 k, so that its products are fewer, and J is small, else
        ``"golub_kahan"``; ``details["method"]`` says which and why. Others: ``"eigsh"``, ``"lobpcg"``, ``"svds"``,
        ``"primme"`` (an extra), ``"power"``, ``"randomized_svd"``; or a solver of your own, called as
        ``solver(operator, k, which, tol=, maxiter=, rng=)``. `operator` is a `FisherOperator` that counts its own
        products; if F would leave the range of its dtype, it is scaled by a power of two, which leaves eigenvectors as
        they are. Return ``(values, vectors)`` by descending value, the vectors in columns (N, k), for "both" (N, 2 k);
        a third item, a dict, goes to ``result.details``; or return an `Answer`. The values are recomputed. If J is
        zero, the solver isn't called.
    tol : float
        Relative to λ_max: a pair is converged when ‖F v − λ v‖ ≤ tol · λ_max, or, at the smallest end, when
        ‖J v‖² ≤ tol · λ_max. Solvers aim somewhat lower, so that rounding doesn't decide.
    maxiter : int, optional
        The solver's own iterations; see there for the default.
    rng : int or Generator, optional
        The same seed gives the same bits on one machine.
    progress : bool
        Show the products done, once a second has passed.
    on_failure : {"raise", "warn"}
        What happens when a pair did not converge.
    state : dict, optional
        For ``"golub_kahan"``; other methods leave it as it is. Pass ``{}`` at first. The search is stored there; pass
        the same dict again, with the same operator, to go on. If the stored result already answers the request, it is
        returned, unless there are options. After Ctrl-C ``state["result"]`` holds what was found, certified.
    against : torch.dtype or FisherOperator, optional
        Whose products judge what was found, as in `certify`: with ``torch.float64``, those of a copy of the model in
        that precision, one linearization and as many products as there are pairs.
    **options
        The solver's own, described in its docstring, as in ``help(fisherop.solvers.golub_kahan.golub_kahan)``; where
        there are any, ``"auto"`` is ``"golub_kahan"``. That takes max_basis, basis_memory, v0, orthogonal_to and
        callback; ``"exact"`` max_bytes; ``"eigsh"`` and ``"svds"`` ncv; ``"lobpcg"`` preconditioner; ``"primme"`` ncv
        and preconditioner; ``"randomized_svd"`` p and q.

    Returns
    -------
    EigenResult
        Each vector's sign is such that its inner product with the standard normal vector of NumPy's
        ``default_rng(2017)`` is positive.

    Raises
    ------
    ConvergenceError
        A pair did not converge, or is shown not to be the extreme one. What was found is in its ``result``.
    TypeError, ValueError
        An argument can't be used; the message says what to do.
    OverflowError, FloatingPointError
        J is so large or so small that its products leave what the dtype can hold: scale the model's response.
    KeyboardInterrupt
        Ctrl-C was pressed. With `state` the search stays there, and what it found is certified before this is raised
        (K + 32 products, which a second Ctrl-C ends at once); ``state["result"]`` then holds it, unless an earlier
        result there has more converged pairs. Without `state`, and with other methods, what was found is lost.

    Warns
    -----
    RuntimeWarning
        J is zero, so that every vector is both extremes; or, with ``on_failure="warn"``, in place of the first error.
    """
    operator = as_fisher(operator)
    n = operator.shape[0]
    k = checks.integer("k", k, 1, n, what=f"an integer from 1 to N = {n}")
    checks.choice("which", which, ("both", "largest", "smallest"))
    tol, progress = checks.tolerance(tol), checks.flag("progress", progress)
    maxiter = checks.integer("maxiter", maxiter, 1, 2**31 - 1, optional=True)
    checks.choice("on_failure", on_failure, ("raise", "warn"))
    _check_state(state)
    solver, name, why = _choose(method, options, operator, k)
    if which == "both" and 2 * k > n and solver is not SOLVERS["exact"]:
        raise ValueError(f"k={k} at both ends needs 2 k ≤ N = {n}: use method='exact', or ask for one end")
    rng = checks.spawned(rng)
    against = None if against is None else judging(operator, against)
    kept = state if solver.is_robust and solver.resumes else None
    if kept is not None and not options and against is None:
        found = _recall(operator, kept, k, which, tol, name)
        if found is not None:
            kept["result"] = found
            return found
    # aim below tol, since the certificate adds the noise of products to residuals
    aim = 0.95 * tol if solver.is_robust else max(0.5 * tol, 0.95 * tol - 4 * float(np.finfo(operator.dtype).eps))
    if kept is not None:
        options["state"] = kept
    stopped: SolverStopped | None = None
    interrupt: BaseException | None = None
    sample: Sample | None = None
    certificate = 1.5 * min(n, 2 * k) + 2
    total = min(operator.jacobian.shape) / 2 + certificate if solver is SOLVERS["exact"] else None
    with progress_bar(operator, name, total, progress, tol) as (operator, bar):
        if progress and solver.is_robust and "callback" in solver.options and callable(options.get("callback", print)):
            options["callback"] = bar.watching(options.get("callback"))
        inner, run = operator, solver.solve
        if not solver.is_robust:
            sample = Sample.of(operator, checks.spawned(rng))
            inner = scaled(operator, sample.exponent)
            run = _arbitrary if sample.size == 0 else run
        try:
            answer = _checked(run(inner, k, which, tol=aim, maxiter=maxiter, rng=rng, **options), k, which, n, name)
        except SolverStopped as error:
            stopped, answer = error, _checked_partial(error, n, name)
            interrupt = error.__cause__ if isinstance(error.__cause__, KeyboardInterrupt) else None
            if interrupt is not None and kept is None:
                raise interrupt from None
        if sample is not None and inner is not operator:
            answer = answer.times(2.0**-sample.exponent)
        if options.get("orthogonal_to") is not None:
            answer = _joined(operator, answer, options["orthogonal_to"])
        # what our own solvers say; all others are examined
        evidence = answer.evidence if solver.is_robust else None

        details = why | dict(answer.details)
        details |= {} if answer.range_error is None else {"range_error": answer.range_error}
        details |= {"quadrature": [one.to_dict() for one in answer.quadratures]} if answer.quadratures else {}
        details |= {} if stopped is None else {"stopped": str(stopped)}

        before = operator.n_products

        def examined() -> EigenResult:
            return certify(
                operator,
                _rayleigh_ritz(operator, np.hstack([answer.largest, answer.smallest])),
                np.r_[: answer.largest.shape[1], n - answer.smallest.shape[1] : n],
                tol=tol,
                method=name,
                probe=0 if evidence and which != "smallest" else PROBE_STEPS,
                rng=rng,
                ground=evidence,
                bounds=answer.bounds,
                details=details,
                sample=sample,
                against=against,
            )

        try:
            result = examined()
        except KeyboardInterrupt as error:
            if kept is None or interrupt is not None:
                raise
            interrupt, result = error, examined()  # the first Ctrl-C: what was found is worth it
    certified = operator.n_products - before + (0.0 if against is None else result.n_products)  # which counts its own
    if kept is not None:  # by the certificates of all calls for one search
        certified = kept["certified"] = certified + (kept.get("certified", 0.0) if answer.n_earlier else 0.0)
    result = dataclasses.replace(result, n_products=before + answer.n_earlier + certified)
    if kept is not None and stopped is None and not result.converged.all():
        kept.pop("search", None)  # the certificate rejects these pairs: don't go on with the search that found them
    if interrupt is not None and kept is not None:
        _keep_best(kept, result)
        raise KeyboardInterrupt(f"{name} was interrupted after {result.n_products:g} products") from None
    if stopped is not None or not result.converged.all():
        why = explain(result, stopped, raised=on_failure == "raise")
        if options.get("orthogonal_to") is not None:
            why += ".\northogonal_to is certified with the rest: it must hold eigenvectors found before, at these ends"
        if on_failure == "raise":
            raise ConvergenceError(why, result) from stopped
        checks.warn(why)
    if kept is not None:
        kept["result"] = result
    return result


def _keep_best(state: dict[str, Any], result: EigenResult) -> None:
    """Put what an interrupted search found into its state, unless an earlier result there has more converged pairs."""
    earlier = state.get("result")
    is_answer = "stopped" not in result.details and result.converged.all()
    if earlier is None or is_answer or earlier.converged.sum() <= result.converged.sum():
        state["result"] = result


def _recall(
    operator: FisherOperator, state: dict[str, Any], k: int, which: str, tol: float, name: str
) -> EigenResult | None:
    """What is asked for, where an earlier result of the operator has it all, to this tol or a smaller one, or None."""
    operator.products.check_current()
    result, n = state.get("result"), operator.shape[0]
    if result is None or not is_same(operator.products, state.get("products")):
        return None
    if result.method != name or {"stopped", "against"} & set(result.details):  # not looked into, or judged by others
        return None
    index = _indices(k, which, n)
    here = np.isin(result.eigenindex, index)
    if tol < result.tol or here.sum() < len(index) or not result.converged[here].all():
        return None
    if here.all() and tol == result.tol and result.evidence.source != "zero":  # which warns again
        return result
    details = {name: x for name, x in result.details.items() if name != "nullity" or tol == result.tol}
    anew = _certify_anew(
        operator,
        result,
        here,
        tol=tol,
        probe=0 if which != "smallest" else PROBE_STEPS,
        ground=result.evidence,
        bounds=(result.lambda_min_bounds[0], result.lambda_max_bounds[1]),
        details=details,
    )
    return anew if anew.converged.all() else None


def transfer(operator: FisherOperator, result: EigenResult) -> EigenResult:
    """A result's pairs by products of another operator, of the same model in other arithmetic.

    Warns where a pair does not hold there.
    """
    anew = _certify_anew(operator, result, slice(None), tol=result.tol, details=result.details)
    if not anew.converged.all():
        checks.warn(explain(anew, None, raised=False))
    return anew


def _certify_anew(
    operator: FisherOperator, result: EigenResult, here: NDArray[np.bool_] | slice, **claims: Any
) -> EigenResult:
    claims["details"] = {name: x for name, x in claims["details"].items() if name != "against"}
    anew = certify(
        operator,
        _rayleigh_ritz(operator, result.eigenvectors[:, here]),
        result.eigenindex[here],
        method=result.method,
        rng=0,
        **claims,
    )
    return dataclasses.replace(anew, n_products=result.n_products + anew.n_products)


def as_fisher(operator: FisherOperator | JacobianOperator) -> FisherOperator:
    if isinstance(operator, JacobianOperator):
        return operator.fisher
    cure = "use its .operator" if hasattr(operator, "operator") else "make one of a matrix by FisherOperator.of"
    return checks.instance("operator", operator, FisherOperator, "a FisherOperator or a JacobianOperator", cure)


def _check_state(state: Any) -> None:
    if state is not None:
        checks.instance("state", state, dict, "a dict, empty at first, or None")
        left, kinds = state.get("result"), (EigenResult, type(None))
        checks.instance("state['result']", left, kinds, "what an earlier call left", "pass an empty dict")
        if not hasattr(state.get("checkpoint"), "offer") and state.get("checkpoint") is not None:
            checks.refuse(TypeError, "state['checkpoint']", "a fisherop.checkpoint.Checkpoint", state["checkpoint"])


def _choose(
    method: str | Callable[..., Any], options: dict[str, Any], operator: FisherOperator, k: int
) -> tuple[Method, str, dict[str, str]]:
    """The solver, its name, and, where it was chosen here, why."""
    if callable(method):
        _check_solver(method, options)
        return Method(method), getattr(method, "__name__", type(method).__name__), {}
    checks.choice("method", method, ("auto", *SOLVERS), " or a callable")
    why = {}
    if method == "auto":
        m, n = operator.jacobian.shape
        if options:
            method, reason = "golub_kahan", "options are given"
        elif min(m, n) > 100 * k:
            method, reason = "golub_kahan", f"min(M, N) = {min(m, n)} > 100 k"
        elif m * n > _SMALL:
            method, reason = "golub_kahan", f"J has {m * n} elements, more than {_SMALL}"
        else:
            method, reason = "exact", f"min(M, N) = {min(m, n)} ≤ 100 k"
        why["method"] = f"{method}, since {reason}"
    allowed = SOLVERS[method].options
    for option in options:
        if option not in allowed:
            cures = {"seed": "; a seed is given as rng", "checkpoint": "; Eigendistortion.synthesize has checkpoints"}
            those = ", ".join(sorted(allowed)) or "none"
            raise TypeError(f"method {method!r} has no option {option!r}; its options: {those}{cures.get(option, '')}")
    return SOLVERS[method], method, why


def _indices(k: int, which: str, n: int) -> NDArray[np.intp]:
    """The k first, the k last, or both, of n."""
    top, bottom = {"largest": (k, 0), "smallest": (0, k), "both": (k, k)}[which]
    return np.arange(n) if top + bottom >= n else np.r_[:top, n - bottom : n]


def _arbitrary(operator: FisherOperator, k: int, which: str, *, rng: np.random.Generator, **options: Any) -> Answer:
    """Where J is zero every vector is right, and solvers have nothing to start from."""
    n = operator.shape[0]
    top = k if which != "smallest" else 0
    vectors = np.linalg.qr(rng.standard_normal((n, len(_indices(k, which, n)))))[0]
    return Answer(vectors[:, :top], vectors[:, top:])


def _check_solver(solver: Callable[..., Any], options: dict[str, Any]) -> None:
    """A solver of the user's own must be one that can be called as solvers are."""
    try:
        inspect.signature(solver).bind(None, None, None, tol=None, maxiter=None, rng=None, **options)
    except TypeError as error:
        how = f"solver(operator, k, which, {', '.join(f'{name}=' for name in ('tol', 'maxiter', 'rng', *options))})"
        checks.refuse(TypeError, "method", f"callable as {how}", solver, str(error))
    except ValueError:  # it has no signature
        pass


def _checked(answer: Any, k: int, which: str, n: int, name: str) -> Answer:
    """What a solver returns, as an answer with as many vectors as were asked for."""
    what = f"what solver {name!r} returns"
    index = _indices(k, which, n)
    top = len(index) if which == "largest" or len(index) == n else 0 if which == "smallest" else k
    if isinstance(answer, Answer):
        top = np.shape(answer.largest)[-1] if len(index) == n else top  # of all N, any may be the largest ones
        for end, count in (("largest", top), ("smallest", len(index) - top)):
            checks.array(f"{end} in {what}", getattr(answer, end), (n, count))
        return answer
    kind = "an Answer, (values, vectors) or (values, vectors, details)"
    if len(checks.instance(what, answer, (tuple, list), kind)) not in (2, 3):
        checks.refuse(ValueError, what, kind, answer)
    details = checks.instance(f"the details in {what}", answer[2], Mapping, "a mapping") if len(answer) == 3 else {}
    details = dict(details)
    bounds = details.pop("lambda_min_lower", 0.0), details.pop("lambda_max_upper", np.inf)
    what += f", asked for k={k} and which={which!r}"
    vectors = checks.array(f"the vectors in {what},", answer[1], (n, len(index)))
    return Answer(vectors[:, :top], vectors[:, top:], bounds=bounds, details=details)


def _checked_partial(stopped: SolverStopped, n: int, name: str) -> Answer:
    """What a solver that stopped has."""
    what = f"what solver {name!r} stopped with"
    answer = checks.instance(what, stopped.answer, Answer, "an Answer")
    for end in ("largest", "smallest"):
        checks.array(f"{end} in {what}", getattr(answer, end), (n, "k'"))
    return answer


def _joined(operator: FisherOperator, answer: Answer, given: NDArray) -> Answer:
    """The vectors found beside those found before, each of which belongs to one of the ends."""
    n = operator.shape[0]
    largest, smallest, given = answer.largest, answer.smallest, np.asarray(given).reshape(n, -1)
    is_large = np.full(given.shape[1], not smallest.shape[1])
    if largest.shape[1] and smallest.shape[1]:
        found = np.hstack([largest, smallest])
        values, known = ((operator.jacobian.matmat(v).astype(np.float64) ** 2).sum(axis=0) for v in (found, given))
        top = largest.shape[1]
        is_large = known > (values[:top].min() + values[top:].max()) / 2
    # the solver's evidence and bounds hold only in the complement of the given vectors
    return dataclasses.replace(
        answer,
        largest=np.hstack([largest, given[:, is_large]]),
        smallest=np.hstack([smallest, given[:, ~is_large]]),
        evidence=None,
        bounds=(0.0, np.inf),
    )


def _rayleigh_ritz(operator: FisherOperator, vectors: NDArray) -> NDArray:
    """The best vectors within the span: orthonormal, rotated by the SVD of J times them, in float64; signs fixed."""
    basis = np.linalg.qr(vectors.astype(np.float64))[0]
    images = operator.jacobian.matmat(basis).astype(np.float64)
    rotation = np.linalg.svd(np.linalg.qr(images, mode="r"))[2]
    vectors = basis @ rotation.T
    signs = np.random.default_rng(2017).standard_normal(len(vectors)) @ vectors
    return vectors * np.where(signs < 0, -1.0, 1.0)
