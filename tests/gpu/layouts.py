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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.ranks import read_losses  # noqa: E402
from support.runs import write_dataset  # noqa: E402

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

BF16 = 0.02  # of losses near 7; rounding of bf16 sums in another order
FP8 = 0.2
RUNS_AT_ONCE = 4
Result = tuple[dict[int, float], str]


@dataclass(frozen=True)
class Layout:
    """A row: GPUs, Megatron's flags, and how far its losses may be from the reference's.

    Attributes:
        then: flags after iteration 5, from a checkpoint.
        role: ``reference`` of the rows up to the next one, or ``angles``, which says how far
            losses are apart when text is the same and angles are not.
    """

    gpus: int
    flags: tuple[str, ...] = ()
    tolerance: float = BF16
    then: tuple[str, ...] | None = None
    role: str = ""


@dataclass(frozen=True)
class Row:
    """A layout and the largest difference of its losses."""

    name: str
    difference: float
    layout: Layout
    kernel: str

    def line(self) -> str:
        """Return the row in Markdown."""
        allowed = "" if self.layout.role else self.layout.tolerance
        return f"| {self.name} | {self.difference:.5f} | {allowed} | {self.kernel} |"


TP2 = ("--tensor-model-parallel-size", "2", "--sequence-parallel")
PP2 = ("--pipeline-model-parallel-size", "2")
VIRTUAL = ("--num-layers-per-virtual-pipeline-stage", "1")  # makes middle stages of two GPUs
CP2 = ("--context-parallel-size", "2")
SHARDED = ("--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable")
TE_LOSS = ("--te-cross-entropy",)
UNFUSED = ("--no-rope-fusion",)
OTHER_ANGLES = ("--rope-factor", "16")
PACKED = ("--sample-unit", "packed-documents", "--micro-batch-size", "1")
CLEX = ("--rope-interpolation", "clex", "--position-strategy", "randpos")
LAYOUTS = {
    "1 GPU": Layout(1, role="reference"),
    "1 GPU, unfused RoPE": Layout(1, UNFUSED),
    "1 GPU, micro-batch 1": Layout(1, ("--micro-batch-size", "1")),
    "1 GPU, TE cross entropy": Layout(1, TE_LOSS),
    "1 GPU, fp8": Layout(1, ("--fp8-format", "hybrid"), FP8),
    "DP2, distributed optimizer": Layout(2, ("--use-distributed-optimizer",)),
    "TP2, sequence parallel": Layout(2, TP2),
    "TP2, TE cross entropy": Layout(2, (*TP2, *TE_LOSS)),
    "PP2": Layout(2, PP2),
    "PP2, virtual stages": Layout(2, (*PP2, *VIRTUAL)),
    "PP2, then DP2 from its checkpoint": Layout(2, (*PP2, *SHARDED), then=SHARDED),
    "CP2": Layout(2, CP2),
    "CP2, unfused RoPE": Layout(2, (*CP2, *UNFUSED)),
    "other angles": Layout(1, OTHER_ANGLES, role="angles"),
    "packed documents, 1 GPU": Layout(1, PACKED, role="reference"),
    "packed, unfused RoPE": Layout(1, (*PACKED, *UNFUSED)),
    "packed, TP2, sequence parallel": Layout(2, (*PACKED, *TP2)),
    "packed, PP2": Layout(2, (*PACKED, *PP2)),
    "packed, PP2, virtual stages": Layout(2, (*PACKED, *PP2, *VIRTUAL)),
    "packed, CP2": Layout(2, (*PACKED, *CP2)),
    "packed, CP2, unfused RoPE": Layout(2, (*PACKED, *CP2, *UNFUSED)),
    "packed, other angles": Layout(1, (*PACKED, *OTHER_ANGLES), role="angles"),
    "CLEX, 1 GPU": Layout(1, CLEX, role="reference"),
    "CLEX, DP2, distributed optimizer": Layout(2, (*CLEX, "--use-distributed-optimizer")),
    "CLEX, TP2, sequence parallel": Layout(2, (*CLEX, *TP2)),
    "CLEX, PP2": Layout(2, (*CLEX, *PP2)),
    "CLEX, CP2": Layout(2, (*CLEX, *CP2)),
    "CLEX, other positions": Layout(1, (*CLEX, "--position-seed", "7"), role="angles"),
}


def train(folder: Path, name: str, gpus: int, flags: list[str]) -> Result:
    """Return losses by iteration and the log of one run.

    Raises:
        RuntimeError: it failed; the end of its log is the message.
    """
    own = folder / re.sub(r"[^a-z0-9]+", "-", name.lower())
    own.mkdir()
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(gpus), str(Path(__file__).with_name("rank.py")), str(own)),
    ]
    done = subprocess.run([*command, *FLAGS, *flags], capture_output=True, text=True, timeout=300)
    log = done.stdout + done.stderr
    (own / "log").write_text(log)
    if done.returncode:
        raise RuntimeError(f"{name} failed:\n{log[-4000:]}")
    return read_losses(own, gpus), log


def table(folder: Path, gpus: int, part: str = "") -> list[Row]:
    """Return the rows of the layouts that fit, plain ones first.

    ``part`` keeps the layouts whose name contains it. Models are small: several runs share GPUs.
    """
    # Some longer than T, some shorter than a sample, none too short for packed CREAM.
    lengths = [6000, 200, 300, 450] * 20
    data = ["--data-path", write_dataset(folder / "data", lengths, vocabulary=1000)]
    first = ["--train-iters", "1", "--save", str(folder / "initial"), "--save-interval", "1"]
    train(folder, "initial", 1, [*data, *first])
    start = [*data, "--pretrained-checkpoint", str(folder / "initial")]
    chosen = {
        name: layout
        for name, layout in LAYOUTS.items()
        if layout.gpus <= gpus and (part in name or layout.role)
    }
    with ThreadPoolExecutor(RUNS_AT_ONCE) as pool:
        runs = {
            name: pool.submit(_run, folder, name, layout, start) for name, layout in chosen.items()
        }
        rows = []
        for name, layout in chosen.items():
            losses, log = runs[name].result()
            if layout.role == "reference":
                reference = losses
            rows.append(Row(name, _difference(losses, reference), layout, _kernel(log)))
            print(rows[-1].line(), flush=True)
    return rows


def _run(folder: Path, name: str, layout: Layout, start: list[str]) -> Result:
    if layout.then is None:
        return train(folder, name, layout.gpus, [*start, *layout.flags])
    saved = folder / "half"
    save = ["--save", str(saved), "--load", str(saved), "--save-interval", "5"]
    half = [*start, *save, *layout.flags, "--exit-interval", "5"]
    before, _ = train(folder, f"{name} before", layout.gpus, half)
    after, log = train(folder, f"{name} after", layout.gpus, [*start, *save, *layout.then])
    if set(before) & set(after):
        raise RuntimeError(f"trained twice: {sorted(set(before) & set(after))}")
    return before | after, log


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
    print("\n".join(row.line() for row in rows))
    return int(bool(too_far(rows)))


def too_far(rows: list[Row]) -> list[str]:
    """Return the rows that differ by more than they may, or by as much as other angles do."""
    angles = min(row.difference for row in rows if row.layout.role == "angles")
    return [
        row.line()
        for row in rows
        if not row.layout.role and row.difference > min(row.layout.tolerance, angles)
    ]


if __name__ == "__main__":
    sys.exit(main())
