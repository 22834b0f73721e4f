# SPDX-License-Identifier: Apache-2.0
"""rank.py, whose rank 1 fails once before its eighth step."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

if __name__ == "__main__":
    from support.ranks import keep_losses
    from support.restarter import fail_once

    folder, rank = sys.argv.pop(1), os.environ["RANK"]
    keep_losses(os.path.join(folder, f"rank{rank}.losses"))
    if rank == "1":
        fail_once(8)
    from megatron_cream import pretrain

    pretrain.main()
