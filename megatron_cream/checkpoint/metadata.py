# SPDX-License-Identifier: Apache-2.0
"""What a torch_dist checkpoint says about itself, read without a GPU or a process group."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from megatron_cream.checkpoint.iterations import (
    FORMAT_FILE,
    TRACKER,
    folder_named,
    read_tracker,
    start_of,
    without_tracker,
)
from megatron_cream.config import ExtensionConfig
from megatron_cream.errors import UserError
from megatron_cream.mcore.arguments import flag_of, marked

SETTINGS_KEY = "megatron_cream"
"""Attribute of the arguments that Megatron saves with a checkpoint; holds our settings."""


def latest_checkpoint(path: str) -> Path | None:
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
        if error := without_tracker(root):
            raise error
        return None
    folder = folder_named(root, name)
    if not (folder / FORMAT_FILE).is_file():
        from megatron_cream.checkpoint.integrity import go_on_before

        raise UserError(
            f"checkpoint {path}: {TRACKER} names {folder.name}, which is missing or not whole; "
            f"{go_on_before(folder, '--checkpoint')}"
        )
    return folder


def saved_arguments(path: str) -> Namespace | None:
    """Return the arguments saved with the latest checkpoint under ``path``, or None.

    No code from the checkpoint runs.
    """
    folder = latest_checkpoint(path)
    return None if folder is None else arguments_in(folder)


def arguments_in(folder: Path) -> Namespace | None:
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


def saved_extension(args: Namespace) -> ExtensionConfig | None:
    """Return our settings out of saved arguments, or None where another tool trained."""
    settings = getattr(args, SETTINGS_KEY, None)
    return None if settings is None else ExtensionConfig.from_dict(settings)


def _started_from(args: Namespace) -> Namespace | None:
    """Return the arguments saved with the weights that a run starts from or resumes."""
    start = start_of(args)
    return None if start is None else arguments_in(start.folder)


def starts_without_trained_rope(args: Namespace) -> bool:
    """Say whether a run starts from weights that have no trained frequencies among them."""
    saved = _started_from(args)
    extension = saved and saved_extension(saved)
    return saved is not None and not (extension and extension.trained)


def complete_arguments(args: Namespace) -> None:
    """Finish what --use-checkpoint-args began: settings of the model that Megatron leaves behind.

    Without them a model would be built with another norm epsilon, say, and nobody told.
    """
    saved = _started_from(args)
    for name in marked("restored") if saved else ():
        if getattr(saved, name, None) is not None:
            setattr(args, name, getattr(saved, name))


def keep_vocabulary(args: Namespace) -> None:
    """Have a run know how many tokens its model has beside padding, as the checkpoint says.

    A tokenizer may have fewer than the model; the rows of the rest would be lost on the way.

    Raises:
        UserError: the run's vocabulary is smaller, padding included.
    """
    saved = _started_from(args)
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
