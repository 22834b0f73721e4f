# SPDX-License-Identifier: Apache-2.0
"""CLEX's settings: the scales that training draws, and which one serves a length. numpy only.

A scale t says how many original windows N0 a sequence spans. Training draws one per sample among
the whole numbers of 1 .. T / N0, and T / N0 itself where that is none, so far as N tokens fit in
t * N0. A sequence of L tokens is served at t = ceil(L / N0), one of up to T at no more than T / N0.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from megatron_cream.errors import UserError
from megatron_cream.options import Option
from megatron_cream.rope.scaling import Floats, RopeScaling


class ClexScaling(RopeScaling, name="clex"):
    """CLEX (arXiv:2310.16450); its frequencies are in the checkpoint's weights, see ``clex.ode``.

    What is here without weights are those that training starts from: NTK-aware scaling by 2 t - 1.
    ``param_factor`` is the hidden width of the trained term in multiples of d, ``act`` its
    activation, ``time_step`` the solver's largest step at t = 1.
    """

    OPTIONS = {
        "param_factor": Option("hidden width in multiples of d", default=1, type=int),
        "act": Option("activation", default="tanh", type=str, choices=("tanh", "silu")),
        "time_step": Option("the solver's largest step at t = 1", default=0.5),
    }
    varies_with_length = True
    trained_by = "megatron_cream.extras.clex"
    draws_scales = True
    mixes = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dim < 4:
            raise UserError(f"dim is {self.dim}: clex needs at least 4 rotated dimensions")
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
