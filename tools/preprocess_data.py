# SPDX-License-Identifier: Apache-2.0
"""Turn text into a Megatron indexed dataset. See docs/data.md."""

import argparse
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from megatron_cream.data.preprocess import PreprocessConfig, preprocess
from megatron_cream.data.tokenizers import TOKENIZERS


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def parse_args(argv: Sequence[str] | None = None) -> PreprocessConfig:
    """The job that the command line asks for; exits with status 2 on a flag it cannot read."""
    parser = _Parser(description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="PATH", help="files and folders of text")
    add("--tokenizer-type", required=True, choices=list(TOKENIZERS))
    add("--tokenizer-model", metavar="PATH", help="tokenizer.json, its folder, or a .model file")
    add("--output-prefix", required=True, metavar="PREFIX", help="writes PREFIX.bin .idx .json")
    add("--json-key", default="text", help="key of the text in JSONL (default: text)")
    add("--append-eod", action="store_true", help="end each document with the eod token")
    add("--prepend-bos", action="store_true", help="begin each document with the bos token")
    add("--min-tokens", type=int, default=1, metavar="N", help="drop shorter documents")
    add("--workers", type=int, default=1, metavar="W", help="tokenizing processes (default: 1)")
    add("--overwrite", action="store_true", help="replace the files of an earlier run")
    flags = vars(parser.parse_args(argv))
    return PreprocessConfig(**{**flags, "input": tuple(flags["input"])})


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns the exit status."""
    config = parse_args(argv)
    # Without a handler a termination would leave the temporary files behind.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        stats = preprocess(config)
    except (ValueError, OSError) as exc:
        print("error:", " ".join(str(exc).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted, nothing was written", file=sys.stderr)
        return 128 + signal.SIGINT
    print(stats.summary())
    return 0


if __name__ == "__main__":
    sys.exit(main())
