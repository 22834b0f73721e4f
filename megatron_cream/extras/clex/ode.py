# SPDX-License-Identifier: Apache-2.0
"""The ODE that CLEX learns, and its solution at every scale that a step may draw, in numpy float64.

State: ln theta(t) of each pair over the scale t >= 1, from the model's own at t = 1. With
alpha(t) = 2 t - 1, c_i = -(2 i / d) ln b and e_i = 2 i / (d - 2), NTK-aware scaling by alpha is
n(t) = c - e ln alpha(t), and CLEX adds a trained term to its slope (arXiv:2310.16450, eq. 13):

    d ln theta / dt = dn / dt + act((ln theta + n) W_up) W_down

dn / dt is known, so only w = ln theta - n is integrated: dw / dt = act((2 n + w) W_up) W_down with
w(1) = 0. Weights of zero then give NTK exactly, whatever the step, where integrating all of it is
2e-5 off at the published step of 0.01. On a GPU ``ode_triton`` takes the same steps, for training.

The grid has every scale that is asked for. n moves as ln alpha, fastest at t = 1: an interval from
n to n + 1 is cut into the fewest equal steps that are at most ``step * (2 n - 1)``.

The steps are Kutta's 3/8 rule, which torchdiffeq calls ``rk4``, to rounding: the tests compare the
two. The state is d / 2 numbers, so that a step costs what its calls cost; recorded by autograd, as
torchdiffeq does, a solution and its gradient take six times as long (``tools/benchmark_ode.py``).
The reverse is that of the steps, not of the ODE, as autograd's is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor

_INITIAL_SEED = 1234  # the same W_up on every rank and at every layout


@dataclass(frozen=True)
class VectorField:
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


def limits(field: VectorField) -> tuple[np.ndarray, float]:
    """Return the least (float64 ``[d / 2]``) and the largest ``log_stretch`` that is served.

    A pair that turns by more than pi per token reads as one that turns back, more slowly; one that
    is e ** 80 slower does not turn at all. Weights may go beyond both, angles do not follow.
    """
    fastest, _ = field.constants()
    return fastest - math.log(math.pi), 80.0


@dataclass(frozen=True)
class OdeSolution:
    """The solution at the scales that were asked for.

    Attributes:
        log_stretch: ln(theta_i(1) / theta_i(t)), how much slower each pair turns at a scale:
            float64 ``[scales, d / 2]``, zeros at t = 1.
    """

    log_stretch: np.ndarray
    _learned: IntegratedSteps
    _rows: np.ndarray

    def pull_back(self, gradient: np.ndarray) -> np.ndarray:
        """Return the gradient of the weights ``[size]`` for that of ``log_stretch``."""
        upstream = np.zeros_like(self._learned.states)
        upstream[self._rows] = -gradient
        with _one_thread():
            parts = self._learned.pull_back(upstream)
        return np.concatenate([part.ravel() for part in parts])


def solve(field: VectorField, weights: np.ndarray, scales: list[float]) -> OdeSolution:
    """Solve the ODE with ``weights``, float64 ``[size]``, at increasing ``scales`` from 1 on."""
    scales = [float(t) for t in scales]
    points = np.array(grid(scales if scales[0] == 1.0 else [1.0, *scales], field.step))
    c, e = field.constants()
    ln_alpha = np.log(2.0 * stage_times(points) - 1.0)
    known = 2.0 * (c - ln_alpha[..., None] * e)
    up, down = field.split(weights)
    with _one_thread():
        learned = integrate(points, known, up, down, _ACTIVATIONS[field.act])
    rows = np.searchsorted(points, scales)
    ntk = np.log(2.0 * np.array(scales) - 1.0)[:, None] * e
    return OdeSolution(ntk - learned.states[rows], learned, rows)


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


_C = (0.0, 1 / 3, 2 / 3, 1.0)
# Rows: the arguments of the four stages, then the result; columns: the state, then the slopes of
# the stages, to be multiplied by the step.
_FORTH = np.zeros((5, 5))
_FORTH[1:, 1:] = np.array(
    [[1 / 3, 0, 0, 0], [-1 / 3, 1, 0, 0], [1, -1, 1, 0], [1 / 8, 3 / 8, 3 / 8, 1 / 8]]
)
# The same by column: what each slope goes into.
_BACK = _FORTH[:, 1:].T.copy()


def stage_times(points: np.ndarray) -> np.ndarray:
    """Return where the slope is evaluated between ``points`` ``[n + 1]``: ``[n, 4]``."""
    return points[:-1, None] + np.diff(points)[:, None] * _C


@dataclass(frozen=True)
class Activation:
    """A function of numbers and its derivative, the latter out of argument and value."""

    value: Callable[[np.ndarray], np.ndarray]
    slope: Callable[[np.ndarray, np.ndarray], np.ndarray]


def _silu(u: np.ndarray) -> np.ndarray:
    return u * _sigmoid(u)


def _silu_slope(u: np.ndarray, value: np.ndarray) -> np.ndarray:
    gate = _sigmoid(u)
    return gate + value * (1.0 - gate)


def _sigmoid(u: np.ndarray) -> np.ndarray:
    return 0.5 + 0.5 * np.tanh(0.5 * u)  # never overflows


_ACTIVATIONS = {
    "tanh": Activation(np.tanh, lambda u, value: 1.0 - value * value),
    "silu": Activation(_silu, _silu_slope),
}


@dataclass
class IntegratedSteps:
    """A solved dw / dt = act((w + q(t)) W_up) W_down with w = 0 at the first point.

    Attributes:
        states: w at each point, ``[n + 1, p]``.
    """

    states: np.ndarray
    _steps: np.ndarray
    _up: np.ndarray
    _down: np.ndarray
    _act: Activation
    _inputs: np.ndarray  # w + q at each stage, [n, 4, p]
    _hidden: np.ndarray  # before the activation, [n, 4, h]
    _active: np.ndarray  # after it

    def pull_back(self, upstream: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the gradients of W_up ``[p, h]`` and W_down ``[h, p]`` for that of the states."""
        slopes = self._act.slope(self._hidden, self._active)
        up_t, down_t = self._up.T.copy(), self._down.T.copy()
        rates = np.empty_like(self._inputs)  # gradients of the stages' slopes
        hidden = np.empty_like(self._hidden)
        # Gradients of the arguments of the four stages, and of the state behind the step.
        stack = np.zeros((5, self.states.shape[1]))
        stack[4] = upstream[-1]
        for n in reversed(range(len(self._steps))):
            coefficients = self._steps[n] * _BACK
            for i in (3, 2, 1, 0):
                rate = np.dot(coefficients[i, i + 1 :], stack[i + 1 :], out=rates[n, i])
                inner = np.dot(rate, down_t, out=hidden[n, i])
                inner *= slopes[n, i]
                np.dot(inner, up_t, out=stack[i])
            stack[4] = stack.sum(axis=0) + upstream[n]
        return _outer(self._inputs, hidden), _outer(self._active, rates)


