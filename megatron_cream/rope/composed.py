# SPDX-License-Identifier: Apache-2.0
"""An interpolation on top of a model whose RoPE is interpolated already.

Llama 3.1 has ``llama3`` scaling in its own 131072 tokens. Dividing its positions by 8 more makes a
model that no single method describes: the divisors of both multiply.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_cream.errors import UserError
from megatron_cream.rope.base import RopeScaling, longrope_fields, rounded_list
from megatron_cream.rope.uniform import LinearScaling, NtkScaling, ProportionalScaling

# What asks for nothing but a ratio of angles. The others look at wavelengths of an unscaled model.
_ON_TOP = (LinearScaling, NtkScaling)


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
    def theta(self) -> float:
        return self.inner.theta

    @property
    def divisors(self) -> np.ndarray:
        return self.inner.divisors * self.outer.stretch

    @property
    def attention_factor(self) -> float:
        return self.inner.attention_factor * self.outer.attention_factor

    @property
    def summary(self) -> str:
        return f"{self.outer.summary}, on {self.inner.summary}"

    def settings(self) -> dict[str, Any]:
        raise UserError("a composed scaling has two settings: those of inner and of outer")

    def rounded(self, powers: np.ndarray) -> np.ndarray:
        return rounded_list(self.divisors, powers)

    def to_hf(self) -> dict[str, Any]:
        return longrope_fields(self, self.divisors, self.divisors)


def compose(inner: RopeScaling, outer: RopeScaling) -> RopeScaling:
    """Return ``outer`` on top of ``inner``.

    Raises:
        UserError: methods, bases or dimensions that do not go together.
    """
    if not isinstance(outer, _ON_TOP) or isinstance(outer, ProportionalScaling):
        raise UserError(
            f"--rope-interpolation is {outer.name!r}: on top of the base model's {inner.name} "
            "(--rope-base-config) it must be 'linear' or 'ntk'; the others describe all angles, "
            "so leave out --rope-base-config and count from the first window"
        )
    if inner.name == "dynamic":
        raise UserError(
            "--rope-base-config has rope_type 'dynamic': angles that change with the length cannot "
            "be built on; name the interpolation from the first window instead"
        )
    if inner.base != outer.base:
        raise UserError(
            f"base (--rotary-base, --rope-theta) is {outer.base:g}: the base model's "
            f"(--rope-base-config) rope_theta is {inner.base:g}, and it must stay that"
        )
    return ComposedScaling(
        outer.name,
        outer.dim,
        inner.base,
        outer.factor,
        outer.original_length,
        inner=inner,
        outer=outer,
    )
