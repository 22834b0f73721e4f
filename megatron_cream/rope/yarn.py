# SPDX-License-Identifier: Apache-2.0
"""YaRN: fast pairs are kept, slow pairs interpolated, a ramp between (arXiv:2309.00071).

Two variants that differ on the ramp alone. ``yarn`` blends frequencies: the paper's equation,
transformers, vLLM, Megatron. ``yarn-pose`` blends wavelengths: the paper's other choice
(jquesnelle/yarn issue 24), which the checkpoints of PoSE and CREAM are trained with. A model of
one served as the other is wrong: for Llama-2 at s = 8 they differ in 25 of 64 pairs.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

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

if TYPE_CHECKING:
    from megatron_cream.rope.huggingface import HfRope


class YarnScaling(RopeScaling, name="yarn"):
    """YaRN as in the paper: linear in frequency on the ramp.

    Pairs that turn more than ``beta_fast`` times in the original window are kept, those that turn
    less than ``beta_slow`` times are divided by s. ``truncate`` rounds the ramp's ends outwards to
    whole pairs. The attention factor is 0.1 ln s + 1 unless ``attention_factor`` is given, or
    ``mscale`` and ``mscale_all_dim`` (DeepSeek's) make it a quotient of two such terms.
    """

    OPTIONS = {
        "beta_fast": Option("a pair that turns more often in the window is kept", default=32.0),
        "beta_slow": Option("one that turns less often is divided by s", default=1.0),
        "truncate": Option("round the ends of the ramp to whole pairs", default=True, type=bool),
        "attention_factor": ATTENTION_FACTOR,
        "mscale": Option("of DeepSeek's attention factor", default_help="none"),
        "mscale_all_dim": Option("of DeepSeek's attention factor", default_help="none"),
    }
    hf_types: ClassVar[tuple[str, ...]] = ("yarn",)

    def __post_init__(self) -> None:
        super().__post_init__()
        fast, slow = self.option("beta_fast"), self.option("beta_slow")
        if fast <= slow:
            raise UserError(
                f"beta_fast (--rope-options) is {fast}: it must be more than beta_slow, {slow}"
            )
        if self.base <= 1:
            raise UserError(
                f"base (--rotary-base, --rope-theta) is {self.base}: {self.name} needs more than 1"
            )

    @property
    def kept(self) -> Floats:
        """float64 ``[dim // 2]``: 1 where a pair is kept, 0 where it is interpolated."""
        low, high = map(self._pair_that_turns, (self.option("beta_fast"), self.option("beta_slow")))
        if self.option("truncate"):
            low, high = math.floor(low), math.ceil(high)
        # The upper limit counts dimensions, not pairs, in the paper's code and everywhere since.
        low, high = max(low, 0), min(high, self.dim - 1)
        width = high - low if high != low else 0.001
        pairs = np.arange(self.dim // 2, dtype=np.float32)
        ramp = np.clip((pairs - np.float32(low)) / np.float32(width), 0, 1)
        # In float32 as it is served: a share that is nearly 0 keeps only some of its digits, and
        # exact ones would be up to 3e-6 off from transformers' frequencies.
        kept: Floats = (1 - ramp).astype(np.float64)
        return kept

    def _pair_that_turns(self, times: float) -> float:
        """Return the (fractional) pair that turns so often in the original window."""
        return (
            self.dim
            * math.log(self.original_length / (2 * math.pi * times))
            / (2 * math.log(self.base))
        )

    @property
    def divisors(self) -> Floats:
        divisors: Floats = 1.0 / ((1.0 - self.kept) / self.factor + self.kept)
        return divisors

    def rounded(self, powers: Floats32) -> Floats32:
        kept = self.kept.astype(np.float32)
        one = np.float32(1.0)
        interpolated = one / (np.float32(self.factor) * powers)
        blended: Floats32 = interpolated * (one - kept) + one / powers * kept
        return blended

    @property
    def attention_factor(self) -> float:
        given, one, all_ = map(self.option, ("attention_factor", "mscale", "mscale_all_dim"))
        if given is not None:
            return float(given)
        if one is not None and all_ is not None:
            return _temperature(self.factor, one) / _temperature(self.factor, all_)
        return _temperature(self.factor)

    @classmethod
    def from_hf(cls, rope: HfRope) -> RopeScaling:
        return rope.make(cls, *rope.from_original_window())

    def to_hf(self) -> dict[str, Any]:
        return {
            "rope_type": "yarn",
            "rope_theta": self.theta,
            "factor": self.factor,
            "original_max_position_embeddings": self.original_length,
            **self.options,
        }


class YarnPoseScaling(YarnScaling, name="yarn-pose"):
    """YaRN as PoSE and CREAM train it: linear in wavelength on the ramp.

    No server knows it by name, so it is exported as ``longrope`` with its divisors listed.
    """

    OPTIONS = {
        key: YarnScaling.OPTIONS[key]
        for key in ("beta_fast", "beta_slow", "truncate", "attention_factor")
    }
    hf_types = ()

    @property
    def divisors(self) -> Floats:
        return (1.0 - self.kept) * self.factor + self.kept

    @property
    def attention_factor(self) -> float:
        given = self.option("attention_factor")
        return _temperature(self.factor) if given is None else float(given)

    def rounded(self, powers: Floats32) -> Floats32:
        return rounded_list(self.divisors, powers)

    def to_hf(self) -> dict[str, Any]:
        return longrope_fields(self, self.divisors, self.divisors)


def _temperature(factor: float, mscale: float = 1.0) -> float:
    """YaRN's 0.1 ln s + 1, which sharpens attention over more tokens."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0
