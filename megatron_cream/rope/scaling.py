# SPDX-License-Identifier: Apache-2.0
"""RopeScaling: what every RoPE interpolation is, and the registry of them by name. numpy only.

    inv_freq[i] = theta ** (-2 i / d) / divisors[i]

Hugging Face configs say it the same way (``rope_theta`` and factors), so that a trained model and
its exported copy turn by the same angles.

A new interpolation is one class: it names itself, declares its options, and reads and writes
config.json.

    class HalvedScaling(RopeScaling, name="halved"):
        OPTIONS = {"share": Option("share of the pairs that is slowed", default=0.5)}
        ...
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, cast

import numpy as np
import numpy.typing as npt

from megatron_cream.errors import UserError
from megatron_cream.options import Option, is_finite

if TYPE_CHECKING:
    from megatron_cream.rope.huggingface import HfRope

Floats = npt.NDArray[np.float64]
Floats32 = npt.NDArray[np.float32]

SCALINGS: dict[str, type[RopeScaling]] = {}
"""Every interpolation by its name, the value of --rope-interpolation."""

STOPPED = 1e30
"""Divisor of a pair that does not turn, as a list must hold a number: 2e-24 radians at 2M."""

ATTENTION_FACTOR = Option("multiplies cos and sin", default_help="by the formula")
"""The option of methods that have a formula for ``RopeScaling.attention_factor``."""

_SHOWN = 60  # characters of a value in a message


@dataclass(frozen=True)
class RopeScaling:
    """One interpolation of rotary position embeddings.

    Attributes:
        dim: d, rotated dimensions of a head, even.
        base: theta that the method starts from (--rotary-base, or --rope-theta).
        factor: s, how many times longer the window becomes, a real number of at least 1.
        original_length: window in tokens that the model was trained on before.
        options: settings of this method alone, by their names in config.json (--rope-options).
        length: tokens of the sequences it turns, for methods that look at it; None for none yet.
    """

    dim: int
    base: float
    factor: float
    original_length: int
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    length: int | None = None

    method: ClassVar[str] = ""
    """Name of the method, which a class is registered by."""

    least_dim: ClassVar[int] = 2
    """Fewest rotated dimensions that the method can turn."""

    OPTIONS: ClassVar[dict[str, Option]] = {}
    """Every option of the method, by its name in config.json."""

    hf_types: ClassVar[tuple[str, ...]] = ()
    """Values of ``rope_type`` in config.json that ``from_hf`` reads."""

    hf_required: ClassVar[tuple[str, ...]] = ()
    """Settings that such a config.json must have."""

    hf_original_window: ClassVar[bool] = False
    """Whether such a config.json names the window that its factor counts from."""

    varies_with_length: ClassVar[bool] = False
    """Whether ``at_length`` changes the angles."""

    evaluation_only: ClassVar[bool] = False
    """Whether its angles change with each sequence's length, so that no model is trained with it;
    such a model keeps its original window in config.json, from which its angles are computed."""

    by_factor: ClassVar[bool] = True
    """Whether a factor alone says it: others have none, or need more settings."""

    needs_theta: ClassVar[bool] = False
    """Whether --rope-theta is what it is about."""

    goes_on_top: ClassVar[bool] = False
    """Whether it asks for nothing but a ratio of angles, so that ``compose`` takes it on top of
    another one. The others look at wavelengths of an unscaled model."""

    mixes: ClassVar[bool] = True
    """Whether it is one fixed list of frequencies, beside which a model can keep its own within the
    original window (--mixed-windows)."""

    trained_by: ClassVar[str] = ""
    """Module that trains its frequencies, a ``ScalingTrainer``; empty where settings say them."""

    draws_scales: ClassVar[bool] = False
    """Whether each sample has a scale of its own, which its angles depend on."""

    def __init_subclass__(cls, name: str = "", **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if name in SCALINGS:
            raise ValueError(f"interpolation {name!r} is registered twice")
        if name:
            cls.method = name
            SCALINGS[name] = cls

    def __post_init__(self) -> None:
        if self.dim < self.least_dim or self.dim % 2:
            raise UserError(
                f"dim is {self.dim}: the rotated dimensions must be even, and for {self.name} "
                f"at least {self.least_dim}"
            )
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
        option = self.OPTIONS[key]
        if option.per_pair:
            numbers = isinstance(value, list | tuple) and not any(map(option.needed, value))
            fits = numbers and len(value) == self.dim // 2
            pairs = f"one per pair of {self.dim} dimensions"
            needed = None if fits else f"{self.dim // 2} positive numbers, {pairs}"
        else:
            needed = option.needed(value)
        if needed:
            shown = repr(value) if option.choices else _short(value)
            raise UserError(f"{key} (--rope-options) is {shown}: it must be {needed}")

    @property
    def name(self) -> str:
        """Value of --rope-interpolation."""
        return self.method

    @property
    def trained(self) -> bool:
        """Whether its frequencies are weights of the model; the settings alone do not say them."""
        return bool(self.trained_by)

    @property
    def trained_size(self) -> int:
        """Number of those weights; 0 without."""
        return 0

    @property
    def scales(self) -> list[float]:
        """Every scale that training may draw, increasing; empty without ``draws_scales``."""
        return []

    def scale_of(self, length: int) -> float:
        """Return the scale of sequences of ``length`` tokens; 1 without ``draws_scales``."""
        return 1.0

    def option(self, key: str) -> Any:
        """Return an option's value or its default."""
        return self.options.get(key, self.OPTIONS[key].default)

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
    def divisors(self) -> Floats:
        """float64 ``[dim // 2]``: what each frequency is divided by on top of ``theta``."""
        return np.ones(self.dim // 2)

    @property
    def exponents(self) -> Floats:
        """float64 ``[dim // 2]``: 2 i / d."""
        return np.arange(0, self.dim, 2, dtype=np.float64) / self.dim

    @property
    def inv_freq(self) -> Floats:
        """float64 ``[dim // 2]``: radians per token, fastest first."""
        return self.theta**-self.exponents / self.divisors

    def rounded(self, powers: Floats32) -> Floats32:
        """Return float32 ``inv_freq`` out of float32 ``theta ** (2 i / d)``.

        In the order of operations in which transformers computes it for this type: the last bit
        of a frequency near 1 is an angle of 0.016 at position 262143.
        """
        rounded: Floats32 = np.divide(np.float32(1.0) / powers, self.divisors.astype(np.float32))
        return rounded

    @property
    def stretch(self) -> Floats:
        """float64 ``[dim // 2]``: how many times slower than at ``base`` each pair turns."""
        return (self.theta / self.base) ** self.exponents * self.divisors

    @property
    def attention_factor(self) -> float:
        """Multiplies cos and sin, and so attention logits by its square."""
        return 1.0

    @property
    def wavelengths(self) -> tuple[float, float]:
        """Shortest and longest wavelength in tokens, of the pairs that turn at all."""
        turning = self.inv_freq[self.divisors < STOPPED]
        if not len(turning):
            return math.inf, math.inf
        return 2 * math.pi / float(turning.max()), 2 * math.pi / float(turning.min())

    @property
    def summary(self) -> str:
        """One line for a person."""
        options = "".join(f", {key} {_short(value)}" for key, value in self.options.items())
        return (
            f"{self.name}, factor {self.factor:g} over {self.original_length} tokens, "
            f"theta {self.theta:g}{options}"
        )

    @classmethod
    def from_hf(cls, rope: HfRope) -> RopeScaling:
        """Return the scaling that a config.json of one of ``hf_types`` describes."""
        counted = rope.from_original_window() if cls.hf_original_window else rope.by_factor()
        return rope.make(cls, *counted)

    def to_hf(self) -> dict[str, Any]:
        """Return transformers 5's ``rope_parameters`` for config.json."""
        return {"rope_type": "default", "rope_theta": self.theta}


class ScalingTrainer(Protocol):
    """What ``RopeScaling.trained_by`` names: a module that trains the frequencies of a method."""

    def configure(self, config: Any, starts_without: bool) -> None:
        """Put what training needs into Megatron's model config, once, before the model is built.

        ``starts_without`` says that the checkpoint a run starts from has no such weights.
        """

    def rotary_class(self) -> type[Any]:
        """Return the ``PositionRotaryEmbedding`` that takes the place of Megatron's."""

    def freeze_stored(self, scaling: Any, stored: Any) -> RopeScaling:
        """Return what to export: the frequencies of a checkpoint's weights, as settings."""


def trainer_of(scaling: RopeScaling | type[RopeScaling]) -> ScalingTrainer | None:
    """Return what trains the frequencies of a scaling, None where settings alone say them."""
    if not scaling.trained_by:
        return None
    return cast(ScalingTrainer, importlib.import_module(scaling.trained_by))


def make_scaling(
    name: str,
    *,
    dim: int,
    base: float = 10000.0,
    factor: float = 1.0,
    original_length: int,
    **options: Any,
) -> RopeScaling:
    """Return the interpolation ``name``, one of ``SCALINGS``.

    Args:
        name: value of --rope-interpolation.
        dim: rotated dimensions of a head.
        base: theta; for ``rope-theta`` the new one.
        factor: how many times longer the window becomes.
        original_length: the window before, in tokens.
        options: settings of this method alone, by their names in config.json: ``beta_fast``,
            ``low_freq_factor``, ``long_factor`` ...; None means its default.

    Returns:
        The scaling: ``inv_freq`` float64 ``[dim // 2]`` in radians per token, ``attention_factor``,
        ``to_hf``. Each class names the paper that its formula is from.

    Raises:
        UserError: an unknown name, or a value outside what the method takes.
    """
    given = {key: _plain(value) for key, value in options.items() if value is not None}
    return scaling_class(name)(int(dim), _real(base), _real(factor), int(original_length), given)


def scaling_class(name: str) -> type[RopeScaling]:
    """Return the class of an interpolation.

    Raises:
        UserError: an unknown name.
    """
    if name not in SCALINGS:
        raise UserError(
            f"interpolation (--rope-interpolation) is {name!r}: it must be one of {tuple(SCALINGS)}"
        )
    return SCALINGS[name]


def rounded_list(divisors: Floats, powers: Floats32) -> Floats32:
    """Return ``RopeScaling.rounded`` of what is served as ``longrope``."""
    return np.float32(1.0) / (divisors.astype(np.float32) * powers)


def longrope_fields(scaling: RopeScaling, short: Floats, long: Floats) -> dict[str, Any]:
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


class ListedScaling(RopeScaling):
    """One that servers know as ``longrope``, by a list of its divisors."""

    def rounded(self, powers: Floats32) -> Floats32:
        return rounded_list(self.divisors, powers)

    def to_hf(self) -> dict[str, Any]:
        return longrope_fields(self, self.divisors, self.divisors)


def _is_positive(value: Any) -> bool:
    return is_finite(value) and value > 0


def _short(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    text = str(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({len(text)} characters)"


def _real(value: float) -> float:
    """Return a float; a number that none can hold stays as it is, to be refused by its value."""
    return float(value) if abs(value) <= sys.float_info.max else value


def _plain(value: Any) -> Any:
    """Return a list for any sequence, so that settings read back from JSON compare equal."""
    return list(value) if isinstance(value, tuple) else value
