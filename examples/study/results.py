# SPDX-License-Identifier: Apache-2.0
"""One small JSON file per run: settings, training, and every task's cases; tables of them.

python examples/study/results.py                   # the table of examples/study/results
python examples/study/results.py --difference A B  # what A finds more than B, with intervals
python examples/study/results.py --rivals          # with 8K's records spread over 16K and 32K
python examples/study/results.py --price           # perplexity within the old window
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
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
        kept = {"perplexity", "low", "high", "targets", "document_nll", "longppl", "key_targets"}
        rows = result["lengths"]
        return {row["length"]: {k: v for k, v in row.items() if k in kept} for row in rows}
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
    return _table(folder, {task: (task, SHOWN) for task in COLUMNS})


def rivals(folder: Path) -> str:
    """Return a table of what is found of many records far away, and of few records as far away."""
    columns = {
        "lines 8K 16K 32K": ("longchat-lines", SHOWN[1:]),
        "8K's lines over 16K 32K": ("longchat-lines-of-8K", SHOWN[2:]),
        "key-value 8K 16K 32K": ("kv-retrieval", SHOWN[1:]),
        "8K's keys over 16K 32K": ("kv-retrieval-of-8K", SHOWN[2:]),
    }
    return _table(folder, columns)


def price(folder: Path) -> str:
    """Return a table of perplexities within the old window."""
    lengths = ("1024", "2048", "4096", "8192")
    return _table(folder, {"perplexity 1K 2K 4K 8K": ("perplexity", lengths)})


def _table(folder: Path, columns: dict[str, tuple[str, tuple[str, ...]]]) -> str:
    """Return a row for each run that has all of ``columns``: heading to task and lengths."""
    files = {path.stem: json.loads(path.read_text("utf-8")) for path in folder.glob("*.json")}
    rows = ["| " + " | ".join(("run", *columns)) + " |", "|" + "---|" * (1 + len(columns))]
    for name in (variant.title for variant in VARIANTS if variant.title in files):
        tasks = files[name]["tasks"]
        if all(set(lengths) <= tasks.get(task, {}).keys() for task, lengths in columns.values()):
            cells = [_cell(task, tasks[task], lengths) for task, lengths in columns.values()]
            rows.append("| " + " | ".join((f"`{name}`", *cells)) + " |")
    return "\n".join(rows)


def _cell(task: str, rows: dict[str, Any], lengths: tuple[str, ...]) -> str:
    if task == "perplexity":
        return " ".join(f"{rows[length]['perplexity']:.4g}" for length in lengths)
    return " ".join(f"{rows[length]['hit']:.0f}" for length in lengths)


def difference(folder: Path, one: str, other: str) -> str:
    """Return a Markdown table of what variant ``one`` finds more than ``other``, in points.

    Both answered the same cases. Each cell has the mean over the cases and over the training seeds
    that both have, and an interval of 95 % of 10,000 bootstrap draws of cases and of seeds: with
    two or three seeds, one that is too narrow for what a further seed may do.

    Raises:
        SystemExit: they have no training seed in common.
    """
    pairs = _pairs(folder, one, other)
    if not pairs:
        raise SystemExit(f"error: {folder} has no seed of both {one} and {other}")
    head = ("task", *(f"{int(length) // 1024}K" for length in SHOWN))
    rows = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for task in COLUMNS[1:]:
        cells = [_interval(np.stack([_points(a, b, task, n) for a, b in pairs])) for n in SHOWN]
        rows.append("| " + " | ".join((task, *cells)) + " |")
    return "\n".join(rows)


def _pairs(folder: Path, one: str, other: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    found = [json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("*.json"))]
    runs = {(run["variant"]["name"], run["variant"]["seed"]): run["tasks"] for run in found}
    seeds = sorted(seed for name, seed in runs if name == one and (other, seed) in runs)
    return [(runs[one, seed], runs[other, seed]) for seed in seeds]


def _points(one: dict[str, Any], other: dict[str, Any], task: str, length: str) -> np.ndarray:
    """Return -100, 0 or 100 for each case: float64 ``[cases]``."""
    hits = [np.array(list(run[task][length]["hits"]), dtype=float) for run in (one, other)]
    return 100 * (hits[0] - hits[1])


def _interval(points: np.ndarray) -> str:
    """Return mean and interval of ``points [seeds, cases]``."""
    seeds, cases = points.shape
    rng = np.random.default_rng(0)
    # By the number of times that each is drawn: [draws, seeds] and [draws, cases].
    seed_counts = rng.multinomial(seeds, np.full(seeds, 1 / seeds), 10_000)
    case_counts = rng.multinomial(cases, np.full(cases, 1 / cases), 10_000)
    means = np.einsum("ds,dc,sc->d", seed_counts, case_counts, points) / points.size
    low, high = np.quantile(means, (0.025, 0.975))
    return f"{points.mean():+.0f} [{low:+.0f}, {high:+.0f}]"


def main() -> None:
    """Print the table that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(__file__).parent / "results"
    parser.add_argument("folder", nargs="?", type=Path, default=default)
    parser.add_argument("--difference", nargs=2, metavar=("A", "B"), help="names without seeds")
    for kind in (rivals, price):
        parser.add_argument(f"--{kind.__name__}", dest="kind", action="store_const", const=kind)
    args = parser.parse_args()
    if args.difference:
        print(difference(args.folder, *args.difference))
    else:
        print((args.kind or table)(args.folder))


if __name__ == "__main__":
    main()
