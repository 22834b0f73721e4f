# SPDX-License-Identifier: Apache-2.0
"""Reads samples from an indexed dataset, and of it only the tokens that are trained on.

A sample of N tokens that pretends to span T reads its spans, N tokens, from the memory map; the
text between them is never touched, and no position is ever stored.

Most of the time of a sample is the price of calls, not of copying its bytes. A mapped file is
therefore one array, and tokens and labels are joined in one call.

Where ``PREFIX.mask`` stands beside the file, a label whose token has a 0 there has no loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.blended_megatron_dataset_config import BlendedMegatronDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.megatron_dataset import MegatronDataset
from megatron.core.datasets.utils import Split

from megatron_cream.config import ExtensionConfig
from megatron_cream.data import text_sources
from megatron_cream.data.indexed import MASK_SUFFIX, DatasetFiles, open_index, read_index
from megatron_cream.data.mapped import ArrayCache, MappedFile
from megatron_cream.data.text_sources import TextSources, open_sources, validate_sources
from megatron_cream.errors import UserError
from megatron_cream.positions import SampleLayout, Span, Strategy, philox

_NO_TOKEN = np.zeros(1, dtype=np.int64)  # label where no token follows
_NO_LABEL = np.zeros(1, dtype=np.uint8)


class _UnmappedTokens:
    """Tokens of a file that is not mapped: ``tokens[first:end]`` is one call of the reader."""

    def __init__(self, reader: Any, dtype: np.dtype) -> None:
        self.reader = reader
        self.dtype = dtype

    def __getitem__(self, span: slice) -> np.ndarray:
        offset = span.start * self.dtype.itemsize
        return self.reader.read(self.dtype.type, span.stop - span.start, offset)


class _UnmappedMask:
    """A mask that is read at each call and not mapped: ``mask[first:end]``."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __getitem__(self, span: slice) -> np.ndarray:
        return np.fromfile(self.path, np.uint8, max(span.stop - span.start, 0), offset=span.start)


