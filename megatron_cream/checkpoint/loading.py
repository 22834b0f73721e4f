# SPDX-License-Identifier: Apache-2.0
"""A model out of a Megatron checkpoint of any layout, ready to evaluate."""

from __future__ import annotations

import os
import warnings
from argparse import Namespace
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import dist_checkpointing, mpu
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from megatron_cream.checkpoint.saved import latest_checkpoint, saved_arguments, saved_extension
from megatron_cream.config import ExtensionConfig
from megatron_cream.training.hooks import model_config


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode.

    Attributes:
        module: called with ``input_ids``, ``position_ids`` ``[b, s]`` and optionally ``labels``.
        extension: the settings it turns its positions by.
        args: Megatron's arguments, as saved.
    """

    module: torch.nn.Module
    extension: ExtensionConfig
    args: Namespace


# Layout and memory choices of the run that saved the model; one process needs none of them.
_ONE_PROCESS = {
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": None,
    "pipeline_model_parallel_layout": None,
    "context_parallel_size": 1,
    "expert_model_parallel_size": 1,
    "expert_tensor_parallel_size": 1,
    "sequence_parallel": False,
    "recompute_granularity": None,
    "recompute_method": None,
    "recompute_num_layers": None,
    "tp_comm_overlap": False,
    "decoder_first_pipeline_num_layers": None,
    "decoder_last_pipeline_num_layers": None,
}


def initialize_one_process() -> None:
    """Set Megatron's parallel state up for this process alone. Idempotent."""
    if not torch.distributed.is_initialized():
        cpu = getattr(torch.cuda, "_stood_in_by_cpu", False)
        torch.distributed.init_process_group(
            "gloo" if cpu else "nccl", store=torch.distributed.HashStore(), rank=0, world_size=1
        )
    if not mpu.model_parallel_is_initialized():
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        mpu.initialize_model_parallel()
        model_parallel_cuda_manual_seed(1234)


def load_model(path: str, extension: ExtensionConfig | None = None) -> LoadedModel:
    """Load the latest checkpoint under ``path`` into one process.

    Args:
        path: folder given to --save, or one iteration in it; saved at any TP/PP/DP layout.
        extension: settings to evaluate with instead of the saved ones, for instance a base model
            with interpolation that it was not trained with.

    Raises:
        FileNotFoundError: there is no torch_dist checkpoint.
        ValueError: it carries no settings of ours and ``extension`` is not given.
    """
    args = saved_arguments(path)
    if args is None:
        raise FileNotFoundError(f"--checkpoint is {path}: it must hold a torch_dist checkpoint")
    extension = extension or saved_extension(args)
    if extension is None:
        raise ValueError(
            f"--checkpoint is {path}: it was not trained by megatron_cream, so it does not say "
            "how its positions are interpolated"
        )
    initialize_one_process()
    vars(args).update(_ONE_PROCESS)
    config = model_config(args, extension)
    builder = config.get_builder_cls()(config)
    chunks = builder.build_distributed_models(
        ProcessGroupCollection.use_mpu_process_groups(),
        wrap_with_ddp=False,
        data_parallel_random_init=False,
    )
    _load_weights(chunks[0], path)
    return LoadedModel(chunks[0].eval(), extension, args)


def _load_weights(model: Any, path: str) -> None:
    folder = str(latest_checkpoint(path))
    metadata = dict(dist_checkpointing.load_content_metadata(folder) or {})
    metadata["dp_cp_group"] = mpu.get_data_parallel_group(with_context_parallel=True)
    with warnings.catch_warnings():
        # torch announces changes to classes that Megatron's format is made of.
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", UserWarning)
        wanted = {"model": model.sharded_state_dict(metadata=metadata)}
        loaded = dist_checkpointing.load(wanted, folder)
    model.load_state_dict(loaded["model"], strict=True)
