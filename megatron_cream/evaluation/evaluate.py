# SPDX-License-Identifier: Apache-2.0
"""The command ``megatron-cream evaluate``: a sub-command per task, and one that compares."""

from __future__ import annotations

import argparse
import sys

from megatron_cream.evaluation.evaluation_settings import EvaluationSettings
from megatron_cream.evaluation.ruler import TASKS as RULER_TASKS
from megatron_cream.options import add_flags
from megatron_cream.rope.flags import add_rope_flags

EXAMPLES = """
    megatron-cream evaluate perplexity --checkpoint runs/cream --data data/validation \\
        --lengths 1K 2K 4K --documents 16 --output runs/eval/cream-perplexity
    megatron-cream evaluate needle --hf model/ --lengths 4K 8K 16K --output runs/eval/needle
    megatron-cream evaluate ruler --hf model/ --lengths 4K 8K 16K --haystack essays.json \\
        --qa squad.json hotpotqa.json --output runs/eval/ruler
    megatron-cream evaluate longppl --hf model/ --judge longer/ --judge-short model/ \\
        --data books/ --lengths 8K 16K 32K --save-key-tokens key.json --output runs/eval/longppl
    torchrun --nproc-per-node 4 -m megatron_cream evaluate kv-retrieval --checkpoint runs/cream \\
        --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --lengths 32K
    megatron-cream evaluate all --hf model/ --data books/ --lengths 1K 4K 16K --documents 4 \\
        --most-tokens 32K --output runs/eval/all
    megatron-cream evaluate compare runs/eval/base runs/eval/cream --output runs/eval/both

    megatron-cream evaluate report runs/eval/* --output report.html

OUTPUT gets result.json, table.md and picture.png; a killed run continues when it is started again.
"""

HELP = {
    "perplexity": "by context length and position, sliding window",
    "longppl": "perplexity of the tokens that only a long context tells, and of all",
    "passkey": "five digits in a repeated phrase, by depth",
    "needle": "a sentence in prose, by depth",
    "longchat-lines": "the number of one of many lines",
    "kv-retrieval": "the value of one of many keys, by place",
    "niah-multikey": "the number of one of several keys in prose",
    "variable-tracking": "variables that a value reaches over four hops",
    "common-words": "ten most common words of a list",
    "frequent-words": "three most frequent invented words",
    "ruler": "RULER's own thirteen tasks, by generation: scores, averages, effective length",
    "all": "every task but ruler and longppl; perplexity with --data",
}
# Fields that are flags of ruler alone, of longppl alone, of all that scores documents, and of what
# has cases.
_RULER = frozenset(("haystack", "qa", "words", "samples", "threshold"))
_LONGPPL = frozenset(("judge", "judge_short", "key_tokens", "save_key_tokens"))
_WINDOWS = frozenset(("stride", "truncate"))
_DOCUMENTS = frozenset(("data", "documents", "skip_documents", "document_tokens"))
_CASES = frozenset(("cases", "seeds", "first_seed", "most_tokens", "cases_file", "shots"))
_WITHOUT = {
    "ruler": _CASES | _DOCUMENTS | _WINDOWS | _LONGPPL | {"batch_tokens"},
    "longppl": _RULER | _CASES | _WINDOWS | {"prompt", "bos"},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add a sub-command for each task, and one that compares runs."""
    commands = parser.add_subparsers(dest="task", required=True)
    for task, help_ in HELP.items():
        command = commands.add_parser(task, help=help_)
        add_flags(command, EvaluationSettings, _WITHOUT.get(task, _RULER | _LONGPPL))
        add_rope_flags(command.add_argument)
        if task in ("all", "ruler"):
            names = _in_all() if task == "all" else RULER_TASKS
            command.add_argument(
                "--tasks", nargs="+", choices=names, metavar="TASK", help="only these of them"
            )
    command = commands.add_parser("compare", help="several runs of one task in one picture")
    command.add_argument("runs", nargs="+", metavar="RUN", help="--output of a finished run")
    command.add_argument("--output", help="folder for the table and the picture")
    command = commands.add_parser("report", help="finished runs in one page, or in a model card")
    command.add_argument("runs", nargs="+", metavar="RUN", help="--output of a finished run")
    command.add_argument("--output", help="the page, a file that ends in .html")
    command.add_argument("--title", help="of the page (default: the models' names)")
    command.add_argument("--card", help="README.md of the model that the figures are put into")


def _in_all() -> list[str]:
    """Return the tasks that ``all`` runs; ruler has tasks of its own, longppl lengths."""
    return [name for name in HELP if name not in ("all", "ruler", "longppl")]


def settings_of(args: argparse.Namespace) -> EvaluationSettings:
    """Return the settings of a parsed command line."""
    given = dict(vars(args))
    task = given.pop("task")
    if task == "ruler":
        return EvaluationSettings(["ruler"], ruler_tasks=given.pop("tasks"), **given)
    return EvaluationSettings(tasks=_tasks(task, given.pop("tasks", None), args.data), **given)


def _tasks(task: str, named: list[str] | None, data: str | None) -> list[str]:
    if task != "all":
        return [task]
    if named is not None:
        return list(dict.fromkeys(named))
    return [name for name in _in_all() if name != "perplexity" or data is not None]


def run(args: argparse.Namespace) -> None:
    """Run a parsed command line and print its tables."""
    if args.task == "compare":
        from megatron_cream.evaluation.compare import compare

        print(compare(args.runs, args.output))
        return
    if args.task == "report":
        from megatron_cream.evaluation.report import run_report

        print(run_report(args))
        return
    if getattr(args, "cases_file", None) is not None and args.lengths:
        print(
            "note: --lengths is not used: the cases of --cases-file have their own", file=sys.stderr
        )
    from megatron_cream.evaluation.run import evaluate, format_results

    if results := evaluate(settings_of(args)):
        print(format_results(results))
