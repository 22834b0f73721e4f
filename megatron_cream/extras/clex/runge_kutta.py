# SPDX-License-Identifier: Apache-2.0
"""Runge-Kutta steps of CLEX's ODE and their exact reverse, in numpy float64.

Kutta's 3/8 rule, which torchdiffeq calls ``rk4``, to rounding: the tests compare the two. The state
is d / 2 numbers, so that a step costs what its calls cost; recorded by autograd, as torchdiffeq
does, a solution and its gradient take six times as long (``tools/benchmark_ode.py``). The reverse
is that of the steps, not of the ODE, as autograd's is.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache

import numpy as np
from threadpoolctl import ThreadpoolController

_C = (0.0, 1 / 3, 2 / 3, 1.0)
# Rows: the arguments of the four stages, then the result; columns: the state, then the slopes of
# the stages, to be multiplied by the step.
_FORTH = np.zeros((5, 5))
_FORTH[1:, 1:] = [[1 / 3, 0, 0, 0], [-1 / 3, 1, 0, 0], [1, -1, 1, 0], [1 / 8, 3 / 8, 3 / 8, 1 / 8]]
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


ACTIVATIONS = {
    "tanh": Activation(np.tanh, lambda u, value: 1.0 - value * value),
    "silu": Activation(_silu, _silu_slope),
}


@dataclass
class Solution:
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


def solve(
    points: np.ndarray, known: np.ndarray, up: np.ndarray, down: np.ndarray, act: Activation
) -> Solution:
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
    return Solution(states, steps, up, down, act, inputs, hidden, active)


def one_thread() -> AbstractContextManager:
    """Keep numpy's BLAS on the calling thread: waking others takes longer than these products."""
    return _controller().limit(limits=1, user_api="blas")


@cache
def _controller() -> ThreadpoolController:
    return ThreadpoolController()


def _outer(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return the sum over steps and stages of outer products."""
    return left.reshape(-1, left.shape[-1]).T @ right.reshape(-1, right.shape[-1])
