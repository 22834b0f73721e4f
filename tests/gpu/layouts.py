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

import torch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from rows import FLAGS, GRADIENT, LAYOUTS, STARTS, Layout  # noqa: E402
from support.ranks import read_losses  # noqa: E402
from support.runs import write_dataset  # noqa: E402

from megatron_cream import torchrun  # noqa: E402

RUNS_AT_ONCE = 4
NO_GRADIENT = torch.zeros(0)


@dataclass(frozen=True)
class Result:
    """What a run left: losses by iteration, log, and the first gradient of CLEX's weights."""

    losses: dict[int, float]
    log: str
    gradient: torch.Tensor = NO_GRADIENT


@dataclass(frozen=True)
class Row:
    """A layout, the largest difference of its losses and, under CLEX, that of its gradient.

    Attributes:
        gradient: of the first gradient of CLEX's weights, relative to its norm.
    """

    name: str
    difference: float
    layout: Layout
    kernel: str
    gradient: float | None = None

    def line(self) -> str:
        """Return the row in Markdown."""
        allowed = "" if self.layout.role else self.layout.tolerance
        gradient = "" if self.gradient is None else f"{self.gradient:.4f}"
        return f"| {self.name} | {self.difference:.5f} | {allowed} | {gradient} | {self.kernel} |"


def train(folder: Path, name: str, gpus: int, flags: list[str]) -> Result:
    """Return losses by iteration and the log of one run.

    Raises:
        RuntimeError: it failed; the end of its log is the message.
    """
    own = folder / re.sub(r"[^a-z0-9]+", "-", name.lower())
    own.mkdir()
    rank = str(Path(__file__).with_name("rank.py"))
    command = torchrun.command(gpus, rank, str(own), *FLAGS, *flags)
    done = subprocess.run(
        command, env=torchrun.environment(), capture_output=True, text=True, timeout=300
    )
    log = done.stdout + done.stderr
    (own / "log").write_text(log)
    if done.returncode:
        raise RuntimeError(f"{name} failed:\n{log[-4000:]}")
    clex = own / "rank0.clex"
    gradient = torch.load(clex) if clex.exists() else NO_GRADIENT
    return Result(read_losses(own, gpus), log, gradient)


def choose(gpus: int, part: str = "") -> dict[str, Layout]:
    """Return the layouts with ``part`` in their names, and what each is compared with.

    Raises:
        ValueError: there is none.
    """
    groups: list[dict[str, Layout]] = []
    for name, layout in LAYOUTS.items():
        if layout.role == "reference":
            groups.append({})
        if layout.gpus <= gpus and (part in name or layout.role):
            groups[-1][name] = layout
    found = {}
    for group in groups:
        if any(part in name and not layout.role for name, layout in group.items()):
            found |= group
    if not found:
        raise ValueError(f"no layout of {gpus} GPU(s) has {part!r} in its name")
    return found


def table(folder: Path, gpus: int, part: str = "") -> list[Row]:
    """Return the rows of the layouts that fit, plain ones first.

    ``part`` keeps the layouts whose name contains it. Models are small: several runs share GPUs.
    """
    # Some longer than T, some shorter than a sample, none too short for packed CREAM.
    lengths = [6000, 200, 300, 450] * 20
    data = ["--data-path", write_dataset(folder / "data", lengths, vocabulary=1000)]
    chosen = choose(gpus, part)
    for name in {layout.start: None for layout in chosen.values()}:
        flags = STARTS[name]
        save = ["--save", str(folder / name), "--save-interval", flags[-1]]
        train(folder, f"{name} weights", 1, [*data, *flags, *save])
    with ThreadPoolExecutor(RUNS_AT_ONCE) as pool:
        runs = {
            name: pool.submit(_run, folder, name, layout, data) for name, layout in chosen.items()
        }
        rows = []
        for name, layout in chosen.items():
            result = runs[name].result()
            if layout.role == "reference":
                reference = result
            rows.append(_row(name, layout, result, reference))
            print(rows[-1].line(), flush=True)
    return rows


def _run(folder: Path, name: str, layout: Layout, data: list[str]) -> Result:
    start = [*data, "--pretrained-checkpoint", str(folder / layout.start)]
    if layout.then is None:
        return train(folder, name, layout.gpus, [*start, *layout.flags])
    saved = folder / "half"
    save = ["--save", str(saved), "--load", str(saved), "--save-interval", "5"]
    half = [*start, *save, *layout.flags, "--exit-interval", "5"]
    before = train(folder, f"{name} before", layout.gpus, half).losses
    after = train(folder, f"{name} after", layout.gpus, [*start, *save, *layout.then])
    if set(before) & set(after.losses):
        raise RuntimeError(f"trained twice: {sorted(set(before) & set(after.losses))}")
    return Result(before | after.losses, after.log)


def _row(name: str, layout: Layout, result: Result, reference: Result) -> Row:
    gradient = None
    if reference.gradient.numel():
        gradient = (result.gradient - reference.gradient).norm() / reference.gradient.norm()
        gradient = gradient.item()
    difference = _difference(result.losses, reference.losses)
    return Row(name, difference, layout, _kernel(result.log), gradient)


def _difference(a: dict[int, float], b: dict[int, float]) -> float:
    if sorted(a) != sorted(b) or len(a) != 10:
        raise RuntimeError(f"the runs have {len(a)} and {len(b)} losses, both should have 10")
    return max(abs(a[i] - b[i]) for i in a)


def _kernel(log: str) -> str:
    return re.search(r"rope kernel\s+(.*)", log)[1].strip()


def main() -> int:
    """Print the table; exit status 1 if a layout is further away than it may be."""
    gpus = torch.cuda.device_count()
    if not gpus:
        print("error: there is no GPU: these layouts run Megatron's GPU kernels", file=sys.stderr)
        return 2
    try:
        with tempfile.TemporaryDirectory() as folder:
            rows = table(Path(folder), gpus, *sys.argv[1:2])
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"\n{torch.cuda.get_device_name()} x {gpus}, bf16, 10 iterations\n")
    print("| layout | largest difference of a loss | allowed | of CLEX's gradient | RoPE |")
    print("|---|---|---|---|---|")
    print("\n".join(row.line() for row in rows))
    return int(bool(too_far(rows)))


def too_far(rows: list[Row]) -> list[str]:
    """Return the rows that differ by more than they may, or by as much as other angles do."""
    found, group = [], []
    for row in rows:
        if row.layout.role == "angles":
            found += [each.line() for each in group if _is_too_far(each, row)]
            group = []
        elif not row.layout.role:
            group.append(row)
    if group:
        raise RuntimeError(f"no row of other angles follows {group[-1].name}")
    return found


def _is_too_far(row: Row, angles: Row) -> bool:
    if row.gradient is not None and not row.gradient < min(GRADIENT, angles.gradient):
        return True
    return not row.difference < min(row.layout.tolerance, angles.difference)


if __name__ == "__main__":
    sys.exit(main())
