# SPDX-License-Identifier: Apache-2.0
"""Pictures of results: perplexity and accuracy by length, accuracy by place, needle heat map.

Colours are Okabe and Ito's, which stay apart for colour-blind readers; every model has a marker of
its own as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_cream.evaluation.position_plots import require_matplotlib
from megatron_cream.evaluation.tables import short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Result = dict[str, Any]

INK, MUTED = "#22303c", "#5b6773"
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
MARKERS = ("o", "s", "D", "^", "v", "P", "X")
HEAT_MAPS = ("needle", "passkey")


def draw(results: Sequence[Result], path: str | Path, window: str = "window {}") -> None:
    """Write the picture of one run, or of several of the same task, to ``path``.

    Args:
        window: what is written beside the line at a model's window.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(dpi=150, layout="constrained", facecolor="white")
    figure.get_layout_engine().set(h_pad=0.12, w_pad=0.12)
    task = results[0]["task"]
    if task == "perplexity":
        _draw_perplexity(figure, results, window)
    elif task in HEAT_MAPS:
        _draw_heat_maps(figure, results)
    elif "places" in results[0]:
        _draw_lengths_and_places(figure, results)
    else:
        figure.set_size_inches(7.2, 4.2)
        _draw_accuracy(figure.subplots(), results)
    figure.suptitle(_title(results), x=0.015, ha="left", fontsize=12, color=INK, weight="bold")
    figure.savefig(path)


def _title(results: Sequence[Result]) -> str:
    task = results[0]["task"]
    return f"{task}: {results[0]['name']}" if len(results) == 1 else task


def _style(axes: Axes, xlabel: str, ylabel: str) -> None:
    axes.set_xlabel(xlabel, fontsize=9.5, color=MUTED)
    axes.set_ylabel(ylabel, fontsize=9.5, color=MUTED)
    axes.tick_params(colors=MUTED, labelsize=9, length=3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#c5ccd3")
    axes.grid(color="#e6e9ec", linewidth=0.8)
    axes.set_axisbelow(True)


def _length_axis(axes: Axes, results: Sequence[Result], window: str = "window {}") -> None:
    lengths = sorted({row["length"] for result in results for row in result["lengths"]})
    axes.set_xscale("log", base=2)
    axes.set_xlim(lengths[0] / 1.2, lengths[-1] * 1.2)
    axes.set_xticks(lengths, [short(length) for length in lengths])
    axes.minorticks_off()
    for tokens in sorted({result["window"] for result in results}):
        if lengths[0] <= tokens < lengths[-1]:
            axes.axvline(tokens, color=MUTED, linewidth=1, linestyle=(0, (3, 3)))
            axes.annotate(
                window.format(short(tokens)), (tokens, 1), xycoords=("data", "axes fraction"),
                xytext=(4, -4), textcoords="offset points", va="top", fontsize=8.5, color=MUTED,
            )  # fmt: skip


def _line(
    axes: Axes, number: int, count: int, name: str, rows: list[dict[str, Any]], keys: Any
) -> None:
    """Draw line ``number`` of ``count``; ``keys`` name x, y and the ends of the interval of rows.

    Earlier lines are broader and intervals stand side by side, so that none hides another.
    """
    from matplotlib.transforms import ScaledTranslation

    x, y, low, high = keys
    color, extra = COLORS[number % len(COLORS)], min(3, count - 1 - number)
    axes.plot(
        [row[x] for row in rows], [row[y] for row in rows], color=color, label=name,
        marker=MARKERS[number % len(MARKERS)], markersize=6 + extra,
        linewidth=1.8 + 0.8 * extra, markeredgecolor="white", markeredgewidth=0.7,
    )  # fmt: skip
    bars = [row for row in rows if row.get(low) is not None]
    if bars:
        points = 2.5 * (number - (count - 1) / 2)
        aside = ScaledTranslation(points / 72, 0, axes.figure.dpi_scale_trans)
        axes.vlines(
            [row[x] for row in bars], [row[low] for row in bars], [row[high] for row in bars],
            color=color, linewidth=1.2, alpha=0.7, transform=axes.transData + aside,
        )  # fmt: skip
        # A shifted transform keeps the axes from making room by themselves.
        axes.update_datalim([(row[x], row[end]) for row in bars for end in (low, high)])
        axes.autoscale_view()


def _legend(axes: Axes, results: Sequence[Result]) -> None:
    if len(results) > 1:
        axes.legend(frameon=False, fontsize=9, labelcolor=INK)


def _draw_perplexity(figure: Figure, results: Sequence[Result], window: str) -> None:
    figure.set_size_inches(7.2, 4.4)
    axes = figure.subplots()
    for number, result in enumerate(results):
        keys = ("length", "perplexity", "low", "high")
        _line(axes, number, len(results), result["name"], result["lengths"], keys)
    _style(axes, "context length in tokens", "perplexity (95 % intervals over documents)")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.tick_params(axis="y", which="minor", labelsize=7.5, colors=MUTED)
    axes.grid(which="minor", axis="y", color="#f1f3f5", linewidth=0.6)
    _length_axis(axes, results, window)
    axes.yaxis.set_minor_locator(_minor_locator())
    _legend(axes, results)


def _minor_locator() -> Any:
    from matplotlib.ticker import LogLocator

    return LogLocator(subs=(2, 3, 5, 7))


def _draw_accuracy(axes: Axes, results: Sequence[Result]) -> None:
    for number, result in enumerate(results):
        keys = ("length", "hit", "hit_low", "hit_high")
        _line(axes, number, len(results), result["name"], result["lengths"], keys)
    _style(axes, "length of a case in tokens", "exact answers (95 % intervals)")
    _percent_axis(axes)
    _length_axis(axes, results)
    _legend(axes, results)


def _percent_axis(axes: Axes) -> None:
    axes.set_ylim(-0.03, 1.03)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])


