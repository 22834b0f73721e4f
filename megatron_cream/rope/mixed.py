# SPDX-License-Identifier: Apache-2.0
"""Mixed windows: one model, two RoPEs, by the length of the sequence (LongRoPE2, 2502.20082).

Sequences within the original window turn by the model's own RoPE, longer ones by the interpolated
one. Both are lists of divisors under one theta and one attention factor, which is what ``longrope``
is: such a model is exported, served and evaluated by that, and trained by the same two lists.
"""

from __future__ import annotations

import numpy as np

from megatron_cream.rope.by_pair import STOPPED, LongRopeScaling
from megatron_cream.rope.scaling import Floats, RopeScaling, make_scaling

_NAMING_A_FACTOR = {"attention_factor", "mscale", "mscale_all_dim"}


def mix_windows(near: RopeScaling, far: RopeScaling) -> RopeScaling:
    """Return the ``longrope`` that turns by ``near`` up to the original window, by ``far`` beyond.

    ``at_length`` of what is returned chooses. One attention factor holds at every length, because
    transformers has one for both lists: that of ``near``, 1 for a model that was not scaled before,
    so that within its window the model is the one that it was; or the one that the options of
    ``far`` name. A ``longrope`` has both lists already, and is returned as it is.

    Args:
        near: the model's own RoPE.
        far: the interpolation, of the same original window and dimensions.
    """
    if isinstance(far, LongRopeScaling):
        return far
    named = _NAMING_A_FACTOR & far.options.keys()
    return make_scaling(
        LongRopeScaling.method,
        dim=far.dim,
        base=near.theta,
        factor=far.factor,
        original_length=far.original_length,
        short_factor=_listed(near, near.theta),
        long_factor=_listed(far, near.theta),
        attention_factor=(far if named else near).attention_factor,
    )


def _listed(scaling: RopeScaling, theta: float) -> list[float]:
    """Return how many times slower than at ``theta`` each pair turns; a list holds no infinity."""
    ratio = (scaling.theta / theta) ** scaling.exponents * scaling.divisors
    listed: Floats = np.minimum(ratio, STOPPED)
    return [float(value) for value in listed]
