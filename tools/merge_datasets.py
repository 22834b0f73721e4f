# SPDX-License-Identifier: Apache-2.0
"""Join indexed datasets: the shards of one preprocessing job, or any with the same tokenizer.

    python tools/merge_datasets.py --input data/train-*-of-00008.idx --output-prefix data/train

Shards are checked to be all there and put in order; other datasets keep the order they are given.
"""

from __future__ import annotations

import sys

from megatron_cream.corpus.command_line import Parser
from megatron_cream.corpus.merge import merge_datasets
from megatron_cream.errors import one_line_errors


def main(argv: list[str]) -> int:
    """Write the dataset; bad input ends in one line and exit status 2."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="PREFIX", help="with or without .idx or .bin")
    add("--output-prefix", required=True, metavar="PREFIX", help="writes PREFIX.bin .idx")
    add("--overwrite", action="store_true", help="replace the files of an earlier run")
    args = parser.parse_args(argv)
    prefixes = [name.removesuffix(".idx").removesuffix(".bin") for name in args.input]
    with one_line_errors():
        print(merge_datasets(prefixes, args.output_prefix, overwrite=args.overwrite))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
