"""What to say of a search that did not reach its tolerance, and what to do."""

from __future__ import annotations

import numpy as np

from fisherop.result import EigenResult, SolverStopped, Status


def explain(result: EigenResult, stopped: SolverStopped | None, *, raised: bool) -> str:
    """Why pairs of a result are not converged, and the cure."""
    scale = result.lambda_max_bounds[0]
    is_double = result.eigenvectors.dtype == np.float64
    noise = max(result.noise, float(np.finfo(result.eigenvectors.dtype).eps))
    is_reached = bool(result.converged.all())
    did = "stopped at" if is_reached else "did not reach"
    parts = [f"method {result.method!r} {did} tol={result.tol:.1g} in {result.n_products:g} products"]
    if stopped is not None:
        parts.append(str(stopped).rstrip("."))
    if is_reached:
        parts.append("all pairs hold, but the search for others beyond them had not ended")
    for i in np.flatnonzero(~result.converged)[:4]:
        parts.append(
            f"eigenindex {result.eigenindex[i]}: λ = {result.eigenvalues[i]:.3e}, residual "
            f"{result.residual_norms[i] / scale:.1e} λ_max, {result.status[i]}"
        )
    too_few = Status.NOT_EXTREME in result.status
    too_few |= not is_reached and stopped is not None and result.response_size < result.image_size
    if too_few and result.method not in ("golub_kahan", "exact"):
        advice = (
            "F has a null space or a repeated eigenvalue here, and this method sees too few of its vectors; use "
            "method='golub_kahan' or 'exact'"
        )
    elif "against" in result.details and stopped is None and Status.UNCONVERGED in result.status:
        advice = (
            "they may hold for the program in its own precision, whose constants are inexact (certify without against "
            "tells); use a float64 image and model"
        )
    elif _is_limited_by_rounding(result, stopped, noise):
        advice = f"rounding alone gives residuals of {noise:.1e} λ_max, which count beside those found; "
        if noise > 1000 * np.finfo(result.eigenvectors.dtype).eps:  # more than the image's dtype leaves
            advice += "steps in lower precision (half, autocast) or a saturated response may be why; "
        larger = f"a larger tol, as {10 * noise:.0e}" if result.tol < 10 * noise < 0.1 else "a larger tol"
        advice += f"use {larger}" if is_double else f"use a float64 image and model, or {larger}"
        advice += "" if result.method in ("golub_kahan", "exact") else ", and method='golub_kahan'"
    elif result.method == "golub_kahan" and stopped is None and Status.UNCONVERGED in result.status:
        advice = (
            "the search took these for converged, so that its products were not those of now: the model or the matrix "
            "has changed on the way, or since the checkpoint was written; begin anew"
        )
    elif result.method == "randomized_svd":
        advice = "raise q, its power iterations, or p, accept a larger tol, or use method='golub_kahan'"
    else:
        other = "another method" if result.method == "golub_kahan" else "method='golub_kahan'"
        advice = f"allow more iterations (maxiter, in synthesize max_iter), accept a larger tol, or use {other}"
    if raised:
        advice += "; what was found is in the error's .result, or returned with on_failure='warn'"
    parts.append(advice)
    return ".\n".join(parts)


def _is_limited_by_rounding(result: EigenResult, stopped: SolverStopped | None, noise: float) -> bool:
    """Whether more iterations can't help: residuals are at the noise, or the solver takes for converged what isn't."""
    if stopped is not None and stopped.by_rounding:
        return True
    if result.method == "golub_kahan" and stopped is None and Status.UNCONVERGED in result.status:
        return noise > result.tol / 100
    residuals = result.residual_norms[~result.converged]
    return noise > result.tol / 4 and bool((residuals <= 10 * noise * result.lambda_max_bounds[0]).any())
