# SPDX-License-Identifier: Apache-2.0
"""The tasks of one command on one model."""

from __future__ import annotations

import re
import sys
from argparse import Namespace
from pathlib import Path

from megatron_cream.errors import UserError
from megatron_cream.evaluation import published
from megatron_cream.evaluation.opening import open_model
from megatron_cream.evaluation.passes import Model
from megatron_cream.evaluation.pictures import draw_suite
from megatron_cream.evaluation.position_plots import require_matplotlib
from megatron_cream.evaluation.score_cases import score_cases
from megatron_cream.evaluation.score_documents import score_perplexity
from megatron_cream.evaluation.tables import suite_table, table


def run(args: Namespace) -> str:
    """Run ``args.tasks`` on one model and return the tables.

    With --output every task has a folder: OUTPUT itself for one task, OUTPUT/TASK for several.

    Raises:
        UserError, FileNotFoundError, ImportError: input that cannot be scored.
    """
    check(args)
    model = open_model(args)
    _say_what_is_longer(args, model)
    results = []
    for task in args.tasks:
        folder = args.output
        if folder and len(args.tasks) > 1:
            folder = str(Path(folder) / task)
        scored = score_perplexity if task == "perplexity" else score_cases
        results.append(scored(args, model, task, folder))
    tables = [table(result) for result in results]
    if len(results) > 1:
        tables.append(suite_table(results))
        if args.output and model.primary:
            (Path(args.output) / "table.md").write_text(tables[-1] + "\n", "utf-8")
            draw_suite(results, Path(args.output) / "picture.png")
    return "\n\n".join(tables) if model.primary else ""


def check(args: Namespace) -> None:
    """Refuse what needs no model to be refused.

    Raises:
        UserError, FileNotFoundError, ImportError: naming the flag.
    """
    args.lengths = sorted(set(args.lengths))
    for flag, value in (
        *(("--lengths", length) for length in args.lengths),
        *(("--" + name, getattr(args, name)) for name in ("seeds", "cases", "documents")),
        *([("--most-tokens", args.most_tokens)] if args.most_tokens is not None else []),
    ):
        if value < 1:
            raise UserError(f"{flag} has {value}: it must be at least 1")
    if args.shots < 0:
        raise UserError(f"--shots is {args.shots}: it must be 0 or more")
    if "perplexity" in args.tasks and args.data is None:
        raise UserError("--data is missing: perplexity needs an indexed dataset or text")
    if args.cases_file is not None:
        if args.most_tokens is not None:
            raise UserError(
                f"--most-tokens is {args.most_tokens} with --cases-file: it must be left out, "
                "--seeds says how many of the file's cases are taken"
            )
        published.read_cases(args.cases_file)
    if args.output is not None:
        require_matplotlib()


def _say_what_is_longer(args: Namespace, model: Model) -> None:
    longer = [length for length in args.lengths if length > model.window]
    if longer and model.primary:
        print(
            f"note: --lengths has {' '.join(map(str, longer))}: {model.name} was extended to "
            f"{model.window} tokens",
            file=sys.stderr,
        )


def parse_length(word: str) -> int:
    """Return tokens of ``4096`` or ``4K``.

    Raises:
        UserError: another form.
    """
    found = re.fullmatch(r"(\d+)([kK]?)", word)
    if not found:
        raise UserError(f"{word!r} is not a number of tokens such as 4096 or 4K")
    return int(found[1]) * (1024 if found[2] else 1)
