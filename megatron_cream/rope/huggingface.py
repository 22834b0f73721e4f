# SPDX-License-Identifier: Apache-2.0
"""RoPE in Hugging Face's config.json, read and written; transformers 4 and 5. numpy only."""

from __future__ import annotations

import math
import reprlib
from dataclasses import dataclass
from typing import Any

from megatron_cream.errors import UserError
from megatron_cream.options import integer, is_finite, number
from megatron_cream.rope.scaling import SCALINGS, RopeScaling, make_scaling

_DEFAULT_THETA = {"mixtral": 1e6}
"""What transformers takes where a config.json of that model_type has no rope_theta; else 1e4."""

KEYS = (
    *("max_position_embeddings", "rope_parameters", "rope_theta", "rope_scaling"),
    *("partial_rotary_factor", "rotary_pct", "original_max_position_embeddings"),
)
"""Every field at the top of config.json that RoPE decides."""


def scaling_from_hf(config: dict[str, Any]) -> RopeScaling:
    """Read the interpolation out of a Hugging Face ``config.json``; inverse of ``to_hf``.

    Takes transformers 5's ``rope_parameters`` and version 4's ``rope_scaling`` + ``rope_theta``.
    Angles and attention factor are those written; the name may not be: an NTK model reads back as
    ``none`` with the larger base, ``yarn-pose`` as ``longrope``.

    Args:
        config: all of config.json.

    Returns:
        The scaling, its lengths in tokens; ``inv_freq`` is float64 ``[dim // 2]``, in radians per
        token, and equals transformers' to the bit in float32 (``RopeScaling.rounded``).

    Raises:
        UserError: a ``rope_type`` that is not known, or lacks what it needs, or a value that is
            missing, of another type, or out of range.
    """
    rope = _parameters(config)
    kind = rope.get("rope_type", rope.get("type", "default"))
    known = {name: cls for cls in SCALINGS.values() for name in cls.hf_types}
    if not isinstance(kind, str) or kind not in known:
        raise UserError(
            f"rope_type in config.json is {reprlib.repr(kind)}: it must be one of {tuple(known)}"
        )
    cls = known[kind]
    for key in cls.hf_required:
        if rope.get(key) is None:
            raise UserError(f"rope_type in config.json is {kind!r}: it needs {key!r} beside it")
    return cls.from_hf(_read(config, rope))


@dataclass(frozen=True)
class HfRope:
    """What a config.json says of RoPE, its values validated.

    Attributes:
        config: all of config.json.
        parameters: its ``rope_parameters``, or ``rope_scaling``.
        theta: base of the frequencies.
        window: ``max_position_embeddings``, in tokens.
        original: the original window in tokens, if it is said.
        factor: how many times longer the window became, if it is said.
        head_dim: dimensions of a head.
    """

    config: dict[str, Any]
    parameters: dict[str, Any]
    theta: float
    window: int
    original: int | None
    factor: float | None
    head_dim: int

    @property
    def rotated(self) -> int:
        """Rotated dimensions of a head."""
        config = self.config
        outside = number(config, "partial_rotary_factor", number(config, "rotary_pct", 1.0))
        share = number(self.parameters, "partial_rotary_factor", outside) or 1.0
        if share > 1:
            raise UserError(
                f"partial_rotary_factor in config.json is {share:g}: it must be at most 1"
            )
        return int(self.head_dim * share)

    def by_factor(self) -> tuple[int, float]:
        """Return original window and factor where the factor is what config.json says."""
        factor = self.factor or 1.0
        return self.original or max(1, round(self.window / factor)), factor

    def from_original_window(self) -> tuple[int, float]:
        """Return them where it says the original window, and may leave out the factor."""
        original = self.original or self.window
        return original, self.window / original if self.factor is None else self.factor

    def make(
        self, cls: type[RopeScaling], original_length: int, factor: float, dim: int | None = None
    ) -> RopeScaling:
        """Return the scaling ``cls`` with theta and options as they are said here.

        ``dim`` are the dimensions that count; the rotated ones unless given.
        """
        # transformers takes a beta or mscale of 0 for one that is not given.
        found = {key: self.parameters.get(key) for key in cls.OPTIONS}
        return make_scaling(
            cls.method,
            dim=self.rotated if dim is None else dim,
            base=self.theta,
            factor=factor,
            original_length=original_length,
            **{key: value for key, value in found.items() if value or value is False},
        )


