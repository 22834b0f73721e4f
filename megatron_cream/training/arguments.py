# SPDX-License-Identifier: Apache-2.0
"""Our flags in Megatron's parser, and the settings they make."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from megatron_cream.config import LABEL_RULES, POSITION_STRATEGIES, SAMPLE_UNITS, ExtensionConfig
from megatron_cream.positions.cream import GAUSSIANS
from megatron_cream.positions.pose import CONTENTS, LENGTHS
from megatron_cream.rope.scaling import SCALINGS


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
        choices=tuple(SCALINGS),
        help="default: linear if T is longer than --original-length",
    )
    add("--rope-factor", type=float, help="default: T / --original-length")
    add("--label-rule", choices=LABEL_RULES, default="true-next", help="targets at chunk borders")
    add("--sample-unit", choices=SAMPLE_UNITS, default="document", help="what a sample reads from")
    add("--cpu", action="store_true", help="run Megatron's trainer on a machine with no GPU")
    return parser


def extension_from_args(args: Namespace) -> ExtensionConfig:
    """Return the settings that parsed arguments make.

    Raises:
        ValueError: lengths, strategy and interpolation that do not go together.
    """
    if args.seq_length is None:
        raise ValueError("--seq-length is missing: it is the trained window N in tokens")
    train = args.seq_length
    target = train if args.target_length is None else args.target_length
    original = train if args.original_length is None else args.original_length
    if original < 1:
        raise ValueError(f"--original-length is {original}: it must be at least 1 token")
    factor = target / original if args.rope_factor is None else args.rope_factor
    longer = target > original
    return ExtensionConfig(
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
        rope_interpolation=args.rope_interpolation or ("linear" if longer else "none"),
        rope_factor=max(factor, 1.0) if args.rope_factor is None else factor,
        rotary_base=float(args.rotary_base),
        label_rule=args.label_rule,
        sample_unit=args.sample_unit,
    )


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
)


def refuse_unsupported(args: Namespace) -> None:
    """Refuse Megatron settings that cannot serve positions of our own.

    Raises:
        ValueError: naming the flag, its value and what to do.
    """
    if args.position_embedding_type != "rope":
        raise ValueError(
            f"--position-embedding-type is {args.position_embedding_type!r}: it must be 'rope', "
            "because positions reach the model only through rotary angles"
        )
    for attribute, bad, flag, advice in _REFUSED:
        value = getattr(args, attribute, None)
        if value if bad is True else value is not None:
            raise ValueError(f"{flag} is {value}: it must be left out, {advice}")
    if args.create_attention_mask_in_dataloader:
        raise ValueError(
            "--no-create-attention-mask-in-dataloader is missing: it must be given, the mask "
            "would take memory of the square of the length"
        )
    if args.dataloader_type not in (None, "single"):
        raise ValueError(
            f"--dataloader-type is {args.dataloader_type!r}: it must be 'single', so that every "
            "pipeline stage counts samples alike"
        )
