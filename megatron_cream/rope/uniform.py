# SPDX-License-Identifier: Apache-2.0
"""Interpolations by one number: none, linear, ntk, dynamic, rope-theta."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from megatron_cream.errors import UserError
from megatron_cream.rope.scaling import Floats, RopeScaling

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

    goes_on_top = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_ntk_dim(self.dim)

    @property
    def theta(self) -> float:
        return float(self.base * self.factor ** (self.dim / (self.dim - 2)))


class DynamicScaling(RopeScaling, name="dynamic"):
    """NTK-aware base that grows with the sequence, for a model that is not trained further.

    transformers' formula: beyond the original window L a sequence of l tokens is turned by
    theta = base * (s l / L - (s - 1)) ** (d / (d - 2)), up to it by the base.
    """

    hf_types = ("dynamic",)
    hf_required = ("factor",)
    varies_with_length = True
    evaluation_only = True
    mixes = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_ntk_dim(self.dim)

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


def _check_ntk_dim(dim: int) -> None:
    if dim < 4:
        raise UserError(f"dim is {dim}: NTK scaling needs at least 4 rotated dimensions")
