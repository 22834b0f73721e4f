# SPDX-License-Identifier: Apache-2.0
"""What a run loads and where it saves, looked at before it starts.

Megatron's trainer starts from random weights where it finds no tracker file, counts iterations from
one then, and writes over folders that are there.
"""

from __future__ import annotations

import os
import shlex
import tempfile
from argparse import Namespace
from pathlib import Path

from megatron_cream.checkpoint.integrity import check
from megatron_cream.checkpoint.iterations import (
    RELEASE,
    TRACKER,
    is_iteration,
    iterations,
    number,
    start_of,
    without_tracker,
)
from megatron_cream.errors import UserError


def check_start(args: Namespace) -> None:
    """Check --load, --pretrained-checkpoint and --save of a run. No code of a checkpoint runs.

    Object storage (``msc://...``) is Megatron's to look at.

    Raises:
        UserError: there is nothing to load, what there is is damaged, or what another run saved
            would be overwritten.
        OSError: --save cannot be written.
    """
    primary = int(os.environ.get("RANK", "0")) == 0  # what is slow, one rank does for all
    for flag, path in (("--load", args.load), ("--pretrained-checkpoint", _pretrained(args))):
        if path:
            _refuse_one_iteration(flag, Path(path), finetune=args.finetune)
            _refuse_unnamed(flag, Path(path), args.ckpt_step)
    start = start_of(args)
    if start is None:
        _refuse_nothing_to_load(args)
    else:
        check(start.folder, f"{start.flag} is {start.root}", objects=primary)
    if args.save and "://" not in args.save:
        _refuse_overwriting(args)
        if primary:
            _refuse_unwritable(Path(args.save))


def _pretrained(args: Namespace) -> str | None:
    """Return what --pretrained-checkpoint names where it is used."""
    resumes = args.load and (Path(args.load) / TRACKER).is_file()
    return None if resumes else args.pretrained_checkpoint


def _refuse_one_iteration(flag: str, folder: Path, finetune: bool) -> None:
    if not is_iteration(folder) or (folder / TRACKER).is_file():
        return
    step, root = number(folder.resolve()), folder.resolve().parent
    if flag == "--load" and step is not None:
        more = " --finetune" if finetune else ""
        advice = f"give --load {shlex.quote(str(root))} --ckpt-step {step}{more}"
    else:
        advice = f"make a folder of it and give that: {_as_folder(folder.resolve(), step)}"
    raise UserError(
        f"{flag} is {folder}, one iteration: Megatron looks for {TRACKER} there, finds none and "
        f"would start from random weights; {advice}"
    )


def _as_folder(folder: Path, step: int | None) -> str:
    """Return the command that makes a folder with one iteration, and a tracker that names it."""
    name = RELEASE if step is None else folder.name
    link = f"mkdir START && ln -s {shlex.quote(str(folder))} START/{name}"
    return f"{link} && echo {RELEASE if step is None else step} > START/{TRACKER}"


def _refuse_unnamed(flag: str, root: Path, step: int | None) -> None:
    """Refuse iterations without a tracker, which Megatron would overwrite from the first on."""
    error = without_tracker(root)
    if error is not None and not (step and flag == "--load"):
        once = f", or give --ckpt-step {number(iterations(root)[-1])} once"
        raise UserError(f"{flag} is {root}: {error}{once if flag == '--load' else ''}")


def _refuse_nothing_to_load(args: Namespace) -> None:
    """Refuse to start from random weights where others were asked for.

    One --load and --save of a run that has saved nothing yet is how a run starts that will be
    resumed by the same command.
    """
    if args.pretrained_checkpoint:
        flag, path = "--pretrained-checkpoint", args.pretrained_checkpoint
    elif args.load and (args.finetune or not _same(args.load, args.save)):
        flag, path = "--load", args.load
    else:
        return
    elsewhere = flag == "--load" and args.non_persistent_ckpt_type is not None
    if not elsewhere and "://" not in path:
        raise FileNotFoundError(
            f"{flag} is {path}: it must hold a torch_dist checkpoint with its {TRACKER}, and the "
            "run would start from random weights"
        )


def _same(one: str | None, other: str | None) -> bool:
    return bool(one and other) and os.path.realpath(one) == os.path.realpath(other)


def _refuse_overwriting(args: Namespace) -> None:
    """Refuse to save over iterations that the run does not go on from."""
    held = iterations(Path(args.save))
    start = start_of(args)
    resumes = start is not None and start.flag == "--load" and _same(args.load, args.save)
    goes_on = resumes and not args.finetune and start.folder.name != RELEASE
    if not held or goes_on:
        return
    save = shlex.quote(args.save)
    raise UserError(
        f"--save is {args.save}: it has {len(held)} iterations, {held[0].name} to {held[-1].name}, "
        f"and this run counts from its own start and would overwrite them; go on with that run by "
        f"--load {save} --save {save} without --finetune, or save to a new folder"
    )


def _refuse_unwritable(folder: Path) -> None:
    """Write a file without a name where --save is, or where it is going to be made.

    Raises:
        OSError: that is not possible.
    """
    there = folder.absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"x")
    except OSError as error:
        raise OSError(
            f"--save is {folder}: {there} cannot be written ({error.strerror}); it must be a "
            "folder that this user can write to"
        ) from None
