# SPDX-License-Identifier: Apache-2.0
"""Turn conversations into documents by a tokenizer's chat template. See docs/examples.md.

    python tools/render_chat.py --input sharegpt.jsonl --tokenizer-model Llama-2-7b-chat-hf \\
        --output conversations.jsonl
    python tools/preprocess_data.py --input conversations.jsonl --min-tokens 4096 \\
        --tokenizer-type HuggingFaceTokenizer --tokenizer-model Llama-2-7b-chat-hf \\
        --output-prefix conversations

One conversation a line: {"messages": [{"role", "content"}, ...]}, or ShareGPT's
{"conversations": [{"from", "value"}, ...]}. All of a document is trained, the user's words too.
"""

from __future__ import annotations

import argparse
import sys

from megatron_cream.corpus.chat import render_files
from megatron_cream.corpus.command_line import Parser
from megatron_cream.errors import one_line_errors


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="FILE", help="JSONL")
    add("--tokenizer-model", required=True, metavar="FOLDER", help="with the chat template")
    add("--output", required=True, metavar="FILE", help="JSONL with a text a line")
    add("--on-error", choices=("fail", "skip"), default="fail", help="at a bad conversation")
    add("--overwrite", action="store_true", help="replace --output")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Run the tool; bad input ends in one line and exit status 2."""
    args = parse_args(argv)
    with one_line_errors():
        written, skipped = render_files(
            args.input,
            args.output,
            args.tokenizer_model,
            skip=args.on_error == "skip",
            overwrite=args.overwrite,
        )
    print(f"{args.output}: {written} conversations, {skipped} skipped")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
