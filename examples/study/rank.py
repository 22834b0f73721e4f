# SPDX-License-Identifier: Apache-2.0
"""Does LongPPL rank extended models as their retrieval does? And does perplexity?

    python examples/study/rank.py WORK/*/extended --judge WORK/BEST/extended \\
        --judge-short MODEL --data books/validation --output runs/rank

Every model is scored on the same key tokens, which one judge names (best one that is not among the
models). Retrieval is the mean share of exact answers over the tasks and lengths that all runs have
in common, out of --results or, for a run that is not there, out of its own ``scores`` folder. The
figures are Spearman's rank correlations of minus (Long)PPL and retrieval at one length: 1 is the
same order. A stopped run goes on when it is started again.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from results import COLUMNS, task_record

from megatron_cream.errors import UserError, one_line_errors
from megatron_cream.evaluation.evaluate import evaluate
from megatron_cream.evaluation.evaluation_settings import EvaluationSettings
from megatron_cream.options import parse_length

RETRIEVAL = COLUMNS[1:]


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("models", nargs="+", type=Path, help="Hugging Face folders RUN/extended, at least three")
    add("--judge", type=Path, required=True, help="of --judge of evaluate longppl")
    add("--judge-short", type=Path, help="likewise")
    add("--data", required=True, help="held-out text")
    add("--documents", type=int, default=8, help="of it (default: 8)")
    add("--lengths", nargs="+", type=parse_length, default=[8192, 16384, 32768], metavar="LENGTH")
    add("--dtype", default="bfloat16", help="of the weights (default: bfloat16)")
    add("--batch-tokens", type=int, default=81920, help="most tokens in a pass (default: 81920)")
    default = Path(__file__).parent / "results"
    add("--results", type=Path, default=default, help="the study's files (default: its own)")
    add("--output", type=Path, required=True, help="folder for what is scored")
    return parser.parse_args()


def retrieval(run: Path, results: Path) -> dict[tuple[str, str], float]:
    """Return percent of exact answers by task and length (a string).

    Raises:
        UserError: the run is neither in the results nor scored.
    """
    kept, own = results / f"{run.name}.json", run / "scores"
    tasks: dict[str, Any]
    if kept.is_file():
        tasks = json.loads(kept.read_text("utf-8"))["tasks"]
    elif own.is_dir():
        tasks = {name: task_record(own / name) for name in RETRIEVAL if (own / name).is_dir()}
    else:
        raise UserError(f"{run}: there is neither {kept} nor {own}, so its retrieval is not known")
    return {
        (name, str(length)): row["hit"]
        for name in RETRIEVAL
        for length, row in tasks.get(name, {}).items()
    }


def spearman(one: list[float], other: list[float]) -> float:
    """Return the correlation of ranks; equal values share the mean of theirs."""
    ranks = []
    for values in (one, other):
        found, place, count = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(count) - (count - 1) / 2)[place])
    return float(np.corrcoef(*ranks)[0, 1])


def score(args: argparse.Namespace) -> dict[str, dict[int, dict[str, Any]]]:
    """Return each run's row at each length; the judge is asked once."""
    key, common = str(args.output / "key-tokens.json"), {
        "data": args.data, "documents": args.documents, "lengths": args.lengths,
        "dtype": args.dtype, "batch_tokens": args.batch_tokens,
    }  # fmt: skip
    short = args.judge_short and str(args.judge_short)
    asked = {"judge": str(args.judge), "judge_short": short, "save_key_tokens": key}
    found = {}
    for folder in args.models:
        name = folder.resolve().parent.name
        named = {"hf": str(folder), "name": name, "output": str(args.output / name)}
        kept = {"key_tokens": key} if found else asked
        (result,) = evaluate(EvaluationSettings(["longppl"], **common, **named, **kept))
        found[name] = {row["length"]: row for row in result["lengths"]}
    return found


def table(rows: dict[str, dict[int, dict[str, Any]]], found: dict[str, dict]) -> str:
    """Return a row per run, and the rank correlations at each length."""
    shared = sorted(set.intersection(*(set(cases) for cases in found.values())))
    if not shared:
        raise UserError("the runs have no retrieval task at the same length")
    lengths = sorted(next(iter(rows.values())))
    means = {
        (name, length): float(np.mean([cases[key] for key in shared if key[1] == str(length)]))
        for name, cases in found.items()
        for length in lengths
        if any(key[1] == str(length) for key in shared)
    }
    head = ["run", *(f"{n // 1024}K: LongPPL, PPL, retrieval %" for n in lengths)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, of_run in rows.items():
        cells = [
            f"{of_run[n]['longppl']:.3f}, {of_run[n]['perplexity']:.3f}, "
            f"{means.get((name, n), float('nan')):.1f}"
            for n in lengths
        ]
        lines.append("| " + " | ".join((f"`{name}`", *cells)) + " |")
    cells = []
    for n in lengths:
        if all((name, n) in means for name in rows):
            asked = [means[name, n] for name in rows]
            both = [
                spearman([-rows[name][n][what] for name in rows], asked)
                for what in ("longppl", "perplexity")
            ]
            cells.append("{:+.2f}, {:+.2f}".format(*both))
        else:
            cells.append("not known")
    lines.append("| " + " | ".join(("rank correlation of LongPPL, of PPL", *cells)) + " |")
    names = ", ".join(sorted({name for name, _ in shared}))
    return "\n".join([*lines, "", f"{len(rows)} models; retrieval is the mean of {names}"])


def main() -> int:
    """Print the table; bad input ends in one line and exit status 2."""
    args = parse_args()
    with one_line_errors():
        if len(args.models) < 3:
            raise UserError(f"models: there are {len(args.models)}, ranks need at least 3")
        runs = [folder.resolve().parent for folder in args.models]
        if len({run.name for run in runs}) < len(runs):
            raise UserError("models: two are of runs of the same name")
        found = {run.name: retrieval(run, args.results) for run in runs}
        made = table(score(args), found)
        (args.output / "table.md").write_text(made + "\n", "utf-8")
        print(made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
