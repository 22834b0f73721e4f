# SPDX-License-Identifier: Apache-2.0
"""The arguments saved with a checkpoint: which model they are of, and those of an import."""

from __future__ import annotations

import contextlib
import io
from argparse import ArgumentParser, Namespace

import torch

from megatron_cream.checkpoint.config_json import WINDOWED
from megatron_cream.checkpoint.metadata import SETTINGS_KEY
from megatron_cream.checkpoint.model_flags import described_shape, kind_flags, size_flags
from megatron_cream.checkpoint.model_shape import ModelShape
from megatron_cream.checkpoint.weight_map import FAMILIES
from megatron_cream.config import ExtensionConfig
from megatron_cream.errors import UserError
from megatron_cream.mcore.arguments import flag_of, values

PADDING = 128
"""Megatron's --make-vocab-size-divisible-by: any tensor-parallel size up to it divides."""

_TYPE_FLAGS = {torch.float32: (), torch.bfloat16: ("--bf16",), torch.float16: ("--fp16",)}

# Flags of a run, which Megatron's validation asks for and no reader of a checkpoint looks at.
_UNUSED = (
    *("--micro-batch-size", "1", "--lr", "0", "--train-iters", "1", "--eval-interval", "1"),
    *("--eval-iters", "0", "--no-create-attention-mask-in-dataloader"),
    *("--tokenizer-type", "NullTokenizer"),
)


def import_arguments(
    shape: ModelShape, extension: ExtensionConfig, dtype: torch.dtype
) -> Namespace:
    """Return the arguments that are saved with an import.

    All of Megatron's are there, made by its own parser, so that --use-checkpoint-args and every
    other reader finds what it looks for.
    """
    from megatron.training.arguments import add_megatron_arguments, validate_args

    from megatron_cream.training.arguments import add_arguments

    parser = add_arguments(add_megatron_arguments(ArgumentParser(allow_abbrev=False)))
    window = str(extension.target_length)
    flags = [
        *(*size_flags(shape), *kind_flags(shape), "--vocab-size", str(shape.vocabulary)),
        *("--position-embedding-type", "rope"),
        *("--seq-length", window, "--max-position-embeddings", window),
    ]
    args = parser.parse_args([*flags, *_TYPE_FLAGS[dtype], *_UNUSED])
    args.rank, args.world_size = 0, 1
    with contextlib.redirect_stdout(io.StringIO()):  # it prints them all
        validate_args(args)
    args.padded_vocab_size = -(-shape.vocabulary // PADDING) * PADDING
    base = extension.rotary_base
    args.rotary_base = int(base) if base == int(base) else base  # the flag takes whole numbers
    # Choices of the run, which --use-checkpoint-args would overrule.
    args.moe_grouped_gemm = args.tokenizer_type = args.tokenizer_model = None
    setattr(args, SETTINGS_KEY, extension.to_dict())
    return args


def shape_from_arguments(args: Namespace, architecture: str | None = None) -> ModelShape:
    """Read Megatron's arguments, as saved with a checkpoint.

    Args:
        architecture: what the model is to be called; by default the one whose features it has.

    Raises:
        UserError: a model that no family describes, naming the flag.
    """
    _validate_llama_like(args)
    shape = described_shape(args, architecture)
    _check_features(shape)
    return shape


def _validate_llama_like(args: Namespace) -> None:
    for name, needed in values("hugging_face").items():
        value = getattr(args, name, needed)
        if value != needed and not (needed is False and value is None):
            raise UserError(
                f"{flag_of(name)} of the checkpoint is {value!r}: it must be {needed!r} for a "
                f"Hugging Face model of the families {tuple(FAMILIES)}"
            )


def _check_features(shape: ModelShape) -> None:
    family = shape.family
    features = {
        "--qk-layernorm": (shape.qk_norm, family.qk_norm),
        "--num-experts": (bool(shape.experts), family.experts),
        "--add-qkv-bias": (shape.qkv_bias, family.qkv_bias or shape.linear_bias),
        "--add-bias-linear": (shape.linear_bias, family.biases and shape.linear_bias),
        "--window-size": (
            shape.window is not None,
            family.model_type in WINDOWED and shape.window is not None,
        ),
    }
    for flag, (has, needs) in features.items():
        if has != needs:
            raise UserError(
                f"{flag} of the checkpoint is {'on' if has else 'off'}: a {shape.architecture} "
                f"needs it {'on' if needs else 'off'}"
            )
