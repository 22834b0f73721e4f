# SPDX-License-Identifier: Apache-2.0
"""Reads and checks a Megatron indexed dataset, its mask and its metadata, without megatron.

Megatron maps whatever it finds; a truncated or damaged file shows up as a crash, as zeros or as
text of other documents in the loss, some thousand steps later. Checking all of an index takes two
CPU seconds for a hundred million documents.

``PREFIX.mask`` has one byte per token of ``PREFIX.bin``: 1 where predicting the token is trained,
0 where it is not. A byte and not a bit, so that any stretch of it is one slice, as of the tokens.
Without the file every token is trained.
"""

from __future__ import annotations

import json
import os
import reprlib
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cream.errors import UserError

MASK_SUFFIX = ".mask"
INDEX_MAGIC = b"MMIDIDX\x00\x00"
_BLOCK = 1 << 20  # numbers of an index that are looked at together
INDEX_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document indices
TOKEN_DTYPES = dict(enumerate(map(np.dtype, ["u1", "i1", "i2", "i4", "i8", "f8", "f4", "u2"]), 1))


@dataclass(frozen=True)
class DatasetIndex:
    """What an ``.idx`` file says, and the ``.bin`` beside it was checked to hold.

    Attributes:
        prefix: path without ``.bin`` and ``.idx``.
        dtype: numpy dtype of a token.
        lengths: int32 ``[documents]``, tokens in each.
        pointers: int64 ``[documents]``, byte offset of each in the ``.bin`` file.
        documents: int64, in which of them a document begins, and their number at the end: other
            than 0, 1, 2 ... where documents were split.
    """

    prefix: str
    dtype: np.dtype
    lengths: np.ndarray = field(repr=False)
    pointers: np.ndarray = field(repr=False)
    documents: np.ndarray = field(repr=False)

    @property
    def tokens(self) -> int:
        """In the ``.bin`` file."""
        if not len(self.lengths):
            return 0
        return int(self.pointers[-1]) // self.dtype.itemsize + int(self.lengths[-1])


def blocks(lengths: np.ndarray) -> Iterator[np.ndarray]:
    """Yield a long array a block at a time, as int64."""
    for start in range(0, len(lengths), _BLOCK):
        yield lengths[start : start + _BLOCK].astype(np.int64)


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the dtype that Megatron's builder takes for a vocabulary."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


def read_index(prefix: str | os.PathLike[str], *, empty: bool = False) -> DatasetIndex:
    """Return the index of the dataset at ``prefix`` after checking all of it.

    Args:
        prefix: path without ``.bin`` and ``.idx``.
        empty: whether a dataset of no documents is fine, as a shard of a small job may be.

    Raises:
        FileNotFoundError: ``.idx`` or ``.bin`` is missing.
        UserError: either is not of this format, or they do not belong together: sizes, dtype,
            lengths, pointers and documents.
    """
    index = _map_index(os.fspath(prefix))
    if not len(index.lengths) and not empty:
        raise UserError(f"{index.prefix}.bin holds no documents")
    _validate_sequences(index)
    _validate_size(index)
    _validate_documents(index)
    return index


def open_index(prefix: str | os.PathLike[str]) -> DatasetIndex:
    """Return the index of a dataset after checking its header and the sizes of both files.

    That takes no time, whatever the number of documents. Errors are as of ``read_index``.
    """
    index = _map_index(os.fspath(prefix))
    _validate_size(index)
    return index


def _map_index(prefix: str) -> DatasetIndex:
    for path in (Path(prefix + ".idx"), Path(prefix + ".bin")):
        if not path.is_file():
            raise FileNotFoundError(
                f"dataset {prefix}: there is no {path}; --data-path takes the path without .bin "
                "and .idx, as tools/preprocess_data.py --output-prefix wrote it"
            )
    dtype, sequences, documents = _read_header(Path(prefix + ".idx"))
    buffer = np.memmap(prefix + ".idx", mode="r", dtype=np.uint8)
    at = INDEX_HEADER.size + np.cumsum([0, 4 * sequences, 8 * sequences, 8 * documents])
    kinds = zip(at, at[1:], ("<i4", "<i8", "<i8"), strict=False)
    return DatasetIndex(prefix, dtype, *(buffer[a:b].view(kind) for a, b, kind in kinds))


