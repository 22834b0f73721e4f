# SPDX-License-Identifier: Apache-2.0
"""CLEX's ODE where the weights are: ``ode.solve`` on a GPU, for training.

The same equation, rule and grid in the same float64 as on the host, in two launches of Triton
(``kernels``). Nothing here waits for the device: what depends on settings alone is copied there
once, so a step's solution and its reverse are queued like any layer's.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_cream.extras.clex import runge_kutta
from megatron_cream.extras.clex.ode import Field, grid


@dataclass(frozen=True)
class Constants:
    """What of the ODE is known before the weights are, on the device; n stages, p pairs.

    Attributes:
        rule: what each stage's slope is multiplied by, ``[n, 4]``, see ``kernels``.
        known: q at each stage, and a row of zeros, ``[n + 1, p]``.
        rows: stages that begin at the scales, ``[scales]``, n for the last state.
        ntk: ``log_stretch`` of untrained weights, ``[scales, p]``.
        sizes: the kernels' compile-time arguments.
    """

    rule: Tensor
    known: Tensor
    rows: Tensor
    ntk: Tensor
    sizes: dict[str, Any]


@dataclass(frozen=True)
class Solved:
    """The solution at the scales that were asked for, as ``ode.Solved``.

    Attributes:
        log_stretch: float64 ``[scales, d / 2]``.
    """

    log_stretch: Tensor
    _field: Field
    _constants: Constants
    _weights: Tensor
    _states: Tensor
    _hidden: Tensor

    def pull_back(self, gradient: Tensor) -> Tensor:
        """Return the gradient of the weights ``[size]`` for that of ``log_stretch``, float64."""
        from megatron_cream.extras.clex import kernels

        known, rule = self._constants.known[:-1], self._constants.rule
        upstream = torch.zeros_like(self._states)
        upstream[self._constants.rows] = -gradient
        active, slopes = _ACTIVATIONS[self._field.act](self._hidden)
        up, down = self._field.split(self._weights)
        transposed = torch.cat((down.t().ravel(), up.t().ravel()))
        rates, hidden = torch.empty_like(known), torch.empty_like(slopes)
        kernels.reverse[(1,)](
            *(transposed, rule, upstream, slopes, rates, hidden, len(known)),
            **self._constants.sizes,
        )
        outer = (self._states[:-1] + known).t() @ hidden, active.t() @ rates
        return torch.cat([part.ravel() for part in outer])


def _tanh(u: Tensor) -> tuple[Tensor, Tensor]:
    value = torch.tanh(u)
    return value, 1.0 - value * value


def _silu(u: Tensor) -> tuple[Tensor, Tensor]:
    gate = torch.sigmoid(u)
    value = u * gate
    return value, gate + value * (1.0 - gate)


_ACTIVATIONS = {"tanh": _tanh, "silu": _silu}  # values and derivatives


def solve(field: Field, weights: Tensor, scales: list[float]) -> Solved:
    """Solve the ODE with ``weights``, ``[size]`` of any float type, at increasing ``scales``.

    Weights that make no finite frequencies are no error here: it would have to wait for them.
    """
    from megatron_cream.extras.clex import kernels

    constants = _constants(field, tuple(map(float, scales)), weights.device)
    known, (pairs, hidden) = constants.known, field.shapes[0]
    stages = len(known) - 1
    weights = weights.detach().to(torch.float64, copy=True)  # an optimizer writes into its own
    states, inner = known.new_empty(stages + 1, pairs), known.new_empty(stages, hidden)
    kernels.forward[(1,)](
        *(weights, constants.rule, known, states, inner, stages), **constants.sizes
    )
    stretch = constants.ntk - states[constants.rows]
    return Solved(stretch, field, constants, weights, states, inner)


def frequencies(stretch: Tensor, powers: Tensor, low: Tensor, high: float) -> Tensor:
    """Return float32 frequencies ``[scales, d / 2]``, as ``rounded_list`` rounds a server's.

    A pair whose ``stretch`` is no number turns as at t = 1: a step goes on with numbers to its end,
    which refuses it (``gradients.finish``).

    Args:
        stretch: ``log_stretch``.
        powers: float32 ``[d / 2]``, base ** (2 i / d).
        low, high: ``ode.limits``.
    """
    divisors = torch.maximum(stretch.nan_to_num(nan=0.0), low).clamp(max=high).exp()
    return 1.0 / (divisors.float() * powers)


@lru_cache(maxsize=4)
def _constants(field: Field, scales: tuple[float, ...], device: torch.device) -> Constants:
    from megatron_cream.extras.clex import kernels

    points = np.array(grid(list(scales if scales[0] == 1.0 else (1.0, *scales)), field.step))
    c, e = field.constants()
    ln_alpha = np.log(2.0 * runge_kutta.stage_times(points) - 1.0)
    known = (2.0 * (c - ln_alpha[..., None] * e)).reshape(ln_alpha.size, len(c))
    rule = np.diff(points)[:, None, None] * np.array(kernels.RULE)
    ntk = np.log(2.0 * np.array(scales) - 1.0)[:, None] * e
    rows = 4 * np.searchsorted(points, scales)
    arrays = (rule.reshape(len(known), 4), np.pad(known, ((0, 1), (0, 0))), rows, ntk)
    # Whatever the mode of the step that asks first, later ones use them.
    with torch.inference_mode(False):
        tensors = [torch.from_numpy(array).to(device) for array in arrays]
    return Constants(*tensors, kernels.sizes(field))
