# SPDX-License-Identifier: Apache-2.0
"""The one table of Megatron's arguments: what each may be, where, and why.

Every check and every reset of an argument reads it here. A test holds its names, flags and defaults
against the parser of the installed Megatron.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal


class _Unset:
    """The value of a fact that an argument does not have; None is a value."""

    def __repr__(self) -> str:
        return "UNSET"


UNSET: Any = _Unset()


@dataclass(frozen=True)
class Range:
    """Numbers that an argument may be, and how a message says so."""

    holds: Callable[[float], bool]
    needed: str


_MOST = 2**63  # of which numbers come to be 64-bit ones
COUNT = Range(lambda value: 1 <= value < _MOST, "at least 1 and below 2 ** 63")
AMOUNT = Range(lambda value: 0 <= value < _MOST, "at least 0 and below 2 ** 63")
SEED = Range(lambda value: 1 <= value < 2**32, "at least 1 and below 2 ** 32")
BELOW_ONE = Range(lambda value: 0 <= value < 1, "at least 0 and below 1")
SHARE = Range(lambda value: 0 <= value <= 1, "from 0 to 1")
ABOVE_ZERO_SHARE = Range(lambda value: 0 < value <= 1, "above 0 and at most 1")


@dataclass(frozen=True, kw_only=True)
class Argument:
    """Facts about one argument; those that an argument does not have keep their defaults.

    Attributes:
        name: attribute of the parsed arguments.
        flag: its flag, where that is not the name with dashes.
        off: the flag that turns it off, where it has no other.
        default: the parser's default, where a value of None or False is not it.
        computed: Megatron computes it from other flags.
        range: numbers that it may be.
        required: what it is; a run without it is refused.
        unless, where: the argument without or with which alone it is required.
        refused: why a run must leave it out.
        with_scales: why a run whose samples have scales, as with CLEX, must leave it out.
        with_lengths: why a run that validates at other lengths must leave it out.
        needs_gpu: it must be left out with --cpu.
        cpu: the value that --cpu sets.
        one_rank: the value of the same model on one rank.
        evaluated: the value that a model is evaluated with, whatever its run had.
        meta: the value that a model is built with on the meta device.
        hugging_face: the value that every model has which can be exported.
        estimated: the value that estimates of memory are for.
        same_model: another value than the checkpoint's makes another model of the same shapes.
        restored: Megatron's --use-checkpoint-args leaves it behind.
        scales_rope: it makes angles that an export cannot write down.
    """

    name: str
    flag: str | None = None
    off: str | None = None
    default: Any = None
    computed: bool = False
    range: Range | None = None
    required: str | None = None
    unless: str | None = None
    where: str | None = None
    refused: str | None = None
    with_scales: str | None = None
    with_lengths: str | None = None
    needs_gpu: bool = False
    cpu: Any = UNSET
    one_rank: Any = UNSET
    evaluated: Any = UNSET
    meta: Any = UNSET
    hugging_face: Any = UNSET
    estimated: Any = UNSET
    same_model: bool = False
    restored: bool = False
    scales_rope: bool = False

    def is_left_out(self, args: Namespace) -> bool:
        """Whether the command line does not give it, or gives what it is anyway."""
        value = getattr(args, self.name, None)
        return value is None or value is False or value == self.default


def _each(names: str, **facts: Any) -> Iterator[Argument]:
    return (Argument(name=name, **facts) for name in names.split())


_SHAPE: dict[str, Any] = {"required": "it is part of the model; or --use-checkpoint-args"}
_SHAPE |= {"unless": "use_checkpoint_args", "range": COUNT}
_STAGES = {"range": COUNT, "one_rank": None}
_MEMORY = {"evaluated": None, "meta": None}
_GRADIENTS = "the gradient of clex's weights is written into Megatron's own gradient buffers"
_YARN = "use --rope-interpolation yarn --rope-options"

_ROWS = (
    # The model
    *_each("hidden_size num_attention_heads max_position_embeddings", **_SHAPE),
    *_each(
        "seq_length vocab_size padded_vocab_size make_vocab_size_divisible_by num_layers "
        "ffn_hidden_size kv_channels num_query_groups moe_ffn_hidden_size",
        range=COUNT,
    ),
    *_each("init_method_std embedding_init_method_std", range=AMOUNT),
    *_each(
        "layernorm_epsilon", flag="--norm-epsilon", range=AMOUNT, same_model=True, restored=True
    ),
    *_each("qk_layernorm window_size", restored=True),
    *_each("normalization", hugging_face="RMSNorm", estimated="RMSNorm", same_model=True),
    *_each("layernorm_zero_centered_gamma", flag="--apply-layernorm-1p", hugging_face=False),
    *_each("swiglu", hugging_face=True, estimated=True),
    *_each("add_bias_linear", off="--disable-bias-linear", estimated=False),
    *_each("hidden_dropout attention_dropout", range=BELOW_ONE, estimated=0.0),
    *_each("hybrid_layer_pattern", hugging_face=None, estimated=None),
    *_each("window_attn_skip_freq", hugging_face=None),
    *_each("num_experts", range=AMOUNT),
    *_each("moe_router_topk", range=COUNT, same_model=True),
    *_each("moe_router_pre_softmax", hugging_face=False, same_model=True),
    *_each("moe_router_score_function", hugging_face="softmax"),
    *_each("moe_shared_expert_intermediate_size", hugging_face=None, estimated=None),
    *_each("moe_expert_capacity_factor", estimated=None),
    *_each("multi_latent_attention", refused="positions do not reach MLA", hugging_face=False),
    *_each("mtp_num_layers", refused="multi-token prediction is not supported"),
    # Positions and angles
    *_each("position_embedding_type", hugging_face="rope"),
    *_each("position_seed", range=AMOUNT),
    *_each("rotary_base", range=COUNT, same_model=True),
    *_each("rotary_percent", range=ABOVE_ZERO_SHARE, hugging_face=1.0, same_model=True),
    *_each("rotary_interleaved", hugging_face=False, same_model=True),
    *_each("rope_type", refused="use --rope-interpolation"),
    *_each("use_rope_scaling", refused="use --rope-interpolation", scales_rope=True),
    *_each("rope_scaling_factor", default=8.0, refused="use --rope-factor"),
    *_each(
        "rotary_seq_len_interpolation_factor",
        refused="use --rope-interpolation linear --rope-factor",
        scales_rope=True,
    ),
    *_each(
        "yarn_original_max_position_embeddings",
        refused="use --rope-interpolation yarn --original-length",
    ),
    *_each("yarn_beta_fast yarn_beta_slow", refused=_YARN),
    *_each("mrope_section", refused="positions have one axis"),
    *_each("flash_decode", refused="it takes angles by length; leave it out"),
    *_each("reset_position_ids", refused="the strategy decides the positions"),
    # Layout
    *_each("tensor_model_parallel_size pipeline_model_parallel_size", range=COUNT, one_rank=1),
    *_each("context_parallel_size", range=COUNT, one_rank=1, meta=1),
    *_each("expert_model_parallel_size expert_tensor_parallel_size", range=COUNT, one_rank=1),
    *_each(
        "virtual_pipeline_model_parallel_size",
        flag="--num-virtual-stages-per-pipeline-rank",
        computed=True,
        one_rank=None,
    ),
    *_each("num_layers_per_virtual_pipeline_stage", range=COUNT),
    *_each("num_virtual_stages_per_pipeline_rank", range=COUNT),
    *_each(
        "microbatch_group_size_per_vp_stage",
        flag="--microbatch-group-size-per-virtual-pipeline-stage",
        range=COUNT,
    ),
    *_each("decoder_first_pipeline_num_layers decoder_last_pipeline_num_layers", **_STAGES),
    *_each("pipeline_model_parallel_layout", one_rank=None, estimated=None),
    *_each(
        "account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split",
        estimated=False,
    ),
    *_each(
        "tensor_parallel_num_weight_shards expert_tensor_parallel_num_weight_shards", one_rank=None
    ),
    *_each("sequence_parallel", needs_gpu=True, evaluated=False, meta=False),
    *_each("hierarchical_context_parallel_sizes", needs_gpu=True),
    *_each("hybrid_context_parallel", refused="samples have one length"),
    *_each("overlap_moe_expert_parallel_comm", refused="schedule plans are not supported"),
    *_each("use_megatron_fsdp use_torch_fsdp2", needs_gpu=True, with_scales=_GRADIENTS),
    # How a step runs
    *_each("transformer_impl", default="transformer_engine", cpu="local"),
    *_each("distributed_backend", default="nccl", cpu="gloo"),
    *_each("use_cpu_initialization", cpu=True),
    *_each("no_persist_layer_norm", cpu=True),
    *_each("masked_softmax_fusion", off="--no-masked-softmax-fusion", cpu=False),
    *_each("bias_gelu_fusion", off="--no-bias-gelu-fusion", cpu=False),
    *_each("bias_dropout_fusion", off="--no-bias-dropout-fusion", cpu=False),
    *_each("bias_swiglu_fusion", off="--no-bias-swiglu-fusion", cpu=False),
    *_each("apply_rope_fusion", off="--no-rope-fusion", cpu=False),
    *_each(
        "gradient_accumulation_fusion",
        off="--no-gradient-accumulation-fusion",
        cpu=False,
        meta=False,
        evaluated=False,
    ),
    *_each(
        "moe_grouped_gemm use_te_activation_func fused_residual_rmsnorm", default=False, cpu=False
    ),
    *_each("bf16", estimated=True),
    *_each("fp8", flag="--fp8-format", needs_gpu=True, meta=None),
    *_each("fp8_param_gather", meta=False),
    *_each("recompute_granularity recompute_method", **_MEMORY),
    *_each("recompute_num_layers", range=COUNT, **_MEMORY),
    *_each(
        "tp_comm_overlap",
        with_lengths="its buffers have the trained length",
        evaluated=False,
        meta=False,
    ),
    *_each("rope_kernel", evaluated="te"),
    *_each("dual_chunk", evaluated=None),  # evaluation has an attention of its own
    *_each("te_cross_entropy", evaluated=False),  # logits are what is asked for
    *_each("perform_initialization", off="--no-initialization", meta=False),
    *_each(
        "cuda_graph_impl",
        default="none",
        with_scales="the rotation of clex is not captured",
        with_lengths="graphs have the trained length",
    ),
    *_each("enable_cuda_graph external_cuda_graph optimizer_cuda_graph", needs_gpu=True),
    *_each("async_save optimizer_cpu_offload", needs_gpu=True),
    # Batch, optimizer and schedule
    *_each("micro_batch_size", required="samples of one rank in one pass", range=COUNT),
    *_each("global_batch_size eval_micro_batch_size eval_global_batch_size", range=COUNT),
    *_each("use_distributed_optimizer", estimated=True),
    *_each("use_precision_aware_optimizer", meta=False),
    *_each("num_distributed_optimizer_instances", range=COUNT, estimated=1),
    *_each("adam_beta1 adam_beta2", range=BELOW_ONE),
    *_each("lr", required="the largest learning rate", unless="skip_train", range=AMOUNT),
    *_each(
        "min_lr lr_warmup_init lr_warmup_iters lr_warmup_samples decoupled_lr decoupled_min_lr "
        "weight_decay start_weight_decay end_weight_decay clip_grad adam_eps sgd_momentum",
        range=AMOUNT,
    ),
    *_each("lr_decay_iters lr_decay_samples lr_wsd_decay_iters lr_wsd_decay_samples", range=COUNT),
    *_each("lr_warmup_fraction", range=SHARE),
    # The run
    *_each(
        "eval_interval",
        required="iterations between two evaluations; Megatron asks for it also where "
        "--eval-iters is 0",
        range=COUNT,
    ),
    *_each(
        "tokenizer_type",
        required="NullTokenizer with --vocab-size will do, datasets hold tokens already",
    ),
    *_each(
        "save_interval",
        required="iterations between two checkpoints in --save",
        where="save",
        range=COUNT,
    ),
    *_each("load pretrained_checkpoint", evaluated=None),  # where the run started from
    *_each("seed", range=SEED),
    *_each(
        "train_iters train_samples exit_interval exit_duration_in_mins train_sync_interval "
        "log_interval tensorboard_log_interval tensorboard_queue_size log_memory_interval "
        "save_retain_interval save_params_interval non_persistent_save_interval dist_ckpt_workers "
        "check_weight_hash_across_dp_replicas_interval gpu_sniff_test_interval "
        "distributed_timeout_minutes num_dataset_builder_threads",
        range=COUNT,
    ),
    *_each("num_workers eval_iters start_eval_at_iter ckpt_step manual_gc_interval", range=AMOUNT),
    *_each("yaml_cfg", refused="settings come from flags"),
    *_each("check_for_spiky_loss", refused="the loss is checked for NaN and Inf"),
    *_each("logits_load_dir logits_save_dir", refused="distillation is not supported"),
    *_each("perform_rl_step", refused="reinforcement learning is not supported"),
    # Data
    *_each("sft mock_data", refused="samples come from indexed datasets"),
    *_each("fim_data", refused="samples are read as they stand"),
    *_each(
        "reset_attention_mask dataloader_inter_document_masking",
        refused="samples are not masked by document",
    ),
    *_each(
        "multiple_validation_sets",
        refused="validation is one blend; evaluate the sets with tools/evaluate.py",
    ),
    *_each(
        "full_validation",
        refused="validation is --eval-iters batches of a blend; evaluate all of a set with "
        "tools/evaluate.py",
    ),
    *_each("validation_set_names", refused="validation is one blend, which has no names"),
    *_each(
        "phase_transition_iterations",
        refused="samples are counted from the start of a run on one blend",
    ),
    *_each("per_dataset_sequences_path", refused="the index says how many samples there are"),
    *_each("object_storage_cache_path", refused="datasets are local files"),
    *_each("dataloader_fast_cache_load", refused="an index opens at once without it"),
    *_each("dataloader_defer_npy_index_mmap", refused="datasets have no such index"),
    *_each("allow_ambiguous_pad_tokens", refused="samples are not padded"),
    *_each("decoder_seq_length", refused="use --seq-length"),
    *_each("sample_rate", default=1.0, refused="every sample of the blend is read"),
    *_each("mask_prob", default=0.15, refused="no token is hidden from the model"),
    *_each("short_seq_prob", default=0.1, refused="samples have one length"),
    *_each(
        "mid_level_dataset_surplus",
        default=0.005,
        refused="datasets have as many samples as are asked for",
    ),
)

ARGUMENTS: dict[str, Argument] = {row.name: row for row in _ROWS}

Value = Literal["cpu", "one_rank", "evaluated", "meta", "hugging_face", "estimated"]
Reason = Literal["refused", "with_scales", "with_lengths"]
Mark = Literal["needs_gpu", "same_model", "restored", "scales_rope"]


def flag_of(name: str) -> str:
    """Return the flag of an argument."""
    row = ARGUMENTS.get(name)
    return (row and row.flag) or f"--{name.replace('_', '-')}"


def values(fact: Value) -> dict[str, Any]:
    """Return the value that a fact names, of every argument that has it."""
    found = ((row.name, getattr(row, fact)) for row in ARGUMENTS.values())
    return {name: value for name, value in found if value is not UNSET}


def one_rank_values(args: Namespace) -> dict[str, Any]:
    """Return the values of the same model on one rank, whose layers keep their numbers."""
    pattern = getattr(args, "hybrid_layer_pattern", None)
    return values("one_rank") | {"hybrid_layer_pattern": pattern and pattern.replace("|", "")}


def marked(fact: Mark) -> list[str]:
    """Return the names of all arguments that a fact holds for."""
    return [row.name for row in ARGUMENTS.values() if getattr(row, fact)]


def cpu_flags() -> list[str]:
    """Return the command line that turns off what only GPUs have."""
    words: list[str] = []
    for name, value in values("cpu").items():
        row = ARGUMENTS[name]
        if value != row.default:
            words += [row.off or flag_of(name)] + [value] * isinstance(value, str)
    return words


def rotary_dim(args: Namespace) -> int:
    """Return the rotated dimensions of a head, as Megatron computes them."""
    head_dim = args.kv_channels or args.hidden_size // args.num_attention_heads
    return int(head_dim * args.rotary_percent) if args.rotary_percent < 1.0 else head_dim


def vocabulary(args: Namespace) -> Any:
    """Return the tokens that a model has, padding left out as far as the arguments tell; or None.

    Megatron pads what its tokenizer has, whatever --vocab-size says: that may be more than the
    model's rows.
    """
    return min(filter(None, (args.vocab_size, args.padded_vocab_size)), default=None)
