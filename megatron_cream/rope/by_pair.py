# SPDX-License-Identifier: Apache-2.0
"""Interpolations that look at each pair: Llama 3's, LongRoPE's lists, CoPE, DroPE."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_cream.errors import UserError
from megatron_cream.options import Option
from megatron_cream.rope.scaling import (
    ATTENTION_FACTOR,
    Floats,
    Floats32,
    RopeScaling,
    longrope_fields,
    rounded_list,
)
from megatron_cream.rope.uniform import LinearScaling

if TYPE_CHECKING:
    from megatron_cream.rope.huggingface import HfRope

STOPPED = 1e30
"""Divisor of a pair that does not turn, as a list must hold a number: 2e-24 radians at 2M."""


class Llama3Scaling(RopeScaling, name="llama3"):
    """Llama 3.1's: long wavelengths divided by s, short ones kept, a blend between.

    A pair that turns less than ``low_freq_factor`` times in the original window is divided by s,
    one that turns more than ``high_freq_factor`` times is kept; between them the frequencies are
    blended by the number of turns. Llama 3.1 has s = 8 over 8192 tokens, theta 500000.
    """

    OPTIONS = {
        "low_freq_factor": Option("a pair that turns less often is divided by s", default=1.0),
        "high_freq_factor": Option("one that turns more often is kept", default=4.0),
    }
    hf_types = ("llama3",)
    hf_required = ("factor", "low_freq_factor", "high_freq_factor")

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = self.option("low_freq_factor"), self.option("high_freq_factor")
        if high <= low:
            raise UserError(
                f"high_freq_factor (--rope-options) is {high}: it must be more than "
                f"low_freq_factor, {low}"
            )

    @property
    def divisors(self) -> Floats:
        low, high = self.option("low_freq_factor"), self.option("high_freq_factor")
        turns = self.original_length * self.theta**-self.exponents / (2 * math.pi)
        kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
        divisors: Floats = 1.0 / ((1.0 - kept) / self.factor + kept)
        return divisors

    def rounded(self, powers: Floats32) -> Floats32:
        low, high = (np.float32(self.option(key)) for key in self.OPTIONS)
        factor, one = np.float32(self.factor), np.float32(1.0)
        plain = one / powers
        # torch divides a number by a tensor as the reciprocal times the number.
        wavelengths = one / plain * np.float32(2 * math.pi)
        turns = one / wavelengths * np.float32(self.original_length)
        kept = (turns - low) / (high - low)
        blended = (one - kept) * plain / factor + kept * plain
        return np.where(kept >= 1, plain, np.where(kept <= 0, plain / factor, blended))

    @classmethod
    def from_hf(cls, rope: HfRope) -> RopeScaling:
        return rope.make(cls, *rope.from_original_window())

    def to_hf(self) -> dict[str, Any]:
        return {
            "rope_type": "llama3",
            "rope_theta": self.theta,
            "factor": self.factor,
            "original_max_position_embeddings": self.original_length,
            **{key: self.option(key) for key in self.OPTIONS},
        }


class LongRopeScaling(RopeScaling, name="longrope"):
    """LongRoPE: a searched divisor per pair, two lists of them (arXiv:2402.13753).

    ``short_factor`` turns sequences up to the original window, ``long_factor`` longer ones; with
    no length named, the long ones if s is more than 1. The attention factor is
    sqrt(1 + ln s / ln L) over an original window of L tokens unless ``attention_factor`` is given.
    """

    OPTIONS = {
        "short_factor": Option(
            "divisors up to the original window", per_pair=True, default_help="--rope-factors-file"
        ),
        "long_factor": Option(
            "divisors of longer sequences", per_pair=True, default_help="--rope-factors-file"
        ),
        "attention_factor": ATTENTION_FACTOR,
    }
    hf_types = ("longrope", "su")  # su: what the first Phi-3 configs called it
    hf_required = ("short_factor", "long_factor")
    varies_with_length = True
    by_factor = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in self.hf_required:
            if key not in self.options:
                raise UserError(
                    f"{key} is missing: longrope needs {self.dim // 2} positive numbers, give a "
                    "JSON file with short_factor and long_factor as --rope-factors-file"
                )
        if self.original_length < 2:
            raise UserError(
                f"original_length (--original-length) is {self.original_length}: longrope needs at "
                "least 2 tokens"
            )

    @property
    def divisors(self) -> Floats:
        beyond = self.factor > 1 if self.length is None else self.length > self.original_length
        return np.asarray(self.option("long_factor" if beyond else "short_factor"), np.float64)

    @property
    def attention_factor(self) -> float:
        given = self.option("attention_factor")
        if given is not None:
            return float(given)
        return math.sqrt(1.0 + math.log(self.factor) / math.log(self.original_length))

    def rounded(self, powers: Floats32) -> Floats32:
        return rounded_list(self.divisors, powers)

    @classmethod
    def from_hf(cls, rope: HfRope) -> RopeScaling:
        return rope.make(cls, *rope.from_original_window())

    def to_hf(self) -> dict[str, Any]:
        lists = self.option("short_factor"), self.option("long_factor")
        return longrope_fields(self, *map(np.asarray, lists))


class SlowedScaling(RopeScaling):
    """Some pairs slowed down or stopped; exported as ``longrope`` with its divisors listed."""

    @property
    def wavelengths(self) -> tuple[float, float]:
        turning = self.inv_freq[self.divisors < STOPPED]
        if not len(turning):
            return math.inf, math.inf
        return 2 * math.pi / float(turning.max()), 2 * math.pi / float(turning.min())

    def rounded(self, powers: Floats32) -> Floats32:
        return rounded_list(self.divisors, powers)

    def to_hf(self) -> dict[str, Any]:
        return longrope_fields(self, self.divisors, self.divisors)


class CopeScaling(SlowedScaling, name="cope"):
    """CoPE: the slowest pairs fade out along a half cosine (arXiv:2602.05258).

    Frequencies of the c slowest pairs are multiplied by (1 + cos(pi j / (c - 1))) / 2, j = 0 ..
    c - 1: the first of them is kept, the last stops. c is ``clipped_pairs``, or the number of pairs
    that do not turn once in the original window, whose angles beyond it were never seen. Nothing
    depends on the factor.
    """

    OPTIONS = {
        "clipped_pairs": Option(
            "c, pairs that fade out", default_help="those that do not turn once in the window"
        )
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        pairs, given = self.dim // 2, self.option("clipped_pairs")
        if given is not None and not (given == int(given) and 2 <= given <= pairs):
            raise UserError(
                f"clipped_pairs (--rope-options) is {given}: it must be a whole number from 2 to "
                f"{pairs}, the pairs of {self.dim} dimensions"
            )

    @property
    def clipped(self) -> int:
        """c, the number of pairs that fade out; 0 where all turn in the window."""
        given = self.option("clipped_pairs")
        if given is not None:
            return int(given)
        turning = self.original_length * self.theta**-self.exponents
        slow = int((turning < 2 * math.pi).sum())
        return slow if slow > 1 else 0

    @property
    def divisors(self) -> Floats:
        result = np.ones(self.dim // 2)
        if self.clipped:
            kept = (1 + np.cos(np.pi * np.arange(self.clipped) / (self.clipped - 1))) / 2
            result[-self.clipped :] = 1 / np.maximum(kept, 1 / STOPPED)
        return result


class DropeScaling(SlowedScaling, name="drope"):
    """DroPE: no positions at all (arXiv:2512.12167); what order there is comes from the mask."""

    @property
    def divisors(self) -> Floats:
        return np.full(self.dim // 2, STOPPED)


class ProportionalScaling(LinearScaling, name="proportional"):
    """Linear, over the first share of the pairs of a head; the rest never turn.

    Unlike a partial rotary dimension, the exponents count all of the head's dimensions, and the
    pairs that do not turn are the slowest ones. transformers calls it ``proportional``.
    """

    OPTIONS = {"partial_rotary_factor": Option("share of the pairs that turn", default=1.0)}
    hf_types = ("proportional",)
    hf_required = ()
    goes_on_top = False

    def __post_init__(self) -> None:
        super().__post_init__()
        share = self.option("partial_rotary_factor")
        if not 1 <= self._turning <= self.dim // 2:
            raise UserError(
                f"partial_rotary_factor (--rope-options) is {share}: of {self.dim} dimensions it "
                "must leave at least one pair, and it must be at most 1"
            )

    @property
    def _turning(self) -> int:
        return int(self.option("partial_rotary_factor") * self.dim // 2)

    @property
    def divisors(self) -> Floats:
        result = np.full(self.dim // 2, np.inf)
        result[: self._turning] = self.factor
        return result

    @classmethod
    def from_hf(cls, rope: HfRope) -> RopeScaling:
        # Its share is an option: all dimensions count in the exponents.
        return rope.make(cls, *rope.by_factor(), dim=rope.head_dim)

    def to_hf(self) -> dict[str, Any]:
        share = self.option("partial_rotary_factor")
        return {**super().to_hf(), "rope_type": "proportional", "partial_rotary_factor": share}
