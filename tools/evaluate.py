# SPDX-License-Identifier: Apache-2.0
"""Evaluate a checkpoint or a model on long text: the same as ``megatron-cream evaluate``."""

import sys
from functools import partial

from megatron_cream.cli import run_command

main = partial(run_command, "evaluate")

if __name__ == "__main__":
    sys.exit(main())
