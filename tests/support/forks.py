# SPDX-License-Identifier: Apache-2.0
"""Calls a function in a fork of the fork server, which has megatron in memory.

For what changes a process for good: process groups, Megatron's globals, its command line.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
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


def _answer(pipe: Connection, function: Callable[..., Any], arguments: tuple) -> None:
    try:
        pipe.send((True, function(*arguments)))
    except Exception as error:
        pipe.send((False, error))
