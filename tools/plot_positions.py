# SPDX-License-Identifier: Apache-2.0
"""Report and draw where a strategy puts its tokens: the same as ``megatron-cream positions``."""

import sys
from functools import partial

from megatron_cream.cli import run_command

main = partial(run_command, "positions")

if __name__ == "__main__":
    sys.exit(main())
