# SPDX-License-Identifier: Apache-2.0
"""Builds the model of any rank of any world in this one process, by fake process groups.

Models are built on the meta device, which has shapes and no memory, with our rotary put in as in
training. A machine without GPUs has no Transformer Engine: layers are built from Megatron's local
modules, which hold the same parameters, and settings that decide only how a step runs
(their ``meta`` value in ``mcore/argument_table.py``) are validated and then left out.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_cream.config import ExtensionConfig
from megatron_cream.errors import UserError
from megatron_cream.mcore.argument_table import cpu_flags, one_rank_values, values


@dataclass(frozen=True)
class RankView:
    """What one rank builds.

    Attributes:
        rank: in the world.
        stage: pipeline stage, from 0.
        layers: numbers of its layers, from 1, over all its chunks.
        embedding, output: it has the embedding, the output layer.
        parameters: it holds.
        counted: of these, the ones that belong to the model's sum: not the whole copies that other
            ranks of tensor parallelism or a tied embedding have as well.
    """

    rank: int
    stage: int
    layers: tuple[int, ...]
    embedding: bool
    output: bool
    parameters: int
    counted: int


def prepare() -> None:
    """Let the CPU stand in for GPUs, which this process shall not see.

    Raises:
        RuntimeError: it has process groups already, or has started a GPU.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from megatron_cream.mcore import cpu

    cpu.install()
    import torch

    if torch.distributed.is_initialized():
        raise RuntimeError("this process has a process group: check stages in one of its own")


def parse(argv: Sequence[str], world_size: int) -> tuple[Namespace, ExtensionConfig]:
    """Parse and validate flags of ``megatron_cream.pretrain`` as rank 0 of a world would.

    Data and checkpoints are not looked at.

    Raises:
        UserError: naming the flag that Megatron or we refuse.
    """
    from megatron.training.arguments import parse_args, validate_args
    from megatron.training.vocab_utils import calculate_padded_vocab_size

    from megatron_cream.mcore.validation import megatron_validation_errors, validate_model_config
    from megatron_cream.training import arguments
    from megatron_cream.training.validate import validate_flags

    with _command_line(cpu_flags() * ("--cpu" in argv), argv, world_size):
        given = parse_args(arguments.add_arguments)
        _validate_readable(given)
        extension, _ = validate_flags(given)
    # What is built here is built from Megatron's local modules.
    with _command_line(argv, [*cpu_flags(), "--fake-process-group"], world_size):
        args = parse_args(arguments.add_arguments)
        with megatron_validation_errors(args):
            validate_args(args)
        if args.padded_vocab_size is None:  # what loading the tokenizer would set
            args.padded_vocab_size = calculate_padded_vocab_size(
                args.vocab_size, args.make_vocab_size_divisible_by, args.tensor_model_parallel_size
            )
        args.gradient_accumulation_fusion = given.gradient_accumulation_fusion  # of the run itself
        validate_model_config(buildable(args))
    return args, extension


def buildable(args: Namespace) -> Namespace:
    """Return the arguments without what the local modules and their optimizer refuse."""
    import torch

    moments = dict.fromkeys(("exp_avg_dtype", "exp_avg_sq_dtype"), torch.float32)
    return Namespace(**{**vars(args), **values("meta"), **moments})


def _validate_readable(args: Namespace) -> None:
    if args.use_checkpoint_args:
        raise UserError(
            "--use-checkpoint-args is given: no checkpoint is read here, give the model's flags"
        )
    if args.vocab_size is None and args.padded_vocab_size is None:
        raise UserError("--vocab-size is missing: it must be given, no tokenizer is loaded here")


@contextlib.contextmanager
def _command_line(first: Sequence[str], last: Sequence[str], world_size: int) -> Iterator[None]:
    """Let Megatron read ``first`` and ``last`` as its command line, and print nothing."""
    saved_argv, saved_environment = sys.argv, os.environ.copy()
    sys.argv = ["pretrain", *first, *last]
    os.environ.update(RANK="0", WORLD_SIZE=str(world_size), CUDA_DEVICE_MAX_CONNECTIONS="1")
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            yield
    except SystemExit:  # --help
        print(output.getvalue(), end="")
        raise
    finally:
        sys.argv = saved_argv
        os.environ.clear()
        os.environ.update(saved_environment)


def one_rank(args: Namespace) -> Namespace:
    """Return the arguments of the same model, its vocabulary padded alike, on one rank."""
    alone = {"world_size": 1, "data_parallel_size": 1}
    return Namespace(**{**vars(args), **one_rank_values(args), **alone})


def model_ranks(args: Namespace) -> list[int]:
    """Return the ranks of the first copy of the model: of its dense layers and of its experts."""
    from megatron.core.parallel_state import RankGenerator

    tensor, pipeline = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    context, data = args.context_parallel_size, args.data_parallel_size
    sizes = {"pp": pipeline, "order": _order(args)}
    dense = RankGenerator(tp=tensor, ep=1, dp=data, cp=context, **sizes)
    ranks = set(dense.get_ranks("tp-pp")[0])
    if args.num_experts is not None:
        tensor, expert = args.expert_tensor_parallel_size, args.expert_model_parallel_size
        data = args.world_size // (tensor * expert * pipeline)
        experts = RankGenerator(tp=tensor, ep=expert, dp=data, cp=1, **sizes)
        ranks |= set(experts.get_ranks("tp-ep-pp")[0])
    return sorted(ranks)


