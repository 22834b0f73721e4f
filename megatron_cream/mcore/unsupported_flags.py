# SPDX-License-Identifier: Apache-2.0
"""Megatron's flags that a run of ours cannot serve, refused before a GPU is asked for."""

from __future__ import annotations

from argparse import Namespace

from megatron_cream.data.sources import PACK_MULTIPLE
from megatron_cream.errors import UserError
from megatron_cream.extras import te_cross_entropy
from megatron_cream.mcore.flag_ranges import flag_of

# Megatron settings under which positions would silently not reach the angles, or would be
# changed on the way: (attribute, value that is refused, flag, what to do instead).
_REFUSED = (
    ("multi_latent_attention", True, "--multi-latent-attention", "positions do not reach MLA"),
    ("flash_decode", True, "--flash-decode", "it takes angles by length; leave it out"),
    ("reset_position_ids", True, "--reset-position-ids", "the strategy decides the positions"),
    ("reset_attention_mask", True, "--reset-attention-mask", "samples are not masked by document"),
    ("use_rope_scaling", True, "--use-rope-scaling", "use --rope-interpolation"),
    ("hybrid_context_parallel", True, "--hybrid-context-parallel", "samples have one length"),
    ("sft", True, "--sft", "samples come from indexed datasets"),
    ("fim_data", True, "--fim-data", "samples are read as they stand"),
    (
        "dataloader_inter_document_masking",
        True,
        "--dataloader-inter-document-masking",
        "samples are not masked by document",
    ),
    (
        "multiple_validation_sets",
        True,
        "--multiple-validation-sets",
        "validation is one blend; evaluate the sets with tools/evaluate.py",
    ),
    ("mtp_num_layers", None, "--mtp-num-layers", "multi-token prediction is not supported"),
    (
        "rotary_seq_len_interpolation_factor",
        None,
        "--rotary-seq-len-interpolation-factor",
        "use --rope-interpolation linear --rope-factor",
    ),
    ("yaml_cfg", None, "--yaml-cfg", "settings come from flags"),
    # Megatron's scripts read these in functions that ours take the place of.
    ("mock_data", True, "--mock-data", "samples come from indexed datasets"),
    ("logits_load_dir", None, "--logits-load-dir", "distillation is not supported"),
    ("check_for_spiky_loss", True, "--check-for-spiky-loss", "the loss is checked for NaN and Inf"),
    (
        "overlap_moe_expert_parallel_comm",
        True,
        "--overlap-moe-expert-parallel-comm",
        "schedule plans are not supported",
    ),
    (
        "per_dataset_sequences_path",
        None,
        "--per-dataset-sequences-path",
        "the index says how many samples there are",
    ),
    ("object_storage_cache_path", None, "--object-storage-cache-path", "datasets are local files"),
    (
        "dataloader_fast_cache_load",
        True,
        "--dataloader-fast-cache-load",
        "datasets have no cache",
    ),
    (
        "dataloader_defer_npy_index_mmap",
        True,
        "--dataloader-defer-npy-index-mmap",
        "datasets have no such index",
    ),
    (
        "full_validation",
        True,
        "--full-validation",
        "validation is --eval-iters batches of a blend; evaluate all of a set with "
        "tools/evaluate.py",
    ),
    (
        "validation_set_names",
        None,
        "--validation-set-names",
        "validation is one blend, which has no names",
    ),
    (
        "phase_transition_iterations",
        None,
        "--phase-transition-iterations",
        "samples are counted from the start of a run on one blend",
    ),
    ("allow_ambiguous_pad_tokens", True, "--allow-ambiguous-pad-tokens", "samples are not padded"),
    ("decoder_seq_length", None, "--decoder-seq-length", "use --seq-length"),
    ("logits_save_dir", None, "--logits-save-dir", "distillation is not supported"),
    ("perform_rl_step", True, "--perform-rl-step", "reinforcement learning is not supported"),
    (
        "yarn_original_max_position_embeddings",
        None,
        "--yarn-original-max-position-embeddings",
        "use --rope-interpolation yarn --original-length",
    ),
    (
        "yarn_beta_fast",
        None,
        "--yarn-beta-fast",
        "use --rope-interpolation yarn --rope-options",
    ),
    (
        "yarn_beta_slow",
        None,
        "--yarn-beta-slow",
        "use --rope-interpolation yarn --rope-options",
    ),
    ("mrope_section", None, "--mrope-section", "positions have one axis"),
)

# Flags with a default that nothing here reads: (attribute, default, what to do instead).
_UNREAD = (
    ("rope_scaling_factor", 8.0, "use --rope-factor"),
    ("sample_rate", 1.0, "every sample of the blend is read"),
    ("mask_prob", 0.15, "no token is hidden from the model"),
    ("short_seq_prob", 0.1, "samples have one length"),
    ("mid_level_dataset_surplus", 0.005, "datasets have as many samples as are asked for"),
    ("rope_type", None, "use --rope-interpolation"),
)


def validate_supported(args: Namespace) -> None:
    """Refuse Megatron settings that cannot serve positions of our own.

    Raises:
        UserError: naming the flag, its value and what to do.
    """
    if args.position_embedding_type != "rope":
        raise UserError(
            f"--position-embedding-type is {args.position_embedding_type!r}: it must be 'rope', "
            "because positions reach the model only through rotary angles"
        )
    for attribute, bad, flag, advice in _REFUSED:
        value = getattr(args, attribute, None)
        if value if bad is True else value is not None:
            raise UserError(f"{flag} is {value}: it must be left out, {advice}")
    for attribute, default, advice in _UNREAD:
        value = getattr(args, attribute, default)
        if value != default:
            raise UserError(f"{flag_of(attribute)} is {value}: it must be left out, {advice}")
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
    te_cross_entropy.validate_flags(args)
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
