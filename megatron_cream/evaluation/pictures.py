# SPDX-License-Identifier: Apache-2.0
"""Draws results; which panels each kind of run has:

perplexity, one run      by length with intervals of the change; by position in the window
perplexity, several      by length; ratio to the first run with intervals of paired documents
longppl                  LongPPL and perplexity by length
passkey, needle          heat map of depth and length, one per run
tasks with places        by length with intervals; heat map of place and length, or lines by place
other tasks              by length with intervals
ruler                    averages by length; heat map of task and length, for one run
all tasks of a model     heat map of task and length

Documents differ from each other far more than models or lengths do on the same document, so
intervals of perplexities say little. What is drawn are intervals of ratios on the same documents:
of a model's to the first one's, or of a length's to the shortest one's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_cream.evaluation.charts import (
    INK,
    MUTED,
    NORMAL,
    SMALL,
    ChartLine,
    draw_lines,
    heat_map,
    length_axis,
    line_of,
    logarithmic_y,
    mark_lengths,
    mark_window,
    name_lines,
    style,
)
from megatron_cream.evaluation.results import (
    Result,
    lengths_of,
    perplexity_interval,
    perplexity_of,
    ruler_score,
    short,
)
from megatron_cream.positions.plots import require_matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HEAT_MAPS = ("needle", "passkey")
_PAGE = 13  # inches; a wider picture is too small to read where a page shows it
_HITS = ("hit", "hit_low", "hit_high")
_LENGTH = "length of a case (tokens)"
_CONTEXT = "context length (tokens)"


def draw(results: Sequence[Result], path: str | Path, window: str = "window {}") -> None:
    """Write the picture of one run, several of one task, or several tasks of one model.

    Args:
        window: what is written beside the line at a model's window.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    picture(results, window).savefig(path)


def picture(results: Sequence[Result], window: str = "window {}") -> Figure:
    """Return the figure that ``draw`` writes."""
    if len({result["task"] for result in results}) > 1:
        return _suite([result for result in results if result["task"] != "perplexity"])
    task = results[0]["task"]
    title = f"{task}: {results[0]['name']}" if len(results) == 1 else task
    if task == "perplexity":
        figure = _figure(title, 8.6, 3.3)
        _draw_perplexity(figure, results, window)
        return figure
    if task == "longppl":
        figure = _figure(title, 8.6, 3.3)
        _draw_longppl(figure, results, window)
        return figure
    if task == "ruler":
        return _ruler(title, results)
    if task in HEAT_MAPS:
        return _depths(title, results)
    if "places" in results[0]:
        return _lengths_and_places(_figure(title, 8.6, _height(results)), results)
    figure = _figure(title, 5, 3.3)
    _accuracy(figure.subplots(), results)
    return figure


def _ruler(title: str, results: Sequence[Result]) -> Figure:
    """Draw the averages of all runs; beside them, of a single run, every task's scores."""
    if len(results) > 1:
        figure = _figure(title, 5, 3.3)
        _averages(figure.subplots(), results)
        return figure
    tasks, rows = results[0]["ruler_tasks"], results[0]["lengths"]
    figure = _figure(title, 7.2 + 0.4 * len(rows), 2.6 + 0.15 * len(tasks))
    left, right = figure.subplots(1, 2)
    _averages(left, results)
    scores = {(task, row["length"]): ruler_score(row, task) / 100 for task in tasks for row in rows}
    averages = {("average", row["length"]): row["average"] / 100 for row in rows}
    _draw_map(right, scores | averages, {name: name for name in (*tasks, "average")}, results)
    right.axhline(len(tasks), color=MUTED, linewidth=1.2)
    return figure


def _averages(axes: Axes, results: Sequence[Result]) -> None:
    """Draw RULER's averages by length, with the threshold of effective use."""
    for threshold in sorted({result["threshold"] for result in results}):
        axes.axhline(threshold, color=MUTED, linewidth=0.8, linestyle=(0, (1, 2)), zorder=1)
        axes.annotate(
            f"{threshold:g}", (0, threshold), xycoords=("axes fraction", "data"), xytext=(2, 2),
            textcoords="offset points", va="bottom", fontsize=SMALL, color=MUTED,
        )  # fmt: skip
    tasks = len(results[0]["ruler_tasks"])
    axes.set_ylim(-3, 103)
    words = f"average score of {tasks} task{'s' if tasks > 1 else ''}"
    _draw_by_length(axes, results, _lines_by_length(results, "average"), (_LENGTH, words))


