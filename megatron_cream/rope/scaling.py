# SPDX-License-Identifier: Apache-2.0
"""How far a position turns each pair of dimensions: RoPE interpolations. numpy only.

Every method is a base theta and one divisor per pair of dimensions,

    inv_freq[i] = theta ** (-2 i / d) / divisors[i],

which is also how Hugging Face configs say it (``rope_theta`` and factors), so that a trained
model and its exported copy turn by the same angles.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class RopeScaling:
    """One interpolation of rotary position embeddings.

    Attributes:
        name: value of --rope-interpolation.
        dim: d, rotated dimensions of a head, even.
        base: theta of the model before interpolation (--rotary-base).
        factor: s, how many times longer the window becomes, a real number of at least 1.
        original_length: window in tokens that the model was trained on before.
    """

    name: str
    dim: int
    base: float
    factor: float
    original_length: int

    def __post_init__(self) -> None:
        if self.dim < 2 or self.dim % 2:
            raise ValueError(f"dim is {self.dim}: the rotated dimensions must be even, at least 2")
        if not (math.isfinite(self.base) and self.base > 0):
            raise ValueError(f"base (--rotary-base) is {self.base}: it must be a positive number")
        if not (math.isfinite(self.factor) and self.factor >= 1):
            raise ValueError(f"factor (--rope-factor) is {self.factor}: it must be at least 1")
        if self.original_length < 1:
            raise ValueError(
                f"original_length (--original-length) is {self.original_length}: it must be at "
                "least 1 token"
            )

    @property
    def theta(self) -> float:
        """Base of the interpolated frequencies."""
        return self.base

    @property
    def divisors(self) -> np.ndarray:
        """float64 ``[dim // 2]``: what each frequency is divided by on top of ``theta``."""
        return np.ones(self.dim // 2)

    @property
    def inv_freq(self) -> np.ndarray:
        """float64 ``[dim // 2]``: radians a token, fastest first."""
        exponents = np.arange(0, self.dim, 2, dtype=np.float64) / self.dim
        return self.theta**-exponents / self.divisors

    @property
    def attention_factor(self) -> float:
        """Multiplies cos and sin, and so attention logits by its square."""
        return 1.0

    @property
    def wavelengths(self) -> tuple[float, float]:
        """Shortest and longest wavelength in tokens."""
        inv_freq = self.inv_freq
        return 2 * math.pi / float(inv_freq.max()), 2 * math.pi / float(inv_freq.min())

    def to_hf(self) -> dict[str, Any]:
        """Return transformers 5's ``rope_parameters`` for config.json."""
        return {"rope_type": "default", "rope_theta": self.theta}


class NoScaling(RopeScaling):
    """Frequencies as trained; the factor is not used."""


class LinearScaling(RopeScaling):
    """Position interpolation: positions divided by s (arXiv:2306.15595)."""

    @property
    def divisors(self) -> np.ndarray:
        return np.full(self.dim // 2, self.factor)

    def to_hf(self) -> dict[str, Any]:
        return {"rope_type": "linear", "rope_theta": self.theta, "factor": self.factor}


class NtkScaling(RopeScaling):
    """NTK-aware base: the fastest pair unchanged, the slowest divided by s exactly.

    theta = base * s ** (d / (d - 2)), as PoSE and CREAM have it. In a Hugging Face config that is
    nothing but a larger ``rope_theta``.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dim < 4:
            raise ValueError(f"dim is {self.dim}: NTK scaling needs at least 4 rotated dimensions")

    @property
    def theta(self) -> float:
        return self.base * self.factor ** (self.dim / (self.dim - 2))


SCALINGS: dict[str, type[RopeScaling]] = {
    "none": NoScaling,
    "linear": LinearScaling,
    "ntk": NtkScaling,
}


def make_scaling(
    name: str, *, dim: int, base: float = 10000.0, factor: float = 1.0, original_length: int
) -> RopeScaling:
    """Return the interpolation ``name``: ``none``, ``linear`` or ``ntk``.

    Raises:
        ValueError: an unknown name, or a value outside what the method can serve.
    """
    if name not in SCALINGS:
        raise ValueError(
            f"interpolation (--rope-interpolation) is {name!r}: it must be one of {tuple(SCALINGS)}"
        )
    return SCALINGS[name](name, int(dim), float(base), float(factor), int(original_length))


def scaling_from_hf(config: dict[str, Any]) -> RopeScaling:
    """Read the interpolation out of a Hugging Face ``config.json``; inverse of ``to_hf``.

    Takes transformers 5's ``rope_parameters`` and version 4's ``rope_scaling`` + ``rope_theta``.
    An NTK model reads back as ``none`` with the larger base: the same angles.

    Raises:
        ValueError: a ``rope_type`` that is not one of ``default`` and ``linear``.
    """
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    kind = rope.get("rope_type", rope.get("type", "default"))
    names = {"default": "none", "linear": "linear"}
    if kind not in names:
        raise ValueError(f"rope_type in config.json is {kind!r}: it must be one of {tuple(names)}")
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    factor = float(rope.get("factor", 1.0))
    window = config["max_position_embeddings"]
    return make_scaling(
        names[kind],
        dim=int(head_dim * partial),
        base=rope.get("rope_theta", config.get("rope_theta", 10000.0)),
        factor=factor,
        original_length=rope.get("original_max_position_embeddings", round(window / factor)),
    )