def _read_header(idx: Path) -> tuple[np.dtype, int, int]:
    """Return dtype, number of sequences and of document borders, which fill the file."""
    size = idx.stat().st_size
    with idx.open("rb") as file:
        header = file.read(INDEX_HEADER.size)
    if len(header) < INDEX_HEADER.size:
        raise UserError(f"{idx} is truncated: it ends inside its header")
    magic, version, code, sequences, documents = INDEX_HEADER.unpack(header)
    if magic != INDEX_MAGIC or version != 1:
        raise UserError(f"{idx} is not a Megatron index (magic {magic!r}, version {version})")
    dtype = TOKEN_DTYPES.get(code, np.dtype(np.float64))
    if dtype.kind == "f":
        raise UserError(
            f"{idx} is damaged: its dtype code is {code}, needs that of an integer, the kind that "
            "token ids are"
        )
    expected = INDEX_HEADER.size + 12 * sequences + 8 * documents
    if size < expected:
        raise UserError(f"{idx} is truncated: it has {size} bytes and needs {expected}")
    # Megatron adds a byte for each sequence where a dataset has more than text.
    if size not in (expected, expected + sequences):
        raise UserError(f"{idx} is damaged: it has {size} bytes and its header needs {expected}")
    return dtype, sequences, documents


def _validate_sequences(index: DatasetIndex) -> None:
    """Refuse sequences that do not follow each other from the first byte of the file to the last.

    Megatron's writers leave no gap, so another place is damage.
    """
    name, byte, at = index.prefix + ".idx", 0, 0
    for lengths, pointers in zip(blocks(index.lengths), blocks(index.pointers), strict=True):
        sizes = lengths * index.dtype.itemsize
        expected = byte + np.cumsum(sizes) - sizes
        wrong = np.flatnonzero((lengths < 1) | (pointers != expected))
        if len(wrong):
            i = int(wrong[0])
            if lengths[i] < 1:
                raise UserError(f"{name} is damaged: sequence {at + i} has {lengths[i]} tokens")
            raise UserError(
                f"{name} is damaged: sequence {at + i} does not follow the one before (it starts "
                f"at byte {pointers[i]}, needs {expected[i]})"
            )
        byte += int(sizes.sum())
        at += len(sizes)


def _validate_size(index: DatasetIndex) -> None:
    size, needed = os.path.getsize(index.prefix + ".bin"), index.tokens * index.dtype.itemsize
    if size < needed:
        raise UserError(
            f"{index.prefix}.bin is truncated: it has {size} bytes and its index needs {needed}"
        )
    if size > needed:
        raise UserError(
            f"{index.prefix}.bin has {size} bytes and its index accounts for {needed}, needs files "
            "of one dataset"
        )


def _validate_documents(index: DatasetIndex) -> None:
    borders, before = index.documents, 0
    whole = len(borders) and borders[0] == 0 and borders[-1] == len(index.lengths)
    for block in blocks(borders) if whole else ():
        whole = whole and block[0] >= before and (np.diff(block) >= 0).all()
        before = int(block[-1])
    if not whole:
        raise UserError(f"{index.prefix}.idx is damaged: its documents do not cover its sequences")


_BLOCK_TOKENS, _PLACES, _PLACE_TOKENS = 1 << 22, 256, 1 << 12


