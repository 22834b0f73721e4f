# SPDX-License-Identifier: Apache-2.0
"""Ask a model about a book or a paper: the same as ``megatron-cream chat``."""

import sys
from functools import partial

from megatron_cream.cli import run_command

main = partial(run_command, "chat")

if __name__ == "__main__":
    sys.exit(main())
