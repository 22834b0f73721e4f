# SPDX-License-Identifier: Apache-2.0
"""The command ``megatron-cream evaluate``: its flags, and what each of its tasks starts."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

from megatron_cream.evaluation.checks import parse_length
from megatron_cream.rope import SCALINGS
from megatron_cream.rope.flags import add_options

EXAMPLES = """
    megatron-cream evaluate perplexity --checkpoint runs/cream --data data/validation \\
        --lengths 1K 2K 4K --documents 16 --output runs/eval/cream-perplexity
    megatron-cream evaluate needle --hf model/ --lengths 4K 8K 16K --output runs/eval/needle
    torchrun --nproc-per-node 4 -m megatron_cream evaluate kv-retrieval --checkpoint runs/cream \\
        --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --lengths 32K
    megatron-cream evaluate all --hf model/ --data books/ --lengths 1K 4K 16K --documents 4 \\
        --most-tokens 32K --output runs/eval/all
    megatron-cream evaluate compare runs/eval/base runs/eval/cream --output runs/eval/both

OUTPUT gets result.json, table.md and picture.png; a killed run continues when it is started again.
"""

TASKS = (
    *("passkey", "needle", "longchat-lines", "kv-retrieval", "niah-multikey"),
    *("variable-tracking", "common-words", "frequent-words"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add a sub-command for each task, and one that compares runs."""
    commands = parser.add_subparsers(dest="task", required=True)
    for task in ("perplexity", *TASKS, "all"):
        command = commands.add_parser(task, help=HELP[task])
        _add_model(command.add_argument)
        _add_cases(command.add_argument)
        _add_perplexity(command.add_argument)
        tasks = ["perplexity", *TASKS] if task == "all" else [task]
        command.set_defaults(tasks=tasks)
    help_ = "several runs of one task in one picture"
    command = commands.add_parser("compare", help=help_)
    command.add_argument("runs", nargs="+", metavar="RUN", help="--output of a finished run")
    command.add_argument("--output", help="folder for the table and the picture")


HELP = {
    "perplexity": "by context length and position, sliding window",
    "passkey": "five digits in a repeated phrase, by depth",
    "needle": "a sentence in prose, by depth",
    "longchat-lines": "the number of one of many lines",
    "kv-retrieval": "the value of one of many keys, by place",
    "niah-multikey": "the number of one of several keys in prose",
    "variable-tracking": "variables that a value reaches over four hops",
    "common-words": "ten most common words of a list",
    "frequent-words": "three most frequent invented words",
    "all": "every task; perplexity with --data",
}


def _add_model(add: Callable[..., Any]) -> None:
    add("--checkpoint", help="folder given to --save, or one iteration in it")
    add("--hf", help="Hugging Face folder instead")
    add("--name", help="what tables and pictures call the model (default: its folder's name)")
    add(
        "--lengths",
        type=parse_length,
        nargs="+",
        help="in tokens, 4K is 4096; needed, except with --cases-file, whose cases have their own",
    )
    add("--output", help="folder for results (default: the table is printed, nothing is written)")
    add(
        "--batch-tokens",
        type=int,
        default=8192,
        help="most tokens in a pass of several samples (default: 8192)",
    )
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the weights, with --hf (default: as saved)",
    )
    for name, more in (("tensor-model", ""), ("pipeline-model", ""), ("context", ", on GPUs")):
        what = f"ranks that torchrun started for it{more} (default: 1)"
        add(f"--{name}-parallel-size", type=int, default=1, help=what)
    untrained = ", ".join(name for name, cls in SCALINGS.items() if not cls.trained_by)
    add(
        "--rope-interpolation",
        help=f"evaluate with another one than the model's own: {untrained} (default: its own)",
    )
    add("--rope-factor", type=float, help="its factor, from the original window (default: its own)")
    add_options(add)
    add("--cpu", action="store_true", help="a checkpoint on a machine with no GPU")


def _add_cases(add: Callable[..., Any]) -> None:
    add(
        "--cases",
        type=int,
        default=5,
        help="cases a seed: depths, places, or questions (default: 5)",
    )
    add("--seeds", type=int, default=3, help="haystacks, or cases of --cases-file (default: 3)")
    add("--first-seed", type=int, default=0, help="seeds count up from it (default: 0)")
    add(
        "--most-tokens",
        type=parse_length,
        help="of a task's haystacks at one length; fewer seeds if need be, at least one (default: "
        "no limit)",
    )
    add("--cases-file", help="published cases of longchat-lines or kv-retrieval (JSONL, .xz, .gz)")
    add(
        "--prompt",
        default="base",
        help="base, or chat for the tokenizer's chat template (default: base)",
    )
    add("--shots", type=int, default=0, help="worked examples in front (default: 0)")
    add(
        "--bos",
        action=argparse.BooleanOptionalAction,
        help="begin cases with the token that begins a text, or do not (default: as the tokenizer)",
    )
    add("--tokenizer-type", help="as in megatron-cream preprocess (default: the model's own)")
    add("--tokenizer-model", help="its file or folder")


def _add_perplexity(add: Callable[..., Any]) -> None:
    add("--data", help="for perplexity: indexed dataset without .bin and .idx, or text files")
    add("--documents", type=int, default=16, help="documents to score (default: 16)")
    add(
        "--document-tokens",
        type=int,
        help="tokens of each; shorter documents are passed over (default: twice the longest of "
        "--lengths, and one)",
    )
    add("--stride", type=int, help="tokens between windows (default: half of each length)")


def run(args: argparse.Namespace) -> None:
    """Print what the task of a command line returns."""
    printed = _run_task(args)
    if printed:
        print(printed)


def _run_task(args: argparse.Namespace) -> str:
    if args.task == "compare":
        from megatron_cream.evaluation.compare import compare

        return compare(args.runs, args.output)
    if args.task == "all" and args.data is None:
        args.tasks.remove("perplexity")
    if args.cases_file is not None and args.lengths is not None:
        print(
            "note: --lengths is not used: the cases of --cases-file have their own", file=sys.stderr
        )
    if args.cpu and args.checkpoint is not None:
        from megatron_cream.mcore import cpu

        cpu.install()
    from megatron_cream.evaluation.run import run as evaluate

    return evaluate(args)
