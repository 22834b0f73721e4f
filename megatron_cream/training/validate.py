# SPDX-License-Identifier: Apache-2.0
"""Validates a run before a GPU is asked for: every check of it, in order.

Training, a script's start and the dry run ask these functions, so that they agree.
"""

from __future__ import annotations

import math
import sys
from argparse import Namespace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megatron_cream.config import ExtensionConfig
from megatron_cream.data.text_sources import PACK_MULTIPLE
from megatron_cream.errors import UserError
from megatron_cream.mcore import cpu
from megatron_cream.mcore.argument_table import flag_of
from megatron_cream.mcore.hooks import extras
from megatron_cream.mcore.validation import (
    validate_left_out,
    validate_model_config,
    validate_ranges,
    validate_required,
    validate_with_megatron,
)
from megatron_cream.training import datasets, resume
from megatron_cream.training.arguments import extension_from_args


def validate_flags(
    args: Namespace, defaults: dict[str, Any] | None = None
) -> tuple[ExtensionConfig, Namespace]:
    """Validate all that flags alone say, on any machine; no dataset or checkpoint is looked at.

    Args:
        args: as parsed; not changed.
        defaults: a script's own, as Megatron's validation takes them.

    Returns:
        The settings of the extension, and a copy of the arguments that Megatron has validated.

    Raises:
        UserError: naming the flag, its value and the value needed.
    """
    extension = validate_our_flags(args)
    validated = validate_with_megatron(args, defaults or {})
    resume.validate_schedule(validated)
    return extension, validated


def validate_our_flags(args: Namespace) -> ExtensionConfig:
    """Validate what Megatron does not, of arguments before or after its validation."""
    validate_required(args)
    validate_ranges(args)
    validate_divisibility(args)
    validate_left_out(args)
    validate_supported(args)
    if args.cpu:
        cpu.validate_flags(args)
    datasets.validate_blend(args)
    extension = extension_from_args(args)
    if extension.draws_scales:
        beside = f" with --rope-interpolation {extension.rope_interpolation}"
        validate_left_out(args, "with_scales", beside)
    for extra in extras():
        extra.validate_flags(args, extension)
    return extension


def validate_files(args: Namespace, validated: Namespace, extension: ExtensionConfig) -> None:
    """Validate what flags name: packages, tokenizer, datasets and checkpoints.

    Args:
        args: as parsed.
        validated: the same, validated by Megatron.

    Raises:
        UserError, OSError: naming the flag or file, and what it needs.
    """
    validate_packages(args)
    validate_model_config(validated)
    validate_tokenizer(args)
    datasets.validate_datasets(args, extension)
    resume.validate_checkpoint(args, extension)
    resume.validate_same_schedule(validated)


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


def validate_packages(args: Namespace) -> None:
    """Refuse what needs a package that is not installed here.

    Raises:
        UserError: naming the flag and the package.
    """
    if args.optimizer not in ("adam", "sgd") and find_spec("emerging_optimizers") is None:
        raise UserError(
            f"--optimizer is {args.optimizer!r}: it needs the package emerging-optimizers; adam "
            "and sgd need none"
        )
    if args.wandb_project and "wandb" not in sys.modules and find_spec("wandb") is None:
        raise UserError("--wandb-project is given: it needs the package wandb")
    if args.transformer_impl == "transformer_engine" and find_spec("transformer_engine") is None:
        raise UserError(
            "--transformer-impl is 'transformer_engine', which is not installed: pip install "
            "'.[gpu]' (megatron_cream's extra), or give --transformer-impl local"
        )
    if args.inprocess_restart and find_spec("nvidia_resiliency_ext") is None:
        raise UserError(
            "--inprocess-restart is given: it needs the package nvidia-resiliency-ext, without "
            "which Megatron would train as if it were not"
        )
    for extra in extras():
        extra.validate_machine(args)


_TOKENIZER_FILES = {
    "GPT2BPETokenizer": ("vocab_file", "merge_file"),
    "BertWordPieceLowerCase": ("vocab_file",),
    "BertWordPieceCase": ("vocab_file",),
    "SentencePieceTokenizer": ("tokenizer_model",),
    "GPTSentencePieceTokenizer": ("tokenizer_model",),
    "Llama2Tokenizer": ("tokenizer_model",),
    "TikTokenizer": ("tokenizer_model",),
}
_OF_HUB = ("HuggingFaceTokenizer", "SFTTokenizer")
_HUB_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
_TIMEOUT = 10.0  # seconds; Megatron's own look, with its repetitions, takes a minute
_ADVICE = "or take --tokenizer-type NullTokenizer with --vocab-size, datasets hold tokens already"


def validate_tokenizer(args: Namespace) -> None:
    """Refuse a tokenizer whose files are neither here nor on a hub within reach.

    Raises:
        UserError: naming the flag.
        FileNotFoundError: likewise, with the file.
    """
    for attribute in _TOKENIZER_FILES.get(args.tokenizer_type, ()):
        flag, path = flag_of(attribute), getattr(args, attribute)
        if path is None:
            raise UserError(f"{flag} is missing: --tokenizer-type {args.tokenizer_type} reads it")
        if not Path(path).is_file():
            raise FileNotFoundError(f"{flag} is {path}: it must be an existing file; {_ADVICE}")
    if args.tokenizer_type in _OF_HUB:
        _validate_tokenizer_name(args.tokenizer_type, args.tokenizer_model)


def _validate_tokenizer_name(kind: str, name: str | None) -> None:
    if name is None:
        raise UserError(f"--tokenizer-model is missing: --tokenizer-type {kind} reads it")
    folder = Path(name)
    if folder.is_dir():
        if not any((folder / file).is_file() for file in _HUB_FILES):
            raise FileNotFoundError(
                f"--tokenizer-model is {name}: that folder has none of {', '.join(_HUB_FILES)}; "
                f"it must be that of a tokenizer, {_ADVICE}"
            )
        return
    reason = _why_out_of_reach(name)
    if reason is not None:
        raise FileNotFoundError(
            f"--tokenizer-model is {name}: there is no such folder, and {reason}; {_ADVICE}"
        )


def _why_out_of_reach(name: str) -> str | None:
    """Return why a repository of the hub cannot be had, or None if it was downloaded or can be."""
    try:
        from huggingface_hub import HfApi, try_to_load_from_cache
    except ImportError:
        return "to look for it on the Hugging Face hub needs the package huggingface_hub"
    try:
        if any(isinstance(try_to_load_from_cache(name, file), str) for file in _HUB_FILES):
            return None
        HfApi().model_info(name, timeout=_TIMEOUT)
    except Exception as error:  # of requests, httpx or the hub's own kind, by version
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return f"the Hugging Face hub does not give it ({reason})"
    return None
