# SPDX-License-Identifier: Apache-2.0
"""What to evaluate a model with where the flags ask for another RoPE than its own."""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from pathlib import Path
from typing import Any

from megatron_cream.checkpoint.iterations import read_saved_arguments
from megatron_cream.config import ExtensionConfig, rope_settings, saved_extension
from megatron_cream.errors import UserError, naming
from megatron_cream.evaluation.evaluation_settings import EvaluationSettings
from megatron_cream.options import read_object
from megatron_cream.rope import SCALINGS, hf_rope_fields, scaling_from_hf
from megatron_cream.rope.flags import options_from_args

_LONGEST = 2**40  # tokens


def changed_extension(settings: EvaluationSettings) -> ExtensionConfig | None:
    """Return what to evaluate a checkpoint with where the RoPE asked for is not its own.

    The window is, as in ``changed_fields``, that of the model before any interpolation, times
    the factor.

    Raises:
        UserError: settings that do not go together.
    """
    changes = _changes(settings)
    saved = read_saved_arguments(str(settings.checkpoint)) if changes else None
    extension = saved_extension(saved) if saved is not None else None
    return None if extension is None else _changed(extension, changes)


def changed_fields(settings: EvaluationSettings) -> dict[str, Any] | None:
    """Return the fields of config.json to evaluate --hf with where they are not its own.

    The window is that of the model before any interpolation, times --rope-factor.

    Raises:
        UserError: settings that do not go together, or a config.json that cannot be changed.
    """
    changes, folder = _changes(settings), Path(str(settings.hf))
    path = folder / "config.json"
    if not changes or not path.is_file():  # a folder without one is refused where it is loaded
        return None
    config = read_object(path)
    if "text_config" in config:
        raise UserError(
            f"--hf is {folder}: its config.json has a text_config, whose RoPE cannot be changed "
            "here; leave out the flags of RoPE"
        )
    name = changes.get("rope_interpolation")
    if name in SCALINGS and SCALINGS[name].trained_by:
        raise UserError(
            f"--rope-interpolation is {name} with --hf: its angles are trained; evaluate a "
            "checkpoint that was, or its export"
        )
    with naming(folder):
        own = scaling_from_hf(config)
    window = own.original_length
    plain = ExtensionConfig(train_length=window, **{"target_length": window, **rope_settings(own)})
    extension = _changed(plain, changes)
    scaling = extension.scaling(own.dim)
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return hf_rope_fields(scaling, extension.target_length, head_dim)


def _changes(settings: EvaluationSettings) -> dict[str, Any]:
    changes = {
        field: value
        for field in ("rope_interpolation", "rope_factor", "rope_theta")
        if (value := getattr(settings, field)) is not None
    }
    if options := options_from_args(Namespace(**vars(settings))):
        changes["rope_options"] = options
    return changes


def _changed(extension: ExtensionConfig, changes: dict[str, Any]) -> ExtensionConfig:
    name = changes.get("rope_interpolation", extension.rope_interpolation)
    if name != extension.rope_interpolation:
        # What belongs to the model's own interpolation means nothing to another.
        changes = {"rope_options": {}, "rope_theta": None, "mixed_windows": False, **changes}
    found = dataclasses.replace(extension, **changes)
    if name == "none" and found.rope_factor != 1:
        raise UserError(
            f"--rope-factor is {found.rope_factor:g}: without an interpolation it changes nothing; "
            "name one with --rope-interpolation"
        )
    if found.rope_factor == 1 and "rope_factor" not in changes and SCALINGS[name].by_factor:
        raise UserError(
            f"--rope-factor is not given: the model's own is 1, with which {name} changes nothing; "
            "it must be how many times longer its window becomes"
        )
    return _reaching(found)


def _reaching(found: ExtensionConfig) -> ExtensionConfig:
    """Return the settings with the window that they reach; of drawn scales the trained one."""
    if found.draws_scales:
        return found
    if not found.original_length * found.rope_factor <= _LONGEST:
        raise UserError(
            f"--rope-factor is {found.rope_factor:g}: {found.original_length} tokens times it must "
            f"be at most {_LONGEST}"
        )
    window = round(found.original_length * found.rope_factor)
    # Positions of training samples would be checked against the new window, and are not used.
    return dataclasses.replace(
        found,
        position_strategy="full",
        position_options={},
        train_length=window,
        target_length=window,
    )
