# SPDX-License-Identifier: Apache-2.0
"""Loads a model to evaluate, and says and validates what a training run is going to load."""

from __future__ import annotations

import os
import shlex
import tempfile
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_cream.attention.methods import AttentionChoice, saved_attention
from megatron_cream.checkpoint.doctor import validate_iteration
from megatron_cream.checkpoint.iterations import (
    RELEASE,
    TRACKER,
    is_iteration,
    iteration_folder,
    iteration_number,
    list_iterations,
    missing_tracker_error,
    read_arguments,
    read_tracker,
    require_arguments,
    require_checkpoint,
)
from megatron_cream.checkpoint.torch_dist_table import only_listed_globals
from megatron_cream.config import ExtensionConfig, saved_extension
from megatron_cream.errors import UserError
from megatron_cream.mcore.argument_table import flag_of, marked
from megatron_cream.parallel_layout import ONE_PROCESS, ParallelLayout


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode.

    Attributes:
        module: called with ``input_ids``, ``position_ids`` ``[b, s]`` and optionally ``labels``.
        extension: the settings by which it rotates by position.
        args: Megatron's arguments, as saved.
        attention: dual chunk attention that it was trained with.
    """

    module: torch.nn.Module
    extension: ExtensionConfig
    args: Namespace
    attention: AttentionChoice | None = None


def load_model(
    path: str, extension: ExtensionConfig | None = None, layout: ParallelLayout = ONE_PROCESS
) -> LoadedModel:
    """Load this rank's part of the latest checkpoint under ``path``.

    Args:
        path: folder given to --save, or one iteration in it; saved at any TP/PP/DP layout.
        extension: settings to evaluate with instead of the saved ones, for instance a base model
            with interpolation that it was not trained with.
        layout: ranks to spread it over, by the first three of its sizes.

    Returns:
        The module, called with ``input_ids`` and ``position_ids`` ``[b, s]``; its settings, with
        lengths in tokens; and Megatron's arguments.

    Raises:
        FileNotFoundError: there is no torch_dist checkpoint.
        UserError: it carries no settings of ours and ``extension`` is not given; it is damaged, or
            names what Megatron does not write.
    """
    # Megatron's: a run has it only once its own flags are parsed.
    from megatron_cream.mcore.build_model import build_model, initialize_ranks, load_weights

    folder = require_checkpoint(path)
    validate_iteration(folder, f"--checkpoint is {path}")
    args = require_arguments(folder)
    extension = extension or saved_extension(args)
    if extension is None:
        raise UserError(
            f"--checkpoint is {path}: it was not trained by megatron_cream, so it does not say "
            "how its positions are interpolated"
        )
    _validate_trained_rope(path, args, extension)
    initialize_ranks(layout)
    attention = saved_attention(args)
    module = build_model(args, extension, layout)
    with only_listed_globals():  # .metadata was read with a list of its own before
        load_weights(module, folder)
    return LoadedModel(module.eval(), extension, args, attention)


def _validate_trained_rope(path: str, args: Namespace, extension: ExtensionConfig) -> None:
    """Refuse an interpolation of trained frequencies that the checkpoint has no weights of."""
    if not extension.trained:
        return
    before, name = saved_extension(args), extension.rope_interpolation
    if before is None or before.rope_interpolation != name:
        raise UserError(
            f"--rope-interpolation is {name!r}: its weights are trained, and --checkpoint {path} "
            f"has none; train it with --rope-interpolation {name}"
        )


@dataclass(frozen=True)
class RunStart:
    """What a run takes its weights from.

    Attributes:
        flag: that named it, ``--load`` or ``--pretrained-checkpoint``.
        root: its value.
        folder: the iteration, whether it is there or not.
    """

    flag: str
    root: Path
    folder: Path


def find_start(args: Namespace) -> RunStart | None:
    """Return what Megatron's trainer will load with these arguments; None for random weights.

    Raises:
        UserError: a tracker file that names nothing.
    """
    if pretrained := _pretrained(args):
        flag, root = "--pretrained-checkpoint", Path(pretrained)
    elif args.load:
        flag, root = "--load", Path(args.load)
    else:
        return None
    name = read_tracker(root)
    step = getattr(args, "ckpt_step", None)
    if step and name != RELEASE:  # as Megatron has it
        name = str(step)
    return None if name is None else RunStart(flag, root, iteration_folder(root, name))


def validate_start(args: Namespace) -> None:
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
            _validate_not_one_iteration(flag, Path(path), finetune=args.finetune)
            _validate_tracker(flag, Path(path), args.ckpt_step)
    start = find_start(args)
    if start is None:
        _validate_new_start(args)
    else:
        validate_iteration(start.folder, f"{start.flag} is {start.root}", objects=primary)
    if args.save and "://" not in args.save:
        _validate_nothing_overwritten(args)
        if primary:
            _validate_writable(Path(args.save))


def _pretrained(args: Namespace) -> str | None:
    """Return what --pretrained-checkpoint names where it is used."""
    resumes = args.load and (Path(args.load) / TRACKER).is_file()
    return None if resumes else args.pretrained_checkpoint


def _validate_not_one_iteration(flag: str, folder: Path, finetune: bool) -> None:
    if not is_iteration(folder) or (folder / TRACKER).is_file():
        return
    step, root = iteration_number(folder.resolve()), folder.resolve().parent
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


def _validate_tracker(flag: str, root: Path, step: int | None) -> None:
    """Refuse iterations without a tracker, which Megatron would overwrite from the first on."""
    error = missing_tracker_error(root)
    if error is not None and not (step and flag == "--load"):
        once = f", or give --ckpt-step {iteration_number(list_iterations(root)[-1])} once"
        raise UserError(f"{flag} is {root}: {error}{once if flag == '--load' else ''}")


def _validate_new_start(args: Namespace) -> None:
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
    return bool(one and other) and os.path.realpath(one or "") == os.path.realpath(other or "")


def _validate_nothing_overwritten(args: Namespace) -> None:
    """Refuse to save over iterations that the run does not go on from."""
    held = list_iterations(Path(args.save))
    start = find_start(args)
    goes_on = (
        start is not None
        and start.flag == "--load"
        and start.folder.name != RELEASE
        and _same(args.load, args.save)
        and not args.finetune
    )
    if not held or goes_on:
        return
    save = shlex.quote(args.save)
    raise UserError(
        f"--save is {args.save}: it has {len(held)} iterations, {held[0].name} to "
        f"{held[-1].name}, and this run counts from its own start and would overwrite them; go "
        f"on with that run by --load {save} --save {save} without --finetune, "
        "or save to a new folder"
    )


def _validate_writable(folder: Path) -> None:
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


def _read_start_arguments(args: Namespace) -> Namespace | None:
    """Return the arguments saved with the weights that a run starts from or resumes."""
    start = find_start(args)
    return None if start is None else read_arguments(start.folder)


def starts_without_trained_rope(args: Namespace) -> bool:
    """Say whether a run starts from weights that have no trained frequencies among them."""
    saved = _read_start_arguments(args)
    extension = saved and saved_extension(saved)
    return saved is not None and not (extension and extension.trained)


def complete_arguments(args: Namespace) -> None:
    """Finish what --use-checkpoint-args began: settings of the model that Megatron leaves behind.

    Without them the model would be built with another norm epsilon, for instance, in silence.
    """
    saved = _read_start_arguments(args)
    for name in marked("restored") if saved else ():
        if getattr(saved, name, None) is not None:
            setattr(args, name, getattr(saved, name))


def complete_vocabulary(args: Namespace) -> None:
    """Have a run know how many tokens its model has beside padding, as the checkpoint says.

    A tokenizer may have fewer than the model; the rows of the rest would be lost on the way.

    Raises:
        UserError: the run's vocabulary is smaller, padding included.
    """
    saved = _read_start_arguments(args)
    size = getattr(saved, "vocab_size", None)
    if size is None:
        return
    args.vocab_size = args.vocab_size or size
    if (args.padded_vocab_size or args.vocab_size) < size:
        raise UserError(
            f"--padded-vocab-size is {args.padded_vocab_size}: the checkpoint that the run starts "
            f"from has {size} tokens, it must be at least that; --use-checkpoint-args takes it over"
        )


def validate_same_model(path: str, saved: Namespace, args: Namespace) -> None:
    """Refuse flags that build another model of the same shapes than a checkpoint is of.

    Raises:
        UserError: naming each flag, with both values.
    """
    differences = [
        f"{flag_of(name)} {getattr(saved, name)} != {getattr(args, name)}"
        for name in marked("same_model")
        if getattr(saved, name, None) is not None and getattr(saved, name) != getattr(args, name)
    ]
    if differences:
        raise UserError(
            f"{path} is of another model than the flags say (checkpoint != now): "
            f"{'; '.join(differences)}. Give the same, or --use-checkpoint-args"
        )
