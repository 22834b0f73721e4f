# SPDX-License-Identifier: Apache-2.0
"""Extend the context window of a small model, from text to a picture, on two CPU cores.

    make demo                  # the Python standard library as text
    make demo INPUT=my/texts   # files or folders of your own
    make demo ROPE=linear      # another interpolation than yarn: linear, ntk, clex ...

Trains a tokenizer and a small GPT at N = 256 tokens. Then ``megatron-cream extend`` makes it one of
T = 2048, with PoSE and with CREAM, while still training at 256: from a Hugging Face folder to a
Hugging Face folder. Perplexities on held-out documents compare them. Started again, it does what is
left: another ROPE takes the small GPT that is there.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from megatron_cream import torchrun
from megatron_cream.checkpoint.iterations import TRACKER
from megatron_cream.errors import one_line_errors
from megatron_cream.extend.extend import extend
from megatron_cream.extend.recipe import ExtendSettings
from megatron_cream.extend.steps import RecipeStep, run_step

# The demo is about two CPU cores, also on a machine that has a GPU.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import corpus  # noqa: E402

from megatron_cream.evaluation import pictures  # noqa: E402
from megatron_cream.evaluation.result_files import read_result  # noqa: E402
from megatron_cream.evaluation.results import joined_table  # noqa: E402
from megatron_cream.rope import SCALINGS  # noqa: E402

N, T = 256, 2048
ROPE = "yarn"
LENGTHS = (256, 512, 1024, 2048)
VOCABULARY = 1024
BASE_STEPS, EXTENSION_STEPS = 800, 80
BATCH, MICRO_BATCH = 8, 4
PROCESSES = 2
BASE = [
    *("--num-layers", "3", "--hidden-size", "128", "--ffn-hidden-size", "384"),
    *("--num-attention-heads", "4", "--swiglu", "--normalization", "RMSNorm"),
    *("--disable-bias-linear", "--position-embedding-type", "rope"),
    *("--attention-dropout", "0", "--hidden-dropout", "0", "--init-method-std", "0.05"),
    *("--untie-embeddings-and-output-weights", "--sample-unit", "packed"),
    *("--seq-length", str(N), "--max-position-embeddings", str(N), "--split", "100,0,0"),
    *("--micro-batch-size", str(MICRO_BATCH), "--global-batch-size", str(BATCH)),
    *("--lr", "4e-3", "--min-lr", "0", "--lr-decay-style", "cosine", "--clip-grad", "1.0"),
    *("--lr-warmup-iters", str(BASE_STEPS // 20), "--train-iters", str(BASE_STEPS)),
    *("--weight-decay", "0.01", "--adam-beta2", "0.95", "--log-interval", "10"),
    *("--eval-iters", "0", "--eval-interval", "1000000", "--num-workers", "0"),
    *("--tokenizer-type", "NullTokenizer", "--vocab-size", str(VOCABULARY)),
    *("--make-vocab-size-divisible-by", "1", "--no-create-attention-mask-in-dataloader"),
    *("--save-interval", str(BASE_STEPS), "--no-save-optim"),
]


def main() -> None:
    """Run the demo from text to table."""
    args = parse_args()
    started = time.monotonic()
    with one_line_errors():
        texts = corpus.read(args.input)
        # A folder per text: what was trained on another is never taken for this one.
        folder = Path(args.output) / corpus.digest(texts)
        folder.mkdir(parents=True, exist_ok=True)
        corpus.prepare(texts, folder, VOCABULARY, N, T + 1)
        base = make_base(folder)
        results = [*extensions(folder, base, args.rope)]
    table = folder / f"perplexity-{args.rope}.json"
    seconds = round(time.monotonic() - started, 1)
    write(table, results, args.rope, seconds)
    documents = results[0]["lengths"][0]["documents"]
    print(f"\nPerplexity on {documents} held-out documents, by context length in tokens\n")
    print(joined_table(results).split("\n\n", 1)[1])
    print(f"\n{seconds:.0f} s. Table: {table}  picture: {table.with_suffix('.png')}", end="")
    output = folder / f"cream-{args.rope}"
    print(f"  logs: {folder / 'logs'}, {output}.work/logs\nExported. In transformers:")
    print("    from transformers import AutoModelForCausalLM, AutoTokenizer")
    print(f"    model = AutoModelForCausalLM.from_pretrained({str(output)!r})")
    print(f"    tokenizer = AutoTokenizer.from_pretrained({str(output)!r})")


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


def make_base(folder: Path) -> Path:
    """Train the small GPT with Megatron's trainer; return its Hugging Face folder."""
    run, model = folder / "base-run", folder / "base"
    places = ("--data-path", str(folder / "train"), "--save", str(run), "--load", str(run))
    flags = ("-m", "megatron_cream.pretrain", "--cpu", *BASE, *places)
    command = torchrun.command(PROCESSES, *flags)
    step(folder, "train-base", run / TRACKER, command, BASE_STEPS)
    if not model.exists():
        words = ("export", "--checkpoint", str(run), "--output", str(model))
        step(folder, "export-base", model, tool(*words))
    shutil.copytree(folder / "tokenizer", model, dirs_exist_ok=True)
    return model


