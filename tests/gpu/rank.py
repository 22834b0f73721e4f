# SPDX-License-Identifier: Apache-2.0
"""One rank of a run of layouts.py: megatron_cream.pretrain, with its losses written in full.

The log has seven digits, and in a resumed run its second line is an average of two iterations.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

if __name__ == "__main__":
    from support.ranks import keep_losses

    folder = sys.argv.pop(1)
    keep_losses(os.path.join(folder, f"rank{os.environ['RANK']}.losses"))
    from megatron_cream import pretrain

    pretrain.main()
