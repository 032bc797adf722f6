"""Curves of finished results, drawn by matplotlib; `fisherop.plot` holds them, too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from fisherop import checks
from fisherop.density import SpectralDensity
from fisherop.eigendistortion import Eigendistortion
from fisherop.printing import COLOURS, DASHES, cycle, entitle, every, plain, printed
from fisherop.result import EigenResult, Status
from fisherop.sweeps import Record, SweepResult

_FILLS: dict[Status, Any] = {
    Status.EIGENPAIR: "full",
    Status.NULL: "none",
    Status.NOT_EXTREME: "left",
    Status.UNCONVERGED: "bottom",
}


def spectrum(
    results: EigenResult | Sequence[EigenResult],
    names: Sequence[str] | None = None,
    *,
    width: float | None = None,
    fontsize: float | None = None,
    titles: bool = True,
) -> Figure:
    """Draw the eigenvalues against their index, on a log scale, with the residuals ‖F v − λ v‖ as bars.

    An eigenvalue below 10⁻¹⁶ λ_max is drawn there, with an arrow down.

    Parameters
    ----------
    results : EigenResult or sequence of EigenResult
        A colour and a marker each; how it is filled says the status.
    names : sequence of str, optional
        For the legend, by default the method.
    width : float, optional
        Of the figure, in inches: 3.3 for a column, 7 for a page.
    fontsize : float, optional
        Of all text, in points: by default 0.9 of matplotlib's ``font.size``, and 0.7 where `width` is given.
    titles : bool
        False leaves all titles out, for a caption to say what is shown.

    Returns
    -------
    Figure
        Where there are up to three pairs at each end, and not all, a panel for each end; else one panel, in which
        indices are relative to N − 1 where the results' N differ.

    Raises
    ------
    ValueError
        There is no result, or `names` has another length.
    """
    results = [results] if isinstance(results, EigenResult) else results
    results = checks.several("results", results, EigenResult, "an EigenResult, or a sequence of at least one")
    names = [result.method for result in results] if names is None else names
    names = checks.several("names", names, str, f"a text for each of the {len(results)} results", len(results))
    ends = [_ends(result) for result in results]
    is_complete = any(len(result.eigenvalues) == result.image_size for result in results)
    has_few = not is_complete and max(chosen.sum() for pair in ends for chosen in pair) <= 3
    places = [i for i in (0, 1) if any(pair[i].any() for pair in ends)] if has_few else [None]
    relative = len({result.image_size for result in results}) > 1
    with printed(width, fontsize, titles, ncols=len(places), sharey=True, squeeze=False) as (figure, (axes,)):
        for ax, place in zip(axes, places, strict=True):
            for number, (result, name) in enumerate(zip(results, names, strict=True)):
                last, prefix = result.image_size - 1, f"{name}, " if len(results) > 1 else ""
                if place is None:
                    x, chosen = result.eigenindex / (max(last, 1) if relative else 1), np.isfinite(result.eigenvalues)
                else:
                    x, chosen = result.eigenindex - last * place, ends[number][place]
                    x = x + 0.15 * (number - (len(results) - 1) / 2)  # beside each other
                _draw_spectrum(ax, result, x, chosen, number, prefix)
            last = results[0].image_size - 1
            if place is None:
                ax.set_xlim(*((-0.03, 1.03) if relative else (-0.03 * last - 0.5, 1.03 * last + 0.5)))
                ax.set_xlabel("eigenindex / (N − 1)" if relative else f"eigenindex (0 … {last})")
            else:
                ticks = np.sort(np.arange(max(pair[place].sum() for pair in ends)) * (1 - 2 * place))
                labels = [f"{i + last * place}" if place == 0 or not relative else f"N − {1 - i}" for i in ticks]
                ax.set_xticks(ticks, labels)
                ax.set_xlim(min(ticks) - 0.5, max(ticks) + 0.5)
                ax.set_xlabel(f"eigenindex, {('largest', 'smallest')[place]}")
        axes[0].set_yscale("log")
        axes[0].set_ylabel("eigenvalue of F, bars: residual")
        told = zip(results, names, strict=True)
        lines = [f"{name}: {len(one.eigenvalues)} eigenvalues, {one.n_products:g} products" for one, name in told]
        entitle(figure, "\n".join(lines), titles)
    return figure


def _ends(result: EigenResult) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which pairs are of the largest end, and which of the smallest."""
    from_top = result.eigenindex == np.arange(len(result.eigenindex))
    return from_top, ~from_top


