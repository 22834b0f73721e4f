# SPDX-License-Identifier: Apache-2.0
"""Samples that read only the tokens they train on.

A sample of N tokens that pretends to span T reads its spans, N tokens, from the memory map; the
text between them is never touched, and no position is ever stored.

Most of the time of a sample is the price of calls, not of copying its bytes. A mapped file is
therefore one array, got from Megatron's reader once, and tokens and labels are joined in one call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_config import BlendedMegatronDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.megatron_dataset import MegatronDataset
from megatron.core.datasets.utils import Split

from megatron_cream.config import ExtensionConfig
from megatron_cream.data.indexed import read_index
from megatron_cream.data.sources import Sources, fewest_tokens, make_sources
from megatron_cream.errors import UserError
from megatron_cream.positions import SampleLayout, Span, Strategy, philox
from megatron_cream.positions.scaled import Scaled

_NO_TOKEN = np.zeros(1, dtype=np.int64)  # label where no token follows


class _Reads:
    """Tokens of a file that is not mapped: ``reads[first:end]`` is one call of the reader."""

    def __init__(self, reader: Any, dtype: np.dtype) -> None:
        self.reader = reader
        self.dtype = dtype

    def __getitem__(self, span: slice) -> np.ndarray:
        offset = span.start * self.dtype.itemsize
        return self.reader.read(self.dtype.type, span.stop - span.start, offset)


class SpanReader:
    """Reads sources of an indexed dataset at the layouts it is given.

    Args:
        dataset: what to read, mapped or through any other of Megatron's readers.
        sources: stretches of its tokens.
        longest: tokens in a sample, at most.
        label_rule: what the last token of a chunk trains on, see ``ExtensionConfig``.
        masked_token: a token without loss, None for no such token.

    Attributes:
        tokens: those of the file by number, to be sliced: ``tokens[first:end]``.
    """

    def __init__(
        self,
        dataset: IndexedDataset,
        sources: Sources,
        longest: int,
        label_rule: str,
        masked_token: int | None,
    ) -> None:
        self.dataset = dataset
        self.sources = sources
        self.label_rule = label_rule
        self.masked_token = masked_token
        self._all_ones = np.ones(longest, dtype=np.float32)
        self.tokens = self._open()

    def _open(self) -> np.ndarray | _Reads:
        """Return all tokens of the file, to be sliced; none is read yet."""
        dtype, reader = np.dtype(self.dataset.index.dtype), self.dataset.bin_reader
        if self.dataset.mmap:  # a view, not a copy, which must not outlive the reader
            return reader.read(dtype.type, int(self.sources.ends.max(initial=0)), 0)
        return _Reads(reader, dtype)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the tokens, which would be copied: the dataset opens its file again."""
        return {name: value for name, value in self.__dict__.items() if name != "tokens"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.tokens = self._open()

    def read(self, source: int, layout: SampleLayout) -> dict[str, np.ndarray]:
        """Return the four arrays ``[train_length]`` of a sample, the caller's own.

        ``tokens``, ``labels`` and ``position_ids`` are int64, ``loss_mask`` is float32.
        """
        start, length, end = self._stretch(source)
        loss_mask = self._all_ones[: layout.train_length].copy()
        spans = layout.spans(length)
        texts, following, filled = [], [], 0
        for offset, count in spans:
            first = start + offset
            text = self.tokens[first : min(first + count + 1, end)]
            texts.append(text[:count])
            following.append(text[1:])
            filled += count
            if len(text) == count:  # the text ends here
                following.append(_NO_TOKEN)
                loss_mask[filled - 1] = 0.0
        joined = np.concatenate(texts + following, dtype=np.int64)
        tokens, labels = joined[:filled], joined[filled:]
        self._apply_label_rule(spans, tokens, labels, loss_mask)
        if self.masked_token is not None:
            loss_mask[tokens == self.masked_token] = 0.0
        return {
            "tokens": tokens,
            "labels": labels,
            "loss_mask": loss_mask,
            "position_ids": layout.position_ids,
        }

    def _stretch(self, i: int) -> tuple[int, int, int]:
        sources = self.sources
        return sources.starts.item(i), sources.lengths.item(i), sources.ends.item(i)

    def _apply_label_rule(
        self, spans: list[Span], tokens: np.ndarray, labels: np.ndarray, loss_mask: np.ndarray
    ) -> None:
        if self.label_rule == "true-next":
            return
        if self.label_rule == "reference":
            labels[:-1] = tokens[1:]
            loss_mask[:-1] = 1.0
            labels[-1], loss_mask[-1] = 0, 0.0
            return
        border = 0
        for (offset, count), (following, _) in zip(spans, spans[1:], strict=False):
            border += count
            if offset + count != following:
                loss_mask[border - 1] = 0.0


_SHUFFLE_STREAM = 1  # keeps shuffling apart from the layouts of the same seed
_KEPT_ORDERS = 1 << 20  # samples of all kept epochs (4 bytes each), unless one alone has more


@dataclass
class SpanDatasetConfig(BlendedMegatronDatasetConfig):
    """Megatron's blend and split settings, plus ours.

    Attributes:
        extension: lengths, strategy, labels and what a sample is drawn from.
        eod_id: end-of-document token, needed for ``eod_mask_loss`` only.
        eod_mask_loss: no loss on the token that follows an end of document.
    """

    extension: ExtensionConfig | None = None
    eod_id: int | None = None
    eod_mask_loss: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.extension is None:
            raise UserError("SpanDatasetConfig needs extension, an ExtensionConfig")
        if self.eod_mask_loss and self.eod_id is None:
            raise UserError(
                "eod_mask_loss (--eod-mask-loss) needs an end-of-document token: a dataset written "
                "with --append-eod, or a tokenizer that has one"
            )


def split_strategy(extension: ExtensionConfig, split: Split) -> Strategy:
    """Return the strategy of a split: training pretends, validation and test do not."""
    return extension.strategy() if split is Split.train else extension.plain_strategy()


class SpanDataset(MegatronDataset):
    """Samples of one indexed dataset, for Megatron's ``BlendedMegatronDatasetBuilder``.

    Sample i of epoch e is a source of text, every source once an epoch in an order drawn from
    (seed, e), read at the layout drawn from (seed, i). Each is a dict of ``tokens``, ``labels``,
    ``position_ids`` (int64 ``[N]``) and ``loss_mask`` (float32 ``[N]``).

    Raises:
        UserError: no document of the split is long enough for a sample.
    """

    config: SpanDatasetConfig

    def __init__(
        self,
        dataset: IndexedDataset,
        dataset_path: str | None,
        indices: np.ndarray,
        num_samples: int | None,
        index_split: Split,
        config: SpanDatasetConfig,
    ) -> None:
        super().__init__(dataset, dataset_path, indices, num_samples, index_split, config)
        extension = config.extension
        self.unit = extension.sample_unit
        self.strategy = split_strategy(extension, index_split)
        itemsize = np.dtype(dataset.index.dtype).itemsize
        self.sources = make_sources(
            extension.sample_unit,
            dataset.index.sequence_pointers[indices] // itemsize,
            dataset.sequence_lengths[indices],
            self.strategy,
        )
        if not len(self.sources) and num_samples != 0:
            split = index_split.name
            raise UserError(
                no_sources_message(dataset_path, split, self.sources, self.strategy, self.unit)
            )
        self.reader = SpanReader(
            dataset,
            self.sources,
            self.strategy.train_length,
            extension.label_rule,
            config.eod_id if config.eod_mask_loss else None,
        )
        self._orders: dict[int, np.ndarray] = {}

    @staticmethod
    def numel_low_level_dataset(low_level_dataset: IndexedDataset) -> int:
        return len(low_level_dataset)

    @staticmethod
    def build_low_level_dataset(dataset_path: str, config: SpanDatasetConfig) -> IndexedDataset:
        read_index(dataset_path)  # for its checks: Megatron maps whatever there is
        return IndexedDataset(dataset_path, multimodal=False, mmap=config.mmap_bin_files)

    @property
    def epoch_size(self) -> int:
        """Samples per epoch."""
        return len(self.sources)

    def __len__(self) -> int:
        return self.epoch_size if self.num_samples is None else self.num_samples

    def __getitem__(self, idx: int) -> dict[str, torch.Tensor]:
        return self.sample(idx, draw=idx)

    def sample(self, idx: int, draw: int) -> dict[str, torch.Tensor]:
        """Return the text of sample ``idx`` read at the layout with index ``draw``."""
        layout = self.strategy.layout(self.config.extension.position_seed, int(draw))
        arrays = self.read(self.chosen(idx), layout)
        sample = {name: torch.from_numpy(array) for name, array in arrays.items()}
        return sample | drawn_scale(self.strategy, self.config.extension.position_seed, draw)

    def chosen(self, idx: int) -> int:
        """Return which text of the epoch sample ``idx`` reads."""
        epoch, slot = divmod(int(idx), self.epoch_size)
        return self._epoch_order(epoch).item(slot)

    def read(self, source: int, layout: SampleLayout) -> dict[str, np.ndarray]:
        """Return tokens, labels, loss mask and position ids of a source read at ``layout``."""
        return self.reader.read(source, layout)

    def _epoch_order(self, epoch: int) -> np.ndarray:
        """int32 ``[epoch_size]``: the order of an epoch, kept while there is room."""
        if epoch not in self._orders:
            rng = philox.generator(self.config.random_seed, epoch, _SHUFFLE_STREAM)
            order = rng.permutation(self.epoch_size).astype(np.int32)
            if (len(self._orders) + 1) * self.epoch_size > _KEPT_ORDERS:
                self._orders = {}
            self._orders[epoch] = order
        return self._orders[epoch]


def drawn_scale(strategy: Strategy, seed: int, index: int) -> dict[str, torch.Tensor]:
    """Return ``{"scale": t}``, float32, of a sample whose angles depend on one; else nothing."""
    if not isinstance(strategy, Scaled):
        return {}
    return {"scale": torch.tensor(strategy.scale(seed, int(index)), dtype=torch.float32)}


def no_sources_message(
    path: str | None, split: str, sources: Sources, strategy: Strategy, unit: str
) -> str:
    """Say why a split of a dataset has no sample."""
    fewest = fewest_tokens(unit, strategy)
    short = fewest < strategy.train_length
    why = "what the strategy can place in --target-length" if short else "--seq-length"
    return (
        f"dataset {path} has no document for the {split} split: a sample takes at least "
        f"{fewest} tokens of one ({why}), and the longest of its {sources.dropped} has "
        f"{sources.longest}; give longer documents, a shorter --seq-length, another --split, or "
        "--sample-unit packed"
    )


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
