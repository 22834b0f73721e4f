# SPDX-License-Identifier: Apache-2.0
"""What is put into Megatron's model config, through its own hooks."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from megatron.core.transformer import MegatronModule
from megatron.training.argument_utils import gpt_config_from_args, hybrid_config_from_args

from megatron_cream.checkpoint.saved import SETTINGS_KEY
from megatron_cream.config import ExtensionConfig
from megatron_cream.rope.rotary import install_rotary
from megatron_cream.training.arguments import rotary_dim


def model_config(args: Namespace, extension: ExtensionConfig) -> Any:
    """Return Megatron's GPT or Hybrid model config with our rotary and metadata in it."""
    hybrid = getattr(args, "hybrid_layer_pattern", None) is not None
    config = hybrid_config_from_args(args) if hybrid else gpt_config_from_args(args)
    scaling = extension.scaling(rotary_dim(args))

    def install(chunks: list[MegatronModule]) -> list[MegatronModule]:
        for chunk in chunks:
            install_rotary(chunk, scaling)
        return chunks

    config.pre_wrap_hooks.append(install)
    config.extra_checkpoint_metadata = {
        **(config.extra_checkpoint_metadata or {}),
        SETTINGS_KEY: extension.to_dict(),
    }
    return config
