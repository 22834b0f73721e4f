# SPDX-License-Identifier: Apache-2.0
"""One rank's stage of a loaded model, outside training: its neighbours, groups and attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.transformer.attention import Attention
from megatron.core.utils import unwrap_model
from torch import Tensor
from torch.distributed import ProcessGroup


class PipelineStage:
    """What this rank has of a model that is spread over tensor, pipeline and context ranks.

    Args:
        model: as Megatron built it. ``module`` is what is inside its wrappers: that of a 16-bit
            model would make all its logits float32.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.module: Any = unwrap_model(model)
        self.is_first: bool = mpu.is_pipeline_first_stage()
        self.is_last: bool = mpu.is_pipeline_last_stage()
        self.context_rank: int = mpu.get_context_parallel_rank()
        self.context_group: ProcessGroup = mpu.get_context_parallel_group()
        self.tensor_rank: int = mpu.get_tensor_model_parallel_rank()
        several = mpu.get_tensor_model_parallel_world_size() > 1
        self.tensor_group = mpu.get_tensor_model_parallel_group() if several else None

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.module.parameters()).device

    def receive_input(self, batch: int, tokens: int) -> None:
        """Wait for the previous stage's hidden states ``[tokens, batch, h]`` and take them."""
        weight = next(self.module.parameters())
        hidden = weight.new_empty((tokens, batch, self.module.config.hidden_size))
        torch.distributed.recv(hidden, mpu.get_pipeline_model_parallel_prev_rank())
        self.module.set_input_tensor(hidden)

    def send(self, hidden: Tensor) -> Any:
        """Begin to send hidden states to the next stage; ``wait`` on what is returned."""
        next_rank = mpu.get_pipeline_model_parallel_next_rank()
        return torch.distributed.isend(hidden.contiguous(), next_rank)

    def broadcast_from_last(self, values: Tensor) -> None:
        """Give all stages the last one's ``values``, in place."""
        if mpu.get_pipeline_model_parallel_world_size() > 1:
            last = mpu.get_pipeline_model_parallel_last_rank()
            group = mpu.get_pipeline_model_parallel_group()
            torch.distributed.broadcast(values, last, group)

    def leave_unrotated(self) -> None:
        """Have every layer hand unrotated queries and keys to its core attention."""
        for layer in self.module.modules():
            if isinstance(layer, Attention):
                layer.register_forward_pre_hook(
                    lambda _, args, kwargs: (args, {**kwargs, "rotary_pos_emb": None}),
                    with_kwargs=True,
                )

    def replace_core_attention(self, attention: Callable[[Any], torch.nn.Module]) -> bool:
        """Give every layer an ``attention(config)``; return whether that was possible.

        Attribute: ``Attention.core_attention``. Layers with a window, sinks or scaling of their
        own keep theirs.
        """
        config = self.module.config
        if config.window_size is not None or config.softmax_type != "vanilla":
            return False
        if config.apply_query_key_layer_scaling:
            return False
        for layer in self.module.modules():
            if isinstance(layer, Attention):
                layer.core_attention = attention(config)
        return True
