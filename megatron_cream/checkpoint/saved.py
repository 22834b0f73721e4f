# SPDX-License-Identifier: Apache-2.0
"""What a torch_dist checkpoint says about itself, read without a GPU or a process group."""

from __future__ import annotations

import warnings
from argparse import Namespace
from pathlib import Path

from megatron_cream.config import ExtensionConfig

SETTINGS_KEY = "megatron_cream"
"""Attribute of the arguments that Megatron saves with a checkpoint; holds our settings."""

_TRACKER = "latest_checkpointed_iteration.txt"


def latest_checkpoint(path: str) -> Path | None:
    """Return the folder of the latest torch_dist checkpoint under ``path``, or None.

    ``path`` is what Megatron was given as --save, or one ``iter_...`` folder in it.

    Raises:
        ValueError: the folder that Megatron's tracker file names is missing or not whole.
    """
    root = Path(path)
    tracker = root / _TRACKER
    if not tracker.is_file():
        return root if (root / "metadata.json").is_file() else None
    name = tracker.read_text().strip()
    folder = root / ("release" if name == "release" else f"iter_{int(name):07d}")
    if not (folder / "metadata.json").is_file():
        raise ValueError(
            f"checkpoint {path}: {_TRACKER} names {folder.name}, which is missing or not whole"
        )
    return folder


def saved_arguments(path: str) -> Namespace | None:
    """Return the arguments saved with the latest checkpoint under ``path``, or None."""
    folder = latest_checkpoint(path)
    if folder is None:
        return None
    from megatron.core.dist_checkpointing import load_common_state_dict

    with warnings.catch_warnings():
        # It says that it reads in one process, which is what is wanted.
        warnings.simplefilter("ignore", UserWarning)
        return load_common_state_dict(str(folder)).get("args")


def saved_extension(args: Namespace) -> ExtensionConfig | None:
    """Return our settings out of saved arguments, or None where another tool trained."""
    settings = getattr(args, SETTINGS_KEY, None)
    return None if settings is None else ExtensionConfig.from_dict(settings)
