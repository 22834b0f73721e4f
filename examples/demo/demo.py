# SPDX-License-Identifier: Apache-2.0
"""Extend the context window of a small model, from text to a picture, on two CPU cores.

    make demo                  # the Python standard library as text
    make demo INPUT=my/texts   # files or folders of your own
    make demo ROPE=linear      # another interpolation than yarn: linear, ntk, clex ...

Trains a tokenizer and a small GPT at N = 256 tokens, extends it to T = 2048 with CREAM and with
PoSE while still training at 256, compares perplexities on held-out documents, and exports the
model for transformers. Started again, it does what is left: another ROPE takes the small GPT that
is there.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from megatron_cream.errors import one_line_errors

# The demo is about two CPU cores, also on a machine that has a GPU.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import corpus  # noqa: E402
import jobs  # noqa: E402
import picture  # noqa: E402

from megatron_cream.evaluation.results import joined_table  # noqa: E402
from megatron_cream.rope import SCALINGS  # noqa: E402

N, T = 256, 2048
ROPE = "yarn"
LENGTHS = (256, 512, 1024, 2048)
VOCABULARY = 1024
BASE_STEPS, EXTENSION_STEPS = 800, 80
DOCUMENT_TOKENS = T + 1
DOCUMENTS = 12


def main() -> None:
    """Run the demo from text to table."""
    args = parse_args()
    started = time.monotonic()
    folder, suffix = Path(args.output), "" if args.rope == ROPE else f"-{args.rope}"
    folder.mkdir(parents=True, exist_ok=True)
    with one_line_errors():
        data = corpus.prepare(args.input, folder, VOCABULARY, N, DOCUMENT_TOKENS)
    train(folder, args.rope, suffix)
    results = evaluate(folder, data.documents_for(DOCUMENTS), args.rope, suffix)
    record = {
        "rope_interpolation": args.rope,
        "train_length": N,
        "target_length": T,
        "base_steps": BASE_STEPS,
        "extension_steps": EXTENSION_STEPS,
        "documents": data.documents_for(DOCUMENTS),
        "perplexity": {result["name"]: result["lengths"] for result in results},
        "seconds": round(time.monotonic() - started, 1),
    }
    table = folder / f"perplexity{suffix}.json"
    table.write_text(json.dumps(record, indent=2) + "\n")
    picture.draw(results, N, table.with_suffix(".png"))
    print(
        f"\nPerplexity on {record['documents']} held-out documents, by context length in tokens\n"
    )
    print(joined_table(results).split("\n\n", 1)[1])
    print(f"\n{record['seconds']:.0f} s. Table: {table}", end="")
    print(f"  picture: {table.with_suffix('.png')}  logs: {folder}/*.log")
    loads = jobs.export(folder, f"cream{suffix}", f"extended{suffix}")
    print(f"\nExported. In transformers:\n{loads}")


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", nargs="*", help="text files, JSONL files or folders")
    parser.add_argument("--output", default="runs/demo", help="folder for everything it makes")
    names = [name for name, cls in SCALINGS.items() if cls.by_factor and not cls.evaluation_only]
    parser.add_argument("--rope", choices=names, default=ROPE, help="interpolation")
    return parser.parse_args()


def train(folder: Path, rope: str, suffix: str) -> None:
    """Train the base model, then extend it in two ways."""
    jobs.pretrain(folder, "base", BASE_STEPS, ["--sample-unit", "packed", "--lr", "4e-3"])
    for strategy in ("pose", "cream"):
        flags = [
            *("--pretrained-checkpoint", str(folder / "base")),
            *("--target-length", str(T), "--sample-unit", "window", "--lr", "1e-3"),
            *("--position-strategy", strategy, "--rope-interpolation", rope),
        ]
        jobs.pretrain(folder, strategy + suffix, EXTENSION_STEPS, flags)


def evaluate(folder: Path, documents: int, rope: str, suffix: str) -> list[dict[str, Any]]:
    """Return the perplexities of every model, as tools/evaluate.py has them."""
    models = {"base": ("base", {})}
    if not SCALINGS[rope].trained_by:  # those have no angles without weights of their own
        changes = {"rope_interpolation": rope, "rope_factor": T / N}
        models["base, interpolated"] = ("base", changes)
    models |= {"PoSE": (f"pose{suffix}", {}), "CREAM": (f"cream{suffix}", {})}
    return [
        jobs.perplexities(folder, run, name, LENGTHS, documents, DOCUMENT_TOKENS, changes)
        for name, (run, changes) in models.items()
    ]


if __name__ == "__main__":
    sys.exit(main())
