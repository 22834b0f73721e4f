# SPDX-License-Identifier: Apache-2.0
"""Interpolations by one number: none, rope-theta, linear, proportional, ntk, dynamic."""

from __future__ import annotations

from typing import Any

import numpy as np

from megatron_cream.errors import UserError
from megatron_cream.rope.base import RopeScaling


class NoScaling(RopeScaling):
    """Frequencies as trained; the factor is not used."""


class ThetaScaling(RopeScaling):
    """A larger theta, named by --rope-theta, and nothing else (ABF, arXiv:2309.16039)."""


class LinearScaling(RopeScaling):
    """Position interpolation: positions divided by s (arXiv:2306.15595)."""

    @property
    def divisors(self) -> np.ndarray:
        return np.full(self.dim // 2, self.factor)

    def to_hf(self) -> dict[str, Any]:
        return {"rope_type": "linear", "rope_theta": self.theta, "factor": self.factor}


class ProportionalScaling(LinearScaling):
    """Linear, over the first share of the pairs of a head; the rest never turn.

    Unlike a partial rotary dimension, the exponents count all of the head's dimensions, and the
    pairs that do not turn are the slowest ones. transformers calls it ``proportional``.
    """

    OPTIONS = {"partial_rotary_factor": 1.0}

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
    def divisors(self) -> np.ndarray:
        result = np.full(self.dim // 2, np.inf)
        result[: self._turning] = self.factor
        return result

    def to_hf(self) -> dict[str, Any]:
        share = self.option("partial_rotary_factor")
        return {**super().to_hf(), "rope_type": "proportional", "partial_rotary_factor": share}


class NtkScaling(RopeScaling):
    """NTK-aware base: the fastest pair unchanged, the slowest divided by s exactly.

    theta = base * s ** (d / (d - 2)), as PoSE and CREAM have it. In a Hugging Face config that is
    nothing but a larger ``rope_theta``.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_ntk_dim(self.dim)

    @property
    def theta(self) -> float:
        return self.base * self.factor ** (self.dim / (self.dim - 2))


class DynamicScaling(RopeScaling):
    """NTK-aware base that grows with the sequence, for a model that is not trained further.

    transformers' formula: beyond the original window L a sequence of l tokens is turned by
    theta = base * (s l / L - (s - 1)) ** (d / (d - 2)), up to it by the base.
    """

    varies_with_length = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_ntk_dim(self.dim)

    @property
    def theta(self) -> float:
        ratio = max(self.length or 0, self.original_length) / self.original_length
        grown = self.factor * ratio - (self.factor - 1)
        return self.base * grown ** (self.dim / (self.dim - 2))

    def to_hf(self) -> dict[str, Any]:
        return {"rope_type": "dynamic", "rope_theta": self.base, "factor": self.factor}


def _check_ntk_dim(dim: int) -> None:
    if dim < 4:
        raise UserError(f"dim is {dim}: NTK scaling needs at least 4 rotated dimensions")
