# SPDX-License-Identifier: Apache-2.0
"""Writes a Hugging Face folder from a Megatron checkpoint of any parallel layout."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import shutil
from argparse import Namespace
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from megatron_cream.attention.methods import AttentionChoice
from megatron_cream.checkpoint.extraction import plan_tensors, read_tensors
from megatron_cream.checkpoint.hf_files import (
    TOKENIZER,
    find_hf_folder,
    find_kept_files,
    list_other_files,
    read_config,
    read_source_name,
    validate_export_output,
    validate_files,
)
from megatron_cream.checkpoint.hf_weights import write_shards
from megatron_cream.checkpoint.iterations import require_arguments, require_checkpoint
from megatron_cream.checkpoint.model_card import SourceModel, describe_engines, model_card
from megatron_cream.checkpoint.model_shape import (
    ModelShape,
    config_fields,
    exportable_shape,
    shape_from_config,
    window_of,
)
from megatron_cream.checkpoint.torch_dist_io import TorchDistTensors
from megatron_cream.config import ExtensionConfig, saved_extension
from megatron_cream.errors import UserError
from megatron_cream.json_values import naming, read_object
from megatron_cream.mcore.argument_table import flag_of, marked
from megatron_cream.ownership import staged, validate_output
from megatron_cream.rope import RopeScaling, hf_rope_fields, trainer_of
from megatron_cream.rope.huggingface import with_rope

SHARD_BYTES = 5_000_000_000

EMBEDDING = "embedding.word_embeddings.weight"

_TYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}

EXAMPLES = """
    megatron-cream export --checkpoint runs/cream --output llama-2-7b-32k

