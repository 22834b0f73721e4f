# SPDX-License-Identifier: Apache-2.0
"""Look into an indexed dataset: statistics and length histogram, a document's text, a full check.

    python tools/inspect_dataset.py data/train --seq-length 4096 --target-length 262144
    python tools/inspect_dataset.py data/train --document 17 --tokens 200
    python tools/inspect_dataset.py data/train --check

Sizes of both files are compared in every case; --check also reads every token.
"""

from __future__ import annotations

import argparse
import sys

from megatron_cream.data.inspection import check, describe, document_text
from megatron_cream.data.tokenizers import TOKENIZERS
from megatron_cream.errors import one_line_errors


def main(argv: list[str]) -> int:
    """Print what is asked for; a damaged dataset ends in one line and exit status 2."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("prefix", metavar="PREFIX", help="path of the dataset without .bin and .idx")
    add("--document", type=int, metavar="I", help="print the text of document I, from 0")
    add("--tokens", type=int, default=0, metavar="N", help="its first N tokens (default: all)")
    add("--tokenizer-type", choices=list(TOKENIZERS), help="default: what PREFIX.json says")
    add("--tokenizer-model", metavar="PATH")
    add("--seq-length", type=int, metavar="N", help="share of sequences as long")
    add("--target-length", type=int, metavar="T", help="share of sequences as long")
    add("--check", action="store_true", help="read all of it")
    args = parser.parse_args(argv)
    thresholds = tuple(n for n in (args.seq_length, args.target_length) if n is not None)
    with one_line_errors():
        if args.document is not None:
            model = (args.tokenizer_type, args.tokenizer_model)
            print(document_text(args.prefix, args.document, *model, args.tokens))
        else:
            print(describe(args.prefix, thresholds))
        if args.check:
            print(check(args.prefix))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
