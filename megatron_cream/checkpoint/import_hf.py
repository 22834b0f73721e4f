# SPDX-License-Identifier: Apache-2.0
"""Writes a Megatron checkpoint, which any parallel layout loads, from a Hugging Face one."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from megatron_cream.checkpoint.hf_folder import (
    DTYPE_NAMES,
    DTYPES,
    HF_FOLDER,
    HfWeights,
    copy_hf_files,
    find_hf_folder,
    read_config,
    validate_files,
)
from megatron_cream.checkpoint.iterations import RELEASE, TRACKER
from megatron_cream.checkpoint.model_shape import (
    ModelShape,
    kind_flags,
    shape_from_config,
    size_flags,
    window_of,
)
from megatron_cream.checkpoint.torch_dist_io import TensorChunk, write_torch_dist
from megatron_cream.checkpoint.weight_map import IGNORED, WeightRow, rows_in_order
from megatron_cream.config import SETTINGS_KEY, ExtensionConfig, rope_settings
from megatron_cream.errors import UserError, naming
from megatron_cream.ownership import staged, validate_output
from megatron_cream.rope import scaling_from_hf

CHUNK_BYTES = 64 << 20
"""Most bytes of a chunk of the checkpoint: small beside a model, large beside a disk's seeks."""

EXAMPLES = """
    megatron-cream import --hf meta-llama/Llama-2-7b-hf --output base

An import is what --pretrained-checkpoint starts from, at any layout.
"""


@dataclasses.dataclass(frozen=True)
class ImportedModel:
    """What an import made: the model, and the bytes of its weights as written."""

    shape: ModelShape
    extension: ExtensionConfig
    dtype: torch.dtype
    nbytes: int


def import_checkpoint(
    hf: str, output: str, dtype: torch.dtype | None = None, quiet: bool = False
) -> ImportedModel:
    """Write the Megatron checkpoint ``output`` of a Hugging Face model.

    It has the weights in the torch_dist format, one global tensor ``[layers, rows, columns]`` for
    all layers, which every parallel layout loads; Megatron's arguments for --use-checkpoint-args;
    and config.json, tokenizer and licence in ``output/hf``. A few blocks of 64 MiB are in memory.

    Args:
        hf: folder with config.json and safetensors files, or a repository on the hub.
        output: new or empty folder, to be given to --pretrained-checkpoint or --load.
        dtype: type of the weights; by default the one they have, bit for bit.
        quiet: no progress bar.

    Returns:
        The shape of the model, the settings of its positions, the type and bytes of its weights.

    Raises:
        UserError: a config.json or weights that cannot be imported, an output that holds something
            or a disk with too little space; before anything is written.
        FileNotFoundError: no such folder or repository, or a file of it is missing.
        BlockingIOError: another process is writing ``output``.
        OSError: the disk became full, or failed; nothing is kept.
    """
    source = find_hf_folder(hf)
    place = validate_output(Path(output), [source])
    config = read_config(source)
    with naming(source):
        shape = shape_from_config(config)
        extension = read_base_extension(config, shape)
    validate_files(source)
    with contextlib.closing(HfWeights(source)) as weights:
        stored = validate_weights(weights, shape, dtype)
        dtype = dtype or stored
        chunks = list(_chunks(weights, shape, dtype))
        total = sum(chunk.nbytes for chunk in chunks)
        objects = _object_records(shape, extension, dtype)
        with (
            staged(place, total, [source]) as folder,
            tqdm(total=total, unit="B", unit_scale=True, desc="import", disable=quiet) as bar,
        ):
            (folder / RELEASE).mkdir()
            write_torch_dist(folder / RELEASE, chunks, objects, bar.update)
            copy_hf_files(source, hf, folder / HF_FOLDER)
            (folder / TRACKER).write_text(RELEASE)
    return ImportedModel(shape, extension, dtype, total)


def read_base_extension(config: dict[str, Any], shape: ModelShape) -> ExtensionConfig:
    """Return the settings of the model as it is: its window, and how its angles are made.

    Raises:
        UserError: a window or angles that config.json does not say, or that are not supported.
    """
    window = window_of(config)
    scaling = scaling_from_hf(config)
    if scaling.dim != shape.head_dim:
        raise UserError(
            f"partial_rotary_factor in config.json has {scaling.dim} dimensions of a head rotated: "
            f"{shape.architecture} rotates all {shape.head_dim}"
        )
    return ExtensionConfig(train_length=window, target_length=window, **rope_settings(scaling))


_COMPARED_BYTES = 64 << 20  # at a time
_LISTED = 10_000


