# SPDX-License-Identifier: Apache-2.0
"""The command ``megatron-cream check-install``: from text to two training steps, on a CPU.

The images of the Dockerfile run it while they are built. A GPU of the machine is left alone.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import math
import re
import subprocess
import tempfile
from pathlib import Path

from megatron_cream import torchrun
from megatron_cream.errors import UserError
from megatron_cream.mcore import patches

MODULES = (
    "megatron_cream.positions",
    "megatron_cream.rope",
    "megatron_cream.corpus.preprocess",
    "megatron_cream.planning.propose",
    "megatron_cream.checkpoint.iterations",
    "megatron_cream.evaluation.evaluation_tasks",
    "megatron_cream.training.arguments",
)
PACKAGES = ("megatron-core", "torch", "transformers", "transformer-engine", "numpy")
TRAINING = [
    *("--num-layers", "1", "--hidden-size", "32", "--num-attention-heads", "2"),
    *("--seq-length", "64", "--max-position-embeddings", "64", "--target-length", "256"),
    *("--position-embedding-type", "rope", "--no-create-attention-mask-in-dataloader"),
    *("--micro-batch-size", "1", "--global-batch-size", "2", "--train-iters", "2"),
    *("--lr", "1e-3", "--eval-iters", "0", "--eval-interval", "100", "--log-interval", "1"),
    *("--split", "100,0,0", "--num-workers", "0", "--tokenizer-type", "NullTokenizer"),
    *("--vocab-size", "257", "--make-vocab-size-divisible-by", "1"),
]
_LOSS = re.compile(r"lm loss: (\S+)")


EXAMPLES = """
    megatron-cream check-install
    megatron-cream check-install --patches     # what is replaced in Megatron, and why

Half a minute, no GPU and no network.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    parser.add_argument(
        "--patches", action="store_true", help="list the patches of Megatron, and check them alone"
    )


def run(args: argparse.Namespace) -> None:
    """Print a line for each thing that works."""
    if args.patches:
        print("\n".join([*patches.listing(), patches.validate_all()]))
        return
    with tempfile.TemporaryDirectory() as folder:
        print("\n".join(check_install(Path(folder))))


def check_install(folder: Path) -> list[str]:
    """Import, write a dataset and train on it; return a line for each thing found to work.

    Args:
        folder: for the dataset and the run, a few hundred kB.

    Raises:
        ImportError: a module cannot be imported, or a name that is patched has gone.
        UserError: the training run failed, with its error or the end of what it printed.
    """
    for name in MODULES:
        importlib.import_module(name)
    lines = [", ".join(_versions()), f"{len(MODULES)} modules of megatron_cream imported"]
    lines.append(patches.validate_all())
    prefix = _write_dataset(folder)
    lines.append("text made into an indexed dataset")
    losses = _train(prefix, folder)
    return [*lines, f"{len(losses)} training steps on a CPU, losses {losses}"]


def _versions() -> list[str]:
    # A damaged one, without metadata, has no name.
    names = (dist.metadata["Name"] or "" for dist in importlib.metadata.distributions())
    found = {name.lower().replace("_", "-") for name in names}
    return [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES if name in found]


def _write_dataset(folder: Path) -> Path:
    from megatron_cream.corpus.preprocess import PreprocessConfig, preprocess

    text = folder / "text.txt"
    text.write_text("A sample has N trained tokens and pretends to span T.\n" * 40)
    prefix = folder / "dataset"
    preprocess(
        PreprocessConfig(
            input=(str(text),),
            tokenizer_type="ByteLevelTokenizer",
            output_prefix=str(prefix),
            append_eod=True,
        ),
        progress=False,
    )
    return prefix


def _train(prefix: Path, folder: Path) -> list[float]:
    training = ("--cpu", *TRAINING, "--data-path", str(prefix))
    command = torchrun.command(1, "-m", "megatron_cream.pretrain", *training)
    environment = torchrun.environment(CUDA_VISIBLE_DEVICES="")
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    losses = [float(word) for word in _LOSS.findall(done.stdout)]
    if done.returncode or len(losses) != 2 or not all(map(math.isfinite, losses)):
        said = (done.stdout + done.stderr).splitlines()
        why = [line for line in said if line.startswith("error:")] or said[-30:]
        text = "\n".join(why)
        raise UserError(f"two training steps on a CPU: losses {losses}\n{text}")
    return losses
