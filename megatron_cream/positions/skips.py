# SPDX-License-Identifier: Apache-2.0
"""Strategies that cut a sample in chunks and skip positions between them: PoSE and scatter.

PoSE, positional skip-wise training (arXiv:2309.10400): each chunk after the first is moved right by
a random skip that never decreases, u_i ~ U{u_(i-1) .. T - N} with u_0 = 0. The published trainer
cuts in two, the first chunk holding at most half of the tokens; the paper's appendix cuts in k and
lets every chunk be any length. The trainer looks only at the first 5 N tokens of a document; here
every token can be drawn. Skips drawn one after the other crowd the end of the window as k grows:
k = N is not RandPos.

Scatter: many chunks all over the target window, the last of which always ends it. What is asked at
the end of a sample then looks back at text from all distances up to T at once, as in a sequence of
T tokens. CREAM and PoSE show it one or two other places: where CREAM's coin falls on long heads the
end is far from everything else, and otherwise near all of it. A sample is cut in k chunks at places
drawn uniformly, log k uniform up to --scatter-most-chunks. Between them are k - 1 gaps of T - N
positions in all, a uniform share of which each has.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_cream.errors import UserError
from megatron_cream.positions import philox
from megatron_cream.positions.strategy import ChunkLayout, Span, Strategy, option


@dataclass(frozen=True)
class PoseLayout(ChunkLayout):
    """Chunks of text, each from its own offset v_i, with v_0 = 0 and v_i >= v_(i-1).

    Content follows the paper's Table 4: ``uniform`` v_i ~ U{v_(i-1) .. n - N}, ``zero`` v_i = 0,
    ``positions`` v_i = u_i, or n - N where the document is too short for that.
    """

    content: str
    content_words: tuple[int, ...]

    def _spans(self, document_length: int) -> list[Span]:
        room = document_length - self.train_length
        spans, before, shift = [], 0, 0
        for i, (start, length) in enumerate(self.chunks):
            if i and self.content == "uniform":
                shift += philox.below(self.content_words[i - 1], room - shift + 1)
            elif self.content == "positions":
                shift = min(start - before, room)
            spans.append((before + shift, length))
            before += length
        return spans


@dataclass(frozen=True)
class Pose(Strategy, name="pose"):
    """PoSE positions.

    Attributes:
        chunks: number of chunks k, from 1 to N.
        lengths: ``trainer``, l_0 ~ U{1 .. ceil(N / 2)} (two chunks only), or ``paper``,
            l_i ~ U{1 .. what leaves one token for each later chunk}. Default: ``trainer`` for two
            chunks, ``paper`` otherwise.
        content: which text a chunk reads, see ``PoseLayout``.
    """

    chunks: int = option("k, chunks of a sample", default=2, type=int)
    lengths: str | None = option(
        "how long chunks are",
        type=str,
        choices=("trainer", "paper"),
        default_help="trainer for 2 chunks, else paper",
    )
    content: str = option(
        "which text a chunk reads",
        default="uniform",
        type=str,
        choices=("uniform", "zero", "positions"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.chunks, int) or not 1 <= self.chunks <= self.train_length:
            raise UserError(
                f"chunks (--pose-chunks) is {self.chunks}: it must be from 1 to train_length "
                f"(--seq-length) = {self.train_length}"
            )
        if self.lengths == "trainer" and self.chunks != 2:
            raise UserError(
                f"lengths (--pose-lengths) is 'trainer' with {self.chunks} chunks (--pose-chunks): "
                "the published trainer cuts in 2; use 'paper'"
            )

    @property
    def shortest_length(self) -> int:
        return self.chunks  # a token each

    def place(
        self,
        lengths: tuple[int, ...],
        skips: tuple[int, ...],
        content_words: tuple[int, ...] = (),
    ) -> PoseLayout:
        """Return the layout for given chunk lengths l_i and skips u_i, both of k entries.

        ``content_words`` are the k - 1 random words that content ``uniform`` is drawn from.
        """
        chunks, before = [], 0
        for length, skip in zip(lengths, skips, strict=True):
            chunks.append((before + skip, length))
            before += length
        return PoseLayout(
            self.train_length, self.target_length, tuple(chunks), self.content, content_words
        )

    def layout(self, seed: int, index: int) -> PoseLayout:
        later = self.chunks - 1
        words = philox.words(seed, index, 3 * later)
        lengths = self._chunk_lengths(words[:later])
        skips = [0]
        for word in words[later : 2 * later]:
            room = self.target_length - self.train_length - skips[-1]
            skips.append(skips[-1] + philox.below(word, room + 1))
        return self.place(lengths, tuple(skips), tuple(words[2 * later :]))

    def _chunk_lengths(self, words: list[int]) -> tuple[int, ...]:
        left, lengths = self.train_length, []
        for i, word in enumerate(words):
            if self.chunks == 2 and self.lengths != "paper":
                # N >= chunks = 2, so that this leaves a token for the second chunk.
                most = (self.train_length + 1) // 2
            else:
                most = left - (len(words) - i)
            lengths.append(1 + philox.below(word, most))
            left -= lengths[-1]
        return (*lengths, left)


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
