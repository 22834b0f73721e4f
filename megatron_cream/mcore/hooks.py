# SPDX-License-Identifier: Apache-2.0
"""Puts our RoPE and attention into Megatron's model config, through its own hooks."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from megatron.core.transformer import MegatronModule
from megatron.training.argument_utils import gpt_config_from_args, hybrid_config_from_args

from megatron_cream.config import SETTINGS_KEY, ExtensionConfig
from megatron_cream.errors import UserError
from megatron_cream.mcore.argument_table import rotary_dim
from megatron_cream.mcore.extra import extras
from megatron_cream.mcore.rotary import fold_attention_factor_into_softmax, install_rotary
from megatron_cream.rope.scaling import RopeScaling, trainer_of


def model_config(args: Namespace, extension: ExtensionConfig) -> Any:
    """Return Megatron's GPT or Hybrid model config with our rotary and metadata in it."""
    return add_hooks(megatron_config(args), args, extension)


def megatron_config(args: Namespace) -> Any:
    """Return the GPT or Hybrid model config that Megatron makes of its flags."""
    is_hybrid = getattr(args, "hybrid_layer_pattern", None) is not None
    return hybrid_config_from_args(args) if is_hybrid else gpt_config_from_args(args)


def add_hooks(
    config: Any, args: Namespace, extension: ExtensionConfig, *, trains_rope_anew: bool = False
) -> Any:
    """Put our rotary and metadata into a GPT or Hybrid model config, and return it. Idempotent.

    Args:
        trains_rope_anew: the checkpoint that the run starts from has no trained frequencies.

    Raises:
        UserError: another model's config, which has no place for hooks.
    """
    if not hasattr(config, "pre_wrap_hooks"):
        raise UserError(
            f"the model config is {type(config).__name__}: it must be Megatron's GPTModelConfig or "
            "HybridModelConfig, through whose hooks positions reach the model"
        )
    if not any(isinstance(hook, _InstallRotary) for hook in config.pre_wrap_hooks):
        scaling = extension.scaling(rotary_dim(args))
        in_softmax = fold_attention_factor_into_softmax(config.transformer, scaling)
        hook = _InstallRotary(scaling, in_softmax, extension.mixed_windows)
        config.pre_wrap_hooks.append(hook)
        if trainer := trainer_of(scaling):
            trainer.configure(config, trains_rope_anew)
    config.extra_checkpoint_metadata = {
        **(config.extra_checkpoint_metadata or {}),
        SETTINGS_KEY: extension.to_dict(),
    }
    for extra in extras():
        extra.configure(config, args, extension)
    return config


class _InstallRotary:
    """The hook that Megatron calls with the built model chunks of a rank."""

    def __init__(self, scaling: RopeScaling, in_softmax: bool, mixed_windows: bool) -> None:
        self.scaling = scaling
        self.in_softmax = in_softmax
        self.mixed_windows = mixed_windows

    def __call__(self, chunks: list[MegatronModule]) -> list[MegatronModule]:
        for chunk in chunks:
            install_rotary(
                chunk,
                self.scaling,
                attention_factor_in_softmax=self.in_softmax,
                mixed_windows=self.mixed_windows,
            )
        return chunks
