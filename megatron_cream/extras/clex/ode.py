# SPDX-License-Identifier: Apache-2.0
"""The ODE that CLEX learns, and its solution at every scale that a step may draw.

State: ln theta(t) of each pair over the scale t >= 1, from the model's own at t = 1. With
alpha(t) = 2 t - 1, c_i = -(2 i / d) ln b and e_i = 2 i / (d - 2), NTK-aware scaling by alpha is
n(t) = c - e ln alpha(t), and CLEX adds a trained term to its slope (arXiv:2310.16450, eq. 13):

    d ln theta / dt = dn / dt + act((ln theta + n) W_up) W_down

dn / dt is known, so only w = ln theta - n is integrated: dw / dt = act((2 n + w) W_up) W_down with
w(1) = 0. Weights of zero then give NTK exactly, whatever the step, where integrating all of it is
2e-5 off at the published step of 0.01. Numpy's float64: the state is d / 2 numbers. On a GPU
``on_gpu`` takes the same steps, for training.

The grid has every scale that is asked for. n moves as ln alpha, fastest at t = 1: an interval from
n to n + 1 is cut into the fewest equal steps that are at most ``step * (2 n - 1)``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_cream.extras.clex import runge_kutta

_INITIAL_SEED = 1234  # the same W_up on every rank and at every layout


@dataclass(frozen=True)
class Field:
    """The vector field, weights aside.

    Attributes:
        dim: d, rotated dimensions of a head, at least 4.
        base: b, theta of the model before.
        width: hidden width of the trained term as a multiple of d, the paper's lambda.
        act: ``tanh`` or ``silu``.
        step: largest step at t = 1, in units of t.
    """

    dim: int
    base: float
    width: int = 1
    act: str = "tanh"
    step: float = 0.5

    @property
    def shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Shapes of W_up and W_down: ``(d / 2, width d)`` and ``(width d, d / 2)``."""
        pairs, hidden = self.dim // 2, self.width * self.dim
        return (pairs, hidden), (hidden, pairs)

    @property
    def size(self) -> int:
        """Numbers of both together."""
        return self.dim * self.width * self.dim

    def initial(self) -> Tensor:
        """Return float32 weights ``[size]``: W_up uniform in +-1/sqrt(d / 2), W_down zero."""
        up, _ = self.shapes
        weights = torch.zeros(self.size, dtype=torch.float32, device="cpu")
        bound = 1.0 / math.sqrt(up[0])
        generator = torch.Generator(device="cpu").manual_seed(_INITIAL_SEED)
        weights[: math.prod(up)].uniform_(-bound, bound, generator=generator)
        return weights

    def split(self, weights: Any) -> tuple[Any, Any]:
        """Return views W_up, W_down of flat ``weights``, an array or a tensor."""
        up, down = self.shapes
        count = math.prod(up)
        return weights[:count].reshape(up), weights[count:].reshape(down)

    def constants(self) -> tuple[np.ndarray, np.ndarray]:
        """Return c and e, float64 ``[d / 2]``."""
        pairs = np.arange(0, self.dim, 2, dtype=np.float64)
        return -pairs / self.dim * math.log(self.base), pairs / (self.dim - 2)


def limits(field: Field) -> tuple[np.ndarray, float]:
    """Return the least (float64 ``[d / 2]``) and the largest ``log_stretch`` that is served.

    A pair that turns by more than pi a token reads as one that turns back, more slowly; one that is
    e ** 80 slower does not turn at all. Weights may go beyond both, angles do not follow.
    """
    fastest, _ = field.constants()
    return fastest - math.log(math.pi), 80.0


@dataclass(frozen=True)
class Solved:
    """The solution at the scales that were asked for.

    Attributes:
        log_stretch: ln(theta_i(1) / theta_i(t)), how much slower each pair turns at a scale:
            float64 ``[scales, d / 2]``, zeros at t = 1.
    """

    log_stretch: np.ndarray
    _learned: runge_kutta.Solution
    _rows: np.ndarray

    def pull_back(self, gradient: np.ndarray) -> np.ndarray:
        """Return the gradient of the weights ``[size]`` for that of ``log_stretch``."""
        upstream = np.zeros_like(self._learned.states)
        upstream[self._rows] = -gradient
        with runge_kutta.one_thread():
            parts = self._learned.pull_back(upstream)
        return np.concatenate([part.ravel() for part in parts])


def solve(field: Field, weights: np.ndarray, scales: list[float]) -> Solved:
    """Solve the ODE with ``weights``, float64 ``[size]``, at increasing ``scales`` from 1 on."""
    scales = [float(t) for t in scales]
    points = np.array(grid(scales if scales[0] == 1.0 else [1.0, *scales], field.step))
    c, e = field.constants()
    ln_alpha = np.log(2.0 * runge_kutta.stage_times(points) - 1.0)
    known = 2.0 * (c - ln_alpha[..., None] * e)
    up, down = field.split(weights)
    with runge_kutta.one_thread():
        learned = runge_kutta.solve(points, known, up, down, runge_kutta.ACTIVATIONS[field.act])
    rows = np.searchsorted(points, scales)
    ntk = np.log(2.0 * np.array(scales) - 1.0)[:, None] * e
    return Solved(ntk - learned.states[rows], learned, rows)


def grid(scales: list[float], step: float) -> list[float]:
    """Return the points of integration from ``scales[0]`` to the last one, all of them included."""
    points = [scales[0]]
    for low, high in zip(scales, scales[1:], strict=False):
        points += _cut(low, high, step)
    return points


def _cut(low: float, high: float, step: float) -> list[float]:
    """Return the points behind ``low`` up to ``high``; never steps longer than 1."""
    points, start = [], low
    while start < high:
        stop = min(high, math.floor(start) + 1.0)
        count = max(1, math.ceil((stop - start) / (step * (2.0 * start - 1.0)) - 1e-9))
        points += [start + (stop - start) * i / count for i in range(1, count)] + [stop]
        start = stop
    return points
