# SPDX-License-Identifier: Apache-2.0
"""Plan a run: layout, memory, time: the same as ``megatron-cream plan``."""

import sys
from functools import partial

from megatron_cream.cli import run_command

main = partial(run_command, "plan")

if __name__ == "__main__":
    sys.exit(main())
