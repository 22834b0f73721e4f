# SPDX-License-Identifier: Apache-2.0
"""Interpolations by a list of divisors: LongRoPE, CoPE, DroPE, proportional, and two as one.

On top: Llama 3.1 has ``llama3`` scaling in its own 131072 tokens. Dividing its positions by 8 more
makes a model that no single method describes: the divisors of both multiply.

Beside, mixed windows: sequences within the original window turn by the model's own RoPE, longer
ones by the interpolated one (LongRoPE2, arXiv:2502.20082). Both are lists of divisors under one
theta and one attention factor, which is what ``longrope`` is: such a model is exported, served and
evaluated by that, and trained by the same two lists.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_cream.errors import UserError
from megatron_cream.options import Option
from megatron_cream.rope.formulas import LinearScaling
from megatron_cream.rope.scaling import (
    ATTENTION_FACTOR,
    SCALINGS,
    STOPPED,
    Floats,
    ListedScaling,
    RopeScaling,
    longrope_fields,
    make_scaling,
)

if TYPE_CHECKING:
    from megatron_cream.rope.huggingface import HfRope


class LongRopeScaling(ListedScaling, name="longrope"):
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
    hf_original_window = True
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

    def to_hf(self) -> dict[str, Any]:
        lists = self.option("short_factor"), self.option("long_factor")
        return longrope_fields(self, *map(np.asarray, lists))


class CopeScaling(ListedScaling, name="cope"):
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


class DropeScaling(ListedScaling, name="drope"):
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


@dataclass(frozen=True)
class ComposedScaling(ListedScaling):
    """``outer`` on top of ``inner``; exported as ``longrope``, exactly.

    Attributes:
        inner: scaling of the base model.
        outer: what extends it, from the window that ``inner`` reached.
    """

    inner: RopeScaling = field(kw_only=True)
    outer: RopeScaling = field(kw_only=True)

    @property
    def name(self) -> str:
        return self.outer.name

    @property
    def theta(self) -> float:
        return self.inner.theta

    @property
    def divisors(self) -> Floats:
        return self.inner.divisors * self.outer.stretch

    @property
    def attention_factor(self) -> float:
        return self.inner.attention_factor * self.outer.attention_factor

    @property
    def summary(self) -> str:
        return f"{self.outer.summary}, on {self.inner.summary}"

    def settings(self) -> dict[str, Any]:
        raise UserError("a composed scaling has two settings: those of inner and of outer")


def compose(inner: RopeScaling, outer: RopeScaling) -> RopeScaling:
    """Return ``outer`` on top of ``inner``.

    Args:
        inner: scaling of the base model, which its config.json describes.
        outer: what extends it, counted in tokens from the window that ``inner`` reached.

    Returns:
        A scaling whose divisors and attention factors are the products of both.

    Raises:
        UserError: methods, bases or dimensions that do not go together.
    """
    if not outer.goes_on_top:
        able = " or ".join(repr(name) for name, cls in SCALINGS.items() if cls.goes_on_top)
        raise UserError(
            f"--rope-interpolation is {outer.name!r}: on top of the base model's {inner.name} "
            f"(--rope-base-config) it must be {able}; the others describe all angles, "
            "so leave out --rope-base-config and count from the first window"
        )
    if inner.evaluation_only:
        raise UserError(
            f"--rope-base-config has rope_type {inner.name!r}: angles that change with the length "
            "cannot be built on; name the interpolation from the first window instead"
        )
    if inner.base != outer.base:
        raise UserError(
            f"base (--rotary-base, --rope-theta) is {outer.base:g}: the base model's "
            f"(--rope-base-config) rope_theta is {inner.base:g}, and it must stay that"
        )
    return ComposedScaling(
        outer.dim,
        inner.base,
        outer.factor,
        outer.original_length,
        inner=inner,
        outer=outer,
    )


_NAMING_A_FACTOR = {"attention_factor", "mscale", "mscale_all_dim"}


def mix_windows(near: RopeScaling, far: RopeScaling) -> RopeScaling:
    """Return the ``longrope`` that turns by ``near`` up to the original window, by ``far`` beyond.

    ``at_length`` of what is returned chooses. One attention factor holds at every length, because
    transformers has one for both lists: that of ``near``, 1 for a model that was not scaled before,
    so that within its window the model is the one that it was; or the one that the options of
    ``far`` name. A ``longrope`` has both lists already, and is returned as it is.

    Args:
        near: the model's own RoPE.
        far: the interpolation, of the same original window and dimensions.
    """
    if isinstance(far, LongRopeScaling):
        return far
    named = _NAMING_A_FACTOR & far.options.keys()
    return make_scaling(
        LongRopeScaling.method,
        dim=far.dim,
        base=near.theta,
        factor=far.factor,
        original_length=far.original_length,
        short_factor=_listed(near, near.theta),
        long_factor=_listed(far, near.theta),
        attention_factor=(far if named else near).attention_factor,
    )


def _listed(scaling: RopeScaling, theta: float) -> list[float]:
    """Return how many times slower than at ``theta`` each pair turns; a list holds no infinity."""
    ratio = (scaling.theta / theta) ** scaling.exponents * scaling.divisors
    listed: Floats = np.minimum(ratio, STOPPED)
    return [float(value) for value in listed]
