# SPDX-License-Identifier: Apache-2.0
"""Evaluate a Megatron checkpoint on long text.

    python tools/evaluate.py perplexity --checkpoint runs/cream --data data/validation \\
        --lengths 256 512 1024 2048 --documents 16 --output runs/cream.json

Runs in one process, whatever layout saved the checkpoint; --cpu where there is no GPU.
"""

from __future__ import annotations

import argparse
import sys


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    tasks = parser.add_subparsers(dest="task", required=True)
    add = tasks.add_parser("perplexity", help="by context length").add_argument
    add("--checkpoint", required=True, help="folder given to --save, or one iteration in it")
    add("--data", required=True, help="indexed dataset, without .bin and .idx")
    add("--lengths", type=int, nargs="+", required=True, help="context lengths in tokens")
    add("--stride", type=int, help="tokens between windows (default: half the length)")
    add("--documents", type=int, default=16, help="documents to score")
    add("--document-tokens", type=int, help="tokens of each (default: twice the longest length)")
    add("--batch-tokens", type=int, default=8192, help="most tokens in one forward pass")
    add("--rope-interpolation", help="evaluate with another one than the checkpoint's own")
    add("--rope-factor", type=float, help="its factor")
    add("--output", help="JSON file to write")
    add("--cpu", action="store_true", help="run on a machine with no GPU")
    parser.set_defaults(title="perplexity")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Run the task; bad input ends in one line and exit status 2."""
    args = parse_args(argv)
    try:
        if args.cpu:
            from megatron_cream.training import cpu

            cpu.install()
        from megatron_cream.evaluation.run import run_perplexity

        print(run_perplexity(args))
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
