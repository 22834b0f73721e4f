# SPDX-License-Identifier: Apache-2.0
"""One small JSON file per run: settings, training, and every task's cases; tables of them.

python examples/study/results.py means            # all tasks, means over training seeds
python examples/study/results.py difference A B   # what A finds more than B, with intervals
python examples/study/results.py change A B       # A before, B after
python examples/study/results.py intervals A B    # key-value, lines, several keys, with intervals
python examples/study/results.py rivals           # with 8K's records spread over 16K and 32K
python examples/study/results.py price            # perplexity within the old window
python examples/study/results.py cost             # rate of training, memory
python examples/study/results.py update docs/study.md docs/choosing.md README.md

A and B are variants without their seeds; where none is named, all that have such results.
``update`` writes the tables of pages, each below a comment: <!-- results: price A B -->.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import shlex
from collections.abc import Callable, Sequence
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
NAMES = {
    "perplexity": "perplexity of 8 other books",
    "passkey": "passkeys found, %",
    "niah-multikey": "the number of one of several keys in prose, %",
    "kv-retrieval": "one value of many in JSON, %",
    "longchat-lines": "the number of one of many lines, %",
}
LISTS = ("kv-retrieval", "longchat-lines", "niah-multikey")
Tasks = dict[str, dict[str, dict[str, Any]]]
"""Of one run: its tasks' results by length."""
Runs = dict[str, dict[int, dict[str, Any]]]
"""Whole records by variant and training seed, variants in the order of variants.py."""


def read_runs(folder: Path, names: Sequence[str] = ()) -> Runs:
    """Return the runs in ``folder``, those of ``names`` in their order where there are any.

    Raises:
        SystemExit: a name without a run.
    """
    found: Runs = {}
    for variant in VARIANTS:
        path = folder / f"{variant.title}.json"
        if path.is_file():
            run = json.loads(path.read_text("utf-8"))
            found.setdefault(variant.name, {})[variant.seed] = run
    for name in names:
        if name not in found:
            raise SystemExit(f"error: {folder} has no run of {name}")
    return {name: found[name] for name in names or found}


def means(runs: Runs) -> str:
    """Return a table of all tasks: means over training seeds, at each length."""
    lengths = {task: _four_lengths(runs) for task in COLUMNS}
    return _table(runs, {task: (task, lengths[task]) for task in COLUMNS})


def rivals(runs: Runs) -> str:
    """Return a table of what is found of many records far away, and of few records as far away."""
    columns = {
        "key-value 8K 16K 32K": ("kv-retrieval", ("8192", "16384", "32768")),
        "8K's keys over 16K 32K": ("kv-retrieval-of-8K", ("16384", "32768")),
        "lines 8K 16K 32K": ("longchat-lines", ("8192", "16384", "32768")),
        "8K's lines over 16K 32K": ("longchat-lines-of-8K", ("16384", "32768")),
    }
    return _table(runs, columns)


def price(runs: Runs) -> str:
    """Return a table of perplexities within the old window."""
    lengths = ("1024", "2048", "4096", "8192")
    return _table(runs, {"perplexity 1K 2K 4K 8K": ("perplexity", lengths)})


def cost(runs: Runs) -> str:
    """Return a table of what training took; the best rate of the seeds, as machines were shared."""
    rows = [["run", "tokens per second", "peak memory, GiB", "on"]]
    for name, seeds in runs.items():
        trained = [run for run in seeds.values() if "training" in run]
        if trained:
            best = max(trained, key=lambda run: run["training"]["tokens_a_second"])
            peak = max(run["training"]["peak_memory_gib"] for run in trained)
            rate, device = best["training"]["tokens_a_second"], best["settings"]["device"]
            rows.append([f"`{name}`", f"{rate:,}", f"{peak:.1f}", device.removeprefix("NVIDIA ")])
    return _markdown(rows)


def _four_lengths(runs: Runs) -> tuple[str, ...]:
    """Return the lengths of the retrieval tasks, which the first run decides."""
    return tuple(next(iter(next(iter(runs.values())).values()))["tasks"]["niah-multikey"])


def _table(runs: Runs, columns: dict[str, tuple[str, tuple[str, ...]]]) -> str:
    """Return a row for each variant that has all of ``columns``: heading to task and lengths."""
    rows = [["run", "seeds", *columns]]
    for name, seeds in runs.items():
        tasks = [run["tasks"] for run in seeds.values()]
        if all(_has(one, *column) for one in tasks for column in columns.values()):
            cells = [_cell(tasks, *column) for column in columns.values()]
            rows.append([f"`{name}`", str(len(seeds)), *cells])
    return _markdown(rows)


