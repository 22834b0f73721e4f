# SPDX-License-Identifier: Apache-2.0
"""Pictures of results, which panels each kind of run has.

perplexity, one run      by length with intervals of the change; by position in the window
perplexity, several      by length; ratio to the first run with intervals of paired documents
passkey, needle          heat map of depth and length, one a run
tasks with places        by length with intervals; heat map of place and length, or lines by place
other tasks              by length with intervals
all tasks of a model     heat map of task and length
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_cream.evaluation.perplexity_pictures import draw_perplexity
from megatron_cream.evaluation.plotting import (
    INK,
    MUTED,
    NORMAL,
    SMALL,
    Line,
    Result,
    draw_lines,
    heat_map,
    length_axis,
    lengths_of,
    line_of,
    mark_window,
    name_lines,
    style,
)
from megatron_cream.evaluation.tables import short
from megatron_cream.positions.plots import require_matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HEAT_MAPS = ("needle", "passkey")
_PAGE = 13  # inches; a wider picture is too small to read where a page shows it
_HITS = ("hit", "hit_low", "hit_high")


def draw(results: Sequence[Result], path: str | Path, window: str = "window {}") -> None:
    """Write the picture of one run, or of several of the same task, to ``path``.

    Args:
        window: what is written beside the line at a model's window.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    picture(results, window).savefig(path)


def draw_suite(results: Sequence[Result], path: str | Path) -> None:
    """Write the picture of all tasks of one model; perplexity, which is no share, is left out."""
    shares = [result for result in results if result["task"] != "perplexity"]
    lengths = lengths_of(shares)
    names = [result["task"] for result in shares]
    figure = _figure(f"{shares[0]['name']}: exact answers in %", 2.4 + 0.7 * len(lengths), 3.4)
    axes = figure.subplots()
    cells = {(r["task"], row["length"]): row["hit"] for r in shares for row in r["lengths"]}
    heat_map(axes, _grid(cells, names, lengths), list(map(short, lengths)), names)
    axes.set_xlabel("length of a case (tokens)", fontsize=NORMAL, color=MUTED)
    mark_window(axes, lengths, shares[0]["window"])
    figure.savefig(path)


def picture(results: Sequence[Result], window: str = "window {}") -> Figure:
    """Return the figure that ``draw`` writes."""
    task = results[0]["task"]
    title = f"{task}: {results[0]['name']}" if len(results) == 1 else task
    if task == "perplexity":
        figure = _figure(title, 8.6, 3.3)
        draw_perplexity(figure, results, window)
        return figure
    if task in HEAT_MAPS:
        return _depths(title, results)
    if "places" in results[0]:
        return _lengths_and_places(_figure(title, 8.6, _height(results)), results)
    figure = _figure(title, 5, 3.3)
    _accuracy(figure.subplots(), results)
    return figure


def _height(results: Sequence[Result]) -> float:
    """Return inches that leave room for the rows of a map."""
    return 3.3 + 0.19 * max(0, max(len(_place_rows(result)) for result in results) - 11)


def _figure(title: str, width: float, height: float) -> Figure:
    """Return an empty figure of ``width`` x ``height`` inches."""
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure((width, height), dpi=180, layout="constrained", facecolor="white")
    figure.get_layout_engine().set(h_pad=0.08, w_pad=0.08, wspace=0.06)
    figure.suptitle(title, x=0.012, ha="left", fontsize=NORMAL + 1, color=INK, weight="bold")
    return figure


def _accuracy(axes: Axes, results: Sequence[Result]) -> None:
    names = [result["name"] if len(results) > 1 else "" for result in results]
    pairs = zip(names, results, strict=True)
    lines = [line_of(name, result["lengths"], "length", *_HITS) for name, result in pairs]
    draw_lines(axes, lines)
    style(axes, "length of a case (tokens)", "exact answers (95 % intervals)")
    _percent_axis(axes)
    length_axis(axes, results)
    name_lines(axes, lines)


def _percent_axis(axes: Axes) -> None:
    axes.set_ylim(-0.03, 1.03)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])