An export is what transformers, vLLM and SGLang load.
"""


@dataclasses.dataclass(frozen=True)
class ExportedModel:
    """What an export made: the model, its settings and RoPE, and the bytes of its weights."""

    shape: ModelShape
    extension: ExtensionConfig
    dtype: torch.dtype
    nbytes: int
    rope_type: str


def export_checkpoint(
    checkpoint: str,
    output: str,
    hf: str | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    quiet: bool = False,
    dual_chunk: Sequence[str] | None = None,
) -> ExportedModel:
    """Write the Hugging Face folder ``output`` of a Megatron checkpoint.

    It has the weights in safetensors files, each tensor ``[rows, columns]`` or ``[rows]``;
    config.json with the window reached, in tokens, and RoPE as it was trained, in the keys of
    transformers 4 and 5; the tokenizer; and a model card. A few blocks of 64 MiB are in memory.

    Args:
        checkpoint: folder given to --save, or one iteration in it; saved at any parallel layout.
        output: new or empty folder.
        hf: folder, or repository on the hub, to take config.json, tokenizer and licence from; by
            default what the import that the run began with keeps in its ``hf/``.
        dtype: type of the weights; by default the one they were saved in, bit for bit.
        shard_bytes: most bytes of one safetensors file.
        quiet: no progress bar.
        dual_chunk: sizes in tokens, ``KEY=N``, of dual chunk attention that engines are to serve
            it with; an empty list for the usual ones; those of training unless given.

    Returns:
        The shape of the model, its settings, the type and bytes of its weights, its rope_type.

    Raises:
        UserError: a checkpoint that is damaged, of no family here, or of another model than
            ``hf``, or an output that cannot be written; before anything is written.
        FileNotFoundError: no checkpoint, or ``hf`` or the import it began with is missing.
        BlockingIOError: another process is writing ``output``.
        OSError: the disk became full, or failed; nothing is kept.
    """
    iteration = require_checkpoint(checkpoint)
    args = require_arguments(iteration)
    extension = saved_extension(args) or _plain_extension(args)
    source = find_kept_files(checkpoint, args) if hf is None else find_hf_folder(hf)
    reads = [Path(checkpoint), *filter(None, [source])]
    place = validate_export_output(validate_output(Path(output), reads), checkpoint)
    config = _read_config(source) if source else {}
    with closing(TorchDistTensors(iteration)) as stored:
        shape = _validated_shape(args, config, source, stored)
        scaling = _exported_scaling(stored, extension, shape.head_dim)
        fields = hf_rope_fields(scaling, extension.target_length)
        words = getattr(args, "dual_chunk", None) if dual_chunk is None else dual_chunk
        attention = {} if words is None else _dual_chunk_fields(words, fields, config)
        tensors = list(plan_tensors(stored, shape, dtype))
        plans = [tensor.plan for tensor in tensors]
        total, written = sum(plan.nbytes for plan in plans), plans[0].dtype
        with (
            staged(place, total, reads) as folder,
            tqdm(total=total, unit="B", unit_scale=True, desc="export", disable=quiet) as bar,
            closing(read_tensors(stored, tensors)) as blocks,
        ):
            write_shards(folder, plans, shard_bytes, blocks, bar.update)
            _write_files(folder, source, config, shape, extension, scaling, written, attention)
    return ExportedModel(shape, extension, written, total, scaling.to_hf()["rope_type"])


def _read_config(source: Path) -> dict[str, Any]:
    """Return config.json of ``source``, after all that an export takes from there was read."""
    config = read_config(source)
    with naming(source):
        window_of(config)
        shape_from_config(config)
    validate_files(source)
    return config


def _validated_shape(
    args: Namespace, config: dict[str, Any], source: Path | None, stored: TorchDistTensors
) -> ModelShape:
    """Return what the model is, by the saved arguments, config.json and the weights alike.

    Raises:
        UserError: they disagree.
    """
    wanted = shape_from_config(config) if config else None
    shape = exportable_shape(args, wanted.architecture if wanted else None)
    if wanted is not None:
        # A run may have another window, and pad the vocabulary or name the tokenizer's.
        shape = dataclasses.replace(shape, vocabulary=wanted.vocabulary)
        differences = dataclasses.replace(shape, window=wanted.window).differences(wanted)
        if differences:
            raise UserError(
                f"the checkpoint and {source}/config.json are of different models (checkpoint != "
                f"config.json): {'; '.join(differences)}"
            )
    rows = stored.shape(EMBEDDING)[0] if EMBEDDING in stored else 0
    if rows < shape.vocabulary:
        raise UserError(
            f"{EMBEDDING} of the checkpoint has {rows} rows: the vocabulary has "
            f"{shape.vocabulary} tokens"
        )
    return shape


def _plain_extension(args: Namespace) -> ExtensionConfig:
    """Return the settings of a model that Megatron trained without ours: its own plain RoPE."""
    for name in marked("scales_rope"):
        if getattr(args, name, None):
            raise UserError(
                f"{flag_of(name)} of the checkpoint is {getattr(args, name)}: without "
                "megatron_cream's settings in a checkpoint its RoPE must be plain"
            )
    window = args.max_position_embeddings
    return ExtensionConfig(window, window, window, rotary_base=float(args.rotary_base))


def _exported_scaling(
    stored: TorchDistTensors, extension: ExtensionConfig, dim: int
) -> RopeScaling:
    """Return the interpolation to write down; trained frequencies are frozen as they are at T."""
    scaling = extension.scaling(dim)
    trainer = trainer_of(scaling)
    return trainer.freeze_stored(scaling, stored) if trainer else scaling


def _write_files(
    folder: Path,
    source: Path | None,
    config: dict[str, Any],
    shape: ModelShape,
    extension: ExtensionConfig,
    scaling: RopeScaling,
    dtype: torch.dtype,
    attention: dict[str, Any],
) -> None:
    """Write config.json and the model card, and take over the rest from ``source``."""
    for path in list_other_files(source) if source else ():
        shutil.copyfile(path, folder / path.name)
    fields = config_fields(shape)
    if config:  # of the base model: what says the same in its own words stays
        fields = {key: fields[key] for key in ("sliding_window",) if key in fields}
    written = with_rope(config | fields, hf_rope_fields(scaling, extension.target_length))
    written |= attention | {"dtype": _TYPE_NAMES[dtype], "torch_dtype": _TYPE_NAMES[dtype]}
    (folder / "config.json").write_text(json.dumps(written, indent=2) + "\n")
    _raise_tokenizer_length(folder, extension.target_length)
    base = (
        SourceModel(read_source_name(source), config["max_position_embeddings"]) if source else None
    )
    card = model_card(base, shape, extension, _TYPE_NAMES[dtype], scaling)
    (folder / "README.md").write_text(card, encoding="utf-8")


def _dual_chunk_fields(
    words: Sequence[str], fields: dict[str, Any], own: dict[str, Any]
) -> dict[str, Any]:
    """Return what has SGLang serve a model with dual chunk attention.

    Args:
        words: sizes that were asked for.
        fields: of RoPE, with the window.
        own: config.json that the export takes over.

    Raises:
        UserError: sizes that do not go together.
    """
    choice = AttentionChoice.read("dual_chunk", words)
    window = fields["max_position_embeddings"]
    sizes = choice.sizes(window, window, own.get("dual_chunk_attention_config"))
    choice.bands(sizes)
    # Above 0, logits would be multiplied by a factor that grows with the text.
    return {"dual_chunk_attention_config": {**sizes, "original_max_position_embeddings": 0}}


def _raise_tokenizer_length(folder: Path, target_length: int) -> None:
    """Let the tokenizer know the new window: it warns beyond, and some servers cut there."""
    path = folder / TOKENIZER
    if not path.is_file():
        return
    settings = read_object(path)
    most = settings.get("model_max_length")
    if isinstance(most, int | float) and most < target_length:
        settings["model_max_length"] = target_length
        text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
        path.write_text(text, encoding="utf-8")


def describe(exported: ExportedModel, output: str) -> str:
    """Return what was made, and in a second line which inference engines read it."""
    return (
        f"{output}: {exported.shape.architecture}, {exported.shape.layers} layers, window "
        f"{exported.extension.target_length} tokens, RoPE {exported.extension.rope_interpolation}, "
        f"{_TYPE_NAMES[exported.dtype]}, {exported.nbytes / 1e9:.2f} GB\n"
        f"{describe_engines(exported.rope_type)}"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    add = parser.add_argument
    add("--checkpoint", required=True, help="folder given to --save, or one iteration in it")
    add("--output", required=True, help="new folder")
    add("--hf", help="where config and tokenizer come from (default: the import it began with)")
    types = ("float32", "bfloat16", "float16")
    add("--dtype", choices=types, help="type of the weights (default: the one they have)")
    add(
        "--dual-chunk",
        nargs="*",
        metavar="KEY=N",
        help="have SGLang serve it with dual chunk attention, chunk_size=N local_size=N in tokens "
        "(docs/attention.md)",
    )
    add("--max-shard-size", default="5GB", help="of a safetensors file, as 500MB or 5GB")


def run(args: argparse.Namespace) -> None:
    """Export what a command line names."""
    dtype = getattr(torch, args.dtype) if args.dtype else None
    most = parse_bytes(args.max_shard_size)
    exported = export_checkpoint(
        args.checkpoint, args.output, args.hf, dtype, most, dual_chunk=args.dual_chunk
    )
    print(describe(exported, args.output))


_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def parse_bytes(text: str) -> int:
    """Return the bytes of a size like 500MB.

    Raises:
        UserError: it is none.
    """
    found = re.fullmatch(r"(\d{1,9})\s*([KMG]B)", text.strip(), re.IGNORECASE)
    if not found or int(found[1]) == 0:
        raise UserError(f"--max-shard-size is {text!r}: it must be a size such as 500MB or 5GB")
    return int(found[1]) * _UNITS[found[2].upper()]
