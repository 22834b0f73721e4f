# SPDX-License-Identifier: Apache-2.0
"""Turn text into a Megatron indexed dataset: the same as ``megatron-cream preprocess``."""

import sys
from functools import partial

from megatron_cream.cli import run_command

main = partial(run_command, "preprocess")

if __name__ == "__main__":
    sys.exit(main())
