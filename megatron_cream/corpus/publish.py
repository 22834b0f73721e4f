# SPDX-License-Identifier: Apache-2.0
"""Puts the finished files of a dataset in place: all of them, or none.

A mark beside the staged files says that they are whole. A process that is killed while it moves
them leaves the mark, and the next one goes on moving.
"""

from __future__ import annotations

import json
import os

from megatron_cream.errors import UserError

# In the order they are put in place: megatron finds a dataset by its .idx. The hashes are there
# for shards of a job that drops duplicates only.
SUFFIXES = (".bin", ".hashes", ".json", ".idx")
MARK = ".whole"
INDEX_MAGIC = b"MMIDIDX\x00\x00"


def check_absent(prefix: str, overwrite: bool) -> None:
    """Refuse a prefix that has any of the files already, unless they may be overwritten.

    Only a dataset may be: a file of another kind that happens to have one of the names is kept.

    Raises:
        UserError: naming the file.
    """
    found = [prefix + suffix for suffix in SUFFIXES if os.path.lexists(prefix + suffix)]
    if found and not overwrite:
        raise UserError(
            f"--output-prefix {prefix}: {found[0]} exists, needs a new prefix or --overwrite"
        )
    noted, indexed = _is_note(prefix + ".json"), _is_index(prefix + ".idx")
    for path in found:
        if not (noted if path.endswith(".json") else noted or indexed):
            raise UserError(
                f"--output-prefix {prefix}: {path} is not of a dataset, which is all that "
                "--overwrite replaces, needs a new prefix, or that file to be moved away"
            )


def check_prefix(prefix: str) -> None:
    """Refuse an output that names no file, or a place where no folder can be made.

    Raises:
        UserError: naming ``--output-prefix`` and what it needs.
    """
    where = f"--output-prefix {prefix}"
    folder, name = os.path.split(prefix)
    if name in ("", ".", ".."):
        raise UserError(f"{where}: names a folder, needs FOLDER/NAME")
    there = folder or "."
    while not os.path.lexists(there):
        there = os.path.dirname(there) or "."
    if not os.path.isdir(there):
        raise UserError(f"{where}: {there} is not a folder, needs one to write to")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{where}: folder {there} needs to be writable")


def publish(staged: str, prefix: str, overwrite: bool) -> tuple[str, ...]:
    """Move the staged files into place, or leave everything as it was.

    Args:
        staged: path of the new files without suffix, on the file system of ``prefix``.
        prefix: where they go.
        overwrite: whether files that are there may be replaced.

    Returns:
        The files of the dataset.
    """
    new = [suffix for suffix in SUFFIXES if os.path.exists(staged + suffix)]
    for suffix in new:
        _sync(staged + suffix)
    # Once more: another job may have written there since this one was checked.
    check_absent(prefix, overwrite)
    write_whole(staged + MARK, json.dumps(new).encode())
    try:
        finish_publishing(staged, prefix)
    except BaseException:
        if is_whole(staged):
            _restore(staged, prefix, new)
            os.unlink(staged + MARK)
        raise
    return tuple(prefix + suffix for suffix in new)


def is_whole(staged: str) -> bool:
    """Say whether the staged files, those moved already included, are a whole dataset."""
    return os.path.exists(staged + MARK)


def finish_publishing(staged: str, prefix: str) -> None:
    """Move what is not in place yet of a whole dataset, whose mark then goes.

    Raises:
        UserError: the mark is damaged.
    """
    new = _names_in(staged + MARK)
    # The old .idx goes first, so that it is never seen beside the new .bin.
    for suffix in reversed(SUFFIXES):
        in_place = suffix in new and not os.path.exists(staged + suffix)
        if os.path.lexists(prefix + suffix) and not in_place:
            os.rename(prefix + suffix, staged + ".old" + suffix)
    for suffix in SUFFIXES:
        if os.path.exists(staged + suffix):
            os.rename(staged + suffix, prefix + suffix)
    _sync(os.path.dirname(prefix) or ".")
    # From here on the dataset stands for itself, whatever comes of the folder it was made in.
    os.unlink(staged + MARK)


def write_whole(path: str, data: bytes) -> None:
    """Write a file that is there with all of ``data`` or not at all, also after a power cut."""
    with open(path + ".tmp", "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path + ".tmp", path)
    _sync(os.path.dirname(path) or ".")


def _names_in(mark: str) -> list[str]:
    try:
        with open(mark, "rb") as file:
            new = json.load(file)
    except ValueError:
        new = None
    if not isinstance(new, list) or not set(map(str, new)) <= set(SUFFIXES):
        raise UserError(f"{mark} is damaged, needs its folder to be removed")
    return new


def _is_note(path: str) -> bool:
    """Whether a file is one that preprocessing or merging wrote beside a dataset."""
    try:
        with open(path, "rb") as file:
            content = json.load(file)
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and "format_version" in content and "vocab_size" in content


def _is_index(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(len(INDEX_MAGIC)) == INDEX_MAGIC
    except OSError:
        return False


def _restore(staged: str, prefix: str, new: list[str]) -> None:
    for suffix in reversed(new):
        if not os.path.exists(staged + suffix):
            os.rename(prefix + suffix, staged + suffix)
    for suffix in SUFFIXES:
        if os.path.lexists(staged + ".old" + suffix):
            os.rename(staged + ".old" + suffix, prefix + suffix)


def _sync(path: str) -> None:
    """Make a file, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
