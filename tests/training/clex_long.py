# SPDX-License-Identifier: Apache-2.0
"""Trains CLEX for 500 steps on a CPU beside linear interpolation, and says if a number was lost.

    python tests/training/clex_long.py [steps]

A small model at a learning rate of 1e-3, fifty times the published one. Users of the published code
report NaN and infinite gradients; the exit status here is 1 if a loss or gradient norm is either.
Some minutes, so no part of the test suite.
"""

from __future__ import annotations

import math
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))


def main() -> int:
    """Print a row for each interpolation."""
    from support.runs import FLAGS, write_dataset

    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 500
    broken = False
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = ["--data-path", write_dataset(folder / "text", [300, 500, 900, 1500] * 10)]
        print(
            f"| {steps} steps | s | loss of the first 10 | of the last 10 | largest norm | lost |"
        )
        print("|---|---|---|---|---|---|")
        for rope in (["linear"], ["clex"], ["clex", "--rope-options", "act=silu"]):
            flags = [*FLAGS, *data, "--train-iters", str(steps), "--eval-iters", "0"]
            broken |= _row(folder / "-".join(rope), [*flags, "--rope-interpolation", *rope])
    return int(broken)


def _row(folder: Path, flags: list[str]) -> bool:
    from support import ranks

    begin = time.monotonic()
    run = ranks.train(folder, flags)
    losses, norms = list(run.losses.values()), list(run.norms.values())
    lost = sum(not math.isfinite(value) for value in losses + norms)
    print(
        f"| {folder.name} | {time.monotonic() - begin:.0f} | {sum(losses[:10]) / 10:.3f} | "
        f"{sum(losses[-10:]) / 10:.3f} | {max(norms):.1f} | {lost} |",
        flush=True,
    )
    return lost > 0


if __name__ == "__main__":
    sys.exit(main())
