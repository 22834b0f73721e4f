# SPDX-License-Identifier: Apache-2.0
"""Writes a Hugging Face folder from a Megatron checkpoint of any parallel layout."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
from argparse import Namespace
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from megatron_cream.attention.methods import AttentionChoice
from megatron_cream.checkpoint.hf_folder import (
    DTYPE_NAMES,
    find_hf_folder,
    find_kept_files,
    list_other_files,
    raise_tokenizer_length,
    read_config,
    read_source_name,
    validate_export_output,
    validate_files,
)
from megatron_cream.checkpoint.hf_writer import (
    SourceModel,
    TensorPlan,
    describe_engines,
    model_card,
    parse_bytes,
    write_shards,
)
from megatron_cream.checkpoint.iterations import require_arguments, require_checkpoint
from megatron_cream.checkpoint.model_shape import (
    ModelShape,
    config_fields,
    exportable_shape,
    shape_from_config,
    window_of,
)
from megatron_cream.checkpoint.torch_dist_io import TorchDistTensors, read_ahead
from megatron_cream.checkpoint.weight_map import WeightRow, rows_of_part
from megatron_cream.config import ExtensionConfig, saved_extension
from megatron_cream.errors import UserError, naming
from megatron_cream.mcore.argument_table import flag_of, marked
from megatron_cream.ownership import staged, validate_output
from megatron_cream.rope import RopeScaling, hf_rope_fields, trainer_of
from megatron_cream.rope.huggingface import with_rope

SHARD_BYTES = 5_000_000_000

BLOCK_BYTES = 64 << 20
"""Most bytes that are read before they are written; two blocks are in memory."""

EMBEDDING = "embedding.word_embeddings.weight"

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
        scaling = extension.scaling(shape.head_dim)
        if trainer := trainer_of(scaling):  # its frequencies are frozen as they are at T
            scaling = trainer.freeze_stored(scaling, stored)
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
    type_name = str(dtype).removeprefix("torch.")
    written |= attention | {"dtype": type_name, "torch_dtype": type_name}
    (folder / "config.json").write_text(json.dumps(written, indent=2) + "\n")
    raise_tokenizer_length(folder, extension.target_length)
    window = config.get("max_position_embeddings", 0)
    base = SourceModel(read_source_name(source), window) if source else None
    card = model_card(base, shape, extension, type_name, scaling)
    (folder / "README.md").write_text(card, encoding="utf-8")


def _dual_chunk_fields(
    words: Sequence[str], fields: dict[str, Any], own: dict[str, Any]
) -> dict[str, Any]:
    """Return what has SGLang serve a model with dual chunk attention of the sizes ``words``.

    Args:
        fields: of RoPE, with the window.
        own: config.json that the export takes over.

    Raises:
        UserError: sizes that do not go together.
    """
    choice = AttentionChoice.read("dual_chunk", words)
    window = fields["max_position_embeddings"]
    sizes = choice.sizes(window, window, own.get("dual_chunk_attention_config"))
    choice.bands(sizes)
    return {"dual_chunk_attention_config": sizes}


@dataclasses.dataclass(frozen=True)
class ExtractedTensor:
    """A Hugging Face tensor and where it comes from.

    Attributes:
        key: Megatron tensor, and ``leading``, its index along the first axes.
        row_bytes: bytes of a row as stored.
        rows: the rows it is made of, in order.
    """

    plan: TensorPlan
    key: str
    leading: tuple[int, ...]
    row_bytes: int
    rows: list[range]

    def blocks(self) -> Iterator[list[range]]:
        """Yield its rows in blocks of at most BLOCK_BYTES, or of one row."""
        room = most = max(1, BLOCK_BYTES // self.row_bytes)
        block: list[range] = []
        for rows in self.rows:
            while rows:
                block.append(rows[:room])
                rows = rows[room:]
                room -= len(block[-1])
                if not room:
                    yield block
                    block, room = [], most
        if block:
            yield block


def plan_tensors(
    stored: TorchDistTensors, shape: ModelShape, dtype: torch.dtype | None
) -> Iterator[ExtractedTensor]:
    """Yield all tensors of a model, in the order in which they are written.

    Args:
        dtype: type to write; None for the one each is stored in.

    Raises:
        UserError: the checkpoint lacks a tensor, or has it in another shape than the model's.
    """
    for row, place in shape.places():
        shapes = [shape.part_shape(part) for part in row.parts]
        part_rows = [size[0] for size in shapes]
        key, leading = _locate(stored, shape, row, place)
        _validate_shape(stored, shape, row, key, (sum(part_rows), *shapes[0][1:]))
        saved = stored.dtype(key)
        for number, part in enumerate(row.parts):
            yield ExtractedTensor(
                plan=TensorPlan(part.at(place), dtype or saved, shapes[number]),
                key=key,
                leading=leading,
                row_bytes=prod(shapes[number][1:]) * saved.itemsize,
                rows=rows_of_part(row, part_rows, shape.groups, number),
            )


def _locate(
    stored: TorchDistTensors, shape: ModelShape, row: WeightRow, place: tuple[int, ...]
) -> tuple[str, tuple[int, ...]]:
    """Return the key of a tensor and its index: Megatron may also store a tensor for each layer."""
    for name in filter(None, (row.key, row.alias)):
        if name in stored:
            return name, place
        of_layer = name.replace("decoder.layers.", f"decoder.layers.{place[0]}.") if place else name
        if of_layer in stored:
            return of_layer, place[1:]
    raise UserError(f"checkpoint {stored.folder} lacks {row.key}: a {shape.architecture} has it")


def _validate_shape(
    stored: TorchDistTensors, shape: ModelShape, row: WeightRow, key: str, size: tuple[int, ...]
) -> None:
    layers = shape.leading(row) if key in (row.key, row.alias) else shape.leading(row)[1:]
    wanted, found = (*layers, *size), stored.shape(key)
    if row.parts[0].shape[0] == "v":  # padded, for tensor parallelism
        wanted = (max(wanted[0], found[0]), *wanted[1:])
    if found != wanted:
        raise UserError(
            f"checkpoint {stored.folder}: {key} has shape {list(found)}, by its arguments it must "
            f"have {list(wanted)}"
        )


def read_tensors(
    stored: TorchDistTensors, tensors: list[ExtractedTensor]
) -> Generator[np.ndarray, None, None]:
    """Yield the bytes of all tensors, block by block and in order, reading one block ahead."""
    largest = max(
        max(t.row_bytes, min(BLOCK_BYTES, t.row_bytes * t.plan.shape[0])) for t in tensors
    )
    blocks = ((tensor, block) for tensor in tensors for block in tensor.blocks())
    return read_ahead((partial(_read, stored, *one) for one in blocks), largest)


def _read(
    stored: TorchDistTensors, tensor: ExtractedTensor, block: list[range], memory: np.ndarray
) -> np.ndarray:
    out = memory[: sum(map(len, block)) * tensor.row_bytes].reshape(-1, tensor.row_bytes)
    filled = 0
    for rows in block:
        target = out[filled : filled + len(rows)]
        stored.read_rows(tensor.key, tensor.leading, rows.start, rows.stop, target)
        filled += len(rows)
    saved = stored.dtype(tensor.key)
    if saved == tensor.plan.dtype:
        return out.reshape(-1)
    values = torch.frombuffer(out.reshape(-1), dtype=saved).to(tensor.plan.dtype)
    return values.view(torch.uint8).numpy()


def describe(exported: ExportedModel, output: str) -> str:
    """Return what was made, and in a second line which inference engines read it."""
    return (
        f"{output}: {exported.shape.architecture}, {exported.shape.layers} layers, window "
        f"{exported.extension.target_length} tokens, RoPE {exported.extension.rope_interpolation}, "
        f"{str(exported.dtype).removeprefix('torch.')}, {exported.nbytes / 1e9:.2f} GB\n"
        f"{describe_engines(exported.rope_type)}"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    add = parser.add_argument
    add("--checkpoint", required=True, help="folder given to --save, or one iteration in it")
    add("--output", required=True, help="new folder")
    add("--hf", help="where config and tokenizer come from (default: the import it began with)")
    add("--dtype", choices=DTYPE_NAMES, help="type of the weights (default: the one they have)")
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
