# SPDX-License-Identifier: Apache-2.0
"""Reads and checks the blend of datasets that a run names: flags, files, documents, tokens.

Flags are read as Megatron reads them, and refused where it only asserts.
"""

from __future__ import annotations

import json
import math
import os
from argparse import Namespace
from pathlib import Path
from typing import Any

from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.core.datasets.utils import Split
from megatron.training.utils import get_blend_and_blend_per_split

from megatron_cream.config import ExtensionConfig
from megatron_cream.data.dataset import split_strategy
from megatron_cream.data.indexed import (
    DatasetIndex,
    check_mask,
    check_tokens,
    has_mask,
    open_index,
    read_metadata,
    trained_tokens,
    validate_metadata,
)
from megatron_cream.data.text_sources import TextSources, open_sources, validate_sources
from megatron_cream.errors import UserError
from megatron_cream.mcore.argument_table import flag_of

DEFAULT_SPLIT = "969,30,1"  # Megatron's
_PER_SPLIT = ("train_data_path", "valid_data_path", "test_data_path")
_WHOLE = ("data_path", "data_args_path")
_SPLITS = ("train", "valid", "test")


def validate_blend(args: Namespace) -> None:
    """Refuse lists of datasets and weights that Megatron cannot blend, and splits of nothing.

    Raises:
        UserError: naming the flag and the value in it.
        FileNotFoundError: a file that should hold the list.
    """
    ways = (*_WHOLE, *_PER_SPLIT, "per_split_data_args_path")
    given = [name for name in ways if getattr(args, name) is not None]
    if len(given) > 1 and not set(given) <= set(_PER_SPLIT):
        flags = " and ".join(map(flag_of, given))
        raise UserError(f"{flags} are given: datasets must be named in one of these ways")
    for name in given:
        for words in _read_lists(name, getattr(args, name)):
            _validate_words(flag_of(name), words)
    if args.split is not None:
        _validate_split(args.split)


def _read_lists(name: str, value: Any) -> list[list[str]]:
    """Return the words of each list that a flag gives, or the file that it names."""
    if name == "data_args_path":
        return [Path(value).read_text(encoding="utf-8", errors="replace").split()]
    if name != "per_split_data_args_path":
        return [value]
    try:
        lists = json.loads(Path(value).read_text(encoding="utf-8"))
        found = [lists[split] for split in _SPLITS]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{flag_of(name)} is {value}: it must be a JSON object with train, valid and test "
            f"({type(error).__name__}: {error})"
        ) from None
    return [one.split() if isinstance(one, str) else list(map(str, one or [])) for one in found]


def _validate_words(flag: str, words: list[str]) -> None:
    if not words:
        raise UserError(f"{flag} is empty: it must name at least one dataset")
    found = [_number(word) for word in words[::2]]
    weights = [weight for weight in found if weight is not None]
    if len(words) == 1 or not weights:
        return  # prefixes alone
    if len(words) % 2 or len(weights) < len(found):
        raise UserError(
            f"{flag} is {' '.join(words)}: it must be prefixes alone, or a weight before each of "
            "them: 0.3 A 0.7 B"
        )
    for weight, prefix in zip(weights, words[1::2], strict=True):
        if not (math.isfinite(weight) and weight > 0):
            raise UserError(
                f"{flag} gives {prefix} the weight {weight:g}: it must be above 0; leave out a "
                "dataset that is not to be read"
            )


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def _validate_split(split: str) -> None:
    words = split.split(",")
    parts = [part for part in map(_number, words) if part is not None and 0 <= part < math.inf]
    if len(parts) < len(words) or len(parts) > len(_SPLITS) or not sum(parts):
        raise UserError(
            f"--split is {split!r}: it must be up to three shares, for training, validation and "
            "test, as 99,1,0"
        )
    if not parts[0]:
        raise UserError(f"--split is {split!r}: training's share, the first, must be above 0")


