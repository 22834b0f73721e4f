# SPDX-License-Identifier: Apache-2.0
"""Finds the iterations of a run, and reads the arguments saved with one."""

from __future__ import annotations

import re
import shlex
from argparse import Namespace
from pathlib import Path

from megatron_cream.errors import UserError

TRACKER = "latest_checkpointed_iteration.txt"

RELEASE = "release"
"""What Megatron calls a checkpoint that is the start of training, without an iteration."""

FORMAT_FILE = "metadata.json"
"""Written last into an iteration: without it the save did not finish."""

_LONGEST = 18  # digits; what Megatron counts in


def read_tracker(root: Path) -> str | None:
    """Return what the tracker file names: digits of an iteration, or ``release``; None without one.

    Raises:
        UserError: it holds anything else.
    """
    path = root / TRACKER
    if not path.is_file():
        return None
    text = path.read_text(errors="replace").strip()
    digits = text.isascii() and text.isdecimal() and len(text) <= _LONGEST
    if text == RELEASE or digits:
        return text
    raise UserError(
        f"{path} holds {text[:40]!r}: it must be the number of an iteration in {root} "
        f"({_name_iterations(root)}), or {RELEASE}"
    )


def iteration_folder(root: Path, name: str) -> Path:
    """Return the folder of what a tracker names, whether it is there or not."""
    return root / (RELEASE if name == RELEASE else f"iter_{int(name):07d}")


def is_iteration(folder: Path) -> bool:
    """Whether a folder is itself one iteration of a checkpoint."""
    return any((folder / name).is_file() for name in (FORMAT_FILE, ".metadata", "common.pt"))


def list_iterations(root: Path) -> list[Path]:
    """Return the iterations in a folder, oldest first.

    What a save that was killed leaves behind, files of ranks and no table of them, is none.
    """
    if not root.is_dir():
        return []
    numbered = ((iteration_number(path), path) for path in root.iterdir())
    return [
        path
        for _, path in sorted((n, p) for n, p in numbered if n is not None and _holds_iteration(p))
    ]


def iteration_number(folder: Path) -> int | None:
    """Return the iteration of a folder, by its name; None for another folder's."""
    found = re.fullmatch(r"iter_(\d{7,18})", folder.name)
    return int(found[1]) if found else None


def _holds_iteration(folder: Path) -> bool:
    return is_iteration(folder) or any(folder.glob("mp_rank_*"))


def tracker_command(folder: Path) -> str:
    """Return the command that makes an iteration the one to go on from."""
    name = RELEASE if folder.name == RELEASE else iteration_number(folder)
    return f"echo {name} > {shlex.quote(str(folder.parent / TRACKER))}"


def missing_tracker_error(root: Path) -> UserError | None:
    """Return why a folder cannot be used: it has iterations and does not say which is the latest.

    None where it has a tracker, or no iteration.
    """
    found = list_iterations(root)
    if not found or (root / TRACKER).is_file():
        return None
    finished = [path for path in found if (path / FORMAT_FILE).is_file()]
    return UserError(
        f"{root} has {_name_iterations(root)} and no {TRACKER}, which names the one to take; "
        f"write it: {tracker_command((finished or found)[-1])}"
    )


def _name_iterations(root: Path) -> str:
    names = [path.name for path in list_iterations(root)]
    return f"{len(names)} iterations" + (f", {names[0]} to {names[-1]}" if names else "")


def find_checkpoint(path: str) -> Path | None:
    """Return the folder of the latest torch_dist checkpoint under ``path``, or None.

    ``path`` is what Megatron was given as --save, or one ``iter_...`` folder in it.

    Raises:
        UserError: the folder that Megatron's tracker file names is missing or not whole, the
            tracker is damaged, or there are iterations and no tracker.
    """
    root = Path(path)
    if (root / FORMAT_FILE).is_file():
        return root
    name = read_tracker(root)
    if name is None:
        if error := missing_tracker_error(root):
            raise error
        return None
    folder = iteration_folder(root, name)
    if not (folder / FORMAT_FILE).is_file():
        from megatron_cream.checkpoint.doctor import advise_earlier_iteration

        raise UserError(
            f"checkpoint {path}: {TRACKER} names {folder.name}, which is missing or not whole; "
            f"{advise_earlier_iteration(folder, '--checkpoint')}"
        )
    return folder


def require_checkpoint(path: str) -> Path:
    """Return what ``find_checkpoint`` finds for --checkpoint.

    Raises:
        FileNotFoundError: there is none.
    """
    folder = find_checkpoint(path) if path else None
    if folder is None:
        raise FileNotFoundError(f"--checkpoint is {path}: it must hold a torch_dist checkpoint")
    return folder


def read_saved_arguments(path: str) -> Namespace | None:
    """Return the arguments saved with the latest checkpoint under ``path``, or None.

    No code from the checkpoint runs.
    """
    folder = find_checkpoint(path)
    return None if folder is None else read_arguments(folder)


def read_arguments(folder: Path) -> Namespace | None:
    """Return the arguments saved with one iteration, or None where it has none.

    Raises:
        OSError, UserError: it is damaged, or names what Megatron does not write.
    """
    from megatron_cream.checkpoint.torch_dist_table import read_common, read_table

    args = read_common(read_table(folder)).get("args")
    if not isinstance(args, Namespace | None):
        raise UserError(
            f"checkpoint {folder} is damaged: its arguments are a {type(args).__name__}"
        )
    return args


def require_arguments(folder: Path) -> Namespace:
    """Return what ``read_arguments`` reads.

    Raises:
        UserError: there are none, or as ``read_arguments``.
    """
    args = read_arguments(folder)
    if args is None:
        raise UserError(f"checkpoint {folder} has no arguments, which say what its model is")
    return args
