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

from megatron_cream.checkpoint.doctor import validate_iteration
from megatron_cream.checkpoint.iterations import find_checkpoint, read_arguments
from megatron_cream.checkpoint.unpickling import only_listed_globals
from megatron_cream.config import ExtensionConfig, saved_extension
from megatron_cream.errors import UserError
from megatron_cream.extras.hybrid import without_stages
from megatron_cream.mcore.argument_table import values
from megatron_cream.mcore.cpu import is_installed
from megatron_cream.mcore.hooks import model_config
from megatron_cream.parallel_layout import ONE_PROCESS, ParallelLayout


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


def initialize(layout: ParallelLayout) -> None:
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
    cpu = is_installed()
    if not torch.distributed.is_initialized():
        if not cpu:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        alone = {"store": torch.distributed.HashStore(), "rank": 0, "world_size": 1}
        torch.distributed.init_process_group(
            "gloo" if cpu else "nccl", **(alone if ranks == 1 else {})
        )
    if not mpu.model_parallel_is_initialized():
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        mpu.initialize_model_parallel(
            tensor_model_parallel_size=layout.tensor,
            pipeline_model_parallel_size=layout.pipeline,
            context_parallel_size=layout.context,
        )
        model_parallel_cuda_manual_seed(1234)


def initialize_one_process() -> None:
    """Set Megatron's parallel state up for this process alone. Idempotent."""
    initialize(ONE_PROCESS)


def load_model(
    path: str, extension: ExtensionConfig | None = None, layout: ParallelLayout = ONE_PROCESS
) -> LoadedModel:
    """Load this rank's part of the latest checkpoint under ``path``.

    Args:
        path: folder given to --save, or one iteration in it; saved at any TP/PP/DP layout.
        extension: settings to evaluate with instead of the saved ones, for instance a base model
            with interpolation that it was not trained with.
        layout: what to spread it over; one process unless given.

    Raises:
        FileNotFoundError: there is no torch_dist checkpoint.
        UserError: it carries no settings of ours and ``extension`` is not given; it is damaged, or
            names what Megatron does not write.
    """
    folder = find_checkpoint(path)
    if folder is None:
        raise FileNotFoundError(f"--checkpoint is {path}: it must hold a torch_dist checkpoint")
    validate_iteration(folder, f"--checkpoint is {path}")
    args = read_arguments(folder)
    if args is None:
        raise UserError(f"--checkpoint is {path}: {folder.name} says nothing of the model it is of")
    extension = extension or saved_extension(args)
    if extension is None:
        raise UserError(
            f"--checkpoint is {path}: it was not trained by megatron_cream, so it does not say "
            "how its positions are interpolated"
        )
    _validate_trained_rope(path, args, extension)
    initialize(layout)
    vars(args).update(values("one_rank") | values("evaluated"))
    args.tensor_model_parallel_size = layout.tensor
    args.expert_tensor_parallel_size = layout.tensor
    args.pipeline_model_parallel_size = layout.pipeline
    args.context_parallel_size = layout.context
    if is_installed():
        vars(args).update(values("cpu"))
    if args.vocab_size and args.padded_vocab_size:
        # Padded rows would take part in the softmax; no token has their ids. Tensor parallelism
        # needs some: evaluation leaves them out.
        args.padded_vocab_size = -(-args.vocab_size // layout.tensor) * layout.tensor
    args.hybrid_layer_pattern = without_stages(getattr(args, "hybrid_layer_pattern", None))
    config = model_config(args, extension)
    builder = config.get_builder_cls()(config)
    chunks = builder.build_distributed_models(
        ProcessGroupCollection.use_mpu_process_groups(),
        wrap_with_ddp=False,
        data_parallel_random_init=False,
    )
    _load_weights(chunks[0], str(folder))
    return LoadedModel(chunks[0].eval(), extension, args)


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


def _load_weights(model: Any, folder: str) -> None:
    with only_listed_globals():  # .metadata was read with a list of its own before
        _load_checked(model, folder)


def _load_checked(model: Any, folder: str) -> None:
    metadata = dict(dist_checkpointing.load_content_metadata(folder) or {})
    metadata["dp_cp_group"] = mpu.get_data_parallel_group(with_context_parallel=True)
    with warnings.catch_warnings():
        # torch announces changes to classes that Megatron's format is made of.
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", UserWarning)
        wanted = {"model": model.sharded_state_dict(metadata=metadata)}
        loaded = dist_checkpointing.load(wanted, folder)
    model.load_state_dict(loaded["model"], strict=True)