def _has(tasks: Tasks, task: str, lengths: Sequence[str]) -> bool:
    return set(lengths) <= tasks.get(task, {}).keys()


def _cell(seeds: list[Tasks], task: str, lengths: Sequence[str]) -> str:
    key, form = ("perplexity", ".4g") if task == "perplexity" else ("hit", ".0f")
    found = [np.mean([tasks[task][length][key] for tasks in seeds]) for length in lengths]
    return " ".join(f"{value:{form}}" for value in found)


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def difference(runs: Runs) -> str:
    """Return a table of what the first of two variants finds more than the second, in points.

    Both answered the same cases. Each cell has the mean over the cases and over the training seeds
    that both have, and an interval of 95 % of 10,000 bootstrap draws of cases and of seeds: with
    two or three seeds, one that is too narrow for what a further seed may do.

    Raises:
        SystemExit: they are not two, or have no training seed in common.
    """
    if len(runs) != 2:
        raise SystemExit("error: a difference is that of two variants")
    one, other = runs.values()
    seeds = sorted(one.keys() & other.keys())
    if not seeds:
        raise SystemExit(f"error: no seed of both {' and '.join(runs)}")
    rows = [["task", *map(_short, _four_lengths(runs))]]
    for task in COLUMNS[1:]:
        points = [
            np.stack([_hits(one[s], task, n) - _hits(other[s], task, n) for s in seeds])
            for n in _four_lengths(runs)
        ]
        rows.append([task, *(_interval(found, "+.0f") for found in points)])
    return _markdown(rows)


def change(runs: Runs) -> str:
    """Return a table of what the second of two variants can do where the first could do less."""
    before, after = ([run["tasks"] for run in seeds.values()] for seeds in runs.values())
    lengths = _four_lengths(runs)
    rows = [["at", *map(_short, lengths)]]
    for task, name in NAMES.items():
        cells = [f"{_cell(before, task, [n])} → {_cell(after, task, [n])}" for n in lengths]
        rows.append([name, *cells])
    return _markdown(rows)


def intervals(runs: Runs) -> str:
    """Return a table of what each variant finds in the lists, in % with intervals."""
    rows = [["task", "run", "seeds", *map(_short, _four_lengths(runs))]]
    for task in LISTS:
        for name, seeds in runs.items():
            cells = [
                _interval(np.stack([_hits(run, task, n) for run in seeds.values()]), ".0f")
                for n in _four_lengths(runs)
            ]
            rows.append([task, f"`{name}`", str(len(seeds)), *cells])
    return _markdown(rows)


def _short(length: str) -> str:
    return f"{int(length) // 1024}K"


def _hits(run: dict[str, Any], task: str, length: str) -> np.ndarray:
    """Return 0 or 100 for each case: float64 ``[cases]``."""
    return 100 * np.array(list(run["tasks"][task][length]["hits"]), dtype=float)


def _interval(points: np.ndarray, form: str) -> str:
    """Return mean and interval of ``points [seeds, cases]``."""
    seeds, cases = points.shape
    rng = np.random.default_rng(0)
    # By the number of times that each is drawn: [draws, seeds] and [draws, cases].
    seed_counts = rng.multinomial(seeds, np.full(seeds, 1 / seeds), 10_000)
    case_counts = rng.multinomial(cases, np.full(cases, 1 / cases), 10_000)
    drawn = np.einsum("ds,dc,sc->d", seed_counts, case_counts, points) / points.size
    low, high = np.quantile(drawn, (0.025, 0.975))
    return f"{points.mean():{form}} [{low:{form}}, {high:{form}}]"


KINDS: dict[str, Callable[[Runs], str]] = {
    kind.__name__: kind for kind in (means, difference, change, intervals, rivals, price, cost)
}
_TABLE = re.compile(r"(<!-- results: (.+) -->\n)(?:\|.*\n)*")


def filled(page: str, folder: Path) -> str:
    """Return a page with its tables made again."""

    def table(found: re.Match[str]) -> str:
        kind, *names = shlex.split(found[2])
        return found[1] + KINDS[kind](read_runs(folder, names)) + "\n"

    return _TABLE.sub(table, page)


def main() -> None:
    """Print the table that the command line asks for, or write those of pages."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=(*KINDS, "update"))
    parser.add_argument("names", nargs="*", help="variants; of update pages")
    default = Path(__file__).parent / "results"
    parser.add_argument("--folder", type=Path, default=default, help="of the JSON files")
    args = parser.parse_args()
    if args.kind != "update":
        print(KINDS[args.kind](read_runs(args.folder, args.names)))
        return
    for page in map(Path, args.names):
        page.write_text(filled(page.read_text("utf-8"), args.folder), "utf-8")


if __name__ == "__main__":
    main()
