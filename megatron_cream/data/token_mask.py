# SPDX-License-Identifier: Apache-2.0
"""Reads and checks ``PREFIX.mask``: which tokens of an indexed dataset have a loss.

One byte per token of ``PREFIX.bin``, in the same order: 1 where predicting the token is trained, 0
where it is not. A byte and not a bit, because samples begin anywhere and merging copies stretches
of any length: both are one slice or one copy, as they are of the tokens. Without the file every
token is trained.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from megatron_cream.data.mapped import MappedFile
from megatron_cream.errors import UserError

MASK_SUFFIX = ".mask"
MASK_KEYS = frozenset({"mask_bytes", "trained_tokens"})
"""What ``PREFIX.json`` records of a mask."""

_BLOCK_BYTES = 1 << 24
_PLACES = 256
_PLACE_BYTES = 1 << 12


def has_mask(prefix: str, tokens: int, metadata: dict[str, Any] | None) -> bool:
    """Say whether a dataset of so many tokens has a mask, after checking its size.

    Args:
        prefix: path without suffix.
        tokens: in ``PREFIX.bin``.
        metadata: of ``PREFIX.json``, None where there is none.

    Raises:
        UserError: the mask is missing, has another size, or is of another dataset.
    """
    path, recorded = prefix + MASK_SUFFIX, (metadata or {}).get("mask_bytes")
    if not os.path.isfile(path):
        if recorded is None:
            return False
        raise UserError(
            f"{path} is missing: {prefix}.json records {recorded} bytes of it; without it the loss "
            "would be on every token"
        )
    if metadata is not None and recorded is None:
        raise UserError(
            f"{path} is not of this dataset: {prefix}.json records no mask; remove it, or copy "
            "both again"
        )
    size = os.path.getsize(path)
    if size != tokens:
        raise UserError(
            f"{path} has {size} bytes and needs {tokens}, one for each token of {prefix}.bin"
        )
    return True


def check_mask(prefix: str, *, sample: bool = False) -> int:
    """Read all of a mask, or 256 places of it, and return how many of those tokens are trained.

    Raises:
        UserError: a byte is neither 0 nor 1.
    """
    path = prefix + MASK_SUFFIX
    mask = np.memmap(path, mode="r", dtype=np.uint8) if os.path.getsize(path) else np.empty(0, "u1")
    size = _PLACE_BYTES if sample else _BLOCK_BYTES
    starts = np.arange(0, len(mask), size)
    if sample:
        last = max(len(mask) - size, 0)
        starts = np.unique(np.linspace(0, last, _PLACES).astype(np.int64))
    trained = 0
    for start in starts.tolist():
        block = mask[start : start + size]
        if block.max(initial=0) > 1:
            raise UserError(f"{path} holds the byte {block.max()}: it must be 0 or 1 everywhere")
        trained += int(np.count_nonzero(block))
    return trained


def trained_tokens(prefix: str, metadata: dict[str, Any] | None) -> int:
    """Return how many tokens of a dataset with a mask are trained, counted if nothing says it.

    Raises:
        UserError: none is.
    """
    found = (metadata or {}).get("trained_tokens")
    found = check_mask(prefix) if found is None else found
    if not found:
        raise UserError(f"{prefix}{MASK_SUFFIX} is 0 everywhere: no token of it would be trained")
    return found


def describe_mask(prefix: str) -> dict[str, int]:
    """Return what ``PREFIX.json`` records of a mask that was just written, nothing without one."""
    path = prefix + MASK_SUFFIX
    if not os.path.isfile(path):
        return {}
    return {"mask_bytes": os.path.getsize(path), "trained_tokens": check_mask(prefix)}


class UnmappedMask:
    """A mask that is read at each call and not mapped: ``mask[first:end]``."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __getitem__(self, span: slice) -> np.ndarray:
        return np.fromfile(self.path, np.uint8, max(span.stop - span.start, 0), offset=span.start)


def open_mask(prefix: str, *, mapped: bool) -> np.ndarray | UnmappedMask:
    """Return the bytes of a mask, uint8, to be sliced; none is read yet."""
    path = prefix + MASK_SUFFIX
    return MappedFile(path, np.uint8).array if mapped else UnmappedMask(path)
