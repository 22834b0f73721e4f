# SPDX-License-Identifier: Apache-2.0
"""Finished cases and documents to results: shares with confidence intervals, perplexities."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from megatron_cream.evaluation.perplexity import buckets
from megatron_cream.evaluation.statistics import effective_count, perplexity_of, t_interval, wilson

Records = list[dict[str, Any]]


def case_results(cases: Records, places: int, number: bool, placed: bool) -> dict[str, Any]:
    """Return shares by length, and by length and place of the answer.

    Args:
        cases: ``CaseScore`` records.
        places: how many places were asked for, evenly from 0 to 1.
        number: whether the first integer is scored.
        placed: whether answers have places.
    """
    cases = sorted(cases, key=lambda c: (c["length"], c["seed"], c["haystack"], c["index"]))
    result = {"lengths": [_shares(group, number) for group in _by(cases, lambda c: c["length"])]}
    if placed:
        steps = max(1, places - 1)
        groups = _by(cases, lambda c: (c["length"], round(c["where"] * steps) / steps))
        result["places"] = [
            {"where": round(group[0]["where"] * steps) / steps, **_shares(group, number)}
            for group in groups
        ]
    return result


def _by(records: Records, key: Callable[[dict[str, Any]], Any]) -> Iterable[Records]:
    groups = defaultdict(list)
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


def _perplexity(documents: Records) -> dict[str, Any]:
    documents = sorted(documents, key=lambda d: d["document"])
    nll = [sum(d["nll"]) for d in documents]
    targets = [sum(d["targets"]) for d in documents]
    mean = sum(nll) / sum(targets)
    low, high = t_interval([n / t for n, t in zip(nll, targets, strict=True)])
    return {
        "length": documents[0]["length"],
        "perplexity": perplexity_of(mean),
        "low": perplexity_of(low) if not math.isnan(low) else None,
        "high": perplexity_of(high) if not math.isnan(high) else None,
        "nll": mean,
        "targets": sum(targets),
        "documents": len(documents),
        "document_nll": [n / t for n, t in zip(nll, targets, strict=True)],
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
