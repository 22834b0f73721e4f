# SPDX-License-Identifier: Apache-2.0
"""Tables of results, and the 95 % intervals of shares and perplexities that they have."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np

from megatron_cream.evaluation.ruler import TASKS as RULER_TASKS

Records = list[dict[str, Any]]
Result = dict[str, Any]

PER_DOCUMENT = ("perplexity", "longppl")
"""Tasks that score documents; the others have cases."""


def grouped(records: Records, key: Callable[[dict[str, Any]], Any]) -> list[Records]:
    """Return records that have the same key together, by key."""
    groups: defaultdict[Any, Records] = defaultdict(list)
    for record in records:
        groups[key(record)].append(record)
    return [groups[name] for name in sorted(groups)]


def buckets(length: int) -> list[int]:
    """Return edges 0, 256, 512, 1024 .. of the ranges of positions that are told apart.

    The position of a target is the number of tokens that its window has before it, less one.
    """
    edges = [0, 256]
    while edges[-1] < length:
        edges.append(2 * edges[-1])
    return edges[:-1] + [length] if len(edges) > 2 else [0, length]


def short(tokens: int) -> str:
    """Return tokens as the names of context windows have them: 1024 are 1K."""
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else str(tokens)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Return rows, the first of which are the names of the columns."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def table(result: Result) -> str:
    """Return the table of one run."""
    title = f"{result['task']}, {result['name']}, window {short(result['window'])}"
    parts = [title, markdown(result_rows(result)), *notes([result])]
    return "\n\n".join(parts + (_ruler_notes(result) if result["task"] == "ruler" else []))


def result_rows(result: Result) -> list[list[str]]:
    """Return the table of one run; its first row names the columns."""
    if result["task"] == "ruler":
        return _ruler_rows(result)
    return _perplexity_rows(result) if result["task"] in PER_DOCUMENT else _case_rows(result)


def ruler_score(row: dict[str, Any], task: str) -> float:
    """Return the score of one of RULER's tasks at a length, 0 to 100."""
    (score,) = row["scores"][task].values()
    return score


def _ruler_rows(result: Result) -> list[list[str]]:
    tasks = result["ruler_tasks"]
    rows = [["length", *tasks, "average", "cases per task"]]
    for row in result["lengths"]:
        cells = [f"{ruler_score(row, task):.1f}" for task in tasks]
        name = length_name(result, row["length"])
        rows.append([name, *cells, f"{row['average']:.1f}", str(row["cases"])])
    return rows


def _ruler_notes(result: Result) -> list[str]:
    """Return RULER's figures over lengths, and that fewer tasks are not RULER's average."""
    increasing, decreasing = (result[f"weighted_average_{way}creasing"] for way in ("in", "de"))
    length, threshold = _effective(result), f"{result['threshold']:g}"
    notes = [
        f"wAvg (inc) {increasing:.1f}, wAvg (dec) {decreasing:.1f}, effective length {length} "
        f"(average at least {threshold})"
    ]
    if len(result["ruler_tasks"]) < len(RULER_TASKS):
        notes.append(
            f"{len(result['ruler_tasks'])} of RULER's {len(RULER_TASKS)} tasks: their averages and "
            "effective length do not stand beside those of all tasks"
        )
    return notes


def _effective(result: Result) -> str:
    length = result["effective_length"]
    return "none" if length is None else short(length)


def notes(results: Sequence[Result]) -> list[str]:
    """Return what readers of a table must know of its lengths and of its number of cases."""
    notes = []
    if any(row["length"] > result["window"] for result in results for row in result["lengths"]):
        notes.append("\\* longer than the model's window")
    if limits := {result["most_tokens"] for result in results if result.get("most_tokens")}:
        most = " or ".join(short(limit) for limit in sorted(limits))
        notes.append(f"fewer cases at a length whose haystacks would exceed {most} tokens")
    return notes


def length_name(result: Result, length: int) -> str:
    """Return a length, with a star where it is longer than the model's window."""
    return short(length) + ("\\*" if length > result["window"] else "")


def _perplexity_rows(result: Result) -> list[list[str]]:
    shown = [("perplexity", "targets", "perplexity", "low", "high", "targets")]
    if result["task"] == "longppl":
        keys = ("longppl", "longppl_low", "longppl_high", "key_targets")
        shown.insert(0, ("LongPPL", "key tokens", *keys))
    names = [word for name, *_ in shown for word in (name, "95 % interval")]
    rows = [["length", *names, "documents", *(counted for _, counted, *_ in shown)]]
    for row in result["lengths"]:
        cells = [length_name(result, row["length"])]
        for _, _, value, low, high, _ in shown:
            interval = "" if row[low] is None else f"{row[low]:.3f} to {row[high]:.3f}"
            cells += [f"{row[value]:.3f}", interval]
        rows.append([*cells, str(row["documents"]), *(str(row[count]) for *_, count in shown)])
    return rows


def _case_rows(result: Result) -> list[list[str]]:
    number = "number" in result["lengths"][0]
    names = ["length", "exact", "95 % interval", *(["first integer"] if number else [])]
    rows = [[*names, "items", "answer tokens", "log-likelihood per token", "cases", "haystacks"]]
    for row in result["lengths"]:
        cells = [length_name(result, row["length"]), percent(row["hit"])]
        cells.append(f"{percent(row['hit_low'])} to {percent(row['hit_high'])}")
        cells += [percent(row["number"])] if number else []
        cells += [percent(row["items"]), percent(row["tokens"])]
        counts = [str(row["cases"]), str(row["haystacks"])]
        rows.append([*cells, f"{row['logprob_per_token']:.2f}", *counts])
    return rows


