# SPDX-License-Identifier: Apache-2.0
"""Look into an indexed dataset: the same as ``megatron-cream inspect``."""

import sys
from functools import partial

from megatron_cream.cli import run_command

main = partial(run_command, "inspect")

if __name__ == "__main__":
    sys.exit(main())
