# SPDX-License-Identifier: Apache-2.0
"""Numbers of Megatron's flags that it takes without a look, and fails on after its start."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Callable

from megatron_cream.errors import UserError
from megatron_cream.json_values import is_finite

_AT_LEAST_ONE = """
    seq_length max_position_embeddings vocab_size padded_vocab_size make_vocab_size_divisible_by
    num_layers hidden_size num_attention_heads ffn_hidden_size kv_channels num_query_groups
    moe_router_topk moe_ffn_hidden_size
    micro_batch_size global_batch_size eval_micro_batch_size eval_global_batch_size
    tensor_model_parallel_size pipeline_model_parallel_size context_parallel_size
    expert_model_parallel_size expert_tensor_parallel_size
    num_layers_per_virtual_pipeline_stage num_virtual_stages_per_pipeline_rank
    decoder_first_pipeline_num_layers decoder_last_pipeline_num_layers
    microbatch_group_size_per_vp_stage recompute_num_layers num_dataset_builder_threads
    num_distributed_optimizer_instances dist_ckpt_workers
    train_iters train_samples eval_interval exit_interval exit_duration_in_mins train_sync_interval
    log_interval tensorboard_log_interval tensorboard_queue_size log_memory_interval
    save_interval save_retain_interval save_params_interval non_persistent_save_interval
    check_weight_hash_across_dp_replicas_interval gpu_sniff_test_interval
    lr_decay_iters lr_decay_samples lr_wsd_decay_iters lr_wsd_decay_samples
    distributed_timeout_minutes seed rotary_base
"""
_AT_LEAST_ZERO = """
    num_experts num_workers eval_iters start_eval_at_iter ckpt_step manual_gc_interval
    lr min_lr lr_warmup_init lr_warmup_iters lr_warmup_samples decoupled_lr decoupled_min_lr
    weight_decay start_weight_decay end_weight_decay clip_grad adam_eps sgd_momentum
    init_method_std embedding_init_method_std layernorm_epsilon position_seed
"""
_MOST = 2**63  # of which numbers come to be 64-bit ones
_BELOW_ONE = "attention_dropout hidden_dropout adam_beta1 adam_beta2"
_SHARES = "lr_warmup_fraction rotary_percent"

_OTHER_FLAGS = {
    "layernorm_epsilon": "--norm-epsilon",
    "microbatch_group_size_per_vp_stage": "--microbatch-group-size-per-virtual-pipeline-stage",
}


def flag_of(attribute: str) -> str:
    """Return the flag of an attribute of Megatron's arguments."""
    return _OTHER_FLAGS.get(attribute, f"--{attribute.replace('_', '-')}")


def validate_ranges(args: Namespace) -> None:
    """Refuse numbers that no run can have.

    Raises:
        UserError: naming the flag, its value and what it must be.
    """
    _refuse(args, _AT_LEAST_ONE, lambda value: 1 <= value < _MOST, "at least 1 and below 2 ** 63")
    _refuse(args, _AT_LEAST_ZERO, lambda value: 0 <= value < _MOST, "at least 0 and below 2 ** 63")
    _refuse(args, _BELOW_ONE, lambda value: 0 <= value < 1, "at least 0 and below 1")
    _refuse(args, "seed", lambda value: value < 2**32, "below 2 ** 32")
    _refuse(args, _SHARES, lambda value: 0 <= value <= 1, "from 0 to 1")
    if args.rotary_percent == 0:
        raise UserError("--rotary-percent is 0.0: it must be above 0, or no angle is turned")
    if args.window_size is not None and len(args.window_size) != 2:
        raise UserError(
            f"--window-size is {','.join(map(str, args.window_size))}: it must be two numbers, of "
            "tokens before and after, as 4096,0"
        )


def _refuse(args: Namespace, attributes: str, fine: Callable[[float], bool], needed: str) -> None:
    for attribute in attributes.split():
        value = getattr(args, attribute, None)
        if value is not None and not (is_finite(value) and fine(value)):
            raise UserError(f"{flag_of(attribute)} is {value}: it must be {needed}")


def validate_required(args: Namespace) -> None:
    """Refuse a command line without what every run needs.

    Raises:
        UserError: naming the flag.
    """
    needed = {
        "micro_batch_size": "samples of one rank in one pass",
        "eval_interval": "iterations between two evaluations; Megatron asks for it also where "
        "--eval-iters is 0",
        "tokenizer_type": "NullTokenizer with --vocab-size will do, datasets hold tokens already",
    }
    if not args.use_checkpoint_args:
        shape = ("hidden_size", "num_attention_heads", "max_position_embeddings")
        needed |= dict.fromkeys(shape, "it is part of the model; or --use-checkpoint-args")
    if not args.skip_train:
        needed["lr"] = "the largest learning rate"
    if args.save is not None:
        needed["save_interval"] = "iterations between two checkpoints in --save"
    for attribute, meaning in needed.items():
        if getattr(args, attribute) is None:
            raise UserError(f"{flag_of(attribute)} is missing: {meaning}")
    if args.wandb_project and not (args.wandb_save_dir or args.save):
        raise UserError("--wandb-save-dir is missing: with --wandb-project it or --save is needed")
    if args.train_iters is None and args.train_samples is None:
        raise UserError("--train-iters is missing: iterations of the run, or give --train-samples")


def validate_divisibility(args: Namespace) -> None:
    """Refuse sizes that must divide each other, and do not.

    Raises:
        UserError: naming the flags and their values.
    """
    _refuse_uneven_batch(args)
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


def _refuse_uneven_batch(args: Namespace) -> None:
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