def percent(share: float) -> str:
    """Return a share in whole percent."""
    return f"{100 * share:.0f} %"


def joined_table(results: Sequence[Result]) -> str:
    """Return ``joined_rows`` as text, with the task above it."""
    return f"{results[0]['task']}\n\n{markdown(joined_rows(results))}"


def joined_rows(results: Sequence[Result]) -> list[list[str]]:
    """Return one table of several runs of one task: a row per run, a column per length."""
    lengths = lengths_of(results)
    of_ruler = results[0]["task"] == "ruler"
    rows = [["model", *map(short, lengths), *(["effective length"] if of_ruler else [])]]
    for result in results:
        effective = [_effective(result)] if of_ruler else []
        rows.append([result["name"], *_cells(result, lengths), *effective])
    return rows


def suite_table(results: Sequence[Result]) -> str:
    """Return one table of several tasks of one model: a row per task, a column per length.

    The last column has the number of cases, or of documents, at each length.
    """
    lengths = lengths_of(results)
    rows = [["task", *(length_name(results[0], length) for length in lengths), "cases"]]
    rows += [[one["task"], *_cells(one, lengths), _counts(one)] for one in results]
    return "\n\n".join([markdown(rows), *notes(results)])


def format_results(results: Sequence[Result]) -> str:
    """Return the table of every task of a model, and one of all if there are several."""
    tables = [table(result) for result in results]
    return "\n\n".join(tables + [suite_table(results)] * (len(results) > 1))


def lengths_of(results: Sequence[Result]) -> list[int]:
    """Return the lengths of runs, shortest first."""
    return sorted({row["length"] for result in results for row in result["lengths"]})


def _counts(result: Result) -> str:
    """Return the number of cases or documents, by length where lengths differ in it."""
    key = "documents" if result["task"] in PER_DOCUMENT else "cases"
    counts = [row[key] for row in result["lengths"]]
    return ", ".join(map(str, counts if len(set(counts)) > 1 else counts[:1]))


def _cells(result: Result, lengths: Sequence[int]) -> list[str]:
    """Return what a run has at each length; nothing where it has none."""
    cells = dict.fromkeys(lengths, "")
    for row in result["lengths"]:
        if result["task"] == "perplexity":
            cells[row["length"]] = f"{row['perplexity']:.2f}"
        elif result["task"] == "longppl":
            cells[row["length"]] = f"{row['longppl']:.2f} ({row['perplexity']:.2f})"
        elif result["task"] == "ruler":
            cells[row["length"]] = f"{row['average']:.1f}"
        else:
            cells[row["length"]] = f"{percent(row['hit'])} ({row['logprob_per_token']:.2f})"
    return list(cells.values())


_NORMAL = 1.959964
# Student's t at 97.5 % for 1 .. 30 degrees of freedom.
_T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)

_LARGEST = 709.0  # exp of more is no float


def perplexity_of(nll: float) -> float:
    """Return ``exp(nll)``, infinite where a broken model's is more than a float holds."""
    return math.exp(nll) if nll < _LARGEST or math.isnan(nll) else math.inf


def wilson(share: float, count: float) -> tuple[float, float]:
    """Return Wilson's interval (1927) of a share seen in ``count`` independent cases."""
    z2 = _NORMAL**2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = _NORMAL * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2)) / (1 + z2 / count)
    return max(0.0, middle - half), min(1.0, middle + half)


def effective_count(values: Sequence[float], groups: Sequence[Hashable]) -> float:
    """Return how many independent cases ``values`` are worth.

    Cases that share a haystack succeed and fail together. Their number is divided by the design
    effect: the variance of the mean with whole groups for units, over that of independent cases.
    It is never below the number of groups, nor above that of cases.
    """
    array = np.asarray(values, dtype=float)
    names = sorted(set(groups), key=str)
    spread = float(array.var())
    if len(names) < 2 or spread == 0:
        return float(len(array))
    residuals = array - array.mean()
    member = np.array([names.index(group) for group in groups])
    sums = np.bincount(member, residuals)
    clustered = (sums**2).sum() / len(array) ** 2 * len(names) / (len(names) - 1)
    effect = clustered / (spread / len(array))
    return float(min(len(array), max(len(names), len(array) / effect))) if effect else len(array)


def t_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return Student's interval of the mean; NaN for one value."""
    count = len(values)
    if count < 2:
        return math.nan, math.nan
    degrees = count - 1
    t = _T[degrees - 1] if degrees <= len(_T) else _NORMAL + 2.45 / degrees
    half = t * float(np.std(values, ddof=1)) / math.sqrt(count)
    mean = float(np.mean(values))
    return mean - half, mean + half


def perplexity_interval(nll: Sequence[float]) -> tuple[float | None, float | None]:
    """Return the ends of Student's interval of a mean in nats, as perplexities; None of one."""
    low, high = t_interval(nll)
    return (None, None) if math.isnan(low) else (perplexity_of(low), perplexity_of(high))
