# SPDX-License-Identifier: Apache-2.0
"""Make documents that train a model to find what it read, as an indexed dataset. See docs/data.md.

    python tools/make_retrieval_data.py --tokenizer-type HuggingFaceTokenizer \\
        --tokenizer-model tokenizer/ --length 8192 --documents 3000 --haystack books/train \\
        --workers 8 --output-prefix data/retrieval

Train on a blend: --data-path 0.85 data/train 0.15 data/retrieval.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from megatron_cream.errors import one_line_errors

# Read by numpy when it is loaded: threads that nothing here uses would keep workers from forking.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# ruff: noqa: E402
from megatron_cream.corpus.engine import ENGINES
from megatron_cream.corpus.retrieval import RetrievalConfig, make_dataset
from megatron_cream.corpus.tokenizers import TOKENIZERS


def parse_args(argv: Sequence[str] | None = None) -> RetrievalConfig:
    """The job that the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--tokenizer-type", required=True, choices=list(TOKENIZERS))
    add("--tokenizer-model", metavar="PATH", help="tokenizer.json, its folder, or a .model file")
    add("--length", type=int, required=True, metavar="N", help="tokens of each: the trained window")
    add("--documents", type=int, required=True, metavar="D", help="how many")
    add("--seed", type=int, default=1234, help="what they are drawn from (1234)")
    add("--haystack", nargs="+", default=[], metavar="TEXT", help="text to hide facts in")
    add("--questions", type=int, default=16, metavar="Q", help="most questions of a task (16)")
    add("--append-eod", action="store_true", help="end each document with the eod token")
    add("--engine", choices=ENGINES, default="auto", help="gigatoken where exact (default: auto)")
    add("--workers", type=int, default=1, metavar="W", help="processes (default: 1)")
    add("--output-prefix", required=True, metavar="PREFIX", help="writes PREFIX.bin .idx .json")
    add("--overwrite", action="store_true", help="replace the files of an earlier run")
    flags = vars(parser.parse_args(argv))
    flags["haystack"] = tuple(flags["haystack"])
    return RetrievalConfig(**flags)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns the exit status."""
    config = parse_args(argv)
    with one_line_errors():
        note = make_dataset(config, say=lambda line: print(line, file=sys.stderr, flush=True))
    print(
        f"written: {note['documents']} documents, {note['tokens']} tokens, {config.output_prefix}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
