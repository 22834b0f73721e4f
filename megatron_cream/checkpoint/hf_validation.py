# SPDX-License-Identifier: Apache-2.0
"""Do the weights of a Hugging Face folder agree with its config.json?"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import numpy as np
import torch

from megatron_cream.checkpoint.model_shape import ModelShape
from megatron_cream.checkpoint.safetensors_reader import DTYPES, HfWeights
from megatron_cream.checkpoint.weight_map import IGNORED
from megatron_cream.errors import UserError

_COMPARED_BYTES = 64 << 20  # at a time
_LISTED = 10_000


def check_weights(weights: HfWeights, shape: ModelShape, dtype: torch.dtype | None) -> torch.dtype:
    """Compare the weights with the table of the family; return the type they have.

    Raises:
        UserError: a tensor that is missing, of another shape than config.json says, that the
            family has no place for, or of another type than the rest where ``dtype`` is None.
    """
    # A config.json may ask for billions: no more are listed than are needed to name the first.
    expected = dict(islice(_expected(shape), 2 * len(weights.tensors) + _LISTED))
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
    stored = _one_type(weights, list(expected), dtype)
    rest = [n for n in weights.tensors if n not in expected and not n.endswith(IGNORED)]
    if rest == ["lm_head.weight"] and shape.tied:
        _check_tied(weights)
    elif rest:
        raise UserError(
            f"{weights.folder} has {len(rest)} tensors that {shape.architecture} has no place "
            f"for: {_few(sorted(rest))}"
        )
    return stored


def _expected(shape: ModelShape) -> Iterator[tuple[str, tuple[int, ...]]]:
    for row, place in shape.places():
        for part in row.parts:
            yield part.at(place), shape.part_shape(part)


def _one_type(weights: HfWeights, names: list[str], dtype: torch.dtype | None) -> torch.dtype:
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


def _check_tied(weights: HfWeights) -> None:
    """Some checkpoints store the output layer although it is the embedding: it must be equal."""
    one, two = (weights.tensors[n] for n in ("model.embed_tokens.weight", "lm_head.weight"))
    same = (one.shape, one.dtype) == (two.shape, two.dtype)
    step = max(1, _COMPARED_BYTES // one.row_bytes)
    for start in range(0, one.shape[0] if same else 0, step):
        stop = min(start + step, one.shape[0])
        rows = [np.empty((stop - start) * one.row_bytes, np.uint8) for _ in range(2)]
        weights.read_rows("model.embed_tokens.weight", start, stop, rows[0])
        weights.read_rows("lm_head.weight", start, stop, rows[1])
        same = same and np.array_equal(*rows)
    if not same:
        raise UserError(
            f"{weights.folder}: tie_word_embeddings is true in config.json, but lm_head.weight "
            "differs from model.embed_tokens.weight"
        )


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
