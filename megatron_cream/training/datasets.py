# SPDX-License-Identifier: Apache-2.0
"""Builds the datasets of every pipeline stage, through Megatron's blended builder."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.utils import Split
from megatron.training import get_args
from megatron.training.utils import (
    get_blend_and_blend_per_split,
    is_first_or_last_pipeline_stage,
)

from megatron_cream.config import ExtensionConfig, extension_of
from megatron_cream.data.dataset import SpanDataset, SpanDatasetConfig, drawn_scale
from megatron_cream.data.indexed import read_metadata
from megatron_cream.data.packed import PackedSpanDataset
from megatron_cream.training.blend import DEFAULT_SPLIT


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