def _draw_lengths_and_places(figure: Figure, results: Sequence[Result]) -> None:
    """Accuracy by length, and by place: all lengths of one run, or all runs over all lengths."""
    figure.set_size_inches(10.5, 4.4)
    left, right = figure.subplots(1, 2)
    _draw_accuracy(left, results)
    if len(results) == 1:
        lines = _places_by_length(results[0])
    else:
        lines = {result["name"]: _places_pooled(result) for result in results}
    for number, (name, rows) in enumerate(lines.items()):
        keys = ("where", "hit", "hit_low", "hit_high")
        _line(right, number, len(lines), name, rows, keys)
    right.axvspan(1 / 3, 2 / 3, color="#f1e9d2", alpha=0.7, zorder=0, linewidth=0)
    right.annotate(
        "middle third", (0.5, 0.985), xycoords=("data", "axes fraction"), ha="center", va="top",
        fontsize=8.5, color=MUTED,
    )  # fmt: skip
    _style(right, "place of the answer in the context", "exact answers (95 % intervals)")
    right.set_xticks([0, 0.25, 0.5, 0.75, 1], ["beginning", "25 %", "50 %", "75 %", "end"])
    _percent_axis(right)
    right.legend(
        frameon=False, fontsize=8.5, labelcolor=INK, ncols=6, loc="lower left",
        bbox_to_anchor=(0, 1), borderaxespad=0.2, handlelength=1.4, columnspacing=1.2,
    )  # fmt: skip


def _places_by_length(result: Result) -> dict[str, list[dict[str, Any]]]:
    lengths = sorted({row["length"] for row in result["places"]})
    return {
        short(length): [row for row in result["places"] if row["length"] == length]
        for length in lengths
    }


def _places_pooled(result: Result) -> list[dict[str, Any]]:
    """Mean over lengths, without intervals: lengths are not drawn at random."""
    places = sorted({row["where"] for row in result["places"]})
    pooled = []
    for where in places:
        hits = [row["hit"] for row in result["places"] if row["where"] == where]
        pooled.append({"where": where, "hit": sum(hits) / len(hits)})
    return pooled


def _draw_heat_maps(figure: Figure, results: Sequence[Result]) -> None:
    """Place by length, one map a run; each cell has its share written in it."""
    figure.set_size_inches(1.6 + 5.2 * len(results), 4.4)
    maps = figure.subplots(1, len(results), squeeze=False)[0]
    for axes, result in zip(maps, results, strict=True):
        image = _heat_map(axes, result)
        if len(results) > 1:
            axes.set_title(result["name"], loc="left", fontsize=10.5, color=INK)
    bar = figure.colorbar(image, ax=list(maps), shrink=0.9, aspect=30)
    bar.set_ticks([0, 0.5, 1], labels=["0 %", "50 %", "100 %"])
    bar.ax.tick_params(labelsize=9, colors=MUTED)
    cases = {row["cases"] for result in results for row in result["places"]}
    each = "/".join(map(str, sorted(cases)))
    bar.set_label(f"exact answers (cases a cell: {each})", fontsize=9.5, color=MUTED)
    bar.outline.set_visible(False)


def _heat_map(axes: Axes, result: Result) -> Any:
    import numpy as np

    lengths = sorted({row["length"] for row in result["places"]})
    places = sorted({row["where"] for row in result["places"]})
    shares = np.full((len(places), len(lengths)), np.nan)
    for row in result["places"]:
        shares[places.index(row["where"]), lengths.index(row["length"])] = row["hit"]
    image = axes.imshow(shares, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    for (i, j), share in np.ndenumerate(shares):
        if not np.isnan(share):
            axes.text(
                j, i, f"{100 * share:.0f}", ha="center", va="center", fontsize=9,
                color="black" if share > 0.55 else "white",
            )  # fmt: skip
    axes.set_xticks(range(len(lengths)), [short(length) for length in lengths])
    axes.set_yticks(range(len(places)), [f"{100 * place:.0f} %" for place in places])
    axes.set_xlabel("length of a case in tokens", fontsize=9.5, color=MUTED)
    axes.set_ylabel("depth of the needle", fontsize=9.5, color=MUTED)
    axes.tick_params(colors=MUTED, labelsize=9, length=0)
    axes.spines[:].set_visible(False)
    _mark_window(axes, lengths, result["window"])
    return image


def _mark_window(axes: Axes, lengths: list[int], window: int) -> None:
    inside = sum(length <= window for length in lengths)
    if 0 < inside < len(lengths):
        axes.axvline(inside - 0.5, color="white", linewidth=3)
        axes.axvline(inside - 0.5, color="#d55e00", linewidth=1.5, linestyle=(0, (4, 2)))
        axes.annotate(
            f"window {short(window)}", (inside - 0.5, 1), xycoords=("data", "axes fraction"),
            xytext=(0, 3), textcoords="offset points", ha="center", fontsize=8.5, color="#b34700",
        )  # fmt: skip
