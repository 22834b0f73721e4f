# SPDX-License-Identifier: Apache-2.0
"""What every RoPE interpolation is: a theta and one divisor per pair of dimensions. numpy only.

    inv_freq[i] = theta ** (-2 i / d) / divisors[i]

Hugging Face configs say it the same way (``rope_theta`` and factors), so that a trained model and
its exported copy turn by the same angles.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from megatron_cream.errors import UserError
from megatron_cream.json_values import is_finite

_SHOWN = 60  # characters of a value in a message


@dataclass(frozen=True)
class RopeScaling:
    """One interpolation of rotary position embeddings.

    Attributes:
        name: value of --rope-interpolation.
        dim: d, rotated dimensions of a head, even.
        base: theta that the method starts from (--rotary-base, or --rope-theta).
        factor: s, how many times longer the window becomes, a real number of at least 1.
        original_length: window in tokens that the model was trained on before.
        options: settings of this method alone, by their names in config.json (--rope-options).
        length: tokens of the sequences it turns, for methods that look at it; None for none yet.
    """

    name: str
    dim: int
    base: float
    factor: float
    original_length: int
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    length: int | None = None

    OPTIONS: ClassVar[dict[str, Any]] = {}
    """Every option of the method with its default."""

    varies_with_length: ClassVar[bool] = False
    """Whether ``at_length`` changes the angles."""

    def __post_init__(self) -> None:
        if self.dim < 2 or self.dim % 2:
            raise UserError(f"dim is {self.dim}: the rotated dimensions must be even, at least 2")
        if not _is_positive(self.base):
            raise UserError(
                f"base (--rotary-base, --rope-theta) is {_short(self.base)}: it must be "
                "a positive number"
            )
        if not (_is_positive(self.factor) and self.factor >= 1):
            raise UserError(
                f"factor (--rope-factor) is {_short(self.factor)}: it must be at least 1"
            )
        if self.original_length < 1:
            raise UserError(
                f"original_length (--original-length) is {self.original_length}: it must be at "
                "least 1 token"
            )
        for key, value in self.options.items():
            self._check_option(key, value)

    def _check_option(self, key: str, value: Any) -> None:
        if key not in self.OPTIONS:
            known = ", ".join(self.OPTIONS) or "no options"
            raise UserError(f"--rope-options has {key}: {self.name} takes {known}")
        default = self.OPTIONS[key]
        if isinstance(default, bool):
            fits, needed = isinstance(value, bool), "true or false"
        elif isinstance(default, tuple):
            numbers = isinstance(value, list | tuple) and all(map(_is_positive, value))
            fits = numbers and len(value) == self.dim // 2
            needed = f"{self.dim // 2} positive numbers, one per pair of {self.dim} dimensions"
        else:
            fits, needed = _is_positive(value), "a positive number"
        if not fits:
            raise UserError(f"{key} (--rope-options) is {_short(value)}: it must be {needed}")

    def option(self, key: str) -> Any:
        """Return an option's value or its default."""
        return self.options.get(key, self.OPTIONS[key])

    def at_length(self, length: int) -> RopeScaling:
        """Return the scaling for sequences of ``length`` tokens; most methods turn all alike."""
        return dataclasses.replace(self, length=int(length))

    def settings(self) -> dict[str, Any]:
        """Return the arguments of ``make_scaling`` that make this one again, ``dim`` excepted."""
        return {
            "name": self.name,
            "base": self.base,
            "factor": self.factor,
            "original_length": self.original_length,
            **self.options,
        }

    @property
    def theta(self) -> float:
        """Base of the interpolated frequencies."""
        return self.base

    @property
    def divisors(self) -> np.ndarray:
        """float64 ``[dim // 2]``: what each frequency is divided by on top of ``theta``."""
        return np.ones(self.dim // 2)

    @property
    def exponents(self) -> np.ndarray:
        """float64 ``[dim // 2]``: 2 i / d."""
        return np.arange(0, self.dim, 2, dtype=np.float64) / self.dim

    @property
    def inv_freq(self) -> np.ndarray:
        """float64 ``[dim // 2]``: radians a token, fastest first."""
        return self.theta**-self.exponents / self.divisors

    def rounded(self, powers: np.ndarray) -> np.ndarray:
        """Return float32 ``inv_freq`` out of float32 ``theta ** (2 i / d)``.

        In the order of operations in which transformers computes it for this type: the last bit
        of a frequency near 1 is an angle of 0.016 at position 262143.
        """
        return np.float32(1.0) / powers / self.divisors.astype(np.float32)

    @property
    def stretch(self) -> np.ndarray:
        """float64 ``[dim // 2]``: how many times slower than at ``base`` each pair turns."""
        return (self.theta / self.base) ** self.exponents * self.divisors

    @property
    def attention_factor(self) -> float:
        """Multiplies cos and sin, and so attention logits by its square."""
        return 1.0

    @property
    def wavelengths(self) -> tuple[float, float]:
        """Shortest and longest wavelength in tokens, of the pairs that turn at all."""
        turning = self.inv_freq[self.inv_freq > 0]
        return 2 * math.pi / float(turning.max()), 2 * math.pi / float(turning.min())

    @property
    def summary(self) -> str:
        """One line for a person."""
        options = "".join(f", {key} {_short(value)}" for key, value in self.options.items())
        return (
            f"{self.name}, factor {self.factor:g} over {self.original_length} tokens, "
            f"theta {self.theta:g}{options}"
        )

    def to_hf(self) -> dict[str, Any]:
        """Return transformers 5's ``rope_parameters`` for config.json."""
        return {"rope_type": "default", "rope_theta": self.theta}


def rounded_list(divisors: np.ndarray, powers: np.ndarray) -> np.ndarray:
    """``RopeScaling.rounded`` of what is served as ``longrope``."""
    return np.float32(1.0) / (divisors.astype(np.float32) * powers)


def longrope_fields(scaling: RopeScaling, short: np.ndarray, long: np.ndarray) -> dict[str, Any]:
    """Return ``rope_parameters`` that list a divisor per pair; any static scaling can be said so.

    ``short_mscale`` and ``long_mscale`` say the attention factor to vLLM and SGLang, which do not
    read ``attention_factor``; transformers warns about the two keys and does not use them.
    """
    return {
        "rope_type": "longrope",
        "rope_theta": scaling.theta,
        "factor": scaling.factor,
        "original_max_position_embeddings": scaling.original_length,
        "short_factor": [float(value) for value in short],
        "long_factor": [float(value) for value in long],
        "attention_factor": scaling.attention_factor,
        "short_mscale": scaling.attention_factor,
        "long_mscale": scaling.attention_factor,
    }


def _is_positive(value: Any) -> bool:
    return is_finite(value) and value > 0


def _short(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    text = str(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({len(text)} characters)"
