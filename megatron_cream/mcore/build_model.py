# SPDX-License-Identifier: Apache-2.0
"""Models outside training: one rank's part is built, loaded from a checkpoint, and used.

``PipelineStage`` is that part with its neighbours, groups and attention.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, mpu
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.safe_globals import SafeUnpickler
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    model_parallel_cuda_manual_seed,
)
from megatron.core.transformer.attention import Attention
from megatron.core.utils import unwrap_model
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_cream.config import ExtensionConfig
from megatron_cream.errors import UserError
from megatron_cream.mcore.argument_table import one_rank_values, values, vocabulary
from megatron_cream.mcore.cpu import is_installed
from megatron_cream.mcore.hooks import model_config
from megatron_cream.parallel_layout import ONE_PROCESS, ParallelLayout


def initialize_ranks(layout: ParallelLayout = ONE_PROCESS) -> None:
    """Set Megatron's parallel state up: for this process alone, or for torchrun's. Idempotent.

    Raises:
        UserError: torchrun started another number of processes than the layout has.
    """
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks != layout.gpus:
        raise UserError(
            f"--tensor-model-parallel-size {layout.tensor} x --pipeline-model-parallel-size "
            f"{layout.pipeline} x --context-parallel-size {layout.context} is {layout.gpus}: "
            f"torchrun started {ranks} processes, --nproc-per-node must be {layout.gpus}"
        )
    if not torch.distributed.is_initialized():
        if not is_installed():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        alone: dict[str, Any] = {"store": torch.distributed.HashStore(), "rank": 0, "world_size": 1}
        torch.distributed.init_process_group(
            "gloo" if is_installed() else "nccl", **(alone if ranks == 1 else {})
        )
    if not mpu.model_parallel_is_initialized():
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        mpu.initialize_model_parallel(
            tensor_model_parallel_size=layout.tensor,
            pipeline_model_parallel_size=layout.pipeline,
            context_parallel_size=layout.context,
        )
        model_parallel_cuda_manual_seed(1234)


def parse_flags(flags: list[str]) -> Namespace:
    """Return all of Megatron's and our arguments, as its parser and its validation make them."""
    from megatron.training.arguments import add_megatron_arguments, validate_args

    from megatron_cream.training.arguments import add_arguments

    parser = add_arguments(add_megatron_arguments(ArgumentParser(allow_abbrev=False)))
    args = parser.parse_args(flags)
    args.rank, args.world_size = 0, 1
    with contextlib.redirect_stdout(io.StringIO()):  # it prints them all
        validate_args(args)
    return args


def build_model(args: Namespace, extension: ExtensionConfig, layout: ParallelLayout) -> Any:
    """Return this rank's part of the model that saved arguments describe, with random weights.

    The arguments are changed to those of an evaluation at ``layout``.
    """
    vars(args).update(one_rank_values(args) | values("evaluated"))
    args.tensor_model_parallel_size = layout.tensor
    args.expert_tensor_parallel_size = layout.tensor
    args.pipeline_model_parallel_size = layout.pipeline
    args.context_parallel_size = layout.context
    if is_installed():
        vars(args).update(values("cpu"))
    args.vocab_size = tokens = vocabulary(args)
    if tokens and args.padded_vocab_size:
        # Padded rows would take part in the softmax; no token has their ids. Tensor parallelism
        # needs some: evaluation leaves them out.
        args.padded_vocab_size = -(-tokens // layout.tensor) * layout.tensor
    config = model_config(args, extension)
    (module,) = config.get_builder_cls()(config).build_distributed_models(
        ProcessGroupCollection.use_mpu_process_groups(),
        wrap_with_ddp=False,
        data_parallel_random_init=False,
    )
    return module


def load_weights(module: Any, folder: Path) -> None:
    """Load one iteration's weights into this rank's part of its model."""
    metadata = dict(dist_checkpointing.load_content_metadata(str(folder)) or {})
    metadata["dp_cp_group"] = mpu.get_data_parallel_group(with_context_parallel=True)
    with warnings.catch_warnings():
        # torch announces changes to classes that Megatron's format is made of.
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", UserWarning)
        wanted = {"model": module.sharded_state_dict(metadata=metadata)}
        loaded = dist_checkpointing.load(wanted, str(folder))
    module.load_state_dict(loaded["model"], strict=True)


_LAYOUT = "megatron.core.transformer.pipeline_parallel_layer_layout.PipelineParallelLayerLayout"
_ENUMS = ("megatron.core.enums", "megatron.core.transformer.enums")  # all of theirs


def named_by_megatron() -> dict[str, Any]:
    """Return what saved arguments and states name, beside what Megatron tells torch itself."""
    layout, _, name = _LAYOUT.rpartition(".")
    found = {_LAYOUT: getattr(importlib.import_module(layout), name)}
    for module in _ENUMS:
        for name, value in vars(importlib.import_module(module)).items():
            if isinstance(value, type) and issubclass(value, Enum):
                found[f"{module}.{name}"] = value
    return found


def is_extra_state_name(module: str, name: str) -> bool:
    """Whether Megatron reads it in the state that a layer keeps beside its weights, as for fp8."""
    return (module, name) in SafeUnpickler._SAFE_CLASSES


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
        self.stages: int = mpu.get_pipeline_model_parallel_world_size()
        self.data_rank: int = mpu.get_data_parallel_rank()
        self.data_ranks: int = mpu.get_data_parallel_world_size()
        several = mpu.get_tensor_model_parallel_world_size() > 1
        self.tensor_group = mpu.get_tensor_model_parallel_group() if several else None

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.module.parameters()).device

    @property
    def attention_layers(self) -> int:
        """How many layers of attention this stage has."""
        return sum(isinstance(layer, Attention) for layer in self.module.modules())

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
        if self.stages > 1:
            last = mpu.get_pipeline_model_parallel_last_rank()
            group = mpu.get_pipeline_model_parallel_group()
            torch.distributed.broadcast(values, last, group)

    def gather_tokens(self, hidden: Tensor) -> Tensor:
        """Return hidden states ``[tokens, b, h]``, whole also under sequence parallelism."""
        if not self.module.config.sequence_parallel:
            return hidden
        return gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)

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


def leave_unrotated(model: torch.nn.Module) -> None:
    """Have every attention layer hand unrotated queries and keys to its core attention.

    Megatron's static inference keeps keys as they come, its flash decoding and dynamic batching
    keep rotated ones and have kernels of their own: these raise UserError.
    """

    def unrotated(layer: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        context: Any = kwargs.get("inference_context") or kwargs.get("inference_params")
        ranks = layer.pg_collection.cp.size()
        if context and (layer.config.flash_decode or not context.is_static_batching() or ranks > 1):
            raise UserError(
                "Megatron's inference with dual chunk attention must have a static context, no "
                f"--flash-decode and no context parallelism; it has {type(context).__name__}, "
                f"flash_decode {layer.config.flash_decode} and {ranks} context-parallel ranks"
            )
        return args, {**kwargs, "rotary_pos_emb": None}

    for layer in model.modules():
        if isinstance(layer, Attention):
            layer.register_forward_pre_hook(unrotated, with_kwargs=True)
