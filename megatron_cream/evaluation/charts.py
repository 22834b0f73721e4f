# SPDX-License-Identifier: Apache-2.0
"""Draws what pictures of results are made of: axes, lines with names at their ends, heat maps.

Colours are Okabe and Ito's, which stay apart for colour-blind readers; every line has a marker of
its own as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_cream.evaluation.results import Result, lengths_of, short

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes

INK, MUTED, RULE = "#22303c", "#5b6773", "#c5ccd3"
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
MARKERS = ("o", "s", "D", "^", "v", "P", "X")
SMALL, NORMAL = 8, 9  # font sizes in points
_NAME_HEIGHT = 11  # points from one line's name to the next
_ASIDE = 3  # points between the intervals of two lines
_FAR = 8  # times the smallest value, from which on even steps crowd at the upper end


@dataclass(frozen=True)
class ChartLine:
    """One line of a picture.

    Attributes:
        name: written at its end; nothing where empty.
        x, y: its points.
        low, high: ends of an interval of each point, or None; empty where there is none.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float | None] = ()
    high: Sequence[float | None] = ()


def line_of(name: str, rows: Sequence[dict[str, Any]], *keys: str) -> ChartLine:
    """Return the line of ``rows`` whose x, y and, if named, ends of intervals are ``keys``."""
    columns: list[list[Any]] = [[row.get(key) for row in rows] for key in keys]
    return ChartLine(name, *columns)


