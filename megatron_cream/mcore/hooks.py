# SPDX-License-Identifier: Apache-2.0
"""Puts our RoPE and the parts of ``extras`` into Megatron's model config, through its own hooks.

Imports Megatron late: flags, which ``Extra`` adds to, are read before.
"""

from __future__ import annotations

import importlib
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from typing import Any

from megatron_cream.config import SETTINGS_KEY, ExtensionConfig
from megatron_cream.errors import UserError
from megatron_cream.mcore.argument_table import rotary_dim
from megatron_cream.rope.scaling import trainer_of


def model_config(args: Namespace, extension: ExtensionConfig) -> Any:
    """Return Megatron's GPT or Hybrid model config with our rotary and metadata in it."""
    return add_hooks(megatron_config(args), args, extension)


def megatron_config(args: Namespace) -> Any:
    """Return the GPT or Hybrid model config that Megatron makes of its flags."""
    from megatron.training.argument_utils import gpt_config_from_args, hybrid_config_from_args

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
    if not any(getattr(hook, "func", None) is _install_rotary for hook in config.pre_wrap_hooks):
        from megatron_cream.mcore.rotary import fold_attention_factor_into_softmax

        scaling = extension.scaling(rotary_dim(args))
        hook = partial(
            _install_rotary,
            scaling=scaling,
            attention_factor_in_softmax=fold_attention_factor_into_softmax(
                config.transformer, scaling
            ),
            mixed_windows=extension.mixed_windows,
        )
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


def _install_rotary(chunks: list[Any], **settings: Any) -> list[Any]:
    """The hook that Megatron calls with the built model chunks of a rank."""
    from megatron_cream.mcore.rotary import install_rotary

    for chunk in chunks:
        install_rotary(chunk, **settings)
    return chunks


_NAMES = ("hybrid", "te_cross_entropy", "rotation", "dual_chunk", "long_validation")


class Extra:
    """What a part may do, and when; each module of ``extras`` has one as ``EXTRA``."""

    def add_flags(self, add: Callable[..., Any]) -> None:
        """Add its flags by ``add``, the ``add_argument`` of our group."""

    def validate_flags(self, args: Namespace, extension: Any) -> None:
        """Validate flags alone.

        Raises:
            UserError: naming the flag, its value and the value needed.
        """

    def validate_machine(self, args: Namespace) -> None:
        """Validate that packages which flags need are installed here.

        Raises:
            UserError: naming the flag and the package.
        """

    def configure(self, config: Any, args: Namespace, extension: Any) -> None:
        """Put it into Megatron's model config, before the model is built. Idempotent."""


def extras() -> list[Extra]:
    """Return all parts, in the order in which they are asked."""
    return [importlib.import_module(f"megatron_cream.extras.{name}").EXTRA for name in _NAMES]
