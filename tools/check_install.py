# SPDX-License-Identifier: Apache-2.0
"""Check that the install works: the same as ``megatron-cream check-install``."""

import sys
from functools import partial

from megatron_cream.cli import run_command

main = partial(run_command, "check-install")

if __name__ == "__main__":
    sys.exit(main())