def validate_weights(
    weights: HfWeights, shape: ModelShape, dtype: torch.dtype | None
) -> torch.dtype:
    """Compare the weights with the table of the family; return the type they have.

    Raises:
        UserError: a tensor that is missing, of another shape than config.json says, that the
            family has no place for, or of another type than the rest where ``dtype`` is None.
    """
    # A config.json may ask for billions: no more are listed than are needed to name the first.
    expected = dict(islice(_expected_shapes(shape), 2 * len(weights.tensors) + _LISTED))
    missing = sorted(expected.keys() - weights.tensors.keys())
    if missing:
        lacked = shape.tensors - (len(expected) - len(missing))
        raise UserError(
            f"{weights.folder} lacks {lacked} tensors that its config.json asks for: "
            f"{_few(missing)}"
        )
    for name, size in expected.items():
        if weights.tensors[name].shape != size:
            raise UserError(
                f"{weights.folder}: {name} has shape {list(weights.tensors[name].shape)}, by "
                f"config.json it must have {list(size)}"
            )
    stored = _validate_type(weights, list(expected), dtype)
    rest = [n for n in weights.tensors if n not in expected and not n.endswith(IGNORED)]
    if rest == ["lm_head.weight"] and shape.tied:
        _validate_tied(weights)
    elif rest:
        raise UserError(
            f"{weights.folder} has {len(rest)} tensors that {shape.architecture} has no place "
            f"for: {_few(sorted(rest))}"
        )
    return stored


def _expected_shapes(shape: ModelShape) -> Iterator[tuple[str, tuple[int, ...]]]:
    for row, place in shape.places():
        for part in row.parts:
            yield part.at(place), shape.part_shape(part)


def _validate_type(weights: HfWeights, names: list[str], dtype: torch.dtype | None) -> torch.dtype:
    by_type: dict[str, list[str]] = {}
    for name in names:
        by_type.setdefault(weights.tensors[name].dtype, []).append(name)
    unknown = by_type.keys() - DTYPES.keys()
    if unknown:
        raise UserError(
            f"{weights.folder}: {by_type[min(unknown)][0]} has type {min(unknown)}: it must be one "
            f"of {tuple(DTYPES)}"
        )
    if len(by_type) > 1 and dtype is None:
        kinds = ", ".join(f"{len(n)} {kind} ({n[0]})" for kind, n in sorted(by_type.items()))
        raise UserError(
            f"{weights.folder} has tensors of several types: {kinds}; say with --dtype which one "
            "the checkpoint shall have"
        )
    return DTYPES[next(iter(by_type))]


