# SPDX-License-Identifier: Apache-2.0
"""CLEX: frequencies solve an ODE over the scale, with a trained term (arXiv:2310.16450).

What this package exposes is a ``rope.scaling.ScalingTrainer``, which ``ClexScaling`` names; nothing
else outside knows it. ``rope.clex`` has its settings.

ode             the equation, and its solution on the host                    (numpy)
ode_triton      the same on a GPU, for training                               (triton)
frequencies     a table per step, and frozen at one scale for export
trained_rotary  what takes the place of Megatron's rotary embedding, and its rotation
gradients       the gradient of the weights, over all ranks, once per step
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_cream.checkpoint.torch_dist_io import TorchDistTensors
    from megatron_cream.extras.clex.trained_rotary import ClexRotaryEmbedding
    from megatron_cream.rope.clex import ClexScaling
    from megatron_cream.rope.scaling import RopeScaling


def configure(config: Any, starts_without: bool) -> None:
    """Have Megatron make the gradient of the weights, and the chunks of a rank share one table.

    Args:
        config: Megatron's GPT or Hybrid model config, with hooks.
        starts_without: the checkpoint that the run starts from has no weights of CLEX.
    """
    from megatron_cream.extras.clex import gradients

    gradients.configure_finalizer(config.transformer)
    config.pre_wrap_hooks.append(partial(gradients.share_table, fresh=starts_without))


def rotary_class() -> type[ClexRotaryEmbedding]:
    """Return the module that takes the place of Megatron's rotary embedding."""
    from megatron_cream.extras.clex.trained_rotary import ClexRotaryEmbedding

    return ClexRotaryEmbedding


def freeze_stored(scaling: ClexScaling, stored: TorchDistTensors) -> RopeScaling:
    """Return the frequencies of a checkpoint's weights at T, as LongRoPE's lists.

    Raises:
        UserError: it has no such weights, or others than the settings say.
    """
    from megatron_cream.extras.clex.frequencies import freeze, read_weights

    return freeze(scaling, read_weights(stored), scaling.factor)
