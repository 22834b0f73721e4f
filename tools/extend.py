# SPDX-License-Identifier: Apache-2.0
"""Extend a model in one command: the same as ``megatron-cream extend``."""

import sys
from functools import partial

from megatron_cream.cli import run_command

main = partial(run_command, "extend")

if __name__ == "__main__":
    sys.exit(main())
