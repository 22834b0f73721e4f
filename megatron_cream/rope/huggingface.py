# SPDX-License-Identifier: Apache-2.0
"""RoPE in Hugging Face's config.json, read and written; transformers 4 and 5. numpy only."""

from __future__ import annotations

import math
from typing import Any

from megatron_cream.errors import UserError
from megatron_cream.rope.base import RopeScaling
from megatron_cream.rope.scaling import SCALINGS, make_scaling

# rope_type in config.json to our name. An NTK model is a default one with a larger theta.
_NAMES = {
    "default": "none",
    "linear": "linear",
    "dynamic": "dynamic",
    "yarn": "yarn",
    "longrope": "longrope",
    "su": "longrope",  # what the first Phi-3 configs called it
    "llama3": "llama3",
    "proportional": "proportional",
}
_REQUIRED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}


def scaling_from_hf(config: dict[str, Any]) -> RopeScaling:
    """Read the interpolation out of a Hugging Face ``config.json``; inverse of ``to_hf``.

    Takes transformers 5's ``rope_parameters`` and version 4's ``rope_scaling`` + ``rope_theta``.
    Angles and attention factor are those written; the name may not be: an NTK model reads back as
    ``none`` with the larger base, ``yarn-pose`` as ``longrope``.

    Raises:
        UserError: a ``rope_type`` that is not known, or lacks what it needs.
    """
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    kind = rope.get("rope_type", rope.get("type", "default"))
    if any(isinstance(value, dict) for value in rope.values()):
        raise UserError(
            f"rope_parameters in config.json differ by layer type ({', '.join(rope)}): one "
            "rope_type must hold for all layers"
        )
    if kind not in _NAMES:
        raise UserError(f"rope_type in config.json is {kind!r}: it must be one of {tuple(_NAMES)}")
    name = _NAMES[kind]
    for key in _REQUIRED.get(name, ()):
        if rope.get(key) is None:
            raise UserError(f"rope_type in config.json is {kind!r}: it needs {key!r} beside it")
    original_length, factor = _window(config, rope, name)
    return make_scaling(
        name,
        dim=_rotated(config, rope, name),
        base=rope.get("rope_theta") or config.get("rope_theta") or 10000.0,
        factor=factor,
        original_length=original_length,
        **_options(rope, name),
    )


def _options(rope: dict[str, Any], name: str) -> dict[str, Any]:
    # transformers takes a beta or mscale of 0 for one that is not given.
    found = {key: rope.get(key) for key in SCALINGS[name].OPTIONS}
    return {key: value for key, value in found.items() if value or value is False}


def _rotated(config: dict[str, Any], rope: dict[str, Any], name: str) -> int:
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    if name == "proportional":
        return head_dim  # its share is an option: all dimensions count in the exponents
    return int(head_dim * rope.get("partial_rotary_factor", _partial(config)))


def _partial(config: dict[str, Any]) -> float:
    return config.get("partial_rotary_factor", config.get("rotary_pct", 1.0))


def _window(config: dict[str, Any], rope: dict[str, Any], name: str) -> tuple[int, float]:
    """Return the original window in tokens and the factor."""
    window = config["max_position_embeddings"]
    # Phi-3 keeps the original window outside; transformers gives that one priority.
    original = config.get("original_max_position_embeddings")
    original = original or rope.get("original_max_position_embeddings")
    factor = rope.get("factor")
    if name in ("yarn", "longrope", "llama3"):
        original = original or window
        return original, float(window / original if factor is None else factor)
    factor = float(factor or 1.0)
    if name == "dynamic":
        return window, factor
    return original or max(1, round(window / factor)), factor


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
        plain RoPE, so that it replaces one of the base model), and ``partial_rotary_factor`` if
        some dimensions are not rotated.
    """
    parameters = scaling.to_hf()
    partial = head_dim is not None and scaling.dim != head_dim
    if partial:
        parameters["partial_rotary_factor"] = _share(scaling.dim, head_dim)
    older = {key: value for key, value in parameters.items() if key != "rope_theta"}
    older["type"] = older["rope_type"]
    window = scaling.original_length if scaling.name == "dynamic" else int(target_length)
    fields = {
        "max_position_embeddings": window,
        "rope_parameters": parameters,
        "rope_theta": parameters["rope_theta"],
        "rope_scaling": None if older["rope_type"] == "default" else older,
    }
    if partial:
        fields["partial_rotary_factor"] = parameters["partial_rotary_factor"]
    return fields


def _share(dim: int, head_dim: int) -> float:
    """Return the share of rotated dimensions that readers turn back into ``dim`` exactly."""
    share = dim / head_dim
    return share if int(head_dim * share) == dim else math.nextafter(share, 1.0)
