# SPDX-License-Identifier: Apache-2.0
"""Runs planned layouts on one and two GPUs and prints what was planned next to what happened.

    python tests/gpu/planned_memory.py [--only WORDS ...] [--gpus N] [--launch-ms 7.2] [--profile]

Each run is Megatron's trainer on the flags that ``megatron-cream plan`` prints, on some layers of a
model. Memory is what PyTorch had allocated at the peak on the fullest GPU; a step is the median
without the first two. All runs import at once and train one after another; each row is printed as
soon as it is there. ``--profile`` traces two further steps of each by torch's profiler, and says
how long the kernels of a step take, and how much of them is communication that no other kernel
runs beside; in the rest of the step the GPU waits for the host. ``--seconds`` begins no run after
so long.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import json
import math
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch  # noqa: E402
from support.runs import write_dataset  # noqa: E402

from megatron_cream import torchrun  # noqa: E402
from megatron_cream.parallel_layout import ParallelLayout, Tuning, Workload  # noqa: E402
from megatron_cream.planning.cost import GPUS, Gpu, product_share, step_time  # noqa: E402
from megatron_cream.planning.models import GIB, MODELS, BaseModel, peak_memory  # noqa: E402  # noqa: E402
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
STEPS = 8
_PROFILED = 2  # steps, after those that are measured


@dataclass(frozen=True)
class Row:
    """A run that was started: its ranks import Megatron, and wait.

    Attributes:
        folder: its log, and the file that lets it train.
    """

    name: str
    shape: BaseModel
    layout: ParallelLayout
    work: Workload
    tuning: Tuning
    folder: Path
    process: subprocess.Popen[bytes]

    def ready(self) -> bool:
        """Say whether every rank has imported, or the run is over already."""
        ranks = len(list(self.folder.glob("ready-*")))
        return ranks == self.layout.gpus or self.process.poll() is not None

    def train(self) -> tuple[float, float]:
        """Let it train to its end; return GiB at the peak and seconds of a step.

        Raises:
            RuntimeError: it failed; the end of its log is the message.
        """
        (self.folder / "go").touch()
        status = self.process.wait(timeout=200)
        log = (self.folder / "log").read_text()
        if status:
            raise RuntimeError(f"{self.name} failed:\n{log[-4000:]}")
        steps = [float(ms) for ms in _STEP.findall(log)][2 : STEPS - 1]
        return max(map(float, _MEMORY.findall(log))) / 1024, statistics.median(steps) / 1000

    def planned(self, gpu: Gpu) -> tuple[float, float]:
        """Return the same as planned."""
        run = (self.shape, self.layout, self.work)
        step = step_time(*run, gpu, product_share(), tuning=self.tuning)
        return peak_memory(*run, self.tuning).total / GIB, step.total

    def line(self, gpu: Gpu) -> str:
        """Train, and return the row of the table."""
        (gib, seconds), (planned_gib, planned) = self.train(), self.planned(gpu)
        cells = [self.name, str(self.shape.layers), str(self.work.seq_length)]
        cells += [f"{planned_gib:.2f}", f"{gib:.2f}", f"{planned:.3f}", f"{seconds:.3f}"]
        return f"| {' | '.join(cells)} | {100 * (planned / seconds - 1):+.0f} % |"


def start(
    name: str,
    shape: BaseModel,
    layout: ParallelLayout,
    work: Workload,
    tuning: Tuning,
    data: str,
    folder: Path,
    profile: bool,
    *more: str,
) -> Row:
    """Start a run, which waits until it may train."""
    folder.mkdir()
    steps = STEPS + _PROFILED if profile else STEPS
    themes = run_flags(shape, layout, work, 32768, iterations=steps, tuning=tuning)
    del themes["CHECKPOINTS"]
    flags = [data if flag == "$DATA" else flag for flag in argv(themes)]
    if profile:
        flags += ["--profile", "--use-pytorch-profiler", "--profile-ranks", "0"]
        flags += ["--profile-step-start", str(STEPS), "--profile-step-end", str(steps)]
        flags += ["--tensorboard-dir", str(folder / "board")]
    rank = str(Path(__file__).with_name("waiting_rank.py"))
    command = [
        *torchrun.command(layout.gpus, rank, str(folder), *flags, *more),
        *("--eval-iters", "0", "--eval-interval", "100", "--log-interval", "1"),
    ]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command, env=torchrun.environment(), stdout=log, stderr=subprocess.STDOUT
        )
    return Row(name, shape, layout, work, tuning, folder, process)


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


def profile_line(folder: Path) -> str:
    """Return what the kernels of a profiled step took."""
    busy, sent = kernel_seconds(folder / "torch_profile" / "rank-0.json.gz")
    return f"    kernels {busy:.3f} s, of which communication alone {sent:.3f} s"


def chosen(words: list[str], gpus: int | None) -> Iterator[tuple[str, int]]:
    """Yield title and index of the rows of ``words``, in that order; all rows without any."""
    for part in words or [""]:
        for index, (name, _, layout, _, tuning) in enumerate(ROWS):
            title = f"{name} {layout}{', FP8' if tuning.fp8 else ''}"
            fits = layout.gpus <= torch.cuda.device_count() and gpus in (None, layout.gpus)
            if fits and part in title:
                yield title, index


def start_all(place: Path, data: str, args: argparse.Namespace) -> list[Row]:
    """Start the chosen rows, which import at once, and wait until all have."""
    rows: list[Row] = []
    for title, index in chosen(args.only, args.gpus):
        name, layers, *how = ROWS[index]
        shape, folder = dataclasses.replace(MODELS[name], layers=layers), place / str(index)
        if not folder.exists():
            rows.append(start(title, shape, *how, data, folder, args.profile))
    while not all(row.ready() for row in rows):
        time.sleep(0.1)
    return rows


def print_rows(rows: list[Row], gpu: Gpu, until: float) -> None:
    """Train one after another, and print each row when it is there."""
    print("| run | layers | tokens | GiB planned | measured | s planned | measured | error |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for row in rows:
        if time.monotonic() > until:
            print(f"not run: {row.name}", flush=True)
            continue
        try:
            print(row.line(gpu), flush=True)
            if (row.folder / "board").exists():
                print(profile_line(row.folder), flush=True)
        except (RuntimeError, OSError, subprocess.TimeoutExpired) as error:
            print(error, flush=True)  # the other rows are wanted all the same


def main() -> int:
    """Print the table, a row at a time."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default=[], nargs="+", help="parts of rows' models and layouts")
    parser.add_argument("--gpus", type=int, help="rows of so many GPUs")
    parser.add_argument("--launch-ms", type=float, default=GPUS["h200"].launch_ms)
    parser.add_argument("--profile", action="store_true", help="trace two more steps of each")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no run after these")
    args = parser.parse_args()
    gpu, begin = dataclasses.replace(GPUS["h200"], launch_ms=args.launch_ms), time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with tempfile.TemporaryDirectory() as place:
        data = write_dataset(Path(place) / "text", [40000] * 40, vocabulary=30000)
        rows = start_all(Path(place), data, args)
        try:
            print_rows(rows, gpu, begin + args.seconds)
        finally:
            for row in rows:
                row.process.terminate()
    return 0


if __name__ == "__main__":
    sys.exit(main())
