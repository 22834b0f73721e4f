# SPDX-License-Identifier: Apache-2.0
"""Builds one rank's part of a model to evaluate, and loads the weights of a checkpoint into it."""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, mpu
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from megatron_cream.config import ExtensionConfig
from megatron_cream.errors import UserError
from megatron_cream.mcore.argument_table import values, vocabulary
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
    vars(args).update(values("one_rank") | values("evaluated"))
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
