# SPDX-License-Identifier: Apache-2.0
"""Convert checkpoints: the same as ``megatron-cream import`` and ``megatron-cream export``."""

import sys
from functools import partial

from megatron_cream.cli import main as run

main = partial(run, among=("import", "export"), program="convert_checkpoint.py")

if __name__ == "__main__":
    sys.exit(main())
