# SPDX-License-Identifier: Apache-2.0
"""Interpolations by a formula: none, linear, ntk, dynamic, rope-theta, CLEX, YaRN, Llama 3's.

YaRN (arXiv:2309.00071) keeps fast pairs and interpolates slow ones, with a ramp between. It has two
variants that differ on the ramp alone. ``yarn`` blends frequencies: the paper's equation,
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
    ListedScaling,
    RopeScaling,
)

if TYPE_CHECKING:
    from megatron_cream.rope.huggingface import HfRope


class NoScaling(RopeScaling, name="none"):
    """Frequencies as trained; the factor is not used."""

    hf_types = ("default",)
    by_factor = False
    mixes = False


class LinearScaling(RopeScaling, name="linear"):
    """Position interpolation: positions divided by s (arXiv:2306.15595)."""

    hf_types: ClassVar[tuple[str, ...]] = ("linear",)
    hf_required: ClassVar[tuple[str, ...]] = ("factor",)
    goes_on_top = True

    @property
    def divisors(self) -> Floats:
        return np.full(self.dim // 2, self.factor)

    def to_hf(self) -> dict[str, Any]:
        return {"rope_type": "linear", "rope_theta": self.theta, "factor": self.factor}


class NtkScaling(RopeScaling, name="ntk"):
    """NTK-aware base: the fastest pair unchanged, the slowest divided by s exactly.

    theta = base * s ** (d / (d - 2)), as PoSE and CREAM have it. In a Hugging Face config that is
    nothing but a larger ``rope_theta``.
    """

    least_dim = 4
    goes_on_top = True

    @property
    def theta(self) -> float:
        return float(self.base * self.factor ** (self.dim / (self.dim - 2)))


class DynamicScaling(RopeScaling, name="dynamic"):
    """NTK-aware base that grows with the sequence, for a model that is not trained further.

    transformers' formula: beyond the original window L a sequence of l tokens is turned by
    theta = base * (s l / L - (s - 1)) ** (d / (d - 2)), up to it by the base.
    """

    least_dim = 4
    hf_types = ("dynamic",)
    hf_required = ("factor",)
    varies_with_length = True
    evaluation_only = True
    mixes = False

    @property
    def theta(self) -> float:
        ratio = max(self.length or 0, self.original_length) / self.original_length
        grown = self.factor * ratio - (self.factor - 1)
        return float(self.base * grown ** (self.dim / (self.dim - 2)))

    @classmethod
    def from_hf(cls, rope: HfRope) -> RopeScaling:
        return rope.make(cls, rope.window, rope.factor or 1.0)

    def to_hf(self) -> dict[str, Any]:
        return {"rope_type": "dynamic", "rope_theta": self.base, "factor": self.factor}


class ThetaScaling(RopeScaling, name="rope-theta"):
    """A larger theta, named by --rope-theta, and nothing else (ABF, arXiv:2309.16039)."""

    by_factor = False
    needs_theta = True


class ClexScaling(RopeScaling, name="clex"):
    """CLEX (arXiv:2310.16450); its frequencies are in weights, see ``extras.clex.ode``.

    A scale t says how many original windows N0 a sequence spans. Training draws one per sample
    among the whole numbers of 1 .. T / N0, and T / N0 itself where that is none, so far as N tokens
    fit in t * N0. A sequence of L tokens is served at t = ceil(L / N0), one of up to T at no more
    than T / N0.

    What is here without weights are those that training starts from: NTK-aware scaling by 2 t - 1.
    ``param_factor`` is the hidden width of the trained term in multiples of d, ``act`` its
    activation, ``time_step`` the solver's largest step at t = 1.
    """

    OPTIONS = {
        "param_factor": Option("hidden width in multiples of d", default=1, type=int),
        "act": Option("activation", default="tanh", type=str, choices=("tanh", "silu")),
        "time_step": Option("the solver's largest step at t = 1", default=0.5),
    }
    least_dim = 4
    varies_with_length = True
    trained_by = "megatron_cream.extras.clex"
    draws_scales = True
    mixes = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.factor <= 1:
            raise UserError(
                f"factor (--rope-factor) is {self.factor:g}: clex needs more than 1, a "
                "--target-length beyond --original-length"
            )

    @property
    def scales(self) -> list[float]:
        """All that training may draw: 1, 2, 3 .. floor(T / N0), and T / N0 if that is not whole."""
        whole = [float(t) for t in range(1, math.floor(self.factor) + 1)]
        return whole if self.factor == whole[-1] else [*whole, float(self.factor)]

    def scale_of(self, length: int) -> float:
        """Return the scale t of sequences of ``length`` tokens; up to T it is at most T / N0."""
        scale = float(max(1, math.ceil(length / self.original_length)))
        return min(scale, self.factor) if length <= self.factor * self.original_length else scale

    @property
    def divisors(self) -> Floats:
        scale = self.factor if self.length is None else self.scale_of(self.length)
        pairs = np.arange(0, self.dim, 2, dtype=np.float64)
        return (2.0 * scale - 1.0) ** (pairs / (self.dim - 2))

    @property
    def trained_size(self) -> int:
        return int(self.option("param_factor")) * self.dim**2

    @property
    def summary(self) -> str:
        return (
            f"clex, scales 1 to {self.factor:g} over {self.original_length} tokens, theta "
            f"{self.theta:g}, {self.option('act')}, hidden {self.option('param_factor') * self.dim}"
        )

    def to_hf(self) -> dict[str, Any]:
        raise UserError(
            "clex has its frequencies in the checkpoint's weights: freeze them at a scale "
            "(megatron_cream.extras.clex.freeze) to write them into a config.json"
        )


def row_of(scale: Any) -> Any:
    """Return the index in ``ClexScaling.scales`` of a scale, or of a tensor of scales."""
    ceil = scale.ceil() if hasattr(scale, "ceil") else math.ceil(scale)
    return ceil - 1


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
    hf_original_window = True
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

    def to_hf(self) -> dict[str, Any]:
        return {
            "rope_type": "llama3",
            "rope_theta": self.theta,
            "factor": self.factor,
            "original_max_position_embeddings": self.original_length,
            **{key: self.option(key) for key in self.OPTIONS},
        }


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
    hf_original_window = True

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
        given = self.option("attention_factor")
        one, all_ = map(self.options.get, ("mscale", "mscale_all_dim"))
        if given is not None:
            return float(given)
        if one is not None and all_ is not None:
            return _temperature(self.factor, one) / _temperature(self.factor, all_)
        return _temperature(self.factor)

    def to_hf(self) -> dict[str, Any]:
        return {
            "rope_type": "yarn",
            "rope_theta": self.theta,
            "factor": self.factor,
            "original_max_position_embeddings": self.original_length,
            **self.options,
        }


class YarnPoseScaling(ListedScaling, YarnScaling, name="yarn-pose"):
    """YaRN as PoSE and CREAM train it: linear in wavelength on the ramp."""

    OPTIONS = {
        key: YarnScaling.OPTIONS[key]
        for key in ("beta_fast", "beta_slow", "truncate", "attention_factor")
    }
    hf_types = ()

    @property
    def divisors(self) -> Floats:
        return (1.0 - self.kept) * self.factor + self.kept


def _temperature(factor: float, mscale: float = 1.0) -> float:
    """YaRN's 0.1 ln s + 1, which sharpens attention over more tokens."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0
