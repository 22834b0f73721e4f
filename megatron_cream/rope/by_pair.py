# SPDX-License-Identifier: Apache-2.0
"""Interpolations that look at each pair: Llama 3's by wavelength, LongRoPE's listed factors."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from megatron_cream.errors import UserError
from megatron_cream.rope.base import RopeScaling, longrope_fields, rounded_list

STOPPED = 1e30
"""Divisor of a pair that does not turn, as a list must hold a number: 2e-24 radians at 2M."""


class Llama3Scaling(RopeScaling):
    """Llama 3.1's: long wavelengths divided by s, short ones kept, a blend between.

    A pair that turns less than ``low_freq_factor`` times in the original window is divided by s,
    one that turns more than ``high_freq_factor`` times is kept; between them the frequencies are
    blended by the number of turns. Llama 3.1 has s = 8 over 8192 tokens, theta 500000.
    """

    OPTIONS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = self.option("low_freq_factor"), self.option("high_freq_factor")
        if high <= low:
            raise UserError(
                f"high_freq_factor (--rope-options) is {high}: it must be more than "
                f"low_freq_factor, {low}"
            )

    @property
    def divisors(self) -> np.ndarray:
        low, high = self.option("low_freq_factor"), self.option("high_freq_factor")
        turns = self.original_length * self.theta**-self.exponents / (2 * math.pi)
        kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
        return 1.0 / ((1.0 - kept) / self.factor + kept)

    def rounded(self, powers: np.ndarray) -> np.ndarray:
        low, high = (np.float32(self.option(key)) for key in self.OPTIONS)
        factor, one = np.float32(self.factor), np.float32(1.0)
        plain = one / powers
        # torch divides a number by a tensor as the reciprocal times the number.
        wavelengths = one / plain * np.float32(2 * math.pi)
        turns = one / wavelengths * np.float32(self.original_length)
        kept = (turns - low) / (high - low)
        blended = (one - kept) * plain / factor + kept * plain
        return np.where(kept >= 1, plain, np.where(kept <= 0, plain / factor, blended))

    def to_hf(self) -> dict[str, Any]:
        return {
            "rope_type": "llama3",
            "rope_theta": self.theta,
            "factor": self.factor,
            "original_max_position_embeddings": self.original_length,
            **{key: self.option(key) for key in self.OPTIONS},
        }


class LongRopeScaling(RopeScaling):
    """LongRoPE: a searched divisor per pair, two lists of them (arXiv:2402.13753).

    ``short_factor`` turns sequences up to the original window, ``long_factor`` longer ones; with
    no length named, the long ones if s is more than 1. The attention factor is
    sqrt(1 + ln s / ln L) over an original window of L tokens unless ``attention_factor`` is given.
    """

    OPTIONS = {"short_factor": (), "long_factor": (), "attention_factor": None}
    varies_with_length = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("short_factor", "long_factor"):
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
    def divisors(self) -> np.ndarray:
        beyond = self.factor > 1 if self.length is None else self.length > self.original_length
        return np.asarray(self.option("long_factor" if beyond else "short_factor"), np.float64)

    @property
    def attention_factor(self) -> float:
        given = self.option("attention_factor")
        if given is not None:
            return float(given)
        return math.sqrt(1.0 + math.log(self.factor) / math.log(self.original_length))

    def rounded(self, powers: np.ndarray) -> np.ndarray:
        return rounded_list(self.divisors, powers)

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

    def rounded(self, powers: np.ndarray) -> np.ndarray:
        return rounded_list(self.divisors, powers)

    def to_hf(self) -> dict[str, Any]:
        return longrope_fields(self, self.divisors, self.divisors)


class CopeScaling(SlowedScaling):
    """CoPE: the slowest pairs fade out along a half cosine (arXiv:2602.05258).

    Frequencies of the c slowest pairs are multiplied by (1 + cos(pi j / (c - 1))) / 2, j = 0 ..
    c - 1: the first of them is kept, the last stops. c is ``clipped_pairs``, or the number of pairs
    that do not turn once in the original window, whose angles beyond it were never seen. Nothing
    depends on the factor.
    """

    OPTIONS = {"clipped_pairs": None}

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
    def divisors(self) -> np.ndarray:
        result = np.ones(self.dim // 2)
        if self.clipped:
            kept = (1 + np.cos(np.pi * np.arange(self.clipped) / (self.clipped - 1))) / 2
            result[-self.clipped :] = 1 / np.maximum(kept, 1 / STOPPED)
        return result


class DropeScaling(SlowedScaling):
    """DroPE: no positions at all (arXiv:2512.12167); what order there is comes from the mask."""

    @property
    def divisors(self) -> np.ndarray:
        return np.full(self.dim // 2, STOPPED)
