"""The products that a solver has made, and how far it is, on the screen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm.auto import tqdm

from fisherop.operators import FisherOperator, counted


class Bar:
    """A bar that shows products, and, of a solver that tells, what each end lacks."""

    def __init__(self, bar: tqdm, tol: float) -> None:
        self._bar, self._tol = bar, tol
        self.update = bar.update

    def watching(self, callback: Callable[[dict[str, Any]], None] | None) -> Callable[[dict[str, Any]], None]:
        """A callback for `golub_kahan`, that calls another, too."""

        def show(entry: dict[str, Any]) -> None:
            ends = {name: entry[name] for name in ("largest", "smallest") if len(entry[name][0])}
            top = max(float(values.max()) for values, _ in ends.values())
            if top > 0 and "largest" in ends:
                # at the smallest end a small value is as good as a small residual
                left = {"largest": ends["largest"][1].max()}
                if "smallest" in ends:
                    values, norms = ends["smallest"]
                    left["smallest"] = abs(values).clip(max=norms).max() if len(values) else 0.0
                shown = ", ".join(f"{name} {value / top:.0e}" for name, value in left.items())
                self._bar.set_postfix_str(f"residual / λ_max: {shown} (tol {self._tol:.0e})", refresh=False)
            if callback is not None:
                callback(entry)

        return show


@contextmanager
def progress_bar(
    operator: FisherOperator, name: str, total: float | None, shown: bool, tol: float = 0.0
) -> Iterator[tuple[FisherOperator, Bar]]:
    """The same operator with a count of its own, on the screen, too; a dense J that it computes is the operator's."""
    own = counted(operator)
    with tqdm(desc=name, total=total, unit=" products", delay=1, disable=not shown) as bar:
        own.products.on_product = bar.update
        try:
            yield own, Bar(bar, tol)
        finally:
            own.products.on_product = None
            operator.jacobian.dense = own.jacobian.dense
