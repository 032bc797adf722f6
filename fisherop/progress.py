"""The products that a solver has made, on the screen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tqdm.auto import tqdm

from fisherop.operators import FisherOperator, counted


@contextmanager
def progress_bar(operator: FisherOperator, name: str, total: float | None, shown: bool) -> Iterator[FisherOperator]:
    """The same operator with a count of its own, on the screen, too; a dense J that it computes is the operator's."""
    own = counted(operator)
    with tqdm(desc=name, total=total, unit=" products", delay=1, disable=not shown) as bar:
        own.products.on_product = bar.update
        try:
            yield own
        finally:
            own.products.on_product = None
            operator.jacobian.dense = own.jacobian.dense