def check_tokens(index: DatasetIndex, limit: int | None, *, sample: bool = False) -> int:
    """Read every token of a dataset, or those at 256 places, and return the largest.

    Args:
        index: of a dataset that has tokens.
        limit: what all must be below; None where that is not known.
        sample: read places only, the first tokens and the last among them.

    Raises:
        UserError: a token is negative or not below ``limit``.
    """
    tokens, largest = np.memmap(index.prefix + ".bin", mode="r", dtype=index.dtype), 0
    for block in _parts(tokens, sample):
        low, high = int(block.min()), int(block.max())
        if low < 0:
            raise UserError(f"{index.prefix}.bin holds a negative token, {low}")
        if limit is not None and high >= limit:
            raise UserError(
                f"{index.prefix}.bin holds token {high}, needs all below vocab_size {limit}"
            )
        largest = max(largest, high)
    return largest


def _parts(array: np.ndarray, sample: bool) -> Iterator[np.ndarray]:
    """Yield all of an array in blocks, or its first items, its last ones and those at places."""
    size = _PLACE_TOKENS if sample else _BLOCK_TOKENS
    starts = np.arange(0, len(array), size)
    if sample:
        last = max(len(array) - size, 0)
        starts = np.unique(np.linspace(0, last, _PLACES).astype(np.int64))
    for start in starts.tolist():
        yield array[start : start + size]


def check_mask(prefix: str, *, sample: bool = False) -> int:
    """Read all of a mask, or 256 places of it, and return how many of those tokens are trained.

    Raises:
        UserError: a byte is neither 0 nor 1.
    """
    path = prefix + MASK_SUFFIX
    mask = np.memmap(path, mode="r", dtype=np.uint8) if os.path.getsize(path) else np.empty(0, "u1")
    trained = 0
    for block in _parts(mask, sample):
        if block.max(initial=0) > 1:
            raise UserError(f"{path} holds the byte {block.max()}: it must be 0 or 1 everywhere")
        trained += int(np.count_nonzero(block))
    return trained


MOST_SHARDS = 99_999  # five digits in a name

_KINDS: dict[str, Callable[[Any], bool]] = {
    "a text": lambda value: isinstance(value, str),
    "true or false": lambda value: isinstance(value, bool),
    "a count": lambda value: type(value) is int and 0 <= value < 1 << 63,
    "an id": lambda value: _KINDS["a count"](value),
    "1 or more": lambda value: _KINDS["a count"](value) and value > 0,
    "a number": lambda value: isinstance(value, int | float) and 0 <= value < 1 << 63,
    "two numbers, I of N": lambda value: (
        _are(value, "a count") and len(value) == 2 and value[0] < value[1] <= MOST_SHARDS
    ),
    "an object of counts": lambda value: _are(value, "a count", dict),
    "an object of shares": lambda value: _are(value, "a number", dict),
    "a list of lengths": lambda value: _are(value, "1 or more"),
    "a list of pairs of texts": lambda value: (
        isinstance(value, list) and all(_are(pair, "a text") and len(pair) == 2 for pair in value)
    ),
}


def _are(values: Any, kind: str, container: type = list) -> bool:
    found = values.values() if isinstance(values, dict) else values
    return isinstance(values, container) and all(map(_KINDS[kind], found))


# A merged dataset has null for what its sources differ in.
_REQUIRED = {
    **{"tokenizer_type": "a text", "tokenizer_model": "a text or null", "vocab_size": "1 or more"},
    **{"eod_id": "an id or null", "bos_id": "an id or null", "appended_eod": "true or false"},
    **{"prepended_bos": "true or false", "dropped": "an object of counts"},
}
_OPTIONAL = {
    **{"dtype": "a text or null", "documents": "a count", "sequences": "a count"},
    **{"tokens": "a count", "errors": "an object of counts", "job": "a text"},
    **{"listed_errors": "a list of pairs of texts", "longest_document": "a count"},
    **{"mean_document": "a number", "median_document": "a number"},
    **{"documents_by_length": "an object of counts", "share_at_least": "an object of shares"},
    **{"fingerprint": "a text or null", "shard": "two numbers, I of N"},
    **{"thresholds": "a list of lengths", "drop_duplicates": "true or false"},
    **{"mask_bytes": "a count", "trained_tokens": "a count"},
}


