# SPDX-License-Identifier: Apache-2.0
"""Our flags in Megatron's parser, and the settings they make."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from megatron_cream.config import LABEL_RULES, POSITION_STRATEGIES, SAMPLE_UNITS, ExtensionConfig
from megatron_cream.data.sources import PACK_MULTIPLE
from megatron_cream.errors import UserError
from megatron_cream.positions.cream import GAUSSIANS
from megatron_cream.positions.pose import CONTENTS, LENGTHS
from megatron_cream.rope import EVALUATION_ONLY, SCALINGS, TRAINED
from megatron_cream.rope.options import add_options, options_from_args, read_base
from megatron_cream.training import cross_entropy


def add_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Add our flags; lengths are in tokens. Defaults that depend on others are None here."""
    group = parser.add_argument_group(
        "context extension", "megatron_cream; --seq-length is the trained window N"
    )
    add = group.add_argument
    add("--target-length", type=int, help="window T to reach (default: --seq-length)")
    add("--original-length", type=int, help="window before (default: --seq-length)")
    add(
        "--position-strategy",
        choices=POSITION_STRATEGIES,
        help="where training tokens pretend to stand (default: cream if T is longer than N)",
    )
    add("--position-seed", type=int, help="seed of the positions (default: --seed)")
    add("--cream-sigma", type=float, default=3.0, help="width of the Gaussian in half windows")
    add("--cream-sigma-relative", type=float, help="its width as a multiple of T / N instead")
    add("--cream-gaussian", choices=GAUSSIANS, default="clamped")
    add("--cream-head-lengths", type=int, nargs="+", help="default: N / 3 and 4 T / N")
    add("--pose-chunks", type=int, default=2)
    add("--pose-lengths", choices=LENGTHS, help="default: trainer for 2 chunks, else paper")
    add("--pose-content", choices=CONTENTS, default="uniform")
    add(
        "--rope-interpolation",
        choices=(*SCALINGS, *TRAINED),
        help="default: rope-theta if that is given, else linear if T is longer than "
        "--original-length",
    )
    add("--rope-factor", type=float, help="default: T / --original-length")
    add_options(add)
    add(
        "--rope-base-config",
        help="config.json of a base model whose RoPE is scaled already; linear and ntk go on top",
    )
    add("--label-rule", choices=LABEL_RULES, default="true-next", help="targets at chunk borders")
    add("--sample-unit", choices=SAMPLE_UNITS, default="document", help="what a sample reads from")
    add(
        cross_entropy.FLAG,
        action="store_true",
        help="cross entropy by Transformer Engine's kernel, version 2.19 or later",
    )
    add("--cpu", action="store_true", help="run Megatron's trainer on a machine with no GPU")
    return parser


def extension_from_args(args: Namespace) -> ExtensionConfig:
    """Return the settings that parsed arguments make.

    Raises:
        UserError: lengths, strategy and interpolation that do not go together.
    """
    if args.seq_length is None:
        raise UserError("--seq-length is missing: it is the trained window N in tokens")
    train = args.seq_length
    target = train if args.target_length is None else args.target_length
    original = train if args.original_length is None else args.original_length
    if original < 1:
        raise UserError(f"--original-length is {original}: it must be at least 1 token")
    factor = target / original if args.rope_factor is None else args.rope_factor
    extension = ExtensionConfig(
        train_length=train,
        target_length=target,
        original_length=original,
        position_strategy=args.position_strategy or ("cream" if target > train else "full"),
        position_seed=args.seed if args.position_seed is None else args.position_seed,
        cream_sigma=args.cream_sigma,
        cream_sigma_relative=args.cream_sigma_relative,
        cream_gaussian=args.cream_gaussian,
        cream_head_lengths=args.cream_head_lengths and tuple(args.cream_head_lengths),
        pose_chunks=args.pose_chunks,
        pose_lengths=args.pose_lengths,
        pose_content=args.pose_content,
        rope_interpolation=_interpolation(args, longer=target > original),
        rope_factor=max(factor, 1.0) if args.rope_factor is None else factor,
        rotary_base=float(args.rotary_base),
        rope_theta=args.rope_theta,
        rope_options=options_from_args(args),
        rope_base=read_base(args.rope_base_config) if args.rope_base_config else None,
        label_rule=args.label_rule,
        sample_unit=args.sample_unit,
    )
    if args.hidden_size is not None:
        extension.scaling(rotary_dim(args))  # lists of factors must fit the model's dimensions
    return extension


def _interpolation(args: Namespace, longer: bool) -> str:
    if args.rope_interpolation in EVALUATION_ONLY:
        able = ", ".join(name for name in SCALINGS if name not in EVALUATION_ONLY)
        raise UserError(
            f"--rope-interpolation is {args.rope_interpolation!r}: its angles change with the "
            "length of every sequence, so it is for evaluation only (tools/evaluate.py); for "
            f"training it must be one of {able}"
        )
    if args.rope_interpolation:
        return args.rope_interpolation
    if args.rope_theta is not None:
        return "rope-theta"
    return "linear" if longer else "none"


def rotary_dim(args: Namespace) -> int:
    """Return the rotated dimensions of a head, as Megatron computes them."""
    head_dim = args.kv_channels or args.hidden_size // args.num_attention_heads
    return int(head_dim * args.rotary_percent) if args.rotary_percent < 1.0 else head_dim


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
)


def refuse_unsupported(args: Namespace) -> None:
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
    cross_entropy.refuse_unserved(args)
    if args.sample_unit == "packed-documents":
        _refuse_unpackable(args)


def _refuse_unpackable(args: Namespace) -> None:
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
