# SPDX-License-Identifier: Apache-2.0
"""What a sample holds: the tokens of a source at a layout, what they predict, where there is loss.

Most of the time of a sample is the price of calls, not of copying its bytes. A mapped file is
therefore one array, got from Megatron's reader once, and tokens and labels are joined in one call.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_cream.data.sources import Sources
from megatron_cream.positions import Layout, Span

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

    def read(self, source: int, layout: Layout) -> dict[str, np.ndarray]:
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
