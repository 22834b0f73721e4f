# SPDX-License-Identifier: Apache-2.0
"""Turn text into a Megatron indexed dataset. See docs/data.md.

    python tools/preprocess_data.py --input corpus/ more.jsonl.zst 'web/*.parquet' \\
        --tokenizer-type HuggingFaceTokenizer --tokenizer-model tokenizer/ --append-eod \\
        --workers 8 --output-prefix data/train

A job that was killed continues when it is started again with the same settings. As a Slurm array,
with --shard $SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT, then tools/merge_datasets.py.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence

from megatron_cream.errors import one_line_errors

# Read by numpy when it is loaded: threads that nothing here uses would keep workers from forking.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# ruff: noqa: E402
from megatron_cream.corpus.command_line import Parser
from megatron_cream.corpus.engine import ENGINES
from megatron_cream.corpus.job import PART_BYTES
from megatron_cream.corpus.preprocess import PreprocessConfig, preprocess
from megatron_cream.corpus.readers import FORMATS
from megatron_cream.corpus.tokenizers import TOKENIZERS


def parse_args(argv: Sequence[str] | None = None) -> PreprocessConfig:
    """The job that the command line asks for; exits with status 2 on a flag it cannot read."""
    parser = Parser(__doc__, allow_abbrev=False)
    _add_input(parser.add_argument_group("input"))
    _add_tokens(parser.add_argument_group("tokens"))
    _add_documents(parser.add_argument_group("documents"))
    _add_running(parser.add_argument_group("running"))
    flags = vars(parser.parse_args(argv))
    flags["verify"] = -1 if flags.pop("verify_all") else flags["verify"]
    for name in ("input", "json_key"):
        flags[name] = tuple(flags[name])
    return PreprocessConfig(**flags)


def _add_input(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--input", nargs="+", required=True, metavar="PATH", help="files, folders, globs, or -")
    add("--input-format", choices=FORMATS, help="of all files (default: by their suffixes)")
    add(
        "--json-key", nargs="+", default=["text"], metavar="KEY", help="of the text (default: text)"
    )
    join = "between several keys' texts (default: an empty line)"
    add("--key-separator", default="\n\n", metavar="TEXT", help=join)
    add("--on-error", choices=("fail", "skip"), default="fail", help="at a bad record")


def _add_tokens(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    model = "tokenizer.json, its folder, or a .model file (default: none, for plain bytes)"
    add("--tokenizer-type", required=True, choices=list(TOKENIZERS), help="how text becomes ids")
    add("--tokenizer-model", metavar="PATH", help=model)
    add("--append-eod", action="store_true", help="end each document with the eod token")
    add("--prepend-bos", action="store_true", help="begin each document with the bos token")
    add("--engine", choices=ENGINES, default="auto", help="auto takes gigatoken where exact")
    add("--verify", type=int, default=8, metavar="N", help="documents to compare gigatoken on")
    add("--verify-all", action="store_true", help="compare every document")


def _add_documents(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--min-tokens", type=int, default=1, metavar="N", help="drop shorter documents")
    add("--max-tokens", type=int, metavar="N", help="split longer documents (default: no limit)")
    add("--long-documents", choices=("split", "drop"), default="split", help="over --max-tokens")
    add("--drop-duplicates", action="store_true", help="keep the first of equal documents")
    share = "report the share of documents as long (default: not reported)"
    add("--seq-length", type=int, metavar="N", help=share)
    add("--target-length", type=int, metavar="T", help=share)


def _add_running(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    ray = "run on a Ray cluster: auto, local, ray://host:port (default: on this machine)"
    add("--output-prefix", required=True, metavar="PREFIX", help="writes PREFIX.bin .idx .json")
    add("--workers", type=int, default=1, metavar="W", help="processes")
    add("--shard", type=_shard, default=(0, 1), metavar="I/N", help="part I of N (default: 0/1)")
    add("--ray", metavar="ADDRESS", help=ray)
    add("--overwrite", action="store_true", help="replace the files of an earlier run")
    add("--restart", action="store_true", help="forget what an unfinished job has done")
    part = "text per part of the work, which never changes the result"
    add("--part-bytes", type=int, default=PART_BYTES, metavar="BYTES", help=part)


def _shard(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r}, needs I/N as 0/8")
    return int(index), int(count)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns the exit status."""
    config = parse_args(argv)
    # Without a handler a termination would leave worker processes to find out by themselves.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        with one_line_errors():
            stats = preprocess(config, say=_say)
    except KeyboardInterrupt:
        print("error: interrupted; start again to continue", file=sys.stderr)
        return 128 + signal.SIGINT
    print(stats.summary())
    return 0


if __name__ == "__main__":
    sys.exit(main())