def _lengths_and_places(figure: Figure, results: Sequence[Result]) -> Figure:
    """Accuracy by length, and by place: a map of all lengths of a run, or a line a run."""
    left, right = figure.subplots(1, 2)
    _accuracy(left, results)
    if len(results) == 1 and len(lengths_of(results)) > 1:
        _place_map(right, results[0], "place of the answer")
        _mark_middle_rows(right, results[0])
        right.set_title(_cell_words(results), loc="left", fontsize=SMALL, color=MUTED, pad=16)
        return figure
    lines = [_places(result, len(results) > 1) for result in results]
    draw_lines(right, lines)
    right.axvspan(1 / 3, 2 / 3, color="#f3f0e6", zorder=0, linewidth=0)
    right.annotate(
        "middle third", (0.5, 1), xycoords=("data", "axes fraction"), xytext=(0, 3),
        textcoords="offset points", ha="center", va="bottom", fontsize=SMALL, color=MUTED,
    )  # fmt: skip
    shown = "mean of all lengths" if len(lengths_of(results)) > 1 else "95 % intervals"
    style(right, "place of the answer in the context", f"exact answers ({shown})")
    right.set_xticks([0, 0.25, 0.5, 0.75, 1], ["beginning", "25 %", "50 %", "75 %", "end"])
    _percent_axis(right)
    name_lines(right, lines)
    return figure


def _places(result: Result, named: bool) -> Line:
    """Return accuracy by place; over several lengths their mean, without intervals.

    Lengths are not drawn at random: an interval over them would mean nothing.
    """
    name, rows = result["name"] if named else "", result["places"]
    if len(lengths_of([result])) == 1:
        return line_of(name, rows, "where", *_HITS)
    places = sorted({row["where"] for row in rows})
    hits = [[row["hit"] for row in rows if row["where"] == where] for where in places]
    return Line(name, places, [sum(found) / len(found) for found in hits])


def _depths(title: str, results: Sequence[Result]) -> Figure:
    """Depth by length, one map a run, in rows that fit a page."""
    count, width = len(results), 1.6 + 0.62 * len(lengths_of(results))
    rows = ceil(count / max(1, int(_PAGE / width)))
    columns = ceil(count / rows)
    figure = _figure(title, columns * width, rows * _height(results))
    places = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axes in places.flat[count:]:
        axes.remove()
    for i, (axes, result) in enumerate(zip(places.flat, results, strict=False)):
        _place_map(axes, result, "" if i % columns else "depth of the needle")
        words = _cell_words([result]) if count == 1 else result["name"]
        axes.set_title(words, loc="left", fontsize=SMALL, color=MUTED, pad=16)
    return figure


def _cell_words(results: Sequence[Result]) -> str:
    counts = sorted({row["cases"] for result in results for row in result["places"]})
    several = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(counts[0])
    return f"exact answers in %, {several} case{'s' if counts != [1] else ''} a cell"


def _grid(cells: dict[tuple[Any, int], float], rows: Sequence, lengths: Sequence[int]) -> Any:
    import numpy as np

    return np.array([[cells.get((row, length), np.nan) for length in lengths] for row in rows])


def _place_map(axes: Axes, result: Result, ylabel: str) -> None:
    lengths = lengths_of([result])
    places = _place_rows(result)
    cells = {(row["where"], row["length"]): row["hit"] for row in result["places"]}
    names = [f"{100 * place:.0f} %" for place in places]
    heat_map(axes, _grid(cells, places, lengths), list(map(short, lengths)), names)
    axes.set_xlabel("length of a case (tokens)", fontsize=NORMAL, color=MUTED)
    axes.set_ylabel(ylabel, fontsize=NORMAL, color=MUTED)
    mark_window(axes, lengths, result["window"])


def _place_rows(result: Result) -> list[float]:
    return sorted({row["where"] for row in result["places"]})


def _mark_middle_rows(axes: Axes, result: Result) -> None:
    """Draw a bracket beside the rows of a map that are in the middle third."""
    places = _place_rows(result)
    middle = [i for i, place in enumerate(places) if 1 / 3 <= place <= 2 / 3]
    if not middle:
        return
    x, top, end = 1.02, middle[0], middle[-1] + 1
    to = axes.get_yaxis_transform()
    axes.plot(
        [x, x], [top + 0.08, end - 0.08], color=MUTED, linewidth=1, transform=to, clip_on=False
    )
    axes.text(
        x + 0.02, (top + end) / 2, "middle third", rotation=90, va="center", fontsize=SMALL,
        color=MUTED, transform=to,
    )  # fmt: skip
