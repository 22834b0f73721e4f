# SPDX-License-Identifier: Apache-2.0
"""Calls a function in a fork of the fork server, which has megatron in memory.

For what changes a process for good: process groups, Megatron's globals, its command line.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
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
    # A process that dies answers nothing: then the end of the pipe is read.
    ok, answer = False, RuntimeError(f"{function.__name__} ended without an answer")
    with tempfile.NamedTemporaryFile("r", errors="replace") as output:
        given = (there, output.name, function, arguments)
        process = ranks._SERVER.Process(target=_answer, args=given)
        process.start()
        there.close()
        with contextlib.suppress(EOFError):
            ok, answer = here.recv()
        process.join()
        print(output.read())  # pytest shows it where the test fails
    if not ok:
        raise answer
    return answer


def call_ranks(ranks_: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Return what ``function`` returns on each of several gloo ranks, one fork each."""
    port = ranks._free_port()
    with ThreadPoolExecutor(ranks_) as pool:
        found = [
            pool.submit(call, _on_rank, ranks.addresses(rank, ranks_, port), function, arguments)
            for rank in range(ranks_)
        ]
        return [one.result() for one in found]


def _on_rank(environment: dict[str, str], function: Callable[..., Any], given: tuple) -> Any:
    os.environ.update(environment)
    return function(*given)


def _answer(pipe: Connection, output: str, function: Callable[..., Any], given: tuple) -> None:
    ranks.write_output_to(output)
    try:
        pipe.send((True, function(*given)))
    except Exception as error:
        pipe.send((False, error))
