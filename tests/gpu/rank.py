# SPDX-License-Identifier: Apache-2.0
"""One rank of a run of layouts.py: megatron_cream.pretrain, with its losses written in full.

The log has seven digits, and in a resumed run its second line is an average of two iterations.
The first gradient of CLEX's weights is written, too.
"""

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))


def keep_first_gradient(path: str) -> None:
    """Write the weights' gradient ``[size]`` of the first step, as all ranks have it."""
    from megatron_cream.extras.clex import trained_rotary

    own = trained_rotary.weights_gradient

    def weights_gradient(*args):
        gradient = own(*args)
        if not os.path.exists(path):
            torch.save(gradient.cpu(), path)
        return gradient

    trained_rotary.weights_gradient = weights_gradient


if __name__ == "__main__":
    from support.ranks import keep_losses

    own = os.path.join(sys.argv.pop(1), f"rank{os.environ['RANK']}")
    keep_losses(f"{own}.losses")
    keep_first_gradient(f"{own}.clex")
    from megatron_cream import pretrain

    pretrain.main()
