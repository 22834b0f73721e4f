# SPDX-License-Identifier: Apache-2.0
"""rank.py, whose rank 1 raises an error before its seventh step, the first time it gets there."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))


def fail_once(marker: Path) -> None:
    from megatron.training import training

    own, calls = training.train_step, []

    def train_step(*args, **kwargs):
        calls.append(None)
        if len(calls) == 7 and not marker.exists():
            marker.touch()
            raise RuntimeError("a step that fails, once")
        return own(*args, **kwargs)

    training.train_step = train_step


if __name__ == "__main__":
    from support.ranks import keep_losses

    folder, rank = Path(sys.argv.pop(1)), os.environ["RANK"]
    keep_losses(str(folder / f"rank{rank}.losses"))
    if rank == "1":
        fail_once(folder / "failed")
    from megatron_cream import pretrain

    pretrain.main()
