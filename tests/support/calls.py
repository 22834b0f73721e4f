# SPDX-License-Identifier: Apache-2.0
"""A function on several ranks over gloo, in forks of the server that has megatron in memory."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

from support import ranks

_TIMEOUT = 240


def call(folder: Path, function: Callable[..., None], count: int, *args: object) -> None:
    """Run ``function(*args)`` on ``count`` ranks; what they print lands in ``folder``.

    Raises:
        RuntimeError: a rank failed; its output is told.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ranks._prepare_server()
    port = ranks._free_port()
    processes = [
        ranks._SERVER.Process(target=_rank, args=(rank, count, port, str(folder), function, args))
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(_TIMEOUT)
        if process.is_alive():
            process.kill()
    if any(process.exitcode for process in processes):
        logs = "".join((folder / f"rank{rank}.log").read_text() for rank in range(count))
        raise RuntimeError(f"ranks ended with {[p.exitcode for p in processes]}:\n{logs[-6000:]}")


def _rank(
    rank: int, count: int, port: int, folder: str, function: Callable[..., None], args: tuple
) -> None:
    log = open(os.path.join(folder, f"rank{rank}.log"), "w", buffering=1)  # noqa: SIM115
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    sys.stdout = sys.stderr = log
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(count),
        LOCAL_WORLD_SIZE=str(count),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    import torch

    torch.set_num_threads(1)
    function(*args)
