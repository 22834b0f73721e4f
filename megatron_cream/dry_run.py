# SPDX-License-Identifier: Apache-2.0
"""Look at a command before there is a cluster: its flags, stages, memory and positions.

    WORLD_SIZE=64 python -m megatron_cream.dry_run <the flags of megatron_cream.pretrain>

Takes the flags of a run unchanged, on any machine, without its data and checkpoints. The number of
GPUs comes from WORLD_SIZE, as torchrun sets it. Every script of examples/ does this on --dry-run.
"""

from __future__ import annotations

import os
import sys
import warnings

from megatron_cream.errors import UserError, one_line_errors


def main() -> None:
    """Print what the run will be; bad input ends in one line and exit status 2."""
    # Megatron says on import which GPU packages are missing: none is needed here.
    warnings.filterwarnings("ignore", category=UserWarning)
    with one_line_errors():
        from megatron_cream.planning.dry_run import dry_run, lines

        print("\n".join(lines(dry_run(sys.argv[1:], world_size()))))


def world_size() -> int:
    """Return the number of GPUs that WORLD_SIZE names; 1 without it.

    Raises:
        UserError: it is not a positive whole number.
    """
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"WORLD_SIZE is {text!r}: it must be the number of GPUs, at least 1")
    return int(text)


if __name__ == "__main__":
    main()
