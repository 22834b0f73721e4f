# SPDX-License-Identifier: Apache-2.0
"""Builds the command that starts torchrun on one node, as examples/torchrun.sh does in bash.

``torchrun --standalone`` asks for the address of the host's own name. Image builds, laptops and
chroots often cannot resolve it, and torchrun then waits for five minutes and fails. Here the
processes meet at the loopback address, on a port that the system picks.
"""

from __future__ import annotations

import os
import sys

ONE_NODE = (
    *("--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"),
    *("--local-addr", "127.0.0.1"),
)
"""torchrun's flags for processes that are all on this machine."""


def command(processes: int, *arguments: str) -> list[str]:
    """Return the command that starts ``processes`` here; ``arguments`` go to torchrun."""
    launch = [sys.executable, "-m", "torch.distributed.run", *ONE_NODE]
    return [*launch, "--nproc-per-node", str(processes), *arguments]


def environment(**changes: str) -> dict[str, str]:
    """Return the environment for ``command``: this one's, gloo on loopback, and ``changes``."""
    return {"GLOO_SOCKET_IFNAME": "lo", **os.environ, **changes}
