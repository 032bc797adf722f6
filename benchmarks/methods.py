"""Every method on the On–Off model at a 56 × 56 grey photograph, float64: values, residuals and products at both ends.

Prints a Markdown table; the README's was made by it. Run with no argument, a few minutes on 2 cores.
"""

import importlib.util

import torch

from fisherop import ConvergenceError, FisherOperator, eigenpairs, images
from fisherop.models import OnOff

METHODS = ["exact", "golub_kahan", "eigsh", "lobpcg", "svds", "power", "randomized_svd"]
if importlib.util.find_spec("primme"):
    METHODS.append("primme")


def main() -> None:
    operator = FisherOperator(images.photograph(as_gray=True, size=56, dtype=torch.float64), OnOff().double().eval())
    print("| method | λ_max | error / λ_max | λ_min / λ_max | error / λ_max | residuals / λ_max | products | outcome |")
    print("|---|---|---|---|---|---|---|---|")
    truth = None
    for method in METHODS:
        which = "largest" if method == "randomized_svd" else "both"
        try:
            result, outcome = eigenpairs(operator, which=which, method=method, rng=0), "converged"
        except ConvergenceError as error:
            result, outcome = error.result, "ConvergenceError"
        truth = result.eigenvalues if truth is None else truth
        errors = abs(result.eigenvalues - truth[: len(result.eigenvalues)]) / truth[0]
        has_both = which == "both" and len(result.eigenvalues) == 2
        low = (f"{result.eigenvalues[1] / truth[0]:.6e}", f"{errors[1]:.0e}") if has_both else ("", "")
        residuals = ", ".join(f"{r:.0e}" for r in result.residual_norms / truth[0])
        print(
            f"| `{method}` | {result.eigenvalues[0]:.8e} | {errors[0]:.0e} | {low[0]} | {low[1]} | {residuals} "
            f"| {result.n_products:g} | {outcome} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
