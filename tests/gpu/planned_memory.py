# SPDX-License-Identifier: Apache-2.0
"""Runs planned layouts on one and two GPUs and prints what was planned next to what happened.

    python tests/gpu/planned_memory.py [part of a row's name, for instance TP2]

Each run is Megatron's trainer on the flags that tools/plan.py prints, on some of a model's layers.
Memory is what PyTorch had allocated at the peak on the fullest GPU; a step is the median without
the first two.
"""

from __future__ import annotations

import dataclasses
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch  # noqa: E402
from support.runs import write_dataset  # noqa: E402

from megatron_cream import torchrun  # noqa: E402
from megatron_cream.parallel_layout import ParallelLayout, Tuning, Workload  # noqa: E402
from megatron_cream.planning.cost import GPUS, product_share, step_time  # noqa: E402
from megatron_cream.planning.memory import GIB, peak_memory  # noqa: E402
from megatron_cream.planning.models import MODELS, BaseModel  # noqa: E402
from megatron_cream.planning.script import argv, run_flags  # noqa: E402

WORK = Workload(4096, 8)
TUNING = Tuning(fused_gradients=False)  # Apex's kernel is not on PyPI
ROWS: list[tuple[str, int, ParallelLayout]] = [
    ("llama-2-7b", 4, ParallelLayout(1, 1, 1, 1)),
    ("llama-2-7b", 8, ParallelLayout(1, 1, 1, 1, recompute=True)),
    ("llama-3-8b", 4, ParallelLayout(1, 1, 1, 1)),
    ("llama-2-7b", 8, ParallelLayout(1, 1, 1, 2)),
    ("llama-2-7b", 8, ParallelLayout(2, 1, 1, 1)),
    ("llama-2-7b", 8, ParallelLayout(1, 2, 1, 1)),
    ("llama-2-7b", 8, ParallelLayout(1, 1, 2, 1)),
]
_MEMORY = re.compile(r"memory \(MB\) .* max allocated: (\S+)")
_STEP = re.compile(r"elapsed time per iteration \(ms\): (\S+)")


def train(shape: BaseModel, layout: ParallelLayout, data: str) -> tuple[float, float]:
    """Return GiB at the peak and seconds of a step of one run.

    Raises:
        RuntimeError: it failed; the end of its log is the message.
    """
    themes = run_flags(shape, layout, WORK, 32768, iterations=10)
    del themes["CHECKPOINTS"]
    flags = [data if flag == "$DATA" else flag for flag in argv(themes)]
    command = [
        *torchrun.command(layout.gpus, "-m", "megatron_cream.pretrain", *flags),
        *("--eval-iters", "0", "--eval-interval", "100", "--log-interval", "1"),
        # Its kernel comes with Apex, which is not on PyPI.
        "--no-gradient-accumulation-fusion",
    ]
    done = subprocess.run(
        command, env=torchrun.environment(), capture_output=True, text=True, timeout=300
    )
    log = done.stdout + done.stderr
    if done.returncode:
        raise RuntimeError(f"{shape.name} {layout} failed:\n{log[-4000:]}")
    steps = [float(ms) for ms in _STEP.findall(log)]
    return max(map(float, _MEMORY.findall(log))) / 1024, statistics.median(steps[2:]) / 1000


def main() -> int:
    """Print the table; a row at a time, because runs take half a minute each."""
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    gpu = GPUS["h200"]
    print("| model | layers | layout | GiB planned | measured | s per step planned | measured |")
    print("|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        data = write_dataset(Path(folder) / "text", [40000] * 40, vocabulary=30000)
        for name, layers, layout in ROWS:
            if wanted not in f"{name} {layout}" or layout.gpus > torch.cuda.device_count():
                continue
            shape = dataclasses.replace(MODELS[name], layers=layers)
            gib, seconds = train(shape, layout, data)
            planned = peak_memory(shape, layout, WORK).total / GIB
            step = step_time(shape, layout, WORK, gpu, product_share(), tuning=TUNING).total
            row = [name, layers, layout, f"{planned:.2f}", f"{gib:.2f}"]
            row += [f"{step:.3f}", f"{seconds:.3f}"]
            print(f"| {' | '.join(map(str, row))} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
