# SPDX-License-Identifier: Apache-2.0
"""Runs ``python -m megatron_cream COMMAND ...`` as ``megatron-cream COMMAND ...``."""

import sys

from megatron_cream.cli import main

if __name__ == "__main__":
    sys.exit(main())
