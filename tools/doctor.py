# SPDX-License-Identifier: Apache-2.0
"""Say which files of a checkpoint are damaged: the same as ``megatron-cream doctor``."""

import sys
from functools import partial

from megatron_cream.cli import run_command

main = partial(run_command, "doctor")

if __name__ == "__main__":
    sys.exit(main())
