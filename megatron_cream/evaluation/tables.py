# SPDX-License-Identifier: Apache-2.0
"""Results as Markdown tables, of one run or of several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Result = dict[str, Any]


def short(tokens: int) -> str:
    """1024 tokens are 1K, as in the names of context windows."""
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else str(tokens)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Return rows, the first of which are the names of the columns."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def table(result: Result) -> str:
    """Return the table of one run."""
    title = f"{result['task']}, {result['name']}, window {short(result['window'])}"
    rows = _perplexity_rows(result) if result["task"] == "perplexity" else _case_rows(result)
    return f"{title}\n\n{markdown(rows)}{_notes([result])}"


def _notes(results: Sequence[Result]) -> str:
    """Return what readers of a table must know of its lengths and of its number of cases."""
    notes = []
    if any(row["length"] > result["window"] for result in results for row in result["lengths"]):
        notes.append("\\* longer than the window that the model was extended to")
    if limits := {result["most_tokens"] for result in results if result.get("most_tokens")}:
        most = " or ".join(short(limit) for limit in sorted(limits))
        notes.append(f"fewer cases at a length whose haystacks would exceed {most} tokens")
    return "".join(f"\n\n{note}" for note in notes)


def length_name(result: Result, length: int) -> str:
    """Return a length, with a star where it is longer than the model's window."""
    return short(length) + ("\\*" if length > result["window"] else "")


def _perplexity_rows(result: Result) -> list[list[str]]:
    rows = [["length", "perplexity", "95 % interval", "documents", "targets"]]
    for row in result["lengths"]:
        interval = "" if row["low"] is None else f"{row['low']:.3f} to {row['high']:.3f}"
        counts = [str(row["documents"]), str(row["targets"])]
        name = length_name(result, row["length"])
        rows.append([name, f"{row['perplexity']:.3f}", interval, *counts])
    return rows


def _case_rows(result: Result) -> list[list[str]]:
    number = "number" in result["lengths"][0]
    names = ["length", "exact", "95 % interval", *(["first integer"] if number else [])]
    rows = [[*names, "items", "answer tokens", "log-likelihood a token", "cases", "haystacks"]]
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
    """Return one table of several runs of one task: a row a run, a column a length."""
    cell = _perplexity_cell if results[0]["task"] == "perplexity" else _case_cell
    lengths = sorted({row["length"] for result in results for row in result["lengths"]})
    rows = [["model", *map(short, lengths)]]
    for result in results:
        found = {row["length"]: row for row in result["lengths"]}
        rows.append([result["name"], *(_cell(cell, found.get(length)) for length in lengths)])
    return f"{results[0]['task']}\n\n{markdown(rows)}"


def suite_table(results: Sequence[Result]) -> str:
    """Return one table of several tasks of one model: a row a task, a column a length.

    The last column has the number of cases, or of documents, at each length.
    """
    lengths = sorted({row["length"] for result in results for row in result["lengths"]})
    rows = [["task", *(length_name(results[0], length) for length in lengths), "cases"]]
    for result in results:
        cell = _perplexity_cell if result["task"] == "perplexity" else _case_cell
        found = {row["length"]: row for row in result["lengths"]}
        cells = [_cell(cell, found.get(length)) for length in lengths]
        rows.append([result["task"], *cells, _counts(result)])
    return markdown(rows) + _notes(results)


def _counts(result: Result) -> str:
    """Return the number of cases or documents, by length where lengths differ in it."""
    key = "documents" if result["task"] == "perplexity" else "cases"
    counts = [row[key] for row in result["lengths"]]
    return ", ".join(map(str, counts if len(set(counts)) > 1 else counts[:1]))


def _cell(cell: Callable[[dict[str, Any]], str], row: dict[str, Any] | None) -> str:
    return "" if row is None else cell(row)


def _perplexity_cell(row: dict[str, Any]) -> str:
    return f"{row['perplexity']:.2f}"


def _case_cell(row: dict[str, Any]) -> str:
    return f"{percent(row['hit'])} ({row['logprob_per_token']:.2f})"
