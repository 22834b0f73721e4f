# SPDX-License-Identifier: Apache-2.0
"""Runs planned layouts on one and two GPUs and prints what was planned next to what happened.

    python tests/gpu/planned_memory.py [--only WORDS] [--gpus N] [--launch-ms 7.2] [--profile]

Each run is Megatron's trainer on the flags that tools/plan.py prints, on some of a model's layers.
Memory is what PyTorch had allocated at the peak on the fullest GPU; a step is the median without
the first two. ``--profile`` runs each layout once more under torch's profiler, and says how long
the kernels of a step take, how much of them is communication that no other kernel runs beside, and
how long the GPU waits for the host.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import json
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable
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

WORK, LONG = Workload(4096, 8), Workload(8192, 8)
APEXLESS = Tuning(fused_gradients=False)  # Apex's kernel is not on PyPI
FP8 = dataclasses.replace(APEXLESS, fp8=True)
ROWS: list[tuple[str, int, ParallelLayout, Workload, Tuning]] = [
    ("llama-2-7b", 4, ParallelLayout(), WORK, APEXLESS),
    ("llama-2-7b", 4, ParallelLayout(), WORK, FP8),
    ("llama-2-7b", 8, ParallelLayout(recompute=True), WORK, APEXLESS),
    ("llama-2-7b", 8, ParallelLayout(recompute=True, recompute_layers=4), WORK, APEXLESS),
    ("llama-3-8b", 4, ParallelLayout(), WORK, APEXLESS),
    ("llama-2-7b", 8, ParallelLayout(data=2), WORK, APEXLESS),
    ("llama-2-7b", 8, ParallelLayout(tensor=2), WORK, APEXLESS),
    ("llama-2-7b", 8, ParallelLayout(pipeline=2), WORK, APEXLESS),
    ("llama-2-7b", 8, ParallelLayout(pipeline=2, virtual=2), WORK, APEXLESS),
    ("llama-2-7b", 8, ParallelLayout(context=2), LONG, APEXLESS),
    ("llama-2-7b", 8, ParallelLayout(context=2), WORK, APEXLESS),
]
_MEMORY = re.compile(r"memory \(MB\) .* max allocated: (\S+)")
_STEP = re.compile(r"elapsed time per iteration \(ms\): (\S+)")
_PROFILE = [
    *("--profile", "--use-pytorch-profiler", "--profile-ranks", "0"),
    *("--profile-step-start", "6", "--profile-step-end", "8"),
]


def train(
    shape: BaseModel, layout: ParallelLayout, work: Workload, tuning: Tuning, data: str, *more: str
) -> tuple[float, float]:
    """Return GiB at the peak and seconds of a step of one run.

    Raises:
        RuntimeError: it failed; the end of its log is the message.
    """
    themes = run_flags(shape, layout, work, 32768, iterations=10, tuning=tuning)
    del themes["CHECKPOINTS"]
    flags = [data if flag == "$DATA" else flag for flag in argv(themes)]
    command = [
        *torchrun.command(layout.gpus, "-m", "megatron_cream.pretrain", *flags, *more),
        *("--eval-iters", "0", "--eval-interval", "100", "--log-interval", "1"),
    ]
    done = subprocess.run(
        command, env=torchrun.environment(), capture_output=True, text=True, timeout=300
    )
    log = done.stdout + done.stderr
    if done.returncode:
        raise RuntimeError(f"{shape.name} {layout} failed:\n{log[-4000:]}")
    steps = [float(ms) for ms in _STEP.findall(log)]
    return max(map(float, _MEMORY.findall(log))) / 1024, statistics.median(steps[2:]) / 1000


def union(spans: Iterable[tuple[float, float]]) -> float:
    """Return the length that spans (start, end) cover together."""
    covered, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return covered


def kernel_seconds(trace: Path) -> tuple[float, float]:
    """Return seconds per step in which kernels ran, and in which communication alone ran."""
    with gzip.open(trace) as file:
        events = json.load(file)["traceEvents"]
    kernels = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    spans = [(e["ts"], e["ts"] + e["dur"]) for e in kernels]
    others = [s for s, e in zip(spans, kernels, strict=True) if "nccl" not in e["name"].lower()]
    busy = union(spans)
    return busy / 2e6, (busy - union(others)) / 2e6  # two steps, in microseconds


def profile_line(run: tuple[BaseModel, ParallelLayout, Workload, Tuning], data: str) -> str:
    """Return what the kernels of a step take; the host's share is against the plain run."""
    with tempfile.TemporaryDirectory() as folder:
        train(*run, data, *_PROFILE, "--tensorboard-dir", f"{folder}/board")
        busy, sent = kernel_seconds(Path(folder) / "torch_profile" / "rank-0.json.gz")
    return f"    kernels {busy:.3f} s, of which communication alone {sent:.3f} s"


def main() -> int:
    """Print the table; a row at a time, because runs take half a minute each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="part of a row's model and layout")
    parser.add_argument("--gpus", type=int, help="rows of so many GPUs")
    parser.add_argument("--launch-ms", type=float, default=GPUS["h200"].launch_ms)
    parser.add_argument("--profile", action="store_true", help="run each again, profiled")
    args = parser.parse_args()
    gpu = dataclasses.replace(GPUS["h200"], launch_ms=args.launch_ms)
    print("| model | layers | layout | tokens | GiB planned | measured | s planned | measured |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        data = write_dataset(Path(folder) / "text", [40000] * 40, vocabulary=30000)
        for name, layers, layout, work, tuning in ROWS:
            title = f"{name} {layout}{', FP8' if tuning.fp8 else ''}"
            if args.only not in title or layout.gpus > torch.cuda.device_count():
                continue
            if args.gpus not in (None, layout.gpus):
                continue
            shape = dataclasses.replace(MODELS[name], layers=layers)
            gib, seconds = train(shape, layout, work, tuning, data)
            planned = peak_memory(shape, layout, work, tuning).total / GIB
            step = step_time(shape, layout, work, gpu, product_share(), tuning=tuning).total
            row = [name, layers, title.removeprefix(f"{name} "), work.seq_length, f"{planned:.2f}"]
            row += [f"{gib:.2f}", f"{step:.3f}", f"{seconds:.3f}"]
            print(f"| {' | '.join(map(str, row))} |", flush=True)
            if args.profile:
                print(profile_line((shape, layout, work, tuning), data), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