def _validate_tied(weights: HfWeights) -> None:
    """Some checkpoints store the output layer although it is the embedding: it must be equal."""
    names = "model.embed_tokens.weight", "lm_head.weight"
    one, two = (weights.tensors[name] for name in names)
    same = (one.shape, one.dtype) == (two.shape, two.dtype)
    step = max(1, _COMPARED_BYTES // one.row_bytes)
    for start in range(0, one.shape[0] if same else 0, step):
        stop = min(start + step, one.shape[0])
        rows = np.empty((2, (stop - start) * one.row_bytes), np.uint8)
        for name, out in zip(names, rows, strict=True):
            weights.read_rows(name, start, stop, out)
        same = same and np.array_equal(rows[0], rows[1])
    if not same:
        raise UserError(
            f"{weights.folder}: tie_word_embeddings is true in config.json, but lm_head.weight "
            "differs from model.embed_tokens.weight"
        )


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _chunks(weights: HfWeights, shape: ModelShape, dtype: torch.dtype) -> Iterator[TensorChunk]:
    for row, place in shape.places():
        part_shapes = [shape.part_shape(part) for part in row.parts]
        rows, columns = sum(size[0] for size in part_shapes), part_shapes[0][1:]
        step = max(1, CHUNK_BYTES // (prod(columns) * dtype.itemsize))
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            for key in filter(None, (row.key, row.alias)):
                yield TensorChunk(
                    key=key,
                    dtype=dtype,
                    shape=(*shape.leading(row), rows, *columns),
                    offset=(*place, start, *(0 for _ in columns)),
                    size=(*(1 for _ in place), stop - start, *columns),
                    fill=partial(
                        _read_rows, weights, row, place, range(start, stop), shape.groups, dtype
                    ),
                )


def _read_rows(
    weights: HfWeights,
    row: WeightRow,
    place: tuple[int, ...],
    wanted: range,
    groups: int,
    dtype: torch.dtype,
    out: np.ndarray,
) -> None:
    """Put rows of a Megatron tensor together from its parts, in uint8 ``out`` of their size."""
    names = [part.at(place) for part in row.parts]
    part_rows = [weights.tensors[name].shape[0] for name in names]
    first = filled = 0
    for part, rows in rows_in_order(row, part_rows, groups):
        here = rows[max(0, wanted.start - first) : max(0, wanted.stop - first)]
        first += len(rows)
        if here:
            filled += _read_as(weights, names[part], here, dtype, out[filled:])


def _read_as(
    weights: HfWeights, name: str, rows: range, dtype: torch.dtype, out: np.ndarray
) -> int:
    """Read rows of a tensor into the begin of ``out`` as ``dtype``; return their bytes."""
    tensor = weights.tensors[name]
    count, stored = len(rows) * tensor.row_bytes, DTYPES[tensor.dtype]
    memory = out[:count] if stored == dtype else np.empty(count, np.uint8)
    weights.read_rows(name, rows.start, rows.stop, memory)
    if stored == dtype:
        return count
    values = torch.frombuffer(memory, dtype=stored).to(dtype)
    out[: values.nbytes] = values.view(torch.uint8).numpy()
    return values.nbytes


# Modules that keep no state of their own beside their weights, in any implementation.
_WITHOUT_STATE = ("embedding.word_embeddings", "output_layer", "decoder.layers.mlp.router")

# Modules without weights that are asked for all the same.
_BESIDE = {"decoder.layers.mlp.linear_fc1": ("decoder.layers.mlp.activation_func",)}


def _object_records(
    shape: ModelShape, extension: ExtensionConfig, dtype: torch.dtype
) -> dict[str, Any]:
    """Return what Megatron keeps beside tensors, by the name it has on the disk.

    The loader asks for the "extra state" of every linear layer, with Transformer Engine of every
    norm, and with --use-te-activation-func of what is between a feed-forward's two. It is None, as
    Megatron saves it without fp8.
    """
    objects: dict[str, Any] = {
        "common_state/shard_0_1": {
            "args": _arguments_to_save(shape, extension, dtype),
            "checkpoint_version": 3.0,
            "iteration": 0,
        }
    }
    for row, place in shape.places():
        module, _, kind = row.key.rpartition(".")
        if kind == "weight" and module not in _WITHOUT_STATE:
            offset = ".".join(map(str, place or (0,)))
            size = ".".join(map(str, shape.leading(row) or (1,)))
            for name in (module, *_BESIDE.get(module, ())):
                objects[f"{name}._extra_state/shard_{offset}_{size}"] = None
    return objects


PADDING = 128
"""Megatron's --make-vocab-size-divisible-by: any tensor-parallel size up to it divides."""

_TYPE_FLAGS = {torch.float32: (), torch.bfloat16: ("--bf16",), torch.float16: ("--fp16",)}

# Flags of a run, which Megatron's validation asks for and no reader of a checkpoint looks at.
_UNUSED = (
    *("--micro-batch-size", "1", "--lr", "0", "--train-iters", "1", "--eval-interval", "1"),
    *("--eval-iters", "0", "--no-create-attention-mask-in-dataloader"),
    *("--tokenizer-type", "NullTokenizer"),
)


def _arguments_to_save(
    shape: ModelShape, extension: ExtensionConfig, dtype: torch.dtype
) -> Namespace:
    """Return the arguments that are saved with an import.

    All of Megatron's are there, made by its own parser, so that --use-checkpoint-args and every
    other reader finds what it looks for.
    """
    from megatron_cream.mcore.build_model import parse_flags

    window = str(extension.target_length)
    flags = [
        *(*size_flags(shape), *kind_flags(shape), "--vocab-size", str(shape.vocabulary)),
        *("--position-embedding-type", "rope"),
        *("--seq-length", window, "--max-position-embeddings", window),
    ]
    args = parse_flags([*flags, *_TYPE_FLAGS[dtype], *_UNUSED])
    args.padded_vocab_size = -(-shape.vocabulary // PADDING) * PADDING
    base = extension.rotary_base
    args.rotary_base = int(base) if base == int(base) else base  # the flag takes whole numbers
    # Choices of the run, which --use-checkpoint-args would overrule.
    args.moe_grouped_gemm = args.tokenizer_type = args.tokenizer_model = None
    setattr(args, SETTINGS_KEY, extension.to_dict())
    return args


def describe(imported: ImportedModel, output: str) -> str:
    """Return what was made, and how a run starts from it."""
    shape, extension = imported.shape, imported.extension
    lines = [
        f"{output}: {shape.architecture}, {shape.layers} layers, window {extension.target_length} "
        f"tokens, RoPE {extension.rope_interpolation}, {str(imported.dtype).removeprefix('torch.')}"
        f", {imported.nbytes / 1e9:.2f} GB",
        f"start a run from it: --pretrained-checkpoint {output} --use-checkpoint-args "
        f"--tokenizer-type HuggingFaceTokenizer --tokenizer-model {output}/{HF_FOLDER} "
        "--seq-length N --target-length T",
    ]
    if extension.rope_interpolation != "none":
        lines.append(
            f"its RoPE is scaled already: --rope-base-config {output}/{HF_FOLDER}/config.json"
        )
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    add = parser.add_argument
    add("--hf", required=True, help="folder, or the name of a repository on the hub")
    add("--output", required=True, help="new folder, for --pretrained-checkpoint")
    add("--dtype", choices=DTYPE_NAMES, help="type of the weights (default: the one they have)")


def run(args: argparse.Namespace) -> None:
    """Import what a command line names."""
    dtype = getattr(torch, args.dtype) if args.dtype else None
    print(describe(import_checkpoint(args.hf, args.output, dtype), args.output))
