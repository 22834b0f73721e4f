# SPDX-License-Identifier: Apache-2.0
"""Validates what flags alone say, before a GPU is asked for; no file is looked at.

Facts about single arguments stand in ``mcore/arguments.py``; here is what must go together.
"""

from __future__ import annotations

import math
from argparse import Namespace

from megatron_cream.config import ExtensionConfig
from megatron_cream.data.dataset import PACK_MULTIPLE
from megatron_cream.errors import UserError
from megatron_cream.json_values import is_finite
from megatron_cream.mcore.arguments import ARGUMENTS, flag_of


def validate_required(args: Namespace) -> None:
    """Refuse a command line without what every run needs.

    Raises:
        UserError: naming the flag.
    """
    for row in ARGUMENTS.values():
        spared = row.unless is not None and getattr(args, row.unless)
        asked = row.where is None or getattr(args, row.where) is not None
        if row.required and asked and not spared and getattr(args, row.name) is None:
            raise UserError(f"{flag_of(row.name)} is missing: {row.required}")
    if args.wandb_project and not (args.wandb_save_dir or args.save):
        raise UserError("--wandb-save-dir is missing: with --wandb-project it or --save is needed")
    if args.train_iters is None and args.train_samples is None:
        raise UserError("--train-iters is missing: iterations of the run, or give --train-samples")


def validate_ranges(args: Namespace) -> None:
    """Refuse numbers that no run can have: Megatron fails on them after its start.

    Raises:
        UserError: naming the flag, its value and what it must be.
    """
    for row in ARGUMENTS.values():
        value = getattr(args, row.name, None)
        if row.range and value is not None and not (is_finite(value) and row.range.holds(value)):
            raise UserError(f"{flag_of(row.name)} is {value}: it must be {row.range.needed}")
    if args.window_size is not None and len(args.window_size) != 2:
        raise UserError(
            f"--window-size is {','.join(map(str, args.window_size))}: it must be two numbers, of "
            "tokens before and after, as 4096,0"
        )


def validate_divisibility(args: Namespace) -> None:
    """Refuse sizes that must divide each other, and do not.

    Raises:
        UserError: naming the flags and their values.
    """
    _validate_whole_passes(args)
    heads, groups = args.num_attention_heads, args.num_query_groups
    if heads is None:
        return  # of a checkpoint
    if args.kv_channels is None and args.hidden_size % heads:
        raise UserError(
            f"--num-attention-heads is {heads}: it must divide --hidden-size, {args.hidden_size}, "
            "or --kv-channels must be given"
        )
    if args.group_query_attention and heads % groups:
        raise UserError(
            f"--num-query-groups is {groups}: it must divide --num-attention-heads, {heads}"
        )


def _validate_whole_passes(args: Namespace) -> None:
    """Refuse a step that is not a whole number of passes of every rank."""
    changes = args.rampup_batch_size or args.step_batch_size_schedule
    if args.global_batch_size is None or changes or args.decrease_batch_size_if_needed:
        return  # Megatron asks it of every size
    sizes = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
    ranks = args.world_size // math.prod(getattr(args, name) for name in sizes)
    together = args.micro_batch_size * max(1, ranks)
    if args.global_batch_size % together:
        raise UserError(
            f"--global-batch-size is {args.global_batch_size}: it must be a multiple of "
            f"{together}, --micro-batch-size {args.micro_batch_size} times {ranks} data-parallel "
            "ranks"
        )


def validate_left_out(args: Namespace) -> None:
    """Refuse arguments that a run cannot have, or that nothing here reads.

    Raises:
        UserError: naming the flag, its value and what to do.
    """
    for row in ARGUMENTS.values():
        if row.refused and not row.is_left_out(args):
            value = getattr(args, row.name)
            raise UserError(f"{flag_of(row.name)} is {value}: it must be left out, {row.refused}")


def validate_with_scales(args: Namespace, extension: ExtensionConfig) -> None:
    """Refuse arguments that do not go with a scale per sample (CLEX).

    Raises:
        UserError: naming the flag, its value and what to do.
    """
    for row in ARGUMENTS.values() if extension.draws_scales else ():
        if row.with_scales and not row.is_left_out(args):
            raise UserError(
                f"{flag_of(row.name)} is {getattr(args, row.name)}: --rope-interpolation is "
                f"{extension.rope_interpolation!r}, so it must be left out, {row.with_scales}"
            )


def validate_supported(args: Namespace) -> None:
    """Refuse settings of Megatron that positions of our own do not go with.

    Raises:
        UserError: naming the flag, its value and what to do.
    """
    if args.position_embedding_type != "rope":
        raise UserError(
            f"--position-embedding-type is {args.position_embedding_type!r}: it must be 'rope', "
            "because positions reach the model only through rotary angles"
        )
    if args.eval_micro_batch_size not in (None, args.micro_batch_size):
        raise UserError(
            f"--eval-micro-batch-size is {args.eval_micro_batch_size}: it must be left out, or be "
            f"--micro-batch-size, {args.micro_batch_size}, which every pipeline stage counts by"
        )
    if args.create_attention_mask_in_dataloader:
        raise UserError(
            "--no-create-attention-mask-in-dataloader is missing: it must be given, the mask "
            "would take memory of the square of the length"
        )
    if args.dataloader_type not in (None, "single"):
        raise UserError(
            f"--dataloader-type is {args.dataloader_type!r}: it must be 'single', so that every "
            "pipeline stage counts samples alike"
        )
    if args.tokenizer_type in ("MultimodalTokenizer", "NullMultimodalTokenizer"):
        raise UserError(
            f"--tokenizer-type is {args.tokenizer_type!r}: it must be one of text, or NullTokenizer"
        )
    if args.attention_backend.name == "local" and not args.spec:
        raise UserError(
            "--attention-backend is local: it must be left out, the layers' own attention is used; "
            "--transformer-impl local has no other"
        )
    if args.sample_unit == "packed-documents":
        _validate_packing(args)


def _validate_packing(args: Namespace) -> None:
    """Refuse what attention over packed documents (thd) cannot serve."""
    unit = "--sample-unit is packed-documents"
    if args.micro_batch_size != 1:
        raise UserError(
            f"--micro-batch-size is {args.micro_batch_size}: {unit}, so it must be 1; a longer "
            "--seq-length holds more documents"
        )
    if args.seq_length is not None and args.seq_length % PACK_MULTIPLE:
        raise UserError(
            f"--seq-length is {args.seq_length}: {unit}, so it must be a multiple of "
            f"{PACK_MULTIPLE}"
        )
    if 2 * args.context_parallel_size > PACK_MULTIPLE:
        raise UserError(
            f"--context-parallel-size is {args.context_parallel_size}: {unit}, each a multiple of "
            f"{PACK_MULTIPLE} tokens dealt out in 2 x CP parts, so it must be at most "
            f"{PACK_MULTIPLE // 2}"
        )
    if args.hybrid_layer_pattern is not None:
        raise UserError(
            f"--hybrid-layer-pattern is {args.hybrid_layer_pattern!r}: {unit}, so it must be left "
            "out, state-space layers carry their state from one document into the next"
        )
    if args.cpu or args.transformer_impl != "transformer_engine":
        raise UserError(
            f"{unit}, and --transformer-impl is {args.transformer_impl!r}: it must be "
            "'transformer_engine' on a GPU, whose attention keeps documents apart"
        )
