# SPDX-License-Identifier: Apache-2.0
"""Look into an indexed dataset: statistics and length histogram, a document's text, a full check.

    python tools/inspect_dataset.py data/train --seq-length 4096 --target-length 262144
    python tools/inspect_dataset.py data/train --document 17 --tokens 200
    python tools/inspect_dataset.py data/train --check

The whole index is checked in every case; --check also reads every token.
"""

from __future__ import annotations

import sys

from megatron_cream.corpus.command_line import Parser
from megatron_cream.corpus.inspection import check, describe, document_text
from megatron_cream.corpus.tokenizers import TOKENIZERS
from megatron_cream.errors import one_line_errors


def main(argv: list[str]) -> int:
    """Print what is asked for; a damaged dataset ends in one line and exit status 2."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("prefix", metavar="PREFIX", help="path of the dataset without .bin and .idx")
    text = "print only the text of document I, from 0 (default: statistics)"
    add("--document", type=int, metavar="I", help=text)
    add("--tokens", type=int, default=0, metavar="N", help="its first N tokens, 0 for all")
    noted = "default: what PREFIX.json says"
    add("--tokenizer-type", choices=list(TOKENIZERS), help=f"to print text with ({noted})")
    add("--tokenizer-model", metavar="PATH", help=f"of that type ({noted})")
    share = "share of sequences as long (default: not reported)"
    add("--seq-length", type=int, metavar="N", help=share)
    add("--target-length", type=int, metavar="T", help=share)
    add("--check", action="store_true", help="read all tokens, too")
    add("--vocab-size", type=int, metavar="N", help=f"all ids are below it ({noted})")
    args = parser.parse_args(argv)
    with one_line_errors():
        if args.document is not None:
            model = (args.tokenizer_type, args.tokenizer_model)
            print(document_text(args.prefix, args.document, *model, args.tokens))
        else:
            print(describe(args.prefix, (args.seq_length, args.target_length)))
        if args.check:
            print(check(args.prefix, args.vocab_size))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
