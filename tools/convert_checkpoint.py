# SPDX-License-Identifier: Apache-2.0
"""Hugging Face checkpoints to Megatron's format and back, on a CPU, at any size.

    python tools/convert_checkpoint.py import --hf meta-llama/Llama-2-7b-hf --output base
    python tools/convert_checkpoint.py export --checkpoint runs/cream --output llama-2-7b-32k

An import is what --pretrained-checkpoint starts from, at any layout; an export is what
transformers, vLLM and SGLang load.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
import warnings

from megatron_cream.errors import UserError, one_line_errors

_TYPES = ("float32", "bfloat16", "float16")
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    tasks = parser.add_subparsers(dest="task", required=True)
    add = tasks.add_parser("import", help="Hugging Face to Megatron").add_argument
    add("--hf", required=True, help="folder, or the name of a repository on the hub")
    add("--output", required=True, help="new folder, for --pretrained-checkpoint")
    add("--dtype", choices=_TYPES, help="type of the weights (default: the one they have)")
    add = tasks.add_parser("export", help="Megatron to Hugging Face").add_argument
    add("--checkpoint", required=True, help="folder given to --save, or one iteration in it")
    add("--output", required=True, help="new folder")
    add("--hf", help="where config and tokenizer come from (default: the import it began with)")
    add("--dtype", choices=_TYPES, help="type of the weights (default: the one they have)")
    add("--max-shard-size", default="5GB", help="of a safetensors file, as 500MB or 5GB")
    return parser.parse_args(argv)


def shard_bytes(text: str) -> int:
    """Return bytes for a size like 500MB."""
    found = re.fullmatch(r"(\d{1,9})\s*([KMG]B)", text.strip(), re.IGNORECASE)
    if not found or int(found[1]) == 0:
        raise UserError(f"--max-shard-size is {text!r}: it must be a size such as 500MB or 5GB")
    return int(found[1]) * _UNITS[found[2].upper()]


def main(argv: list[str]) -> int:
    """Run the task; bad input ends in one line and exit status 2."""
    args = parse_args(argv)
    # Megatron says on import which GPU packages are missing: none is needed here.
    warnings.filterwarnings("ignore", category=UserWarning)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    with one_line_errors():
        print(convert(args))
    return 0


def convert(args: argparse.Namespace) -> str:
    """Run the task and return what to tell."""
    import torch

    dtype = getattr(torch, args.dtype) if args.dtype else None
    if args.task == "import":
        from megatron_cream.checkpoint.import_hf import describe, import_checkpoint

        return describe(import_checkpoint(args.hf, args.output, dtype), args.output)
    most = shard_bytes(args.max_shard_size)
    from megatron_cream.checkpoint.export_hf import describe, export_checkpoint

    return describe(
        export_checkpoint(args.checkpoint, args.output, args.hf, dtype, most), args.output
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
