# SPDX-License-Identifier: Apache-2.0
"""Measure every GPU and node, and name the slow one: the same as ``megatron-cream preflight``."""

import sys
from functools import partial

from megatron_cream.cli import run_command

main = partial(run_command, "preflight")

if __name__ == "__main__":
    sys.exit(main())