def _draw_spectrum(
    ax: Axes, result: EigenResult, x: NDArray, shown: NDArray[np.bool_], number: int, prefix: str
) -> None:
    style = cycle(number)
    top = result.lambda_max_bounds[0] or 1.0
    floor = 1e-16 * top
    heights = np.maximum(result.eigenvalues, floor)
    for status, fill in _FILLS.items():
        chosen = shown & (result.status == status)
        if chosen.any():
            y, residual = heights[chosen], result.residual_norms[chosen]
            down = np.minimum(residual, y - floor) * (status != Status.NULL)  # which is anywhere below, down to zero
            bars = np.vstack([down, residual])
            label = f"{prefix}{status}"
            ax.errorbar(x[chosen], y, bars, **style, ls="", fillstyle=fill, capsize=3, label=label, ms=5)
    for place in x[shown & (result.eigenvalues < floor)]:
        arrow = {"arrowstyle": "->", "color": style["color"]}
        ax.annotate("", (place, floor / 20), (place, floor), arrowprops=arrow, annotation_clip=False)
        ax.plot(place, floor / 30, alpha=0)  # makes room
    dashes = DASHES[number % len(DASHES)]  # a marker would look like an eigenvalue
    ax.axhline(result.tol * top, color=style["color"], lw=1, ls=dashes, label=f"{prefix}tol · λ_max")


def convergence(
    result: EigenResult,
    *,
    width: float | None = None,
    fontsize: float | None = None,
    titles: bool = True,
) -> Figure:
    """Draw the convergence of the pairs at each end against products: residuals, and values at the smallest end.

    Parameters
    ----------
    result : EigenResult
        With a ``history`` in its details, as ``"golub_kahan"`` leaves one.
    width, fontsize, titles
        As in `spectrum`.

    Returns
    -------
    Figure
        The largest of the k residuals at each end, relative to λ_max, on a log scale; dashed, the largest of the k
        smallest Ritz values, which prove them null to tol once below the line of tol. Dots are what the certificate
        found; grey is what products can't resolve.

    Raises
    ------
    ValueError
        The result has no history.
    """
    history = checks.instance("result", result, EigenResult, "an EigenResult").details.get("history")
    if not history:
        raise ValueError(f"the result of method {result.method!r} has no history: use method='golub_kahan'")
    top = result.lambda_max_bounds[0] or 1.0
    products = np.array([entry["n_products"] for entry in history])
    with printed(width, fontsize, titles) as (figure, ax):
        for number, (end, chosen) in enumerate(zip(("largest", "smallest"), _ends(result), strict=True)):
            lines = {"residual": (1, "-", result.residual_norms), "value": (0, "--", result.eigenvalues)}
            for name, (part, style, certified) in lines.items():
                heights = [max(entry[end][part], default=np.nan) for entry in history]
                if not chosen.any() or (name == "value" and end == "largest"):
                    continue
                look = {"color": COLOURS[number], "marker": {"value": "D", "residual": "^v"[number]}[name]}
                shown = every(len(products), number + 2 * (name == "value"))
                label = f"{end}, {name}"
                ax.plot(products, np.array(heights) / top, style, **look, markevery=shown, ms=4, lw=1.2, label=label)
                ax.plot(result.n_products, certified[chosen].max() / top, "o", color=COLOURS[number], ms=5, mec="k")
        ax.axhline(result.tol, color="0.6", lw=1, ls=":", label="tol")
        ax.set_yscale("log")
        if result.noise > 0:  # the solver's own residuals, from its small problem, fall further
            ax.axhspan(result.noise / 100, result.noise, color="0.9", label="rounding")
            ax.set_ylim(bottom=result.noise / 10)
        ax.set_xlabel("products")
        ax.set_ylabel("relative to λ_max, the worst of k")
        entitle(figure, f"{result.method}: {result.n_products:g} products, dots by the certificate", titles)
    return figure


