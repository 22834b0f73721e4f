# SPDX-License-Identifier: Apache-2.0
"""One small JSON file a run: settings, training, and every task's cases; a table of all.

python examples/study/results.py [FOLDER]    # the table, of examples/study/results
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

from variants import VARIANTS, Variant

_ITERATION = re.compile(
    r"iteration +(\d+)/.*?elapsed time per iteration \(ms\): ([\d.]+).*?lm loss: ([\dE.+-]+)"
)
_PEAK = re.compile(r"max[_ ]allocated: ([\d.]+)")


def training_record(log: Path, tokens_a_step: int) -> dict[str, Any]:
    """Return losses, rate and peak memory out of a training run's log."""
    text = log.read_text("utf-8", errors="replace")
    text = text[max(0, text.rfind("\n$ ")) :]  # the last try
    rows = [(int(i), float(ms), float(loss)) for i, ms, loss in _ITERATION.findall(text)]
    peaks = [float(found) for found in _PEAK.findall(text)]
    later = [ms for _, ms, _ in rows[1:]] or [ms for _, ms, _ in rows]
    return {
        "losses": [[i, round(loss, 4)] for i, _, loss in rows],
        "milliseconds_a_step": round(sum(later) / len(later), 1) if later else None,
        "tokens_a_second": round(tokens_a_step * 1000 * len(later) / sum(later)) if later else None,
        "peak_memory_gib": round(max(peaks) / 1024, 2) if peaks else None,
    }


def task_record(folder: Path) -> dict[str, Any]:
    """Return the results of a scored task; of cases each hit, in the order of seed and place."""
    result = json.loads((folder / "result.json").read_text("utf-8"))
    if "positions" in result:
        kept = ("perplexity", "low", "high", "targets", "document_nll")
        return {row["length"]: {key: row[key] for key in kept} for row in result["lengths"]}
    cases = [json.loads(line) for line in (folder / "cases.jsonl").read_text("utf-8").splitlines()]
    cases.sort(key=lambda c: (c["length"], c["seed"], c["haystack"], c["index"]))
    return {row["length"]: _length_record(row, cases) for row in result["lengths"]}


def _length_record(row: dict[str, Any], cases: list[dict[str, Any]]) -> dict[str, Any]:
    own = [case for case in cases if case["length"] == row["length"]]
    middle = [case["hit"] for case in own if 1 / 3 <= case["where"] <= 2 / 3]
    return {
        "cases": len(own),
        "hit": round(100 * row["hit"], 1),
        "low": round(100 * row["hit_low"], 1),
        "high": round(100 * row["hit_high"], 1),
        "middle": round(100 * sum(middle) / len(middle), 1) if middle else None,
        "tokens": round(100 * row["tokens"], 1),
        "logprob_per_token": round(row["logprob_per_token"], 4),
        "hits": "".join(str(int(case["hit"])) for case in own),
    }


def record(
    variant: Variant, settings: dict[str, Any], folder: Path, tokens_a_step: int
) -> dict[str, Any]:
    """Return all of a finished run."""
    seconds = json.loads((folder / "seconds.json").read_text("utf-8"))
    found = {"variant": dataclasses.asdict(variant), "settings": settings, "seconds": seconds}
    if variant.method is not None:
        found["training"] = training_record(folder / "train.log", tokens_a_step)
    tasks = sorted(path for path in (folder / "scores").iterdir() if path.is_dir())
    return found | {"tasks": {path.name: task_record(path) for path in tasks}}


COLUMNS = ("perplexity", "longchat-lines", "kv-retrieval", "niah-multikey", "needle", "passkey")
SHOWN = ("4096", "8192", "16384", "32768")


def table(folder: Path) -> str:
    """Return a Markdown table of the results in ``folder``, each cell by length, 4K to 32K."""
    files = {path.stem: json.loads(path.read_text("utf-8")) for path in folder.glob("*.json")}
    known = [variant.title for variant in VARIANTS if variant.title in files]
    rows = ["| " + " | ".join(("run", *COLUMNS)) + " |", "|" + "---|" * (1 + len(COLUMNS))]
    for name in known:
        cells = [_cell(task, files[name]["tasks"][task]) for task in COLUMNS]
        rows.append("| " + " | ".join((f"`{name}`", *cells)) + " |")
    return "\n".join(rows)


def _cell(task: str, lengths: dict[str, Any]) -> str:
    if task == "perplexity":
        return " ".join(f"{lengths[length]['perplexity']:.4g}" for length in SHOWN)
    return " ".join(f"{lengths[length]['hit']:.0f}" for length in SHOWN)


if __name__ == "__main__":
    print(table(Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).parent / "results"))