def validate_datasets(args: Namespace, extension: ExtensionConfig) -> None:
    """Validate every dataset of the blend: files whole, long enough, its tokens in the vocabulary.

    Raises:
        FileNotFoundError, ValueError: naming the dataset and what it needs.
    """
    wanted = prefixes_by_split(args)
    if not wanted:
        raise UserError("--data-path is missing: it must name at least one indexed dataset")
    for prefix, splits in wanted.items():
        index = open_index(prefix)
        if os.environ.get("RANK", "0") != "0":  # rank 0 alone looks at all of a dataset
            continue
        sources = {
            split: split_sources(args, prefix, part, extension, split)
            for split, part in splits.items()
            if split is Split.train or args.eval_iters
        }
        _validate_vocabulary(args, index)
        _validate_end_of_document(args, prefix)
        _validate_mask(index)
        for split, found in sources.items():
            documents = _documents(index, splits[split])
            validate_sources(
                found,
                index.lengths[documents.start : documents.stop],
                prefix,
                split.name,
                extension.sample_unit,
                split_strategy(extension, split),
            )


def split_sources(
    args: Namespace,
    prefix: str,
    part: tuple[float, float],
    extension: ExtensionConfig,
    split: Split,
) -> TextSources:
    """Return what samples of a split are drawn from.

    Args:
        part: of the documents, from and to, as shares of all.
    """
    documents, strategy = _documents(open_index(prefix), part), split_strategy(extension, split)
    return open_sources(prefix, documents, extension.sample_unit, strategy, args.data_cache_path)


def _documents(index: DatasetIndex, part: tuple[float, float]) -> range:
    return range(*(round(share * len(index.lengths)) for share in part))


def prefixes_by_split(args: Namespace) -> dict[str, dict[Split, tuple[float, float]]]:
    """Return dataset prefixes, each with the part of its documents that each split takes."""
    blend, per_split = get_blend_and_blend_per_split(args)
    wanted: dict[str, dict[Split, tuple[float, float]]] = {}
    if blend is not None:
        vector = parse_and_normalize_split(args.split or DEFAULT_SPLIT)
        matrix = convert_split_vector_to_split_matrix(vector)
        parts = {s: matrix[s.value] for s in Split if matrix[s.value] is not None}
        for prefix in blend[0]:
            wanted[prefix] = parts
    for split in Split if per_split is not None else ():
        for prefix in (per_split[split.value] or ([], None))[0]:
            wanted.setdefault(prefix, {})[split] = (0.0, 1.0)
    return wanted


def _validate_vocabulary(args: Namespace, index: DatasetIndex) -> None:
    prefix = index.prefix
    metadata = read_metadata(prefix)
    validate_metadata(index, metadata)
    vocabulary = args.padded_vocab_size or args.vocab_size
    if metadata and vocabulary and metadata["vocab_size"] > vocabulary:
        raise UserError(
            f"--vocab-size is {vocabulary}: dataset {prefix} was written with "
            f"{metadata['vocab_size']} tokens ({metadata['tokenizer_type']}); it must be at least "
            "that"
        )
    sizes = [vocabulary, metadata["vocab_size"] if metadata else None]
    limit = min((size for size in sizes if size), default=None)
    check_tokens(index, limit, sample=True)


def _validate_mask(index: DatasetIndex) -> None:
    prefix, metadata = index.prefix, read_metadata(index.prefix)
    if has_mask(prefix, index.tokens, metadata):
        check_mask(prefix, sample=True)
        trained_tokens(prefix, metadata)


def _validate_end_of_document(args: Namespace, prefix: str) -> None:
    metadata = read_metadata(prefix)
    if args.eod_mask_loss and not (metadata and metadata["appended_eod"]):
        raise UserError(
            f"--eod-mask-loss is given: dataset {prefix} must say which token ends a document; "
            "write it with tools/preprocess_data.py --append-eod"
        )
