# SPDX-License-Identifier: Apache-2.0
"""One rank of megatron_cream.pretrain that imports all of it and then waits for its turn.

    torchrun ... tests/gpu/waiting_rank.py FOLDER FLAGS...

Importing takes longer than ten steps. Ranks of several runs import at once; each writes
FOLDER/ready-RANK, and trains when FOLDER/go is there.
"""

import os
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    folder = Path(sys.argv.pop(1))
    import megatron.training  # noqa: F401

    import megatron_cream.training.datasets
    import megatron_cream.training.step  # noqa: F401
    from megatron_cream import pretrain

    (folder / f"ready-{os.environ['RANK']}").touch()
    torchrun = os.getppid()
    while not (folder / "go").exists():
        if os.getppid() != torchrun:
            sys.exit("torchrun is gone")
        time.sleep(0.05)
    pretrain.main()