def read_metadata(prefix: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Return what tools/preprocess_data.py wrote beside the dataset, or None for another tool's.

    Raises:
        UserError: the file is there and is not what that tool writes.
    """
    path = Path(os.fspath(prefix) + ".json")
    if not path.is_file():
        return None
    try:
        metadata = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise _damaged(path, str(error)) from error
    if not isinstance(metadata, dict):
        raise _damaged(path, f"it holds a {type(metadata).__name__}, not an object")
    for key, kind in (_REQUIRED | _OPTIONAL).items():
        if key not in metadata and key in _REQUIRED:
            raise _damaged(path, f"it has no {key}")
        name = kind.removesuffix(" or null")
        null = name != kind and metadata.get(key) is None
        if key in metadata and not (null or _KINDS[name](metadata[key])):
            raise _damaged(path, f"{key} is {reprlib.repr(metadata[key])}, not {kind}")
    size = metadata["vocab_size"]
    for key in ("eod_id", "bos_id"):
        if metadata[key] is not None and metadata[key] >= size:
            raise _damaged(path, f"{key} {metadata[key]} is outside vocab_size {size}")
    return metadata


def _damaged(path: Path, why: str) -> UserError:
    return UserError(
        f"{path} is not what tools/preprocess_data.py writes beside a dataset ({why}), needs that "
        "file, or none"
    )


@dataclass(frozen=True)
class DatasetFiles:
    """The files of a dataset, opened together and of one dataset.

    Attributes:
        index: what ``PREFIX.idx`` says.
        metadata: what ``PREFIX.json`` does, None where another tool wrote the dataset.
        masked: whether there is a ``PREFIX.mask``.
    """

    index: DatasetIndex
    metadata: dict[str, Any] | None
    masked: bool

    @classmethod
    def open(cls, prefix: str, *, whole: bool = True, empty: bool = False) -> DatasetFiles:
        """Open the files at ``prefix``, a path without suffix.

        Args:
            whole: check all of the index, not its header and the sizes of files alone.
            empty: as ``read_index`` takes it.

        Raises:
            FileNotFoundError: ``.idx`` or ``.bin`` is missing.
            UserError: a file is damaged, missing or of another dataset.
        """
        index = read_index(prefix, empty=empty) if whole else open_index(prefix)
        metadata = read_metadata(prefix)
        _validate_metadata(index, metadata or {})
        return cls(index, metadata, _has_mask(index, metadata))

    def trained_tokens(self) -> int:
        """Return how many tokens of a mask are trained, counted if nothing says it.

        Raises:
            UserError: none is.
        """
        prefix = self.index.prefix
        found = (self.metadata or {}).get("trained_tokens") or check_mask(prefix)
        if not found:
            raise UserError(f"{prefix}.mask is 0 everywhere: no token of it would be trained")
        return found


def _validate_metadata(index: DatasetIndex, metadata: dict[str, Any]) -> None:
    found = {
        "dtype": index.dtype.name,
        "documents": len(index.documents) - 1,
        "sequences": len(index.lengths),
        "tokens": index.tokens,
    }
    for key, value in found.items():
        if metadata.get(key) not in (None, value):
            said = (
                f"{index.prefix}.json has {key} {metadata[key]} and {index.prefix}.idx has {value}"
            )
            raise UserError(f"{said}, needs files of one dataset")


def _has_mask(index: DatasetIndex, metadata: dict[str, Any] | None) -> bool:
    path, note = index.prefix + MASK_SUFFIX, index.prefix + ".json"
    recorded = (metadata or {}).get("mask_bytes")
    if not os.path.isfile(path):
        if recorded is None:
            return False
        raise UserError(
            f"{path} is missing: {note} records {recorded} bytes of it; without it the loss would "
            "be on every token"
        )
    if metadata is not None and recorded is None:
        raise UserError(
            f"{path} is not of this dataset: {note} records no mask; remove it, or copy both again"
        )
    if (size := os.path.getsize(path)) != index.tokens:
        raise UserError(
            f"{path} has {size} bytes and needs {index.tokens}, one for each token of "
            f"{index.prefix}.bin"
        )
    return True