def _suite(results: Sequence[Result]) -> Figure:
    """Return the figure of all tasks of one model but perplexity, which is no share."""
    lengths = lengths_of(results)
    figure = _figure(f"{results[0]['name']}: exact answers in %", 2.4 + 0.7 * len(lengths), 3.4)
    cells = {(r["task"], row["length"]): row["hit"] for r in results for row in r["lengths"]}
    _draw_map(figure.subplots(), cells, {r["task"]: r["task"] for r in results}, results)
    return figure


def _height(results: Sequence[Result]) -> float:
    """Return inches that leave room for the rows of a map."""
    return 3.3 + 0.19 * max(0, max(len(_place_rows(result)) for result in results) - 11)


def _figure(title: str, width: float, height: float) -> Figure:
    """Return an empty figure of ``width`` x ``height`` inches."""
    require_matplotlib()
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(h_pad=0.08, w_pad=0.08, wspace=0.06)
    figure = Figure((width, height), dpi=180, layout=layout, facecolor="white")
    figure.suptitle(title, x=0.012, ha="left", fontsize=NORMAL + 1, color=INK, weight="bold")
    return figure


def _accuracy(axes: Axes, results: Sequence[Result]) -> None:
    _percent_axis(axes)
    lines = _lines_by_length(results, *_HITS)
    _draw_by_length(axes, results, lines, (_LENGTH, "exact answers (95 % intervals)"))


def _lines_by_length(results: Sequence[Result], *keys: str) -> list[ChartLine]:
    """Return a line per run of a value and its interval, named where there are several runs."""
    names = [result["name"] if len(results) > 1 else "" for result in results]
    pairs = zip(names, results, strict=True)
    return [line_of(name, result["lengths"], "length", *keys) for name, result in pairs]


def _draw_by_length(
    axes: Axes,
    results: Sequence[Result],
    lines: Sequence[ChartLine],
    labels: tuple[str, str],
    window: str = "window {}",
    logarithmic: bool = False,
) -> None:
    draw_lines(axes, lines)
    style(axes, *labels)
    if logarithmic:
        logarithmic_y(axes)
    length_axis(axes, results, window)
    name_lines(axes, lines)


def _percent_axis(axes: Axes) -> None:
    axes.set_ylim(-0.03, 1.03)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])


def _lengths_and_places(figure: Figure, results: Sequence[Result]) -> Figure:
    """Draw accuracy by length, and by place: a map of all lengths of a run, or a line per run."""
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


def _places(result: Result, named: bool) -> ChartLine:
    """Return accuracy by place; over several lengths their mean, without intervals.

    Lengths are not drawn at random: an interval over them would mean nothing.
    """
    name, rows = result["name"] if named else "", result["places"]
    if len(lengths_of([result])) == 1:
        return line_of(name, rows, "where", *_HITS)
    places = sorted({row["where"] for row in rows})
    hits = [[row["hit"] for row in rows if row["where"] == where] for where in places]
    return ChartLine(name, places, [sum(found) / len(found) for found in hits])


def _depths(title: str, results: Sequence[Result]) -> Figure:
    """Draw depth by length, one map per run, in rows that fit a page."""
    count, width = len(results), 1.6 + 0.62 * len(lengths_of(results))
    rows = math.ceil(count / max(1, int(_PAGE / width)))
    columns = math.ceil(count / rows)
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


def _place_map(axes: Axes, result: Result, ylabel: str) -> None:
    cells = {(row["where"], row["length"]): row["hit"] for row in result["places"]}
    _draw_map(axes, cells, {at: f"{100 * at:.0f} %" for at in _place_rows(result)}, [result])
    axes.set_ylabel(ylabel, fontsize=NORMAL, color=MUTED)


def _draw_map(
    axes: Axes,
    cells: dict[tuple[Any, int], float],
    rows: dict[Any, str],
    results: Sequence[Result],
) -> None:
    """Draw shares by row and length; ``rows`` has the name of each."""
    lengths = lengths_of(results)
    shares = [[cells.get((row, length), np.nan) for length in lengths] for row in rows]
    heat_map(axes, np.array(shares), list(map(short, lengths)), list(rows.values()))
    axes.set_xlabel(_LENGTH, fontsize=NORMAL, color=MUTED)
    mark_window(axes, lengths, results[0]["window"])


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


