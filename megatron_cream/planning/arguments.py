# SPDX-License-Identifier: Apache-2.0
"""Shape, layout and batch that Megatron's parsed arguments describe."""

from __future__ import annotations

import dataclasses
from argparse import Namespace

from megatron_cream.checkpoint.model_shape import ModelShape, shape_from_arguments
from megatron_cream.mcore.arguments import ARGUMENTS, flag_of, values
from megatron_cream.parallel_layout import ParallelLayout, Workload
from megatron_cream.planning.memory import ParameterBytes


def why_not_estimated(args: Namespace) -> str | None:
    """Name the first flag under which memory is not estimated, or return None."""
    for name, needed in values("estimated").items():
        value, off = getattr(args, name, None), ARGUMENTS[name].off
        if value != needed and off:
            return f"{off} is missing, estimates are for models with it"
        if value != needed:
            return f"{flag_of(name)} is {value}, estimates are for {needed}"
    if args.tensor_model_parallel_size > 1 and not args.sequence_parallel:
        return "--sequence-parallel is missing, estimates are for tensor parallelism with it"
    if args.recompute_granularity == "full" and args.recompute_num_layers != 1:
        return f"--recompute-num-layers is {args.recompute_num_layers}, estimates are for 1"
    if args.recompute_granularity == "full" and args.recompute_method != "uniform":
        return f"--recompute-method is {args.recompute_method}, estimates are for uniform"
    modules = set(args.recompute_modules or ()) - {"core_attn"}
    if args.recompute_granularity == "selective" and modules:
        return f"--recompute-modules is {' '.join(sorted(modules))}, estimates are for core_attn"
    return None


def parameter_bytes(args: Namespace) -> ParameterBytes:
    """Return the bytes per parameter of the gradients' buffer and of the optimizer's state.

    The precision-aware optimizer keeps an fp32 master copy as the 16 bits that the bf16 weight
    lacks, and its moments as --exp-avg-dtype and --exp-avg-sq-dtype say.
    """
    gradient = 2 if args.grad_reduce_in_bf16 else 4
    if not args.use_precision_aware_optimizer:
        return ParameterBytes(gradient)
    moments = args.exp_avg_dtype.itemsize + args.exp_avg_sq_dtype.itemsize
    return ParameterBytes(gradient, _PRECISION_AWARE_COPY + moments)


_PRECISION_AWARE_COPY = 2
"""Bytes: fp16, or the remainder of fp32 (Megatron's store_param_remainders, on by default)."""


def shape_from_args(args: Namespace) -> ModelShape:
    """Return the shape of the model; its vocabulary is the padded one."""
    return dataclasses.replace(shape_from_arguments(args), vocabulary=args.padded_vocab_size)


def layout_from_args(args: Namespace) -> ParallelLayout:
    """Return the layout; Megatron has computed the data parallel size."""
    return ParallelLayout(
        tensor=args.tensor_model_parallel_size,
        pipeline=args.pipeline_model_parallel_size,
        context=args.context_parallel_size,
        data=args.data_parallel_size,
        first_layers=args.decoder_first_pipeline_num_layers,
        last_layers=args.decoder_last_pipeline_num_layers,
        recompute=args.recompute_granularity == "full",
    )


def workload_from_args(args: Namespace) -> Workload:
    """Return what a step takes in."""
    return Workload(args.seq_length, args.global_batch_size, args.micro_batch_size)
