# SPDX-License-Identifier: Apache-2.0
"""Scatter: many chunks all over the target window, the last of which always ends it.

What is asked at the end of a sample then looks back at text from all distances up to T at once, as
in a sequence of T tokens. CREAM and PoSE show it one or two other places: where CREAM's coin falls
on long heads the end is far from everything else, and otherwise near all of it.

A sample is cut in k chunks at places drawn uniformly, log k uniform up to --scatter-most-chunks.
Between them are k - 1 gaps of T - N positions in all, a uniform share of which each has.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_cream.errors import UserError
from megatron_cream.positions import philox
from megatron_cream.positions.layout import ChunkLayout, Span
from megatron_cream.positions.strategy import Strategy, option


@dataclass(frozen=True)
class ScatterLayout(ChunkLayout):
    """Chunks at their places, each with the text of its place where the document reaches T."""

    def _spans(self, document_length: int) -> list[Span]:
        room = document_length - self.train_length
        gaps = self.target_length - self.train_length
        spans, before = [], 0
        for start, length in self.chunks:
            moved = start - before
            # Of a shorter document every gap is smaller; its last token is the sample's last.
            spans.append((before + (moved * room // gaps if room < gaps else moved), length))
            before += length
        return spans


@dataclass(frozen=True)
class Scatter(Strategy, name="scatter"):
    """Scattered positions.

    Attributes:
        most_chunks: of a sample, at least 2.
    """

    most_chunks: int = option("most chunks of a sample", default=32, type=int)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.most_chunks, int) or self.most_chunks < 2:
            raise UserError(
                f"most_chunks (--scatter-most-chunks) is {self.most_chunks}: it must be at least 2"
            )
        if self.train_length < self.shortest_length:
            raise UserError(
                f"train_length (--seq-length) is {self.train_length}: scatter needs at least "
                f"{self.shortest_length} tokens"
            )

    @property
    def shortest_length(self) -> int:
        return 2  # a token each of two chunks; where more do not fit, there are fewer

    def place(self, cuts: list[int], shifts: list[int]) -> ScatterLayout:
        """Return the layout cut before the tokens ``cuts``, each later chunk moved by its shift.

        Both are increasing; the last shift is T - N.
        """
        borders, moved = [0, *cuts, self.train_length], [0, *shifts]
        chunks = tuple(
            (start + shift, end - start)
            for start, end, shift in zip(borders, borders[1:], moved, strict=False)
        )
        return ScatterLayout(self.train_length, self.target_length, chunks)

    def layout(self, seed: int, index: int) -> ScatterLayout:
        size, *words = philox.words(seed, index, 2 * self.most_chunks)
        most = self.most_chunks - 1
        later = int((most + 1) ** philox.unit(size))  # chunks after the first
        length, gaps = self.train_length, self.target_length - self.train_length
        cuts = sorted({1 + philox.below(word, length - 1) for word in words[:later]})
        # Two cuts at one place are one.
        drawn = words[most : most + len(cuts) - 1]
        return self.place(cuts, [*sorted(philox.below(word, gaps + 1) for word in drawn), gaps])
