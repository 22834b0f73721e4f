# SPDX-License-Identifier: Apache-2.0
"""Training and evaluation of the demo, each with a progress bar."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_cream import torchrun
from megatron_cream.mcore import cpu

MODEL = [
    *("--num-layers", "3", "--hidden-size", "128", "--ffn-hidden-size", "384"),
    *("--num-attention-heads", "4", "--swiglu", "--normalization", "RMSNorm"),
    *("--disable-bias-linear", "--position-embedding-type", "rope"),
    *("--attention-dropout", "0", "--hidden-dropout", "0", "--init-method-std", "0.05"),
    "--untie-embeddings-and-output-weights",
]
TRAINING = [
    *("--seq-length", "256", "--max-position-embeddings", "256"),
    *("--micro-batch-size", "4", "--global-batch-size", "8"),
    *("--min-lr", "0", "--lr-decay-style", "cosine", "--clip-grad", "1.0"),
    *("--weight-decay", "0.01", "--adam-beta2", "0.95"),
    *("--eval-iters", "0", "--eval-interval", "1000000", "--num-workers", "0"),
    *("--split", "100,0,0", "--no-create-attention-mask-in-dataloader"),
    *("--tokenizer-type", "NullTokenizer", "--vocab-size", "1024"),
    *("--make-vocab-size-divisible-by", "1", "--log-interval", "10"),
]
_ITERATION = re.compile(r"iteration\s+(\d+)/\s*\d+ .*lm loss: (\S+)")


def pretrain(folder: Path, name: str, steps: int, flags: list[str]) -> None:
    """Run Megatron's trainer on two ranks; its output goes to ``folder/name.log``.

    A run that was trained to its end with the same flags, text and first weights is not repeated.

    Raises:
        SystemExit: training failed; the end of the log is printed.
    """
    arguments = [
        *("-m", "megatron_cream.pretrain", "--cpu"),
        *(*MODEL, *TRAINING, "--data-path", str(folder / "train"), "--train-iters", str(steps)),
        *("--lr-warmup-iters", str(max(1, steps // 20)), "--save", str(folder / name)),
        *("--save-interval", str(steps), "--no-save-optim", *flags),
    ]
    mark, made_of = folder / f"{name}.json", _made_of(folder, arguments)
    if mark.exists() and mark.read_text() == made_of:
        print(f"train {name}: {folder / name} is there")
        return
    mark.unlink(missing_ok=True)
    shutil.rmtree(folder / name, ignore_errors=True)
    _train(folder, name, steps, arguments)
    mark.write_text(made_of)


def _made_of(folder: Path, arguments: list[str]) -> str:
    """Return what decides a run's result, as JSON."""
    text = hashlib.sha256((folder / "train.bin").read_bytes()).hexdigest()
    first, flag = None, "--pretrained-checkpoint"
    if flag in arguments:
        first = Path(arguments[arguments.index(flag) + 1] + ".json").read_text()
    return json.dumps({"arguments": arguments, "text": text, "first": first}, indent=2) + "\n"


def _train(folder: Path, name: str, steps: int, arguments: list[str]) -> None:
    command = torchrun.command(2, *arguments)
    log = folder / f"{name}.log"
    lines = [" ".join(command)]
    with (
        log.open("w") as file,
        tqdm(total=steps, desc=f"train {name}", unit="step") as bar,
        subprocess.Popen(
            command,
            env=torchrun.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process,
    ):
        file.write(lines[0] + "\n")
        for line in process.stdout:
            file.write(line)
            file.flush()
            lines.append(line.rstrip())
            if found := _ITERATION.search(line):
                bar.update(int(found[1]) - bar.n)
                bar.set_postfix(loss=f"{float(found[2]):.3f}")
    if process.returncode:
        errors = [line for line in lines if line.startswith("error:")] or lines[-20:]
        raise SystemExit("\n".join([*errors, f"training {name} failed; see {log}"]))


def perplexities(
    folder: Path,
    run: str,
    title: str,
    lengths: tuple[int, ...],
    documents: int,
    document_tokens: int,
    changes: dict[str, Any],
) -> dict[str, Any]:
    """Return the results of one run's checkpoint, with other settings if given."""
    cpu.install()
    from megatron_cream.evaluation.evaluation_settings import EvaluationSettings
    from megatron_cream.evaluation.open_model import open_model
    from megatron_cream.evaluation.perplexity import score_perplexity

    settings = EvaluationSettings(
        tasks=["perplexity"],
        checkpoint=str(folder / run),
        data=str(folder / "held-out"),
        lengths=lengths,
        documents=documents,
        document_tokens=document_tokens,
        batch_tokens=4096,
        name=title,
        **changes,
    )
    return score_perplexity(settings, open_model(settings))


def export(folder: Path, run: str, name: str) -> str:
    """Write a run's model for transformers, its tokenizer beside it; return lines that load it."""
    from megatron_cream.checkpoint.export_hf import export_checkpoint

    output = folder / name
    shutil.rmtree(output, ignore_errors=True)
    export_checkpoint(str(folder / run), str(output), quiet=True)
    shutil.copytree(folder / "tokenizer", output, dirs_exist_ok=True)
    return (
        "    from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"    model = AutoModelForCausalLM.from_pretrained({str(output)!r})\n"
        f"    tokenizer = AutoTokenizer.from_pretrained({str(output)!r})"
    )
