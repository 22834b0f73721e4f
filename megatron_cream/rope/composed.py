# SPDX-License-Identifier: Apache-2.0
"""Two interpolations as one: on top of each other, or beside each other.

On top: Llama 3.1 has ``llama3`` scaling in its own 131072 tokens. Dividing its positions by 8 more
makes a model that no single method describes: the divisors of both multiply.

Beside, mixed windows: sequences within the original window turn by the model's own RoPE, longer
ones by the interpolated one (LongRoPE2, arXiv:2502.20082). Both are lists of divisors under one
theta and one attention factor, which is what ``longrope`` is: such a model is exported, served and
evaluated by that, and trained by the same two lists.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_cream.errors import UserError
from megatron_cream.rope.by_pair import STOPPED, LongRopeScaling
from megatron_cream.rope.scaling import (
    SCALINGS,
    Floats,
    Floats32,
    RopeScaling,
    longrope_fields,
    make_scaling,
    rounded_list,
)


@dataclass(frozen=True)
class ComposedScaling(RopeScaling):
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

    def rounded(self, powers: Floats32) -> Floats32:
        return rounded_list(self.divisors, powers)

    def to_hf(self) -> dict[str, Any]:
        return longrope_fields(self, self.divisors, self.divisors)


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
