# SPDX-License-Identifier: Apache-2.0
"""Perplexity in pictures: by length, by position in the window, as ratios to another run.

Documents differ from each other far more than models or lengths do on the same document, so
intervals of perplexities say little. What is drawn are intervals of ratios on the same documents:
of a model's to the first one's, or of a length's to the shortest one's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from megatron_cream.evaluation.plotting import (
    Line,
    Result,
    draw_lines,
    length_axis,
    lengths_of,
    line_of,
    mark_lengths,
    name_lines,
    style,
)
from megatron_cream.evaluation.statistics import perplexity_of, t_interval
from megatron_cream.evaluation.tables import short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_CONTEXT = "context length (tokens)"
_FAR = 8  # times the smallest perplexity, from which on even steps crowd at the upper end


def draw_perplexity(figure: Figure, results: Sequence[Result], window: str) -> None:
    """Draw two panels: by length; and by position for one run, as ratios for several.

    Args:
        window: what is written beside the line at a model's window.
    """
    left, right = figure.subplots(1, 2)
    several = len(results) > 1
    if several:
        lines = [line_of(r["name"], r["lengths"], "length", "perplexity") for r in results]
    else:
        lines = [change_line(results[0])]
    draw_lines(left, lines)
    change = f"\n(95 % intervals of the change from {short(int(lines[0].x[0]))})"
    style(left, _CONTEXT, "perplexity" + ("" if several else change))
    _logarithmic(left)
    length_axis(left, results, window)
    if several:
        _ratios(right, results, window)
    else:
        _positions(right, results[0])
    name_lines(left, lines)


def _logarithmic(axes: Axes) -> None:
    """Make y a logarithmic axis, named at a few round values whatever its range."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    near = high / low < _FAR
    round_values = MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]) if near else LogLocator(subs=(1, 2, 5))
    axes.yaxis.set_major_locator(round_values)
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:g}")


def _ratios(axes: Axes, results: Sequence[Result], window: str) -> None:
    first = results[0]
    lines = [ratio_line(first, result) for result in results]
    draw_lines(axes, lines)
    style(axes, _CONTEXT, f"perplexity / {first['name']}'s\n(95 % intervals, same documents)")
    length_axis(axes, results, window)
    name_lines(axes, lines)


def ratio_line(first: Result, result: Result) -> Line:
    """Return perplexities over those of ``first``, at the lengths that both have."""
    wanted = {row["length"]: row["document_nll"] for row in first["lengths"]}
    rows = [row for row in result["lengths"] if row["length"] in wanted]
    ratios = [paired_ratio(row["document_nll"], wanted[row["length"]]) for row in rows]
    return Line(result["name"], [row["length"] for row in rows], *_columns(ratios))


def change_line(result: Result) -> Line:
    """Return perplexities, with intervals of their change from that of the shortest length."""
    rows = result["lengths"]
    first = rows[0]
    ratios = [paired_ratio(row["document_nll"], first["document_nll"]) for row in rows]
    y, low, high = _columns(ratios, first["perplexity"])
    return Line("", [row["length"] for row in rows], y, low, high)


def paired_ratio(own: list[float], other: list[float]) -> tuple[float, float | None, float | None]:
    """Return a ratio of perplexities over the same documents, and Student's interval of it.

    Args:
        own, other: nats a target of each document; all documents have as many targets.

    Returns:
        the ratio; the ends of the interval, None for one document and for equal values.
    """
    differences = [a - b for a, b in zip(own, other, strict=True)]
    ratio = perplexity_of(sum(differences) / len(differences))
    low, high = t_interval(differences)
    if math.isnan(low) or not any(differences):
        return ratio, None, None
    return ratio, perplexity_of(low), perplexity_of(high)


def _columns(ratios: list[tuple[float | None, ...]], scale: float = 1) -> list[list[float | None]]:
    return [
        [None if value is None else scale * value for value in column]
        for column in zip(*ratios, strict=True)
    ]


def _positions(axes: Axes, result: Result) -> None:
    """Perplexity by position, one line a length; a bucket stands at its geometric middle."""
    lines = []
    for length in lengths_of([result]):
        rows = [row for row in result["positions"] if row["length"] == length]
        middles = [math.sqrt(max(row["from"], row["to"] / 4) * row["to"]) for row in rows]
        lines.append(Line(short(length), middles, [row["perplexity"] for row in rows]))
    colors = _shades(len(lines))
    draw_lines(axes, lines, colors)
    style(axes, "position in the window (tokens)", "perplexity")
    _logarithmic(axes)
    axes.margins(y=0.12)
    edges = sorted({row["to"] for row in result["positions"]})
    mark_lengths(axes, edges, [result["window"]], "window {}")
    axes.set_xlim(edges[0] / 2.4, edges[-1] * 1.1)
    name_lines(axes, lines, colors)


def _shades(count: int) -> list[Any]:
    """Return colours from pale to dark, for lines that have an order."""
    from matplotlib import colormaps

    return [colormaps["viridis_r"](0.15 + 0.8 * i / max(1, count - 1)) for i in range(count)]
