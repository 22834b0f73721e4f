# SPDX-License-Identifier: Apache-2.0
"""The datasets of a run: the blend that its flags name is checked, then built on every stage.

Flags are read as Megatron reads them, and refused where it only asserts. Datasets are built through
its blended builder.
"""

from __future__ import annotations

import json
import math
import os
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.core.datasets.utils import Split
from megatron.training import get_args
from megatron.training.utils import (
    get_blend_and_blend_per_split,
    is_first_or_last_pipeline_stage,
)

from megatron_cream.config import ExtensionConfig, extension_of
from megatron_cream.data.dataset import (
    SpanDataset,
    SpanDatasetConfig,
    drawn_scale,
    split_strategy,
)
from megatron_cream.data.indexed import (
    DatasetFiles,
    DatasetIndex,
    check_mask,
    check_tokens,
    open_index,
    read_metadata,
)
from megatron_cream.data.packed import PackedSpanDataset
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
        _validate_content(args, DatasetFiles.open(prefix, whole=False))
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


def training_sources(
    args: Namespace, extension: ExtensionConfig
) -> Iterator[tuple[str, float | None, TextSources]]:
    """Yield each dataset of training: its prefix, its weight in the blend, its sources.

    The weight is None where none is given: then each is read by its size.
    """
    blend, per_split = get_blend_and_blend_per_split(args)
    prefixes, weights = blend or per_split[Split.train.value]
    for prefix, splits in prefixes_by_split(args).items():
        if Split.train in splits:
            given = zip(prefixes, weights or (), strict=False)
            weight = sum(weight for other, weight in given if other == prefix) or None
            sources = split_sources(args, prefix, splits[Split.train], extension, Split.train)
            yield prefix, weight, sources


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


def _validate_content(args: Namespace, files: DatasetFiles) -> None:
    """Validate the vocabulary, the end-of-document token and the mask of a dataset."""
    index, metadata = files.index, files.metadata
    vocabulary = args.padded_vocab_size or args.vocab_size
    if metadata and vocabulary and metadata["vocab_size"] > vocabulary:
        raise UserError(
            f"--vocab-size is {vocabulary}: dataset {index.prefix} was written with "
            f"{metadata['vocab_size']} tokens ({metadata['tokenizer_type']}); it must be at least "
            "that"
        )
    sizes = [vocabulary, metadata["vocab_size"] if metadata else None]
    limit = min((size for size in sizes if size), default=None)
    check_tokens(index, limit, sample=True)
    if args.eod_mask_loss and not (metadata and metadata["appended_eod"]):
        raise UserError(
            f"--eod-mask-loss is given: dataset {index.prefix} must say which token ends a "
            "document; write it with tools/preprocess_data.py --append-eod"
        )
    if files.masked:
        check_mask(index.prefix, sample=True)
        files.trained_tokens()


def datasets_provider(
    num_samples: tuple[int, int | None, int], vp_stage: int | None = None
) -> list[Any]:
    """Return train, validation and test datasets of this rank, None where it needs none.

    The first and last stage read tokens on tensor-parallel rank 0, which hands them on. Middle
    stages draw the positions of the training samples on every rank and open no file; validation
    has plain positions, for which they need no dataset. Where documents are packed they read the
    index, which says how long each document is, on every rank.
    """
    args = get_args()
    extension = extension_of(args)
    outer = is_first_or_last_pipeline_stage(vp_stage)
    packed = extension.sample_unit == "packed-documents"
    reads = mpu.get_tensor_model_parallel_rank() == 0 if outer else packed
    builder = BlendedMegatronDatasetBuilder(
        PackedSpanDataset if packed else SpanDataset,
        list(num_samples),
        lambda: reads,
        span_dataset_config(args, extension),
    )
    datasets = [
        BlendedSpans(dataset) if isinstance(dataset, BlendedDataset) else dataset
        for dataset in builder.build()
    ]
    # Megatron's samplers refuse a split of which --eval-iters 0 asks for nothing.
    datasets = [None if size == 0 else ds for size, ds in zip(num_samples, datasets, strict=True)]
    if outer:
        return datasets
    if packed:
        return [None if dataset is None else PackedPositions(dataset) for dataset in datasets]
    return [PositionsOnly(extension, num_samples[0]), *datasets[1:]]


# Megatron calls it on every rank then, not only on tensor-parallel rank 0.
datasets_provider.is_distributed = True  # type: ignore[attr-defined]


def span_dataset_config(args: Namespace, extension: ExtensionConfig) -> SpanDatasetConfig:
    """Return the dataset settings that Megatron's data flags and ours make."""
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    return SpanDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=(args.split or DEFAULT_SPLIT) if blend_per_split is None else None,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        extension=extension,
        eod_id=_eod_id(args, blend, blend_per_split),
        eod_mask_loss=args.eod_mask_loss,
    )


def _eod_id(args: Namespace, blend: Any, blend_per_split: Any) -> int | None:
    """The end-of-document token that the dataset's own metadata names; checked to be there."""
    if not args.eod_mask_loss:
        return None
    first = blend or next(part for part in blend_per_split if part is not None)
    return (read_metadata(first[0][0]) or {})["eod_id"]


class BlendedSpans(torch.utils.data.Dataset):
    """A blend whose layouts are drawn by the blend's own sample index.

    Megatron's blend asks each dataset for its own sample i; two datasets would then train on the
    same layouts one after the other, and middle pipeline stages could not tell which.
    """

    def __init__(self, blend: BlendedDataset) -> None:
        self.blend = blend
        self.split = blend.split  # Megatron's loader reads the batch sizes of the split off it

    def __len__(self) -> int:
        return len(self.blend)

    def __getitem__(self, idx: int) -> dict[str, torch.Tensor]:
        dataset = self.blend.datasets[self.blend.dataset_index[idx]]
        return dataset.sample(self.blend.dataset_sample_index[idx], draw=idx)

    def positions(self, idx: int) -> dict[str, torch.Tensor]:
        """Return what a middle pipeline stage needs of sample ``idx``; packed documents only."""
        dataset = self.blend.datasets[self.blend.dataset_index[idx]]
        return dataset.positions(self.blend.dataset_sample_index[idx], draw=idx)


class PositionsOnly(torch.utils.data.Dataset):
    """Position ids of the training samples, for pipeline stages that see no tokens.

    Opens no file: the layout of a sample is a function of its index.
    """

    def __init__(self, extension: ExtensionConfig, num_samples: int) -> None:
        self.split = Split.train
        self.extension = extension
        self.strategy = extension.strategy()
        self.num_samples = num_samples

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, idx: int) -> dict[str, torch.Tensor]:
        seed = self.extension.position_seed
        layout = self.strategy.layout(seed, int(idx))
        ids = {"position_ids": torch.from_numpy(layout.position_ids)}
        return ids | drawn_scale(self.strategy, seed, idx)


class PackedPositions(torch.utils.data.Dataset):
    """Positions and boundaries of packed samples, for pipeline stages that see no tokens.

    Reads the index of the dataset and none of its tokens. ``dataset`` is a PackedSpanDataset or a
    BlendedSpans of such.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self.split = getattr(dataset, "split", None) or dataset.index_split

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, idx: int) -> dict[str, torch.Tensor]:
        return self.dataset.positions(idx)
