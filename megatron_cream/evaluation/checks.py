# SPDX-License-Identifier: Apache-2.0
"""What is refused of a command line before a model is loaded."""

from __future__ import annotations

import re
from argparse import ArgumentTypeError, Namespace
from collections.abc import Iterator
from pathlib import Path

from megatron_cream.checkpoint.iterations import find_checkpoint
from megatron_cream.errors import UserError
from megatron_cream.evaluation import published_cases
from megatron_cream.evaluation.score_documents import document_tokens
from megatron_cream.evaluation.store import SETTINGS

_LONGEST = 2**27  # tokens of a case or document
_MOST = {"seeds": 100_000, "cases": 1000, "documents": 1_000_000, "shots": 1000}
_SIZES = ("tensor", "pipeline", "context")
_PATHS = ("checkpoint", "hf", "data", "output", "cases_file", "tokenizer_model", "name")


def parse_length(word: str) -> int:
    """Return tokens of ``4096`` or ``4K``.

    Raises:
        ArgumentTypeError: another form.
    """
    found = re.fullmatch(r"(\d{1,12})([kK]?)", word, re.ASCII)
    if not found:
        raise ArgumentTypeError(f"{word!r} is not a number of tokens such as 4096 or 4K")
    return int(found[1]) * (1024 if found[2] else 1)


def check(args: Namespace) -> None:
    """Refuse what needs no model to be refused.

    Raises:
        UserError, FileNotFoundError: naming the flag.
    """
    for name in _PATHS:
        if getattr(args, name) == "":
            raise UserError(f"{_flag(name)} is empty: leave it out, or give it a value")
    if (args.checkpoint is None) == (args.hf is None):
        raise UserError("--checkpoint or --hf: exactly one of them must be given")
    _check_lengths(args)
    for flag, value, least, most in _numbers(args):
        if not least <= value <= most:
            raise UserError(f"{flag} has {value}: it must be at least {least}, at most {most}")
    if args.cases_file is not None:
        _check_cases_file(args)
    if "perplexity" in args.tasks:
        _check_windows(args)
    _check_model(args)
    _check_output(args)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _check_lengths(args: Namespace) -> None:
    if args.lengths is None and args.cases_file is None:
        raise UserError("--lengths is missing: name context lengths in tokens, 4K 8K for instance")
    # Cases of a file have the length that they have.
    args.lengths = sorted(set(args.lengths or ())) if args.cases_file is None else []


def _numbers(args: Namespace) -> Iterator[tuple[str, int, int, int]]:
    """Yield each flag with its value, the least and the most."""
    for length in args.lengths:
        yield "--lengths", length, 1, _LONGEST
    for name, most in _MOST.items():
        yield _flag(name), getattr(args, name), 0 if name == "shots" else 1, most
    yield "--first-seed", args.first_seed, 0, 2**31 - 1
    yield "--batch-tokens", args.batch_tokens, 1, 2**31 - 1
    for name in ("most_tokens", "stride", "document_tokens"):
        if (value := getattr(args, name)) is not None:
            yield _flag(name), value, 1, 2**40 if name == "most_tokens" else _LONGEST
    for name in _SIZES:
        size = getattr(args, f"{name}{'' if name == 'context' else '_model'}_parallel_size")
        flag = f"--{name}{'' if name == 'context' else '-model'}-parallel-size"
        yield flag, size, 1, 2**20


def _check_cases_file(args: Namespace) -> None:
    if args.most_tokens is not None:
        raise UserError(
            f"--most-tokens is {args.most_tokens} with --cases-file: it must be left out, "
            "--seeds says how many of the file's cases are taken"
        )
    for task in args.tasks:
        published_cases.check_task(task)
    published_cases.read_cases(args.cases_file)


def _check_windows(args: Namespace) -> None:
    if args.data is None:
        raise UserError("--data is missing: perplexity needs an indexed dataset or text")
    if args.stride is not None and args.stride > args.lengths[0]:
        raise UserError(
            f"--stride is {args.stride}: it must be at most the shortest of --lengths, "
            f"{args.lengths[0]}, so that every token is scored"
        )
    if document_tokens(args) <= args.lengths[-1]:
        raise UserError(
            f"--document-tokens is {args.document_tokens}: it must be more than the longest of "
            f"--lengths, {args.lengths[-1]}: the token behind a window is its last target"
        )


def _check_model(args: Namespace) -> None:
    if args.hf is not None and not (Path(args.hf) / "config.json").is_file():
        raise FileNotFoundError(f"--hf is {args.hf}: it must be a folder with a config.json")
    if args.hf is None and find_checkpoint(args.checkpoint) is None:
        raise FileNotFoundError(
            f"--checkpoint is {args.checkpoint}: it must hold a torch_dist checkpoint"
        )


def _check_output(args: Namespace) -> None:
    """Refuse a folder of something else for several tasks; for one the store does."""
    if args.output is None or len(args.tasks) == 1:
        return
    folder = Path(args.output)
    ours = any((folder / task / SETTINGS).is_file() for task in args.tasks)
    empty = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    if not (ours or empty) or (folder / SETTINGS).exists():
        raise UserError(
            f"--output is {folder}: it must be a new folder, or that of a run of several tasks"
        )
