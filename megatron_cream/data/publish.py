# SPDX-License-Identifier: Apache-2.0
"""Puts the finished files of a dataset in place: all of them, or none."""

import os

# In the order they are put in place: megatron finds a dataset by its .idx.
SUFFIXES = (".bin", ".json", ".idx")


def check_absent(prefix: str, overwrite: bool) -> None:
    """Refuse a prefix that has any of the files already, unless they may be overwritten."""
    for suffix in SUFFIXES:
        path = prefix + suffix
        if os.path.lexists(path) and not overwrite:
            raise ValueError(
                f"--output-prefix {prefix}: {path} exists, needs a new prefix or --overwrite"
            )


def publish(staged: str, prefix: str, overwrite: bool) -> tuple[str, ...]:
    """Move the staged files into place, or leave everything as it was."""
    for suffix in SUFFIXES:
        _sync(staged + suffix)
    # Once more: another job may have written there since this one was checked.
    check_absent(prefix, overwrite)
    old = staged + ".old"
    try:
        # The old .idx goes first, so that it is never seen beside the new .bin.
        for suffix in reversed(SUFFIXES):
            if os.path.lexists(prefix + suffix):
                os.rename(prefix + suffix, old + suffix)
        for suffix in SUFFIXES:
            os.rename(staged + suffix, prefix + suffix)
    except BaseException:
        _restore(staged, old, prefix)
        raise
    _sync(os.path.dirname(prefix) or ".")
    return tuple(prefix + suffix for suffix in SUFFIXES)


def _restore(staged: str, old: str, prefix: str) -> None:
    for suffix in reversed(SUFFIXES):
        if not os.path.exists(staged + suffix):
            os.unlink(prefix + suffix)
    for suffix in SUFFIXES:
        if os.path.lexists(old + suffix):
            os.rename(old + suffix, prefix + suffix)


def _sync(path: str) -> None:
    """Make a file, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