class SpanReader:
    """Reads sources of an indexed dataset at the layouts it is given.

    Args:
        dataset: what to read, mapped or through any other of Megatron's readers.
        sources: stretches of its tokens.
        longest: tokens in a sample, at most.
        label_rule: what the last token of a chunk trains on, see ``ExtensionConfig``.
        masked_token: a token without loss, None for no such token.
        mask: path without suffix of the dataset whose ``.mask`` says which tokens have a loss; None
            for all.

    Attributes:
        tokens: those of the file by number, to be sliced: ``tokens[first:end]``.
        token_mask: uint8, likewise; None for no mask.
    """

    def __init__(
        self,
        dataset: IndexedDataset,
        sources: TextSources,
        longest: int,
        label_rule: str,
        masked_token: int | None,
        mask: str | None = None,
    ) -> None:
        self.dataset = dataset
        self.sources = sources
        self.label_rule = label_rule
        self.masked_token = masked_token
        self._mask = mask
        self._all_ones = np.ones(longest, dtype=np.float32)
        self._open()

    def _open(self) -> None:
        """Open the file of tokens, to be sliced, and the mask; nothing is read yet."""
        dtype, mapped = np.dtype(self.dataset.index.dtype), self.dataset.mmap
        self._file = MappedFile(self.dataset.path_prefix + ".bin", dtype) if mapped else None
        self.tokens: Any = _UnmappedTokens(self.dataset.bin_reader, dtype)
        if self._file:
            self.tokens = self._file.array
        self.token_mask: Any = None
        if self._mask is not None:
            path = self._mask + MASK_SUFFIX
            self.token_mask = MappedFile(path, np.uint8).array if mapped else _UnmappedMask(path)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the tokens, which would be copied: the dataset opens its file again."""
        opened = ("_file", "tokens", "token_mask")
        return {name: value for name, value in self.__dict__.items() if name not in opened}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def read(self, source: int, layout: SampleLayout) -> dict[str, np.ndarray]:
        """Return the four arrays ``[train_length]`` of a sample, the caller's own.

        ``tokens``, ``labels`` and ``position_ids`` are int64, ``loss_mask`` is float32.
        """
        start, length, end = self.sources.stretch(source)
        loss_mask = self._all_ones[: layout.train_length].copy()
        spans = layout.spans(length)
        if self._file and layout.train_length >= self._file.long:
            self._file.read_ahead((start + offset, count) for offset, count in spans)
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
        if self.token_mask is not None:
            loss_mask *= self._labels_trained(spans, start, end)
        if self.masked_token is not None:
            loss_mask[tokens == self.masked_token] = 0.0
        return {
            "tokens": tokens,
            "labels": labels,
            "loss_mask": loss_mask,
            "position_ids": layout.position_ids,
        }

    def _labels_trained(self, spans: list[Span], start: int, end: int) -> np.ndarray:
        """Return uint8 ``[train_length]``: 1 where the token that is the label is trained."""
        mask, parts = self.token_mask, []
        assert mask is not None
        if self.label_rule == "reference":  # the next token of the sample
            parts = [mask[start + at : start + at + count] for at, count in spans]
            return np.concatenate([*parts, _NO_LABEL])[1:]
        for offset, count in spans:
            first = start + offset + 1
            parts.append(mask[first : min(first + count, end)])
            if first + count > end:
                parts.append(_NO_LABEL)
        return np.concatenate(parts)

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


@dataclass(kw_only=True)
class SpanDatasetConfig(BlendedMegatronDatasetConfig):
    """Megatron's blend and split settings, plus ours.

    Attributes:
        extension: lengths, strategy, labels and what a sample is drawn from.
        eod_id: end-of-document token, needed for ``eod_mask_loss`` only.
        eod_mask_loss: no loss on the token that follows an end of document.
    """

    extension: ExtensionConfig
    eod_id: int | None = None
    eod_mask_loss: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
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
        self.position_seed = extension.position_seed
        self.strategy = split_strategy(extension, index_split)
        # Megatron's array of them would be kept by every rank.
        self.indices = documents = _consecutive(indices)
        unit, prefix = extension.sample_unit, dataset.path_prefix
        self.sources = open_sources(prefix, documents, unit, self.strategy, config.path_to_cache)
        if num_samples != 0:
            lengths = dataset.sequence_lengths[documents.start : documents.stop]
            validate_sources(
                self.sources, lengths, dataset_path, index_split.name, unit, self.strategy
            )
        self.reader = SpanReader(
            dataset,
            self.sources,
            self.strategy.train_length,
            extension.label_rule,
            config.eod_id if config.eod_mask_loss else None,
            _masked_prefix(dataset, dataset_path),
        )
        self._orders: dict[int, np.ndarray] = {}
        if self._order_cache:  # drawn by rank 0, before there are data workers
            for epoch in range(-(-len(self) // self.epoch_size) if len(self) else 0):
                self._epoch_order(epoch)

    @staticmethod
    def numel_low_level_dataset(low_level_dataset: IndexedDataset) -> int:
        return len(low_level_dataset)

    @staticmethod
    def build_low_level_dataset(dataset_path: str, config: SpanDatasetConfig) -> IndexedDataset:
        # For their checks: Megatron maps whatever there is. Many are checked when they are listed.
        if len(open_index(dataset_path).lengths) <= text_sources.FEW:
            read_index(dataset_path)
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
        layout = self.strategy.layout(self.position_seed, int(draw))
        arrays = self.reader.read(self.chosen(idx), layout)
        sample = {name: torch.from_numpy(array) for name, array in arrays.items()}
        return sample | drawn_scale(self.strategy, self.position_seed, draw)

    def chosen(self, idx: int) -> int:
        """Return which text of the epoch sample ``idx`` reads."""
        epoch, slot = divmod(int(idx), self.epoch_size)
        return self._epoch_order(epoch).item(slot)

    @property
    def _order_cache(self) -> ArrayCache | None:
        """Where orders are kept; None where one is drawn at once.

        A large dataset may have few texts that are long enough, and be read a thousand times: so
        many files would be more than a process may have open.
        """
        cache = self.sources.cache
        return cache if cache and self.epoch_size > text_sources.FEW else None

    def _epoch_order(self, epoch: int) -> np.ndarray:
        """int32 ``[epoch_size]``: the order of an epoch, kept; in memory while there is room."""
        if epoch not in self._orders:
            size, seed, cache = self.epoch_size, self.config.random_seed, self._order_cache
            if cache:
                self._orders[epoch] = cache.array(
                    "order", lambda: [draw_order(seed, epoch, size)], order=[seed, epoch, size]
                )
                return self._orders[epoch]
            if (len(self._orders) + 1) * size > _KEPT_ORDERS:
                self._orders = {}
            self._orders[epoch] = draw_order(seed, epoch, size)
        return self._orders[epoch]


def draw_order(seed: int, epoch: int, size: int) -> np.ndarray:
    """Return the order of an epoch, a permutation of ``range(size)``, int32 where that holds it."""
    order = np.arange(size, dtype=np.int32 if size <= 1 << 31 else np.int64)
    philox.generator(seed, epoch, _SHUFFLE_STREAM).shuffle(order)
    return order


def _consecutive(indices: np.ndarray) -> range:
    """Return the numbers of documents as a range, which Megatron's builder makes them of."""
    first = int(indices[0]) if len(indices) else 0
    documents = range(first, first + len(indices))
    if len(indices) and indices[-1] != documents[-1]:
        raise ValueError(f"documents {indices} of a split are not consecutive")
    return documents


def _masked_prefix(dataset: IndexedDataset, path: str | None) -> str | None:
    """Return the path of a dataset that has a mask, None for another."""
    found = path and DatasetFiles.open(dataset.path_prefix, whole=False).masked
    return path if found else None


def drawn_scale(strategy: Strategy, seed: int, index: int) -> dict[str, torch.Tensor]:
    """Return ``{"scale": t}``, float32, of a sample whose angles depend on one; else nothing."""
    scale = strategy.scale(seed, int(index))
    return {} if scale is None else {"scale": torch.tensor(scale, dtype=torch.float32)}
