# SPDX-License-Identifier: Apache-2.0
"""Runs Megatron's real trainer on several gloo ranks of this machine, in a second or two each.

Importing megatron takes nine seconds a process. A fork server imports it once, with the CPU
standing in for the GPU, and every rank is a fork of it.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shlex
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from support import fork_python

_SERVER = multiprocessing.get_context("forkserver")
_TIMEOUT = 240


@dataclass(frozen=True)
class Run:
    """What a run left behind.

    Attributes:
        losses: full-precision training loss by iteration.
        norms: gradient norm by iteration, likewise.
        log: output of all ranks.
        status: exit status of each rank.
    """

    losses: dict[int, float]
    norms: dict[int, float]
    log: str
    status: list[int]

    def lines(self, text: str) -> list[str]:
        """Return the lines of the log that contain ``text``."""
        return [line for line in self.log.splitlines() if text in line]


def train(
    folder: Path,
    flags: list[str],
    ranks: int = 1,
    wait: bool = True,
    kill_when: Callable[[dict[int, float]], bool] | None = None,
    script: Path | None = None,
) -> Run:
    """Run ``megatron_cream.pretrain`` on ``ranks`` processes; everything lands in ``folder``.

    With ``script`` it is ``megatron_cream.launch`` and that script instead. With ``wait`` a run
    that fails is an error here. All ranks get SIGKILL as soon as ``kill_when(losses so far)``,
    asked every two milliseconds, is true.
    """
    processes = _start(folder, ranks, _train, flags, str(folder), script)
    if kill_when is not None:
        _kill_when(processes, lambda: kill_when(read_losses(folder, ranks)))
    log, status = _end(processes, folder)
    if wait and kill_when is None:
        _refuse(status, log)
    return Run(read_losses(folder, ranks), read_losses(folder, ranks, column=2), log, status)


def call(folder: Path, function: Callable[..., None], count: int, *args: object) -> None:
    """Run ``function(*args)`` on ``count`` ranks; what they print lands in ``folder``.

    Raises:
        RuntimeError: a rank failed; its output is told.
    """
    log, status = _end(_start(folder, count, function, *args), folder)
    _refuse(status, log)


def _start(folder: Path, count: int, function: Callable[..., None], *args: object) -> list:
    folder.mkdir(parents=True, exist_ok=True)
    _prepare_server()
    port = _free_port()
    processes = [
        _SERVER.Process(target=_rank, args=(rank, count, port, str(folder), function, args))
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    return processes


def _end(processes: list, folder: Path) -> tuple[str, list[int]]:
    """Return the output of ranks and their exit statuses, once they have ended."""
    for process in processes:
        process.join(_TIMEOUT)
    for process in processes:
        if process.is_alive():
            process.kill()
            process.join()
    logs = ((folder / f"rank{rank}.log").read_text() for rank in range(len(processes)))
    return "".join(logs), [process.exitcode for process in processes]


def _refuse(status: list[int], log: str) -> None:
    if any(status):
        raise RuntimeError(f"ranks ended with {status}:\n{log[-6000:]}")


def largest_difference(a: dict[int, float], b: dict[int, float]) -> float:
    """Return it, of losses of the same iterations."""
    assert a.keys() == b.keys()
    return max(abs(a[i] - b[i]) for i in a)


@contextlib.contextmanager
def process(function: Callable[..., None], *arguments: object) -> Iterator[None]:
    """Run a function that does not end in a fork of the server, which is killed at the end."""
    _prepare_server()
    worker = _SERVER.Process(target=function, args=arguments, daemon=True)
    worker.start()
    try:
        yield
    finally:
        worker.kill()
        worker.join()


@contextlib.contextmanager
def python() -> Iterator[str]:
    """Give the path of a stand-in for python that starts with megatron in memory."""
    with tempfile.TemporaryDirectory() as folder:
        address = f"python-{os.getpid()}-{Path(folder).name}"
        program = Path(folder) / "python"
        words = [sys.executable, "-SE", fork_python.__file__, address]
        program.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
        program.chmod(0o755)
        with process(fork_python.serve, address):
            yield str(program)


def _kill_when(processes: list, reached: Callable[[], bool]) -> None:
    end = time.monotonic() + _TIMEOUT
    while not reached() and time.monotonic() < end and any(p.is_alive() for p in processes):
        time.sleep(0.002)
    for process in processes:
        process.kill()


def _prepare_server() -> None:
    # Python 3.12's fork server preloads before it takes over sys.path, and keeps quiet about
    # what it cannot import.
    tests = str(Path(__file__).parents[1])
    known = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if tests not in known:
        os.environ["PYTHONPATH"] = os.pathsep.join([tests, *filter(None, known)])
    _SERVER.set_forkserver_preload(["support.preload"])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def read_losses(folder: Path, ranks: int, column: int = 1) -> dict[int, float]:
    found: dict[int, float] = {}
    for rank in range(ranks):
        path = folder / f"rank{rank}.losses"
        for line in path.read_text().splitlines() if path.exists() else ():
            values = json.loads(line)
            found[values[0]] = values[column]
    return found


def _rank(
    rank: int, count: int, port: int, folder: str, function: Callable[..., None], args: tuple
) -> None:
    """Body of one rank, in a fork of the server."""
    write_output_to(os.path.join(folder, f"rank{rank}.log"))
    if "support.preload" not in sys.modules:
        raise RuntimeError("the fork server did not import support.preload")
    os.environ.update(OMP_NUM_THREADS="1", **addresses(rank, count, port))
    # As in a process of its own: data workers are forks.
    multiprocessing.set_start_method("fork", force=True)
    import torch

    torch.set_num_threads(1)
    function(*args)


def addresses(rank: int, count: int, port: int) -> dict[str, str]:
    """Return what torchrun would put into the environment of a rank."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    # The host's own name need not resolve.
    at = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
    return {key: str(value) for key, value in (place | at).items()}


def _train(flags: list[str], folder: str, script: Path | None) -> None:
    losses = Path(folder, f"rank{os.environ['RANK']}.losses")
    losses.unlink(missing_ok=True)
    keep_losses(str(losses))
    from megatron_cream import launch, pretrain

    if script is None:
        sys.argv = ["pretrain", "--cpu", *flags]
        pretrain.main()
    else:
        sys.argv = ["launch", str(script), "--cpu", *flags]
        launch.main()


def write_output_to(path: str) -> None:
    """Send all that this process says to a file."""
    log = open(path, "w", buffering=1)  # noqa: SIM115
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    sys.stdout = sys.stderr = log


def keep_losses(path: str) -> None:
    """Write loss and gradient norm of each iteration in full; the log has seven digits."""
    from megatron.training import training

    own = training.training_log

    def training_log(loss_dict, total_loss_dict, learning_rate, iteration, *args, **kwargs):
        if "lm loss" in loss_dict:
            norm = args[3] if len(args) > 3 else kwargs.get("grad_norm")
            with open(path, "a") as file:
                file.write(json.dumps([iteration, float(loss_dict["lm loss"]), norm]) + "\n")
        return own(loss_dict, total_loss_dict, learning_rate, iteration, *args, **kwargs)

    training.training_log = training_log
