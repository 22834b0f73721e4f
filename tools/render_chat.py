# SPDX-License-Identifier: Apache-2.0
"""Turn conversations into documents: the same as ``megatron-cream render-chat``."""

import sys
from functools import partial

from megatron_cream.cli import run_command

main = partial(run_command, "render-chat")

if __name__ == "__main__":
    sys.exit(main())
