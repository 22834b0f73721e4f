# SPDX-License-Identifier: Apache-2.0
"""Runs Megatron's trainer at several layouts on one and two GPUs and prints one table.

    python tests/gpu/layouts.py [part of a layout's name, for instance CP2]

Every run starts from the same weights and sees the same samples; the table has the largest
difference of its ten losses to one GPU's. A row with the same text and other angles says how much
angles matter, and so what the differences above it mean.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

FLAGS = [
    *("--num-layers", "4", "--hidden-size", "512", "--num-attention-heads", "8"),
    *("--group-query-attention", "--num-query-groups", "4"),
    *("--swiglu", "--normalization", "RMSNorm", "--disable-bias-linear"),
    *("--seq-length", "512", "--max-position-embeddings", "512", "--target-length", "4096"),
    *("--position-embedding-type", "rope", "--no-create-attention-mask-in-dataloader"),
    *("--micro-batch-size", "2", "--global-batch-size", "8", "--train-iters", "10", "--bf16"),
    *("--lr", "1e-3", "--min-lr", "1e-4", "--eval-iters", "0", "--eval-interval", "100"),
    *("--split", "100,0,0", "--tokenizer-type", "NullTokenizer", "--vocab-size", "1000"),
    *("--make-vocab-size-divisible-by", "64", "--num-workers", "0", "--log-interval", "1"),
    *("--attention-dropout", "0", "--hidden-dropout", "0", "--init-method-std", "0.05"),
    "--no-gradient-accumulation-fusion",
]
_LOSS = re.compile(r"iteration\s+(\d+)/.*lm loss: (\S+)")


@dataclass(frozen=True)
class Layout:
    """A row: GPUs, Megatron's flags, and how far its losses may be from one GPU's."""

    gpus: int
    flags: tuple[str, ...]
    tolerance: float


BF16 = 0.02  # of losses near 7; rounding of bf16 sums in another order
LAYOUTS = {
    "1 GPU, unfused RoPE": Layout(1, ("--no-rope-fusion",), BF16),
    "1 GPU, micro-batch 1": Layout(1, ("--micro-batch-size", "1"), BF16),
    "1 GPU, fp8": Layout(1, ("--fp8-format", "hybrid"), 0.1),
    "DP2, distributed optimizer": Layout(2, ("--use-distributed-optimizer",), BF16),
    "TP2, sequence parallel": Layout(
        2, ("--tensor-model-parallel-size", "2", "--sequence-parallel"), BF16
    ),
    "PP2": Layout(2, ("--pipeline-model-parallel-size", "2"), BF16),
    "CP2": Layout(2, ("--context-parallel-size", "2"), BF16),
    "CP2, unfused RoPE": Layout(2, ("--context-parallel-size", "2", "--no-rope-fusion"), BF16),
}
OTHER_ANGLES = ("--rope-factor", "16")


def train(folder: Path, name: str, gpus: int, flags: list[str]) -> tuple[dict[int, float], str]:
    """Return losses by iteration and the log of one run.

    Raises:
        RuntimeError: it failed; the end of its log is the message.
    """
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(gpus), "-m", "megatron_cream.pretrain", *FLAGS, *flags),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    log = done.stdout + done.stderr
    (folder / f"{re.sub(r'[^a-z0-9]+', '-', name.lower())}.log").write_text(log)
    losses = {int(i): float(loss) for i, loss in _LOSS.findall(log)}
    if done.returncode:
        raise RuntimeError(f"{name} failed:\n{log[-4000:]}")
    return losses, log


def table(folder: Path, gpus: int, part: str = "") -> list[tuple[str, float, float, str]]:
    """Return (layout, largest difference, tolerance, RoPE kernel) for layouts that fit.

    ``part`` keeps the layouts whose name contains it.
    """
    from support.runs import write_dataset

    data = ["--data-path", write_dataset(folder / "data", [6000] * 40, vocabulary=1000)]
    first = ["--train-iters", "1", "--save", str(folder / "initial"), "--save-interval", "1"]
    train(folder, "initial", 1, [*data, *first])
    start = [*data, "--pretrained-checkpoint", str(folder / "initial")]
    reference, log = train(folder, "1 GPU", 1, start)
    rows = [("1 GPU", 0.0, 0.0, _kernel(log))]
    for name, layout in LAYOUTS.items():
        if layout.gpus <= gpus and part in name:
            losses, log = train(folder, name, layout.gpus, [*start, *layout.flags])
            rows.append((name, _difference(losses, reference), layout.tolerance, _kernel(log)))
            print(rows[-1], flush=True)
    losses, log = train(folder, "other angles", 1, [*start, *OTHER_ANGLES])
    rows.append(("1 GPU, other angles", _difference(losses, reference), 0.0, _kernel(log)))
    return rows


def _difference(a: dict[int, float], b: dict[int, float]) -> float:
    if sorted(a) != sorted(b) or len(a) != 10:
        raise RuntimeError(f"the runs have {len(a)} and {len(b)} losses, both should have 10")
    return max(abs(a[i] - b[i]) for i in a)


def _kernel(log: str) -> str:
    return re.search(r"rope kernel\s+(.*)", log)[1].strip()


def main() -> int:
    """Print the table; exit status 1 if a layout is further away than it may be."""
    import torch

    gpus = torch.cuda.device_count()
    if not gpus:
        print("error: there is no GPU: these layouts run Megatron's GPU kernels", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        rows = table(Path(folder), gpus, *sys.argv[1:2])
    print(f"\n{torch.cuda.get_device_name()} x {gpus}, bf16, 10 iterations\n")
    print("| layout | largest difference of a loss | allowed | RoPE |\n|---|---|---|---|")
    for name, difference, tolerance, kernel in rows:
        print(f"| {name} | {difference:.5f} | {tolerance or '':} | {kernel} |")
    return int(any(difference > tolerance > 0 for _, difference, tolerance, _ in rows))


if __name__ == "__main__":
    sys.exit(main())
