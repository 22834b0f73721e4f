# SPDX-License-Identifier: Apache-2.0
"""What the process and its machine must have for a run, asked before megatron is imported."""

from __future__ import annotations

import os
from collections.abc import Sequence

from megatron_cream.errors import UserError

_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_NO_START = {"-h", "--help", "--fake-process-group"}


def require_launcher(module: str, flags: Sequence[str]) -> None:
    """Refuse a process that nothing has told its rank.

    Args:
        module: for the message, what torchrun starts.

    Raises:
        UserError: naming the variables that are missing.
    """
    missing = [name for name in _LAUNCHER if name not in os.environ]
    if missing and not _NO_START.intersection(flags):
        raise UserError(
            f"{', '.join(missing)} must be set, which torchrun does: torchrun --nproc-per-node "
            f"GPUS -m {module} <its flags>, with one process for one GPU too"
        )


def require_gpu(flags: Sequence[str]) -> None:
    """Refuse a machine with no GPU where the CPU is not asked to stand in.

    Raises:
        UserError: saying what to do.
    """
    import torch

    if torch.cuda.is_available() or _NO_START.intersection(flags):
        return
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    why = "" if hidden is None else f" (CUDA_VISIBLE_DEVICES is {hidden!r})"
    raise UserError(
        f"torch finds no GPU here{why}: add --cpu to train on the CPU, or look at flags, stages "
        "and memory without one by python -m megatron_cream.dry_run"
    )