def style(axes: Axes, xlabel: str, ylabel: str) -> None:
    """Give axes thin spines, a pale horizontal grid and labels."""
    axes.set_xlabel(xlabel, fontsize=NORMAL, color=MUTED)
    axes.set_ylabel(ylabel, fontsize=NORMAL, color=MUTED)
    axes.tick_params(which="both", colors=MUTED, labelsize=SMALL, length=3, width=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set(color=RULE, linewidth=0.8)
    axes.grid(axis="y", color="#e9ecef", linewidth=0.6)
    axes.set_axisbelow(True)


def draw_lines(axes: Axes, lines: Sequence[ChartLine], colors: Sequence[Any] = COLORS) -> None:
    """Draw lines with their intervals, side by side, as thin whiskers."""
    with_ends = [number for number, line in enumerate(lines) if _has_interval(line)]
    for number, line in enumerate(lines):
        color = colors[number % len(colors)]
        axes.plot(
            line.x, line.y, color=color, linewidth=1.3, marker=MARKERS[number % len(MARKERS)],
            markersize=4.5, markeredgecolor="white", markeredgewidth=0.5, zorder=3, label=line.name,
        )  # fmt: skip
        if number in with_ends:
            place = with_ends.index(number) - (len(with_ends) - 1) / 2
            _whiskers(axes, line, color, _ASIDE * place)


def _has_interval(line: ChartLine) -> bool:
    return any(end is not None for end in line.low)


def _whiskers(axes: Axes, line: ChartLine, color: Any, points: float) -> None:
    from matplotlib.transforms import ScaledTranslation

    ends: list[Any] = [e for e in zip(line.x, line.low, line.high, strict=True) if None not in e]
    aside = ScaledTranslation(points / 72, 0, axes.figure.dpi_scale_trans)
    x, low, high = zip(*ends, strict=True)
    axes.vlines(
        x, low, high, color=color, linewidth=0.8, alpha=0.75, transform=axes.transData + aside
    )
    # A shifted transform keeps the axes from making room by themselves.
    axes.update_datalim([(at, end) for at, *both in ends for end in both])
    axes.autoscale_view()


def name_lines(axes: Axes, lines: Sequence[ChartLine], colors: Sequence[Any] = COLORS) -> None:
    """Write each line's name after its last point; names that would overlap are moved apart.

    A line that ends before the others has it below. To be called when the limits of the axes are
    final.
    """
    figure: Any = axes.figure
    figure.draw_without_rendering()
    named = [(number, line) for number, line in enumerate(lines) if line.name]
    ends = [(line.x[-1], line.y[-1]) for _, line in named]
    last = max((x for x, _ in ends), default=0)
    own = [axes.transData.transform(end)[1] * 72 / figure.dpi for end in ends]
    named_last = [i for i, end in enumerate(ends) if end[0] == last]
    places = dict(zip(named_last, apart([own[i] for i in named_last], _NAME_HEIGHT), strict=True))
    for i, (number, line) in enumerate(named):
        axes.annotate(
            line.name, ends[i], xytext=(8, places[i] - own[i]) if i in places else (0, -10),
            ha="left" if i in places else "center", va="center", textcoords="offset points",
            fontsize=SMALL, color=colors[number % len(colors)], annotation_clip=False,
        )  # fmt: skip


def apart(places: Sequence[float], least: float) -> list[float]:
    """Return ``places`` in the same order, moved as little as need be to be ``least`` apart.

    Places that are too near form a block around their mean; blocks that meet become one.
    """
    order = sorted(range(len(places)), key=lambda i: places[i])
    blocks: list[list[int]] = []
    for i in order:
        blocks.append([i])
        while len(blocks) > 1 and _span(blocks[-2], places, least)[1] > (
            _span(blocks[-1], places, least)[0] - least
        ):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    moved = list(places)
    for block in blocks:
        first, _ = _span(block, places, least)
        for step, i in enumerate(block):
            moved[i] = first + step * least
    return moved


def _span(block: list[int], places: Sequence[float], least: float) -> tuple[float, float]:
    middle = sum(places[i] for i in block) / len(block)
    half = (len(block) - 1) * least / 2
    return middle - half, middle + half


def length_axis(axes: Axes, results: Sequence[Result], words: str = "window {}") -> None:
    """Make x the axis of the lengths of runs, with the windows of their models."""
    mark_lengths(axes, lengths_of(results), [result["window"] for result in results], words)


def mark_lengths(axes: Axes, lengths: Sequence[int], windows: Sequence[int], words: str) -> None:
    """Make x a logarithmic axis of lengths, and mark the windows of the models.

    Args:
        words: what is written beside a window, with ``{}`` for its tokens.
    """
    axes.set_xscale("log", base=2)
    axes.set_xlim(lengths[0] / 1.15, lengths[-1] * 1.15)
    axes.set_xticks(lengths, [short(length) for length in lengths])
    axes.minorticks_off()
    middle = (lengths[0] * lengths[-1]) ** 0.5
    for tokens in sorted(set(windows)):
        if lengths[0] <= tokens < lengths[-1]:
            axes.axvline(tokens, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
            axes.annotate(
                words.format(short(tokens)), (tokens, 1), xycoords=("data", "axes fraction"),
                xytext=(0, 3), textcoords="offset points", va="bottom", fontsize=SMALL,
                color=MUTED, ha="left" if tokens < middle else "right",
            )  # fmt: skip


def logarithmic_y(axes: Axes) -> None:
    """Make y a logarithmic axis, named at a few round values whatever its range."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    near = high / low < _FAR
    round_values = MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]) if near else LogLocator(subs=(1, 2, 5))
    axes.yaxis.set_major_locator(round_values)
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:g}")


def heat_map(axes: Axes, shares: np.ndarray, columns: Sequence[str], rows: Sequence[str]) -> None:
    """Draw shares ``[rows, columns]`` from 0 (white) to 1 (blue), each in percent in its cell.

    NaN is an empty cell.
    """
    import numpy as np
    from matplotlib.colors import LinearSegmentedColormap

    colors = LinearSegmentedColormap.from_list("shares", ["#ffffff", "#a9cfe6", COLORS[0]])
    axes.pcolormesh(shares, cmap=colors, vmin=0, vmax=1, edgecolors="#d5dbe0", linewidth=0.6)
    axes.set_ylim(len(rows), 0)
    for (i, j), share in np.ndenumerate(shares):
        if not np.isnan(share):
            axes.text(
                j + 0.5, i + 0.5, f"{100 * share:.0f}", ha="center", va="center", fontsize=SMALL,
                color="white" if share > 0.7 else INK,
            )  # fmt: skip
    axes.set_xticks(np.arange(len(columns)) + 0.5, columns)
    axes.set_yticks(np.arange(len(rows)) + 0.5, rows)
    axes.tick_params(colors=MUTED, labelsize=SMALL, length=0)
    axes.spines[:].set_visible(False)


def mark_window(axes: Axes, lengths: Sequence[int], window: int) -> None:
    """Mark, between the columns of a heat map, where lengths exceed the window."""
    inside = sum(length <= window for length in lengths)
    if 0 < inside < len(lengths):
        axes.axvline(inside, color=COLORS[1], linewidth=1.2, linestyle=(0, (4, 2)))
        axes.annotate(
            f"window {short(window)}", (inside, 1), xycoords=("data", "axes fraction"),
            xytext=(0, 3), textcoords="offset points", ha="center", fontsize=SMALL, color="#b34700",
        )  # fmt: skip
