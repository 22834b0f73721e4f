# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face checkpoint becomes a Megatron checkpoint that any layout loads."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from megatron_cream.checkpoint.hf_config import shape_from_config, window_of
from megatron_cream.checkpoint.hf_files import (
    HF_FOLDER,
    RELEASE,
    copy_hf_files,
    find_hf_folder,
    read_config,
    validate_files,
)
from megatron_cream.checkpoint.hf_weights import DTYPES, HfWeights, validate_weights
from megatron_cream.checkpoint.model_shape import ModelShape, import_arguments
from megatron_cream.checkpoint.torch_dist_io import TensorChunk, write_torch_dist
from megatron_cream.checkpoint.weight_map import WeightRow, rows_in_order
from megatron_cream.config import ExtensionConfig, rope_settings
from megatron_cream.errors import UserError
from megatron_cream.json_values import naming
from megatron_cream.ownership import staged, validate_output
from megatron_cream.rope import scaling_from_hf

CHUNK_BYTES = 64 << 20
"""Most bytes of a piece of the checkpoint: small beside a model, large beside a disk's seeks."""

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
    """Write the checkpoint ``output`` with the weights, arguments and files of ``hf``.

    Args:
        hf: folder with config.json and safetensors files, or a repository on the hub.
        output: new folder, to be given to --pretrained-checkpoint or --load.
        dtype: type of the weights; by default the one they have.
        quiet: no progress bar.

    Raises:
        UserError, FileNotFoundError: a source that cannot be imported, before anything is written.
        OSError: the disk is full, or fails; nothing is kept.
    """
    source = find_hf_folder(hf)
    place = validate_output(Path(output), [source])
    config = read_config(source)
    with naming(source):
        shape = shape_from_config(config)
        extension = read_base_extension(config, shape)
    validate_files(source)
    weights = HfWeights(source)
    try:
        stored = validate_weights(weights, shape, dtype)
        chunks = list(_chunks(weights, shape, dtype or stored))
        total = sum(chunk.nbytes for chunk in chunks)
        objects = _object_records(shape, extension, dtype or stored)
        with (
            staged(place, total, [source]) as folder,
            tqdm(total=total, unit="B", unit_scale=True, desc="import", disable=quiet) as bar,
        ):
            (folder / RELEASE).mkdir()
            write_torch_dist(folder / RELEASE, chunks, objects, bar.update)
            copy_hf_files(source, hf, folder / HF_FOLDER)
            (folder / "latest_checkpointed_iteration.txt").write_text(RELEASE)
    finally:
        weights.close()
    return ImportedModel(shape, extension, dtype or stored, total)


def read_base_extension(config: dict[str, Any], shape: ModelShape) -> ExtensionConfig:
    """Return the settings of the model as it is: its window, and how its angles are made.

    Raises:
        UserError: a window or angles that config.json does not say or that are not served.
    """
    window = window_of(config)
    scaling = scaling_from_hf(config)
    if scaling.dim != shape.head_dim:
        raise UserError(
            f"partial_rotary_factor in config.json has {scaling.dim} dimensions of a head rotated: "
            f"{shape.architecture} rotates all {shape.head_dim}"
        )
    return ExtensionConfig(train_length=window, target_length=window, **rope_settings(scaling))


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
                    fill=_TensorRows(weights, shape, row, place, start, stop, dtype),
                )


@dataclasses.dataclass(frozen=True)
class _TensorRows:
    """Rows ``[start, stop)`` of a Megatron tensor, put together from its parts when called."""

    weights: HfWeights
    shape: ModelShape
    row: WeightRow
    place: tuple[int, ...]
    start: int
    stop: int
    dtype: torch.dtype

    def __call__(self, out: np.ndarray) -> None:
        names = [part.at(self.place) for part in self.row.parts]
        part_rows = [self.weights.tensors[name].shape[0] for name in names]
        first = filled = 0
        for piece in rows_in_order(self.row, part_rows, self.shape.groups):
            begin = piece.start + max(0, self.start - first)
            end = min(piece.stop, piece.start + self.stop - first)
            first += piece.stop - piece.start
            if begin < end:
                filled += self._read(names[piece.part], begin, end, out[filled:])

    def _read(self, name: str, begin: int, end: int, out: np.ndarray) -> int:
        tensor = self.weights.tensors[name]
        count = (end - begin) * tensor.row_bytes
        stored = DTYPES[tensor.dtype]
        if stored == self.dtype:
            self.weights.read_rows(name, begin, end, out[:count])
            return count
        memory = np.empty(count, np.uint8)
        self.weights.read_rows(name, begin, end, memory)
        values = torch.frombuffer(memory, dtype=stored).to(self.dtype)
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
            "args": import_arguments(shape, extension, dtype),
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
    types = ("float32", "bfloat16", "float16")
    add("--dtype", choices=types, help="type of the weights (default: the one they have)")


def run(args: argparse.Namespace) -> None:
    """Import what a command line names."""
    dtype = getattr(torch, args.dtype) if args.dtype else None
    print(describe(import_checkpoint(args.hf, args.output, dtype), args.output))
