# SPDX-License-Identifier: Apache-2.0
"""The command ``megatron-cream evaluate``: its flags as typed settings, validated before a load."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from megatron_cream.errors import UserError
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
_RANKS = "ranks that torchrun started for it"
_LONGEST = 2**27  # tokens of a case or document
_MOST = 2**31 - 1


def parse_length(word: str) -> int:
    """Return tokens of ``4096`` or ``4K``.

    Raises:
        ArgumentTypeError: another form.
    """
    found = re.fullmatch(r"(\d{1,12})([kK]?)", word, re.ASCII)
    if not found:
        raise argparse.ArgumentTypeError(f"{word!r} is not a number of tokens such as 4096 or 4K")
    return int(found[1]) * (1024 if found[2] else 1)


def _flag(default: Any, help_: str, limits: tuple[int, int] | None = None, **reading: Any) -> Any:
    """Return a field of ``EvaluationSettings`` that is a flag.

    Args:
        limits: least and most of a whole number.
        reading: how argparse reads it.
    """
    if limits:
        reading.setdefault("type", int)
    return field(default=default, metadata={"help": help_, **reading, "limits": limits})


@dataclass
class EvaluationSettings:
    """What is evaluated, and on what; every field but ``tasks`` is a flag of the command.

    Lengths, strides and limits are in tokens. ``lengths`` are put in order, each once; cases of
    ``cases_file`` have their own.
    """

    tasks: Sequence[str]
    checkpoint: str | None = _flag(None, "folder given to --save, or one iteration in it")
    hf: str | None = _flag(None, "Hugging Face folder instead")
    name: str | None = _flag(
        None, "what tables and pictures call the model (default: its folder's name)"
    )
    lengths: Sequence[int] = _flag(
        None,
        "in tokens, 4K is 4096; needed, except with --cases-file, whose cases have their own",
        (1, _LONGEST),
        **{"type": parse_length, "nargs": "+"},
    )
    output: str | None = _flag(
        None, "folder for results (default: the table is printed, nothing is written)"
    )
    batch_tokens: int = _flag(8192, "most tokens in a pass of several samples", (1, _MOST))
    dtype: str | None = _flag(
        None,
        "of the weights, with --hf (default: as saved)",
        choices=("float32", "bfloat16", "float16"),
    )
    tensor_model_parallel_size: int = _flag(1, _RANKS, (1, 2**20))
    pipeline_model_parallel_size: int = _flag(1, _RANKS, (1, 2**20))
    context_parallel_size: int = _flag(1, f"{_RANKS}, on GPUs", (1, 2**20))
    rope_interpolation: str | None = _flag(
        None,
        "evaluate with another one than the model's own: "
        f"{', '.join(name for name, one in SCALINGS.items() if not one.trained_by)} "
        "(default: its own)",
    )
    rope_factor: float | None = _flag(
        None, "its factor, from the original window (default: its own)", type=float
    )
    rope_theta: float | None = None
    rope_options: list[str] | None = None
    rope_factors_file: str | None = None
    cpu: bool = _flag(False, "a checkpoint on a machine with no GPU", action="store_true")
    cases: int = _flag(5, "cases per seed: depths, places, or questions", (1, 1000))
    seeds: int = _flag(3, "haystacks, or cases of --cases-file", (1, 100_000))
    first_seed: int = _flag(0, "seeds count up from it", (0, _MOST))
    most_tokens: int | None = _flag(
        None,
        "of a task's haystacks at one length; fewer seeds if need be, at least one (default: no "
        "limit)",
        (1, 2**40),
        type=parse_length,
    )
    cases_file: str | None = _flag(
        None, "published cases of longchat-lines or kv-retrieval (JSONL, .xz, .gz)"
    )
    prompt: str = _flag("base", "base, or chat for the tokenizer's chat template")
    shots: int = _flag(0, "worked examples in front", (0, 1000))
    bos: bool | None = _flag(
        None,
        "begin cases with the token that begins a text, or do not (default: as the tokenizer)",
        action=argparse.BooleanOptionalAction,
    )
    tokenizer_type: str | None = _flag(
        None, "as in megatron-cream preprocess (default: the model's own)"
    )
    tokenizer_model: str | None = _flag(None, "its file or folder")
    data: str | None = _flag(
        None, "for perplexity: indexed dataset without .bin and .idx, or text files"
    )
    documents: int = _flag(16, "documents to score", (1, 1_000_000))
    skip_documents: int = _flag(
        0, "documents at the start of an indexed dataset that training read: not scored", (0, _MOST)
    )
    document_tokens: int | None = _flag(
        None,
        "tokens of each; shorter documents are passed over (default: twice the longest of "
        "--lengths, and one)",
        (1, _LONGEST),
    )
    stride: int | None = _flag(
        None, "tokens between windows (default: half of each length)", (1, _LONGEST)
    )

    def __post_init__(self) -> None:
        self.lengths = sorted(set(self.lengths or ())) if self.cases_file is None else []

    def validate(self) -> None:
        """Refuse what needs no model to be refused.

        Raises:
            UserError, FileNotFoundError: naming the flag.
        """
        for one in fields(self):
            if getattr(self, one.name) == "":
                raise UserError(f"{_flag_of(one.name)} is empty: leave it out, or give it a value")
        if (self.checkpoint is None) == (self.hf is None):
            raise UserError("--checkpoint or --hf: exactly one of them must be given")
        if not self.lengths and self.cases_file is None:
            raise UserError(
                "--lengths is missing: name context lengths in tokens, 4K 8K for instance"
            )
        self._validate_numbers()
        if self.cases_file is not None:
            self._validate_cases_file(self.cases_file)
        if "perplexity" in self.tasks:
            self._validate_windows()
        self._validate_model()
        self._validate_output()

    def _validate_numbers(self) -> None:
        for one in fields(self):
            if (limits := one.metadata.get("limits")) is None:
                continue
            value = getattr(self, one.name)
            for number in value if one.name == "lengths" else [] if value is None else [value]:
                if not limits[0] <= number <= limits[1]:
                    raise UserError(
                        f"{_flag_of(one.name)} has {number}: it must be at least {limits[0]}, at "
                        f"most {limits[1]}"
                    )

    def _validate_cases_file(self, path: str) -> None:
        from megatron_cream.evaluation.tasks.lines import read_cases, validate_has_published

        if self.most_tokens is not None:
            raise UserError(
                f"--most-tokens is {self.most_tokens} with --cases-file: it must be left out, "
                "--seeds says how many of the file's cases are taken"
            )
        for task in self.tasks:
            validate_has_published(task)
        read_cases(path)

    def _validate_windows(self) -> None:
        if self.data is None:
            raise UserError("--data is missing: perplexity needs an indexed dataset or text")
        if self.stride is not None and self.stride > self.lengths[0]:
            raise UserError(
                f"--stride is {self.stride}: it must be at most the shortest of --lengths, "
                f"{self.lengths[0]}, so that every token is scored"
            )
        if self.tokens_per_document <= self.lengths[-1]:
            raise UserError(
                f"--document-tokens is {self.document_tokens}: it must be more than the longest "
                f"of --lengths, {self.lengths[-1]}: the token after a window is its last target"
            )

    @property
    def tokens_per_document(self) -> int:
        """Tokens of each document that perplexity scores."""
        return self.document_tokens or 2 * self.lengths[-1] + 1

    def _validate_model(self) -> None:
        from megatron_cream.checkpoint.iterations import find_checkpoint

        if self.hf is not None and not (Path(self.hf) / "config.json").is_file():
            raise FileNotFoundError(f"--hf is {self.hf}: it must be a folder with a config.json")
        if self.checkpoint is not None and find_checkpoint(self.checkpoint) is None:
            raise FileNotFoundError(
                f"--checkpoint is {self.checkpoint}: it must hold a torch_dist checkpoint"
            )

    def _validate_output(self) -> None:
        """Refuse a folder of something else for several tasks; for one the store does."""
        from megatron_cream.evaluation.store import SETTINGS_FILE

        if self.output is None or len(self.tasks) == 1:
            return
        folder = Path(self.output)
        ours = any((folder / task / SETTINGS_FILE).is_file() for task in self.tasks)
        empty = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
        if not (ours or empty) or (folder / SETTINGS_FILE).exists():
            raise UserError(
                f"--output is {folder}: it must be a new folder, or that of a run of several tasks"
            )


def _flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add a sub-command for each task, and one that compares runs."""
    commands = parser.add_subparsers(dest="task", required=True)
    for task, help_ in HELP.items():
        command = commands.add_parser(task, help=help_)
        for one in fields(EvaluationSettings):
            if one.metadata:
                words = {key: value for key, value in one.metadata.items() if key != "limits"}
                command.add_argument(_flag_of(one.name), default=one.default, **words)
        add_options(command.add_argument)
        if task == "all":
            names = [name for name in HELP if name != "all"]
            command.add_argument(
                "--tasks", nargs="+", choices=names, metavar="TASK", help="only these of them"
            )
    command = commands.add_parser("compare", help="several runs of one task in one picture")
    command.add_argument("runs", nargs="+", metavar="RUN", help="--output of a finished run")
    command.add_argument("--output", help="folder for the table and the picture")


def settings_of(args: argparse.Namespace) -> EvaluationSettings:
    """Return the settings of a parsed command line."""
    given = dict(vars(args))
    task = given.pop("task")
    return EvaluationSettings(tasks=_tasks(task, given.pop("tasks", None), args.data), **given)


def _tasks(task: str, named: list[str] | None, data: str | None) -> list[str]:
    if task != "all":
        return [task]
    if named is not None:
        return list(dict.fromkeys(named))
    return [name for name in HELP if name != "all" and (name != "perplexity" or data is not None)]


def run(args: argparse.Namespace) -> None:
    """Run a parsed command line and print its tables."""
    if args.task == "compare":
        from megatron_cream.evaluation.compare import compare

        print(compare(args.runs, args.output))
        return
    if args.cases_file is not None and args.lengths:
        print(
            "note: --lengths is not used: the cases of --cases-file have their own", file=sys.stderr
        )
    from megatron_cream.evaluation.run import evaluate, format_results

    if results := evaluate(settings_of(args)):
        print(format_results(results))