def density(
    densities: SpectralDensity | Sequence[SpectralDensity],
    names: Sequence[str] | None = None,
    *,
    width: float | None = None,
    fontsize: float | None = None,
) -> Figure:
    """Draw how the eigenvalues are spread over decades below λ_max, and how many are below each size, with 95 % bands.

    Parameters
    ----------
    densities : SpectralDensity or sequence of SpectralDensity
        By `spectral_density`, or the ``density`` of a result by `golub_kahan`. A colour and a marker each.
    names : sequence of str, optional
        For the legend, by default the number of random vectors.
    width, fontsize
        As in `spectrum`.

    Returns
    -------
    Figure
        Above, eigenvalues per decade, each spread over a quarter of one; below, how many are smaller. Where there is a
        band and no line, it takes more steps to tell. What is below the smallest node that a Krylov space has shown, or
        below 10⁻¹² λ_max, is left out above, and counted below.

    Raises
    ------
    ValueError
        There is nothing to draw, `names` has another length, or J is zero.
    """
    densities = [densities] if isinstance(densities, SpectralDensity) else densities
    densities = checks.several("densities", densities, SpectralDensity, "a SpectralDensity, or a sequence of them")
    if names is None:
        names = ["exact" if one.is_exact else f"{one.n_probes} random vectors" for one in densities]
    names = checks.several("names", names, str, f"a text for each of the {len(densities)} densities", len(densities))
    if min(one.lambda_max for one in densities) == 0:
        raise ValueError("J is zero, so that there is no spectrum to draw")
    least = min(float(run.nodes.min()) for one in densities for run in one.runs)
    start = float(np.clip(np.log10(max(least, 1e-12)) - 0.5, -12.5, -1.0))
    decades, steps = np.linspace(start, 0.0, 200), np.linspace(start, 0.0, 40)
    with printed(width, fontsize, True, (6.4, 5.6), nrows=2, sharex=True) as (figure, (above, below)):
        for number, (one, name) in enumerate(zip(densities, names, strict=True)):
            style = dict(cycle(number), lw=1.2, ms=4)
            value, low, high = one.density(decades)
            known = np.where(high - low <= 2 * value + 0.1 * value.max(), value, np.nan)
            label, shown = f"{name}, N = {one.image_size}", every(len(decades), number)
            above.plot(10**decades, known, **style, markevery=shown, label=label)
            above.fill_between(10**decades, low, high, color=style["color"], alpha=0.25, lw=0)
            counts = np.array([one.count_below(float(x)) for x in 10**steps])
            known = np.where(counts[:, 3] - counts[:, 2] <= np.maximum(counts[:, 0], 3), counts[:, 0], np.nan)
            below.plot(10**steps, known, **style, markevery=every(len(steps), number))
            below.fill_between(10**steps, counts[:, 2], counts[:, 3], color=style["color"], alpha=0.25, lw=0)
        above.set_ylabel("eigenvalues per decade")
        below.set_xscale("log")
        below.set_yscale("symlog", linthresh=1)
        below.set_ylim(bottom=0)
        below.set_ylabel("eigenvalues below")
        below.set_xlabel("λ / λ_max (bands: 95 %)")
    return figure


def response_change(
    ed: Eigendistortion,
    indices: int | Sequence[int] = (0, -1),
    deviation: float = 0.1,
    points: int = 40,
    *,
    width: float | None = None,
    fontsize: float | None = None,
    titles: bool = True,
) -> Figure:
    """Draw how far the response moves along distortions, as F predicts it and in truth, against the amplitude.

    Parameters
    ----------
    ed : Eigendistortion
        After `synthesize`.
    indices : int or sequence of int
        Positions among the distortions found: 0 for the most noticeable, −1 for the least. A colour and a marker each.
    deviation : float
        A star marks where prediction and truth part by this much, as `Eigendistortion.linear_range` finds it.
    points : int
        Amplitudes of each line.
    width, fontsize, titles
        As in `spectrum`.

    Returns
    -------
    Figure
        Dashed, √λ · amplitude; the change of the response, in units of its noise, full in the one direction, and
        dash-dotted with hollow markers in the other. The dotted line is a change of 1, which is d′ = 1.

    Raises
    ------
    ValueError
        Nothing has been synthesized yet.
    IndexError
        There is no such distortion.
    """
    checks.instance("ed", ed, Eigendistortion, "an Eigendistortion")
    if ed.result is None or len(ed.result.eigenvalues) == 0:
        raise ValueError("there are no eigendistortions to show: call synthesize() first")
    result, points = ed.result, checks.integer("points", points, 2)
    indices = checks.integers("indices", indices)
    indices = [checks.position("indices", i, len(result.eigenvalues), "eigendistortions found") for i in indices]
    ends = [ed.linear_range(i, deviation) for i in indices]
    size = max(float(np.linalg.norm(ed.image.detach().cpu().double().numpy())), 1.0)
    places = [x for x in ends if 0 < x < np.inf] or [0.1 * size]
    amplitudes = np.geomspace(min(places) / 30, min(10 * max(places), 10 * size), points)
    words = {0: "most", result.image_size - 1: "least"}
    with printed(width, fontsize, titles) as (figure, ax):
        for number, (i, end) in enumerate(zip(indices, ends, strict=True)):
            style, value = cycle(number), float(result.eigenvalues[i])
            name = words.get(int(result.eigenindex[i]), f"index {result.eigenindex[i]}")
            if value > 0:
                look = style | {"ls": "--", "lw": 1, "ms": 3, "markevery": [points - 1]}
                ax.plot(amplitudes, value**0.5 * amplitudes, **look, label=f"{name}, predicted")
            for sign, line, fill in ((1, "-", "full"), (-1, "-.", "none")):
                _, actual = ed.response_change(i, sign * amplitudes)
                label = f"{name}, {'+' if sign > 0 else '−'} amplitude"
                shown = every(points, number + (sign < 0))
                ax.plot(amplitudes, actual, line, **style, fillstyle=fill, markevery=shown, ms=4, lw=1.2, label=label)
            if 0 < end < np.inf:
                label = f"parted by {100 * deviation:.3g} %"
                ax.plot(end, value**0.5 * end, "*", color=style["color"], mec="k", ms=9, label=label)
        ax.axhline(1.0, color="0.6", lw=1, ls=":", label="d′ = 1")
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_xlabel("amplitude, a norm in the image's units")
        ax.set_ylabel("change of the response, d′")
        entitle(figure, "how far F's prediction holds", titles)
    return figure