def _draw_perplexity(figure: Figure, results: Sequence[Result], window: str) -> None:
    """Draw two panels: by length; and by position for one run, as ratios for several.

    Args:
        window: what is written beside the line at a model's window.
    """
    left, right = figure.subplots(1, 2)
    if len(results) > 1:
        lines, words = _lines_by_length(results, "perplexity"), "perplexity"
        ratios = [ratio_line(results[0], result) for result in results]
        ratio = f"perplexity / {results[0]['name']}'s\n(95 % intervals, same documents)"
        _draw_by_length(right, results, ratios, (_CONTEXT, ratio), window)
    else:
        lines = [change_line(results[0])]
        first = short(int(lines[0].x[0]))
        words = f"perplexity\n(95 % intervals of the change from {first})"
        _positions(right, results[0])
    _draw_by_length(left, results, lines, (_CONTEXT, words), window, logarithmic=True)


def _draw_longppl(figure: Figure, results: Sequence[Result], window: str) -> None:
    """Draw two panels by length: of key tokens, and of all tokens of the same documents."""
    panels = {
        "LongPPL: perplexity of key tokens": ("longppl", "longppl_low", "longppl_high"),
        "perplexity of all tokens": ("perplexity", "low", "high"),
    }
    for axes, (words, keys) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        # Intervals over documents of several models would say that none differ: see the top.
        lines = _lines_by_length(results, *(keys if len(results) == 1 else keys[:1]))
        words += "\n(95 % intervals over documents)" if len(results) == 1 else ""
        _draw_by_length(axes, results, lines, (_CONTEXT, words), window, logarithmic=True)


def ratio_line(first: Result, result: Result) -> ChartLine:
    """Return perplexities over those of ``first``, at the lengths that both have."""
    wanted = {row["length"]: row["document_nll"] for row in first["lengths"]}
    rows = [row for row in result["lengths"] if row["length"] in wanted]
    ratios = [paired_ratio(row["document_nll"], wanted[row["length"]]) for row in rows]
    return ChartLine(result["name"], [row["length"] for row in rows], *_columns(ratios))


def change_line(result: Result) -> ChartLine:
    """Return perplexities, with intervals of their change from that of the shortest length."""
    rows = result["lengths"]
    first = rows[0]
    ratios = [paired_ratio(row["document_nll"], first["document_nll"]) for row in rows]
    y, low, high = _columns(ratios, first["perplexity"])
    return ChartLine("", [row["length"] for row in rows], y, low, high)


def paired_ratio(own: list[float], other: list[float]) -> tuple[float, float | None, float | None]:
    """Return a ratio of perplexities over the same documents, and Student's interval of it.

    Args:
        own, other: nats per target of each document; all documents have as many targets.

    Returns:
        the ratio; the ends of the interval, None for one document and for equal values.
    """
    differences = [a - b for a, b in zip(own, other, strict=True)]
    ratio = perplexity_of(sum(differences) / len(differences))
    return ratio, *(perplexity_interval(differences) if any(differences) else (None, None))


def _columns(ratios: Sequence[tuple[float | None, ...]], scale: float = 1) -> list[list[Any]]:
    return [
        [None if value is None else scale * value for value in column]
        for column in zip(*ratios, strict=True)
    ]


def _positions(axes: Axes, result: Result) -> None:
    """Draw perplexity by position, one line per length; a bucket stands at its geometric middle."""
    lines = []
    for length in lengths_of([result]):
        rows = [row for row in result["positions"] if row["length"] == length]
        middles = [math.sqrt(max(row["from"], row["to"] / 4) * row["to"]) for row in rows]
        lines.append(ChartLine(short(length), middles, [row["perplexity"] for row in rows]))
    colors = _shades(len(lines))
    draw_lines(axes, lines, colors)
    style(axes, "position in the window (tokens)", "perplexity")
    logarithmic_y(axes)
    axes.margins(y=0.12)
    edges = sorted({row["to"] for row in result["positions"]})
    mark_lengths(axes, edges, [result["window"]], "window {}")
    axes.set_xlim(edges[0] / 2.4, edges[-1] * 1.1)
    name_lines(axes, lines, colors)


def _shades(count: int) -> list[Any]:
    """Return colours from pale to dark, for lines that have an order."""
    from matplotlib import colormaps

    return [colormaps["viridis_r"](0.15 + 0.8 * i / max(1, count - 1)) for i in range(count)]
