# SPDX-License-Identifier: Apache-2.0
"""Make data that trains retrieval: the same as ``megatron-cream retrieval-data``."""

import sys
from functools import partial

from megatron_cream.cli import run_command

main = partial(run_command, "retrieval-data")

if __name__ == "__main__":
    sys.exit(main())
