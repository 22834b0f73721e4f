# SPDX-License-Identifier: Apache-2.0
"""RoPE interpolations by name. numpy only."""

from __future__ import annotations

import sys
from typing import Any

from megatron_cream.errors import UserError
from megatron_cream.rope.base import RopeScaling
from megatron_cream.rope.by_pair import CopeScaling, DropeScaling, Llama3Scaling, LongRopeScaling
from megatron_cream.rope.clex import ClexScaling
from megatron_cream.rope.uniform import (
    DynamicScaling,
    LinearScaling,
    NoScaling,
    NtkScaling,
    ProportionalScaling,
    ThetaScaling,
)
from megatron_cream.rope.yarn import YarnPoseScaling, YarnScaling

SCALINGS: dict[str, type[RopeScaling]] = {
    "none": NoScaling,
    "linear": LinearScaling,
    "ntk": NtkScaling,
    "dynamic": DynamicScaling,
    "yarn": YarnScaling,
    "yarn-pose": YarnPoseScaling,
    "llama3": Llama3Scaling,
    "longrope": LongRopeScaling,
    "rope-theta": ThetaScaling,
    "proportional": ProportionalScaling,
    "cope": CopeScaling,
    "drope": DropeScaling,
}

TRAINED: dict[str, type[RopeScaling]] = {"clex": ClexScaling}
"""Their frequencies are weights of the model; the settings alone do not say them."""

EVALUATION_ONLY = ("dynamic",)
"""Their angles change with each sequence's length: a model is not trained with them."""

NOT_BY_FACTOR = ("none", "rope-theta", "longrope")
"""A factor alone does not say these: they have none, or need more settings."""


def make_scaling(
    name: str,
    *,
    dim: int,
    base: float = 10000.0,
    factor: float = 1.0,
    original_length: int,
    **options: Any,
) -> RopeScaling:
    """Return the interpolation ``name``, one of ``SCALINGS`` or ``TRAINED``.

    Args:
        name: value of --rope-interpolation.
        dim: rotated dimensions of a head.
        base: theta; for ``rope-theta`` the new one.
        factor: how many times longer the window becomes.
        original_length: the window before, in tokens.
        options: settings of this method alone, by their names in config.json: ``beta_fast``,
            ``low_freq_factor``, ``long_factor`` ...; None means its default.

    Raises:
        UserError: an unknown name, or a value outside what the method can serve.
    """
    known = SCALINGS | TRAINED
    if name not in known:
        raise UserError(
            f"interpolation (--rope-interpolation) is {name!r}: it must be one of {tuple(known)}"
        )
    given = {key: _plain(value) for key, value in options.items() if value is not None}
    return known[name](name, int(dim), _real(base), _real(factor), int(original_length), given)


def _real(value: float) -> float:
    """Return a float; a number that none can hold stays as it is, to be refused by its value."""
    return float(value) if abs(value) <= sys.float_info.max else value


def _plain(value: Any) -> Any:
    """Return a list for any sequence, so that settings read back from JSON compare equal."""
    return list(value) if isinstance(value, tuple) else value
