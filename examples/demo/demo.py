# SPDX-License-Identifier: Apache-2.0
"""Extend the context window of a small model, from text to a picture, on two CPU cores.

    make demo                  # the Python standard library as text
    make demo INPUT=my/texts   # files or folders of your own

Trains a tokenizer and a small GPT at N = 256 tokens, extends it to T = 2048 with CREAM and with
PoSE while still training at 256, and compares perplexities on held-out documents.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

# The demo is about two CPU cores, also on a machine that has a GPU.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import corpus  # noqa: E402
import jobs  # noqa: E402
import picture  # noqa: E402

N, T = 256, 2048
LENGTHS = (256, 512, 1024, 2048)
VOCABULARY = 1024
BASE_STEPS, EXTENSION_STEPS = 800, 80
DOCUMENT_TOKENS = T + 1
DOCUMENTS = 12


def main() -> None:
    """Run the demo from text to table."""
    args = parse_args()
    started = time.monotonic()
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        data = corpus.prepare(args.input, folder, VOCABULARY, N, DOCUMENT_TOKENS)
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from None
    train(folder)
    table = evaluate(folder, data.documents_for(DOCUMENTS))
    record = {
        "train_length": N,
        "target_length": T,
        "base_steps": BASE_STEPS,
        "extension_steps": EXTENSION_STEPS,
        "documents": data.documents_for(DOCUMENTS),
        "perplexity": table,
        "seconds": round(time.monotonic() - started, 1),
    }
    (folder / "perplexity.json").write_text(json.dumps(record, indent=2) + "\n")
    picture.draw(table, N, folder / "perplexity.png")
    print(
        f"\nPerplexity on {record['documents']} held-out documents, by context length in tokens\n"
    )
    print(markdown(table))
    print(f"\n{record['seconds']:.0f} s. Table: {folder / 'perplexity.json'}", end="")
    print(f"  picture: {folder / 'perplexity.png'}  logs: {folder}/*.log")


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", nargs="*", help="text files, JSONL files or folders")
    parser.add_argument("--output", default="runs/demo", help="folder for everything it makes")
    return parser.parse_args()


def train(folder: Path) -> None:
    """Train the base model, then extend it in two ways."""
    jobs.pretrain(folder, "base", BASE_STEPS, ["--sample-unit", "packed", "--lr", "4e-3"])
    for strategy in ("pose", "cream"):
        flags = [
            *("--pretrained-checkpoint", str(folder / "base")),
            *("--target-length", str(T), "--sample-unit", "window", "--lr", "1e-3"),
            *("--position-strategy", strategy, "--rope-interpolation", "linear"),
        ]
        jobs.pretrain(folder, strategy, EXTENSION_STEPS, flags)


def evaluate(folder: Path, documents: int) -> dict[str, dict[int, float]]:
    """Return perplexities by model and length."""
    interpolated = {"rope_interpolation": "linear", "rope_factor": T / N}
    models = {
        "base": ("base", {}),
        "base, interpolated": ("base", interpolated),
        "PoSE": ("pose", {}),
        "CREAM": ("cream", {}),
    }
    return {
        name: jobs.perplexities(folder, run, name, LENGTHS, documents, DOCUMENT_TOKENS, changes)
        for name, (run, changes) in models.items()
    }


def markdown(table: dict[str, dict[int, float]]) -> str:
    """Return the table as Markdown."""
    lines = ["| model | " + " | ".join(map(str, LENGTHS)) + " |", "|---" * 5 + "|"]
    for name, row in table.items():
        lines.append(f"| {name} | " + " | ".join(f"{row[length]:.2f}" for length in LENGTHS) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
