"""The products that a solver has made, on the screen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tqdm.auto import tqdm

from fisherop.operators import FisherOperator


@contextmanager
def progress_bar(operator: FisherOperator, name: str, total: float | None, shown: bool) -> Iterator[None]:
    """Count products on the screen, for whatever solver makes them."""
    lin = operator.linearization
    with tqdm(desc=name, total=total, unit=" products", delay=1, disable=not shown) as bar:
        listener = lin.on_product

        def on_product(count: float) -> None:
            bar.update(count)
            if listener is not None:
                listener(count)

        lin.on_product = on_product
        try:
            yield
        finally:
            lin.on_product = listener
