# SPDX-License-Identifier: Apache-2.0
"""The folder that Megatron saves to: its iterations, and the tracker file that names the latest."""

from __future__ import annotations

import re
import shlex
from argparse import Namespace
from dataclasses import dataclass
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
        f"({_named(root)}), or {RELEASE}"
    )


def folder_named(root: Path, name: str) -> Path:
    """Return the folder of what a tracker names, whether it is there or not."""
    return root / (RELEASE if name == RELEASE else f"iter_{int(name):07d}")


def is_iteration(folder: Path) -> bool:
    """Whether a folder is itself one iteration of a checkpoint."""
    return any((folder / name).is_file() for name in (FORMAT_FILE, ".metadata", "common.pt"))


def iterations(root: Path) -> list[Path]:
    """Return the iterations in a folder, oldest first.

    What a save that was killed leaves behind, files of ranks and no table of them, is none.
    """
    if not root.is_dir():
        return []
    found = [path for path in root.iterdir() if number(path) is not None and _holds_one(path)]
    return sorted(found, key=number)


def number(folder: Path) -> int | None:
    """Return the iteration of a folder, by its name; None for another folder's."""
    found = re.fullmatch(r"iter_(\d{7,18})", folder.name)
    return int(found[1]) if found else None


def _holds_one(folder: Path) -> bool:
    return is_iteration(folder) or any(folder.glob("mp_rank_*"))


def write_tracker(folder: Path) -> str:
    """Return the command that makes an iteration the one to go on from."""
    name = RELEASE if folder.name == RELEASE else number(folder)
    return f"echo {name} > {shlex.quote(str(folder.parent / TRACKER))}"


def without_tracker(root: Path) -> UserError | None:
    """Return why a folder cannot be used: it has iterations and does not say which is the latest.

    None where it has a tracker, or no iteration.
    """
    found = iterations(root)
    if not found or (root / TRACKER).is_file():
        return None
    finished = [path for path in found if (path / FORMAT_FILE).is_file()]
    return UserError(
        f"{root} has {_named(root)} and no {TRACKER}, which names the one to take; write it: "
        f"{write_tracker((finished or found)[-1])}"
    )


def _named(root: Path) -> str:
    names = [path.name for path in iterations(root)]
    return f"{len(names)} iterations" + (f", {names[0]} to {names[-1]}" if names else "")


@dataclass(frozen=True)
class Start:
    """What a run takes its weights from.

    Attributes:
        flag: that named it, ``--load`` or ``--pretrained-checkpoint``.
        root: its value.
        folder: the iteration, whether it is there or not.
    """

    flag: str
    root: Path
    folder: Path


def start_of(args: Namespace) -> Start | None:
    """Return what Megatron's trainer will load with these arguments; None for random weights.

    Raises:
        UserError: a tracker file that names nothing.
    """
    load, pretrained = args.load, args.pretrained_checkpoint
    if pretrained and not (load and (Path(load) / TRACKER).is_file()):
        flag, root = "--pretrained-checkpoint", Path(pretrained)
    elif load:
        flag, root = "--load", Path(load)
    else:
        return None
    name = read_tracker(root)
    step = getattr(args, "ckpt_step", None)
    if step and name != RELEASE:  # as Megatron has it
        name = str(step)
    return None if name is None else Start(flag, root, folder_named(root, name))
