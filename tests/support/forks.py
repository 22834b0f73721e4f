# SPDX-License-Identifier: Apache-2.0
"""Calls a function in a fork of the fork server, which has megatron in memory.

For what changes a process for good: process groups, Megatron's globals, its command line.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

from support import ranks


def call(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what ``function`` returns there, or raise what it raises.

    The function must be importable by name.
    """
    ranks._prepare_server()
    here, there = ranks._SERVER.Pipe()
    process = ranks._SERVER.Process(target=_answer, args=(there, function, arguments))
    process.start()
    there.close()
    # A process that dies answers nothing: then the end of the pipe is read.
    ok, answer = False, RuntimeError(f"{function.__name__} ended without an answer")
    with contextlib.suppress(EOFError):
        ok, answer = here.recv()
    process.join()
    if not ok:
        raise answer
    return answer


def call_ranks(ranks_: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Return what ``function`` returns on each of several gloo ranks, one fork each."""
    port = str(ranks._free_port())
    with ThreadPoolExecutor(ranks_) as pool:
        found = [
            pool.submit(call, _on_rank, rank, ranks_, port, function, arguments)
            for rank in range(ranks_)
        ]
        return [one.result() for one in found]


def _on_rank(rank: int, ranks_: int, port: str, function: Callable[..., Any], given: tuple) -> Any:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks_, "LOCAL_WORLD_SIZE": ranks_}
    os.environ.update({key: str(value) for key, value in place.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, GLOO_SOCKET_IFNAME="lo")
    return function(*given)


def _answer(pipe: Connection, function: Callable[..., Any], arguments: tuple) -> None:
    try:
        pipe.send((True, function(*arguments)))
    except Exception as error:
        pipe.send((False, error))
