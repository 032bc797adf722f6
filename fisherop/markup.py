"""HTML of texts, which may hold anything: none of it becomes markup."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape


def paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def table(columns: Mapping[str, Sequence[str]], caption: str = "") -> str:
    """A table of columns by their names, all of one length; the first column names the rows."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in columns)
    lines = []
    for first, *rest in zip(*columns.values(), strict=True):
        cells = "".join(f"<td>{escape(text)}</td>" for text in rest)
        lines.append(f'<tr><th scope="row">{escape(first)}</th>{cells}</tr>')
    above = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f"<table>{above}<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def definitions(texts: Mapping[str, str]) -> str:
    """Texts by their names."""
    return f"<dl>{''.join(f'<dt>{escape(name)}</dt><dd>{escape(text)}</dd>' for name, text in texts.items())}</dl>"


def thresholds(amplitudes: Sequence[float], rms: Sequence[float], are_bounds: Sequence[bool]) -> dict[str, list[str]]:
    """Columns of the amplitudes at which d′ = 1, and of their RMS, or of lower bounds of these."""

    def texts(values: Sequence[float]) -> list[str]:
        pairs = zip(values, are_bounds, strict=True)
        return ["∞" if x == float("inf") else f"{'≥ ' * is_bound}{x:.3e}" for x, is_bound in pairs]

    return {"threshold (d′ = 1)": texts(amplitudes), "its RMS": texts(rms)}
