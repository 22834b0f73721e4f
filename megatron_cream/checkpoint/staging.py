# SPDX-License-Identifier: Apache-2.0
"""Folders that are either whole or not there: written aside, moved into place when done."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_cream.errors import UserError

_PARTIAL = ".partial"


@contextmanager
def staged(output: Path, needed_bytes: int) -> Iterator[Path]:
    """Give a folder to write to, and rename it to ``output`` once everything in it is on the disk.

    What an interrupted attempt left beside ``output`` is removed first, and what this one wrote is
    removed if it fails, so that its space is free again.

    Args:
        needed_bytes: what will be written, to be refused before work starts if it does not fit.

    Raises:
        UserError: ``output`` holds something already, or the disk has too little space.
        OSError: the disk became full meanwhile, or failed; the message names ``output``.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output is {output}: it exists; it must be a new or an empty folder")
    partial = output.with_name(output.name + _PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        free = shutil.disk_usage(partial).free
        if free < needed_bytes:
            raise UserError(
                f"--output is {output}: its disk has {free / 1e9:.2f} GB free, "
                f"{needed_bytes / 1e9:.2f} GB are needed"
            )
        yield partial
        _sync_all(partial)
        os.rename(partial, output)
        _sync(output.parent)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if _disk_is_full(error):
            raise OSError(
                errno.ENOSPC, f"--output is {output}: its disk became full; nothing was kept"
            ) from None
        raise


def _disk_is_full(error: BaseException | None) -> bool:
    """Whether that is what an error began with: torch's writer raises its own on top."""
    while error is not None:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            return True
        error = error.__cause__ or error.__context__
    return False


def _sync_all(folder: Path) -> None:
    for root, _, files in os.walk(folder):
        for name in files:
            _sync(Path(root) / name)
        _sync(Path(root))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
