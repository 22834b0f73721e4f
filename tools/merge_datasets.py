# SPDX-License-Identifier: Apache-2.0
"""Join indexed datasets: the same as ``megatron-cream merge``."""

import sys
from functools import partial

from megatron_cream.cli import run_command

main = partial(run_command, "merge")

if __name__ == "__main__":
    sys.exit(main())