def integrate(
    points: np.ndarray, known: np.ndarray, up: np.ndarray, down: np.ndarray, act: Activation
) -> IntegratedSteps:
    """Integrate over ``points``.

    Args:
        points: t of each state, ``[n + 1]``, increasing.
        known: q at ``stage_times(points)``, ``[n, 4, p]``.
        up, down: W_up ``[p, h]`` and W_down ``[h, p]``.
    """
    steps = np.diff(points)
    count, pairs = len(steps), up.shape[0]
    states = np.zeros((count + 1, pairs))
    inputs = np.empty((count, 4, pairs))
    hidden, active = (np.empty((count, 4, up.shape[1])) for _ in range(2))
    stack = np.zeros((5, pairs))  # the state before the step, and the slopes of its four stages
    with np.errstate(over="ignore", invalid="ignore"):  # who uses the states checks them
        for n, step in enumerate(steps):
            coefficients = step * _FORTH
            coefficients[:, 0] = 1.0
            for i in range(4):
                argument = np.dot(coefficients[i, : i + 1], stack[: i + 1], out=inputs[n, i])
                argument += known[n, i]
                inner = np.dot(argument, up, out=hidden[n, i])
                active[n, i] = act.value(inner)
                np.dot(active[n, i], down, out=stack[i + 1])
            stack[0] = states[n + 1] = coefficients[4] @ stack
    return IntegratedSteps(states, steps, up, down, act, inputs, hidden, active)


def _one_thread() -> AbstractContextManager:
    """Keep numpy's BLAS on the calling thread: waking others takes longer than these products."""
    return _controller().limit(limits=1, user_api="blas")


@cache
def _controller() -> ThreadpoolController:
    return ThreadpoolController()


def _outer(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return the sum over steps and stages of outer products."""
    return left.reshape(-1, left.shape[-1]).T @ right.reshape(-1, right.shape[-1])
