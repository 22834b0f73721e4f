# SPDX-License-Identifier: Apache-2.0
"""The tasks of one command on one model."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from megatron_cream.evaluation.checks import check
from megatron_cream.evaluation.forward import Model
from megatron_cream.evaluation.models import (
    check_vocabulary,
    open_documents,
    open_model,
    open_prompt,
)
from megatron_cream.evaluation.pictures import draw_suite
from megatron_cream.evaluation.progress import say_without_picture
from megatron_cream.evaluation.prompts import Prompt
from megatron_cream.evaluation.score_cases import check_fit, score_cases
from megatron_cream.evaluation.score_documents import document_tokens, score_perplexity
from megatron_cream.evaluation.store import write_whole
from megatron_cream.evaluation.tables import suite_table, table
from megatron_cream.positions.plots import has_matplotlib


def run(args: Namespace) -> str:
    """Run ``args.tasks`` on one model and return the tables.

    With --output every task has a folder: OUTPUT itself for one task, OUTPUT/TASK for several.

    Raises:
        UserError, OSError, ImportError: input that cannot be scored, found before the first task.
    """
    check(args)
    cases = [task for task in args.tasks if task != "perplexity"]
    prompt = open_prompt(args) if cases else None
    lengths = {length for task in cases for length in check_fit(args, prompt, task)}
    model = open_model(args)
    if prompt is not None:
        check_vocabulary(prompt.tokenizer, model)
    _say_what_is_longer(lengths | set(args.lengths), model)
    documents = None
    if "perplexity" in args.tasks:
        documents = open_documents(args, model, document_tokens(args))
    results = [_score(args, model, task, prompt, documents) for task in args.tasks]
    return _report(args, model, results)


def _score(
    args: Namespace, model: Model, task: str, prompt: Prompt | None, documents: Any
) -> dict[str, Any]:
    folder = args.output
    if folder and len(args.tasks) > 1:
        folder = str(Path(folder) / task)
    if task == "perplexity":
        return score_perplexity(args, model, task, folder, documents)
    return score_cases(args, model, prompt, task, folder)


def _report(args: Namespace, model: Model, results: list[dict[str, Any]]) -> str:
    """Return the tables on the process that writes; write those of several tasks."""
    if not model.primary:
        return ""
    tables = [table(result) for result in results]
    if len(results) > 1:
        tables.append(suite_table(results))
        if args.output:
            folder = Path(args.output)
            write_whole(folder / "table.md", (tables[-1] + "\n").encode())
            if has_matplotlib():
                draw_suite(results, folder / "picture.png")
    if args.output:
        say_without_picture()
    return "\n\n".join(tables)


def _say_what_is_longer(lengths: set[int], model: Model) -> None:
    longer = sorted(length for length in lengths if length > model.window)
    if longer and model.primary:
        print(
            f"note: --lengths has {' '.join(map(str, longer))}: {model.name} was extended to "
            f"{model.window} tokens",
            file=sys.stderr,
        )
