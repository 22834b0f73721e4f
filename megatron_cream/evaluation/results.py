# SPDX-License-Identifier: Apache-2.0
"""Finished cases and documents to results: shares, perplexities, 95 % intervals, and tables."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from megatron_cream.evaluation.intervals import (
    effective_count,
    perplexity_interval,
    perplexity_of,
    wilson,
)
from megatron_cream.evaluation.ruler import TASKS as RULER_TASKS

Records = list[dict[str, Any]]
Result = dict[str, Any]

PER_DOCUMENT = ("perplexity", "longppl")
"""Tasks that score documents; the others have cases."""


def case_results(cases: Records, places: int, number: bool, placed: bool) -> dict[str, Any]:
    """Return shares by length, and by length and place of the answer.

    Args:
        cases: ``CaseScore`` records.
        places: how many places were asked for, evenly from 0 to 1.
        number: whether the first integer is scored.
        placed: whether answers have places.
    """
    cases = sorted(cases, key=lambda c: (c["length"], c["seed"], c["haystack"], c["index"]))
    result: Result = {
        "lengths": [_shares(group, number) for group in _by(cases, lambda c: c["length"])]
    }
    if placed:
        steps = max(1, places - 1)
        groups = _by(cases, lambda c: (c["length"], round(c["where"] * steps) / steps))
        result["places"] = [
            {"where": round(group[0]["where"] * steps) / steps, **_shares(group, number)}
            for group in groups
        ]
    return result


def _by(records: Records, key: Callable[[dict[str, Any]], Any]) -> list[Records]:
    groups: defaultdict[Any, Records] = defaultdict(list)
    for record in records:
        groups[key(record)].append(record)
    return [groups[name] for name in sorted(groups)]


def _shares(cases: Records, number: bool) -> dict[str, Any]:
    hits = [case["hit"] for case in cases]
    share = sum(hits) / len(hits)
    independent = effective_count(hits, [(case["seed"], case["haystack"]) for case in cases])
    low, high = wilson(share, independent)
    found = {
        "length": cases[0]["length"],
        "cases": len(cases),
        "haystacks": len({(case["seed"], case["haystack"]) for case in cases}),
        "hit": share,
        "hit_low": low,
        "hit_high": high,
        "independent_cases": round(independent, 1),
        "items": float(np.mean([case["items"] for case in cases])),
        "tokens": float(np.mean([case["tokens"] for case in cases])),
        "logprob": float(np.mean([case["logprob"] for case in cases])),
        "logprob_per_token": sum(case["logprob"] for case in cases)
        / sum(case["answer_tokens"] for case in cases),
    }
    if number:
        found["number"] = float(np.mean([case["number"] for case in cases]))
    return found


def perplexity_results(documents: Records) -> dict[str, Any]:
    """Return perplexity by length, and by length and position in the window.

    Args:
        documents: ``DocumentScore`` records.
    """
    groups = _by(documents, lambda d: d["length"])
    return {
        "lengths": [_perplexity(group) for group in groups],
        "positions": [row for group in groups for row in _positions(group)],
    }


def longppl_results(documents: Records) -> dict[str, Any]:
    """Return LongPPL by length beside what ``perplexity_results`` has.

    Args:
        documents: ``DocumentScore`` records with key tokens.
    """
    found = perplexity_results(documents)
    groups = _by(documents, lambda d: d["length"])
    found["lengths"] = [row | _key(own) for row, own in zip(found["lengths"], groups, strict=True)]
    return found


def _key(documents: Records) -> dict[str, Any]:
    """Return LongPPL of one length, over the key tokens of all documents together.

    Documents have unequal numbers of them: the interval is that of a ratio of two sums.
    """
    documents = sorted(documents, key=lambda d: d["document"])
    nll = np.array([d["key_nll"] for d in documents])
    targets = np.array([d["key_targets"] for d in documents])
    mean = float(nll.sum() / targets.sum())
    low, high = perplexity_interval((mean + (nll - mean * targets) / targets.mean()).tolist())
    return {
        "longppl": perplexity_of(mean),
        "longppl_low": low,
        "longppl_high": high,
        "key_targets": int(targets.sum()),
        "document_key_nll": nll.tolist(),
        "document_key_targets": targets.tolist(),
    }


def _perplexity(documents: Records) -> dict[str, Any]:
    documents = sorted(documents, key=lambda d: d["document"])
    nll = [sum(d["nll"]) for d in documents]
    targets = [sum(d["targets"]) for d in documents]
    mean = sum(nll) / sum(targets)
    per_target = [n / t for n, t in zip(nll, targets, strict=True)]
    low, high = perplexity_interval(per_target)
    return {
        "length": documents[0]["length"],
        "perplexity": perplexity_of(mean),
        "low": low,
        "high": high,
        "nll": mean,
        "targets": sum(targets),
        "documents": len(documents),
        "document_nll": per_target,
    }


def _positions(documents: Records) -> Records:
    length = documents[0]["length"]
    edges = buckets(length)
    nll = np.sum([d["nll"] for d in documents], axis=0)
    targets = np.sum([d["targets"] for d in documents], axis=0)
    rows = zip(edges, edges[1:], nll, targets, strict=False)
    return [
        {
            "length": length,
            "from": first,
            "to": end,
            "perplexity": perplexity_of(total / count),
            "targets": int(count),
        }
        for first, end, total, count in rows
        if count
    ]


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