def _read(config: dict[str, Any], rope: dict[str, Any]) -> HfRope:
    window = integer(config, "max_position_embeddings")
    if window is None:
        raise UserError(
            "max_position_embeddings in config.json is missing: RoPE cannot be read without it"
        )
    theta = number(config, "rope_theta") or _DEFAULT_THETA.get(str(config.get("model_type")), 1e4)
    # Phi-3 keeps the original window outside; transformers gives that one priority.
    inside = integer(rope, "original_max_position_embeddings")
    return HfRope(
        config=config,
        parameters=rope,
        theta=number(rope, "rope_theta") or theta,
        window=window,
        original=integer(config, "original_max_position_embeddings", inside),
        factor=number(rope, "factor"),
        head_dim=head_dimensions(config),
    )


def _parameters(config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of RoPE, none of which is NaN or infinite."""
    key = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    rope = config.get(key) or {}
    if not isinstance(rope, dict):
        raise UserError(
            f"{key} in config.json is {reprlib.repr(rope)}: it must be a JSON object, or null"
        )
    if any(isinstance(value, dict) for value in rope.values()):
        raise UserError(
            f"rope_parameters in config.json differ by layer type ({', '.join(rope)}): one "
            "rope_type must hold for all layers"
        )
    for name, value in rope.items():
        for one in value if isinstance(value, list) else (value,):
            if isinstance(one, int | float) and not isinstance(one, bool) and not is_finite(one):
                raise UserError(
                    f"{name} in config.json is {reprlib.repr(value)}: it must be finite"
                )
    return rope


def head_dimensions(config: dict[str, Any]) -> int:
    """Return the dimensions of a head.

    Raises:
        UserError: config.json says neither them nor what they follow from.
    """
    heads = integer(config, "num_attention_heads")
    hidden = integer(config, "hidden_size")
    found = integer(config, "head_dim", hidden // heads if heads and hidden else None)
    if found is None:
        raise UserError(
            "head_dim in config.json is missing: it needs that, or hidden_size and "
            "num_attention_heads"
        )
    return found


def hf_rope_fields(
    scaling: RopeScaling, target_length: int, head_dim: int | None = None
) -> dict[str, Any]:
    """Return all fields of config.json that RoPE decides, for transformers 5 and older readers.

    Args:
        scaling: what the model was trained with.
        target_length: T, the window the model is served at, in tokens.
        head_dim: dimensions of a head, where only ``scaling.dim`` of them are rotated.

    Returns:
        ``max_position_embeddings`` (T; a ``dynamic`` model keeps its original window, from which
        its angles are computed), ``rope_parameters``, ``rope_theta``, ``rope_scaling`` (None for
        plain RoPE, so that it replaces one of the base model), ``partial_rotary_factor`` if some
        dimensions are not rotated, and for ``longrope`` ``original_max_position_embeddings``.
        ``with_rope`` puts them into a config.json.

    Raises:
        UserError: frequencies that are trained, which weights say and settings do not.
    """
    parameters = scaling.to_hf()
    if head_dim is not None and scaling.dim != head_dim:
        parameters["partial_rotary_factor"] = _share(scaling.dim, head_dim)
        partial = {"partial_rotary_factor": parameters["partial_rotary_factor"]}
    else:
        partial = {}
    older = {key: value for key, value in parameters.items() if key != "rope_theta"}
    older["type"] = older["rope_type"]
    fields = {
        "max_position_embeddings": claimed_window(
            scaling.name, scaling.original_length, target_length
        ),
        "rope_parameters": parameters,
        "rope_theta": parameters["rope_theta"],
        "rope_scaling": None if older["rope_type"] == "default" else older,
        **partial,
    }
    if parameters["rope_type"] == "longrope":
        # transformers 4 chooses between the lists by this one alone.
        key = "original_max_position_embeddings"
        fields[key] = parameters[key]
    return fields


def with_rope(config: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """Return a config.json with the RoPE of ``fields`` in place of its own.

    What it said of RoPE and ``fields`` does not is left out: an original window of the base model
    at the top would have priority over the one that is written inside.
    """
    return {key: value for key, value in config.items() if key not in KEYS} | fields


def claimed_window(name: str, original_length: int, target_length: int) -> int:
    """Return the window in tokens that a model claims, whether folder or checkpoint.

    It is T; a ``dynamic`` model keeps its original window, from which its angles are computed.
    """
    return int(original_length if SCALINGS[name].evaluation_only else target_length)


def _share(dim: int, head_dim: int) -> float:
    """Return the share of rotated dimensions that readers turn back into ``dim`` exactly."""
    share = dim / head_dim
    return share if int(head_dim * share) == dim else math.nextafter(share, 1.0)