def extensions(folder: Path, base: Path, rope: str) -> list[dict[str, Any]]:
    """Extend the base model in two ways; return the perplexities of all models."""
    works = {"pose": extend_by(folder, base, "pose", rope)}
    works["cream"] = extend_by(folder, base, "cream", rope, reuse=str(works["pose"]))
    before = read_result(works["pose"] / "before" / "perplexity")
    results = [{**before, "name": "base"}]
    if not SCALINGS[rope].trained_by:  # those have no angles without weights of their own
        results.append(score_interpolated(folder, base, rope, before))
    for name, title in (("pose", "PoSE"), ("cream", "CREAM")):
        results.append({**read_result(works[name] / "after" / "perplexity"), "name": title})
    return results


def extend_by(folder: Path, base: Path, strategy: str, rope: str, reuse: str | None = None) -> Path:
    """Run ``megatron-cream extend``; return its working folder."""
    settings = ExtendSettings(
        hf=str(base),
        text=(str(folder / "train.jsonl"),),
        held_out=(str(folder / "held-out.jsonl"),),
        target_length=T,
        output=str(folder / f"{strategy}-{rope}"),
        cpu=True,
        gpus=PROCESSES,
        position_strategy=strategy,
        rope_interpolation=rope,
        retrieval_share=0.0,  # 256 tokens are too few for a document with questions
        steps=EXTENSION_STEPS,
        global_batch_size=BATCH,
        micro_batch_size=MICRO_BATCH,
        lr=1e-3,
        lengths=LENGTHS,
        tasks=("perplexity",),
        workers=1,
        reuse=reuse,
    )
    extend(settings)
    return settings.work_folder


def score_interpolated(folder: Path, base: Path, rope: str, like: dict[str, Any]) -> dict[str, Any]:
    """Return the perplexities of the base model with RoPE interpolated, and no training."""
    output = folder / f"interpolated-{rope}"
    words = [
        *("evaluate", "perplexity", "--hf", str(base), "--name", "base, interpolated"),
        *("--rope-interpolation", rope, "--rope-factor", str(T // N)),
        *("--data", like["data"], "--documents", str(like["documents"])),
        *("--document-tokens", str(like["document_tokens"]), "--output", str(output)),
        *("--lengths", *map(str, LENGTHS)),
    ]
    step(folder, f"score-interpolated-{rope}", output / "result.json", tool(*words))
    return read_result(output)


def step(
    folder: Path, name: str, makes: Path, command: list[str], trains: int | None = None
) -> None:
    """Run a command unless it is done, as ``extend`` runs its own."""
    logs = folder / "logs"
    logs.mkdir(exist_ok=True)
    run_step(RecipeStep(name, makes, command, trains), logs)


def tool(*words: str) -> list[str]:
    """Return the command line of ``megatron-cream``."""
    return [sys.executable, "-m", "megatron_cream", *words]


def write(table: Path, results: list[dict[str, Any]], rope: str, seconds: float) -> None:
    """Write the table as JSON, and a picture of it."""
    record = {
        "rope_interpolation": rope,
        "train_length": N,
        "target_length": T,
        "base_steps": BASE_STEPS,
        "extension_steps": EXTENSION_STEPS,
        "documents": results[0]["lengths"][0]["documents"],
        "perplexity": {result["name"]: result["lengths"] for result in results},
        "seconds": seconds,
    }
    table.write_text(json.dumps(record, indent=2) + "\n")
    trained = [{**result, "window": N} for result in results]
    pictures.draw(trained, table.with_suffix(".png"), window="trained window {}")


if __name__ == "__main__":
    sys.exit(main())