def sweep(
    result: SweepResult,
    *,
    width: float | None = None,
    fontsize: float | None = None,
    titles: bool = True,
) -> Figure:
    """Draw the thresholds of the most and the least noticeable distortion of each image, by model and layer.

    Parameters
    ----------
    result : SweepResult
        Of at least one task that is done.
    width, fontsize, titles
        As in `spectrum`.

    Returns
    -------
    Figure
        A column for each model and layer, on a log scale: a point for each image, and a bar at the median. A hollow
        point is a lower bound, of a pair that is null to tol, and a thin bar the median of such: another tol gives
        another one. Infinite thresholds stand at the top, with how many there are. The threshold is the norm of the
        distortion, in the image's units, as F predicts it.

    Raises
    ------
    ValueError
        No task is done.
    """
    checks.instance("result", result, SweepResult, "a SweepResult")
    columns: dict[tuple[str, str], list[Record]] = {}
    for one in result.done:
        columns.setdefault((one.model, one.layer), []).append(one)
    if not columns:
        raise ValueError("there is nothing to draw: no task of the sweep is done")
    finite = np.concatenate([one.thresholds[np.isfinite(one.thresholds)] for one in result] or [np.ones(1)])
    top = 3 * finite.max(initial=0.0) or 1.0
    infinite: dict[float, str] = {}
    with printed(width, fontsize, titles, (max(4.0, 1.2 + 0.9 * len(columns)), 3.8)) as (figure, ax):
        for x, records in enumerate(columns.values()):
            for is_least in (False, True):
                found = [end for end in (_end(one, is_least) for one in records) if end is not None]
                if not found:
                    continue
                heights, bounds = (np.array(column) for column in zip(*found, strict=True))
                place = x + (0.2 if is_least else -0.2)
                spread = 0.12 * (np.arange(len(heights)) / max(len(heights) - 1, 1) - 0.5)
                colour, marker = COLOURS[int(is_least)], "ov"[int(is_least)]
                label = ("least" if is_least else "most") + " noticeable"
                for chosen, face, what in ((~bounds, colour, ""), (bounds, "none", ", lower bound")):
                    if chosen.any():
                        shown = np.minimum(heights[chosen], top)
                        ax.plot(
                            (place + spread)[chosen], shown, marker, color=colour, mfc=face, ms=4, label=label + what
                        )
                ends = place - 0.14, place + 0.14
                ax.hlines(min(float(np.median(heights)), top), *ends, color=colour, lw=0.7 if bounds.any() else 2)
                if np.isinf(heights).any():
                    infinite[place] = f"∞: {np.isinf(heights).sum()} of {len(heights)}"
        ax.set_yscale("log")
        ax.set_xlim(-0.6, len(columns) - 0.4)
        ax.set_xticks(range(len(columns)), [plain(v[0].name).replace(" ", "\n") for v in columns.values()])
        ax.set_ylabel("threshold 1 / √λ, a norm")
        if infinite:
            above = ax.twiny()
            above.set_xlim(ax.get_xlim())
            above.set_xticks(list(infinite), list(infinite.values()))
            above.tick_params(length=0)
        n_failed = len(result.failed)
        images = len({one.image for records in columns.values() for one in records})
        title = f"{images} image{'s' * (images > 1)}"
        entitle(figure, title + (f", {n_failed} tasks failed" if n_failed else ""), titles)
    return figure


def _end(record: Record, is_least: bool) -> tuple[float, bool] | None:
    """The threshold of an end of the spectrum, and whether it is a bound; None where the sweep did not look for it."""
    place = -1 if is_least else 0
    index = int(record.eigenindex[place])
    is_there = index == record.n_pixels - 1 if is_least else index == 0
    return (float(record.thresholds[place]), record.status[place] == Status.NULL) if is_there else None
