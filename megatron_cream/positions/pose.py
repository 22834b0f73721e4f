# SPDX-License-Identifier: Apache-2.0
"""PoSE: positional skip-wise training (arXiv:2309.10400).

A sample is cut into chunks; each chunk after the first is moved right by a random skip that never
decreases, u_i ~ U{u_(i-1) .. T - N} with u_0 = 0. The published trainer cuts in two, the first
chunk holding at most half of the tokens; the paper's appendix cuts in k and lets every chunk be
any length. The trainer looks only at the first 5 N tokens of a document; here every token can be
drawn. Skips drawn one after the other crowd the end of the window as k grows: k = N is not RandPos.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_cream.errors import UserError
from megatron_cream.positions import philox
from megatron_cream.positions.layout import ChunkLayout, Span
from megatron_cream.positions.strategy import Strategy, option


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
