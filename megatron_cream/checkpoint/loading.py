# SPDX-License-Identifier: Apache-2.0
"""Loads a model out of a Megatron checkpoint of any parallel layout, ready to evaluate."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass

import torch

from megatron_cream.attention.methods import AttentionChoice, saved_attention
from megatron_cream.checkpoint.doctor import validate_iteration
from megatron_cream.checkpoint.iterations import require_arguments, require_checkpoint
from megatron_cream.checkpoint.unpickling import only_listed_globals
from megatron_cream.config import ExtensionConfig, saved_extension
from megatron_cream.errors import UserError
from megatron_cream.extras.hybrid import without_stages
from megatron_cream.mcore.build_model import build_model, initialize_ranks, load_weights
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
    args.hybrid_layer_pattern = without_stages(getattr(args, "hybrid_layer_pattern", None))
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