def stage_ranks(args: Namespace) -> list[int]:
    """Return one rank of each pipeline stage, of the first copy of the model."""
    from megatron.core.parallel_state import RankGenerator

    generator = RankGenerator(
        tp=args.tensor_model_parallel_size,
        ep=1,
        dp=args.data_parallel_size,
        pp=args.pipeline_model_parallel_size,
        cp=args.context_parallel_size,
        order=_order(args),
    )
    return generator.get_ranks("pp")[0]


def _order(args: Namespace) -> str:
    return "tp-cp-ep-pp-dp" if args.use_tp_pp_dp_mapping else "tp-cp-ep-dp-pp"


@contextlib.contextmanager
def as_rank(args: Namespace, rank: int) -> Iterator[Any]:
    """Be ``rank`` of ``args.world_size`` ranks that never talk; yields Megatron's groups of it."""
    import torch
    from megatron.core import mpu
    from megatron.core.process_groups_config import ProcessGroupCollection
    from torch.testing._internal.distributed.fake_pg import FakeStore

    excepthook = sys.excepthook  # torch wraps it once more at every start
    torch.distributed.init_process_group(
        "fake", store=FakeStore(), rank=rank, world_size=args.world_size
    )
    try:
        mpu.initialize_model_parallel(
            args.tensor_model_parallel_size,
            args.pipeline_model_parallel_size,
            args.virtual_pipeline_model_parallel_size,
            context_parallel_size=args.context_parallel_size,
            expert_model_parallel_size=args.expert_model_parallel_size,
            expert_tensor_parallel_size=args.expert_tensor_parallel_size,
            order=_order(args),
            create_gloo_process_groups=False,
        )
        yield ProcessGroupCollection.use_mpu_process_groups()
    finally:
        mpu.destroy_model_parallel()
        torch.distributed.destroy_process_group()
        sys.excepthook = excepthook


def build(args: Namespace, extension: ExtensionConfig, groups: Any) -> list[Any]:
    """Build the model chunks of the rank this process is, unwrapped, as training builds them."""
    import torch

    from megatron_cream.mcore.hooks import model_config

    config = model_config(buildable(args), extension)
    builder = config.get_builder_cls()(config)
    logging.disable(logging.WARNING)  # every rank would say that GPTModel is deprecated
    try:
        with torch.device("meta"), contextlib.redirect_stdout(io.StringIO()):
            return builder.build_distributed_models(
                groups,
                wrap_with_ddp=False,
                data_parallel_random_init=False,
                mixed_precision_wrapper=None,
            )
    finally:
        logging.disable(logging.NOTSET)


def rank_view(args: Namespace, extension: ExtensionConfig, rank: int) -> RankView:
    """Build what ``rank`` builds, on the meta device, and look at it.

    Raises:
        UserError: its rotary embedding is not ours, or not of these flags.
    """
    from megatron.core import mpu

    with as_rank(args, rank) as groups:
        chunks = build(args, extension, groups)
        for chunk in chunks:
            _check_rotary(chunk, args, extension, rank)
        layers = [layer.layer_number for chunk in chunks for layer in chunk.decoder.layers]
        return RankView(
            rank=rank,
            stage=mpu.get_pipeline_model_parallel_rank(),
            layers=tuple(layers),
            embedding=any(hasattr(chunk, "embedding") for chunk in chunks),
            output=any(hasattr(chunk, "output_layer") for chunk in chunks),
            parameters=sum(p.numel() for chunk in chunks for p in chunk.parameters()),
            counted=sum(p.numel() for p in _own_parameters(chunks)),
        )


def _own_parameters(chunks: Sequence[Any]) -> Iterator[Any]:
    """Parameters of this rank that no other rank of the copy is counted for."""
    from megatron.core import mpu

    dense_copy = mpu.get_data_parallel_rank(with_context_parallel=True)
    expert_copy = mpu.get_expert_data_parallel_rank()
    for chunk in chunks:
        for parameter in chunk.parameters():
            expert = not getattr(parameter, "allreduce", True)
            if expert_copy if expert else dense_copy:
                continue
            if getattr(parameter, "shared", False):
                continue  # the output layer's copy of a tied embedding
            tensor = mpu.get_expert_tensor_parallel_rank if expert else _tensor_rank
            if getattr(parameter, "tensor_model_parallel", False) or tensor() == 0:
                yield parameter


def _tensor_rank() -> int:
    from megatron.core import mpu

    return mpu.get_tensor_model_parallel_rank()


def _check_rotary(chunk: Any, args: Namespace, extension: ExtensionConfig, rank: int) -> None:
    from megatron_cream.mcore.argument_table import rotary_dim
    from megatron_cream.mcore.rotary import PositionRotaryEmbedding

    rotary = getattr(chunk, "rotary_pos_emb", None)
    if not isinstance(rotary, PositionRotaryEmbedding):
        raise UserError(f"rank {rank} rotates by {type(rotary).__name__}: positions are ignored")
    if rotary.scaling != extension.scaling(rotary_dim(args)):
        raise UserError(f"rank {rank} rotates by {rotary.scaling}: the flags say otherwise")
