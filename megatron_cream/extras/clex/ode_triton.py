# SPDX-License-Identifier: Apache-2.0
"""CLEX's ODE where the weights are: all Runge-Kutta steps in one launch of Triton, for training.

The same equation, rule and grid in the same float64 as ``ode``, and its reverse in a second launch.
Nothing here waits for the device: what depends on settings alone is copied there once, so a step's
solution and its reverse are queued like any layer's.

One program: a stage needs the one before, and it is two products of a vector with 64 KiB of float64
(d = 128), less than telling another multiprocessor takes. Matrices and state stay in registers
where they fit. No thread reads what another one has written, except inside Triton's own sums.

Kutta's 3/8 rule is a shift register here, so that all stages are one loop. Beside a stage's x it
has a, b and c, where the coming arguments and the result of the step add up; with k the slope at x,

    x, a, b, c = a + e0 k, b + e1 k, c + e2 k, c + e3 k

for e of (h/3, -h/3, h, h/8), (h, -h, 3h/8, 3h/8), (h, 3h/8, 3h/8, 3h/8) and (h/8, h/8, h/8, h/8):
behind the fourth stage all are the next state. Its reverse hands on what comes back likewise.

Numbers of pairs p and of hidden units h need not be powers of two: tiles are padded with zeros,
which stay zeros, as act(0) = 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_cream.extras.clex.ode import VectorField, grid, stage_times


@dataclass(frozen=True)
class OdeConstants:
    """What of the ODE is known before the weights are, on the device; n stages, p pairs.

    Attributes:
        rule: what each stage's slope is multiplied by, ``[n, 4]``, see the module.
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
class QueuedSolution:
    """The solution at the scales that were asked for, as ``ode.OdeSolution``.

    Attributes:
        log_stretch: float64 ``[scales, d / 2]``.
    """

    log_stretch: Tensor
    _field: VectorField
    _constants: OdeConstants
    _weights: Tensor
    _states: Tensor
    _hidden: Tensor

    def pull_back(self, gradient: Tensor) -> Tensor:
        """Return the gradient of the weights ``[size]`` for that of ``log_stretch``, float64."""
        known, rule = self._constants.known[:-1], self._constants.rule
        upstream = torch.zeros_like(self._states)
        upstream[self._constants.rows] = -gradient
        active, slopes = _ACTIVATIONS[self._field.act](self._hidden)
        up, down = self._field.split(self._weights)
        transposed = torch.cat((down.t().ravel(), up.t().ravel()))
        rates, hidden = torch.empty_like(known), torch.empty_like(slopes)
        _reverse[(1,)](
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


def solve(field: VectorField, weights: Tensor, scales: list[float]) -> QueuedSolution:
    """Solve the ODE with ``weights``, ``[size]`` of any float type, at increasing ``scales``.

    Weights that make no finite frequencies are no error here: it would have to wait for them.
    """
    constants = _constants(field, tuple(map(float, scales)), weights.device)
    known, (pairs, hidden) = constants.known, field.shapes[0]
    stages = len(known) - 1
    weights = weights.detach().to(torch.float64, copy=True)  # an optimizer writes into its own
    states, inner = known.new_empty(stages + 1, pairs), known.new_empty(stages, hidden)
    _forward[(1,)](*(weights, constants.rule, known, states, inner, stages), **constants.sizes)
    stretch = constants.ntk - states[constants.rows]
    return QueuedSolution(stretch, field, constants, weights, states, inner)


def frequencies(stretch: Tensor, powers: Tensor, low: Tensor, high: float) -> Tensor:
    """Return float32 frequencies ``[scales, d / 2]``, as ``rounded_list`` rounds a server's.

    A pair whose ``stretch`` is no number turns as at t = 1: a step goes on with numbers to its end,
    which refuses it (``trained_rotary.finish``).

    Args:
        stretch: ``log_stretch``.
        powers: float32 ``[d / 2]``, base ** (2 i / d).
        low, high: ``ode.limits``.
    """
    divisors = torch.maximum(stretch.nan_to_num(nan=0.0), low).clamp(max=high).exp()
    return 1.0 / (divisors.float() * powers)


@lru_cache(maxsize=4)
def _constants(field: VectorField, scales: tuple[float, ...], device: torch.device) -> OdeConstants:
    points = np.array(grid(list(scales if scales[0] == 1.0 else (1.0, *scales)), field.step))
    c, e = field.constants()
    ln_alpha = np.log(2.0 * stage_times(points) - 1.0)
    known = (2.0 * (c - ln_alpha[..., None] * e)).reshape(ln_alpha.size, len(c))
    rule = np.diff(points)[:, None, None] * np.array(_RULE)
    ntk = np.log(2.0 * np.array(scales) - 1.0)[:, None] * e
    rows = 4 * np.searchsorted(points, scales)
    # Whatever the mode of the step that asks first, later ones use them.
    with torch.inference_mode(False):
        return OdeConstants(
            rule=torch.from_numpy(rule.reshape(len(known), 4)).to(device),
            known=torch.from_numpy(np.pad(known, ((0, 1), (0, 0)))).to(device),
            rows=torch.from_numpy(rows).to(device),
            ntk=torch.from_numpy(ntk).to(device),
            sizes=sizes(field),
        )


_RULE = ((1 / 3, -1 / 3, 1, 1 / 8), (1, -1, 3 / 8, 3 / 8), (1, 3 / 8, 3 / 8, 3 / 8), (1 / 8,) * 4)
"""e of the four stages for steps of one."""

_TILE = 8192  # numbers; two such tiles are half of a multiprocessor's registers


def sizes(field: VectorField) -> dict[str, Any]:
    """Return the compile-time arguments of both kernels, and their warps."""
    pairs, hidden = field.shapes[0]
    padded = triton.next_power_of_2(pairs)
    block = min(triton.next_power_of_2(hidden), _TILE // padded)
    return {
        "PAIRS": pairs,
        "HIDDEN": hidden,
        "PADDED": padded,
        "BLOCK": block,
        "BLOCKS": triton.cdiv(hidden, block),
        "TANH": field.act == "tanh",
        "num_warps": min(8, max(4, padded * block // 1024)),
        "enable_fp_fusion": True,
    }


@triton.jit
def _forward(
    matrices,  # W_up [p, h] and W_down [h, p]
    rule,  # e of each stage, [n, 4]
    known,  # q at each stage, and a row that is not used, [n + 1, p]
    states,  # x of each stage and the last state, [n + 1, p], written as all below
    hidden,  # before the activation, [n, h]
    stages,  # n
    PAIRS: tl.constexpr,
    HIDDEN: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    TANH: tl.constexpr,
):
    """Integrate dw / dt = act((w + q(t)) W_up) W_down from w = 0."""
    pair = tl.arange(0, PADDED)
    real = pair < PAIRS
    second = matrices + PAIRS * HIDDEN
    near = _tile(matrices, 0, 0, PAIRS, HIDDEN, PADDED, BLOCK)
    far = _tile(second, 0, 0, HIDDEN, PAIRS, BLOCK, PADDED)
    x = tl.zeros([PADDED], dtype=tl.float64)
    a, b, c = x, x, x
    q = tl.load(known + pair, mask=real, other=0.0)
    for n in range(stages):
        e0, e1, e2, e3 = _row(rule, n)
        tl.store(states + n * PAIRS + pair, x, mask=real)
        argument = x + q
        # Of the next stage: nothing waits for it.
        q = tl.load(known + (n + 1) * PAIRS + pair, mask=real, other=0.0)
        k = _through(
            argument, near, far, matrices, second, hidden + n * HIDDEN, hidden,
            PAIRS, HIDDEN, PADDED, BLOCK, BLOCKS, TANH, False,
        )  # fmt: skip
        x, a, b, c = a + e0 * k, b + e1 * k, c + e2 * k, c + e3 * k
    tl.store(states + stages * PAIRS + pair, x, mask=real)


@triton.jit
def _reverse(
    matrices,  # W_down and W_up transposed, [p, h] and [h, p]
    rule,
    upstream,  # gradient of states, [n + 1, p]
    slopes,  # the activation's derivative at each stage, [n, h]
    rates,  # gradient of each stage's slope k, [n, p], written
    hidden,  # gradient before the activation, [n, h], written
    stages,
    PAIRS: tl.constexpr,
    HIDDEN: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    TANH: tl.constexpr,
):
    """Go back through the stages of ``_forward``."""
    pair = tl.arange(0, PADDED)
    real = pair < PAIRS
    second = matrices + PAIRS * HIDDEN
    near = _tile(matrices, 0, 0, PAIRS, HIDDEN, PADDED, BLOCK)
    far = _tile(second, 0, 0, HIDDEN, PAIRS, BLOCK, PADDED)
    a = tl.zeros([PADDED], dtype=tl.float64)
    b, c = a, a
    x = tl.load(upstream + stages * PAIRS + pair, mask=real, other=0.0)
    # Four at a time: Triton 3.6 and 3.9 take a value that a loop only hands on for a constant, if
    # both begin as the same one.
    for i in range(0, stages, 4):
        for j in tl.static_range(4):
            n = stages - 1 - i - j
            e0, e1, e2, e3 = _row(rule, n)
            own = tl.load(upstream + n * PAIRS + pair, mask=real, other=0.0)
            rate = e0 * x + e1 * a + e2 * b + e3 * c
            tl.store(rates + n * PAIRS + pair, rate, mask=real)
            back = _through(
                rate, near, far, matrices, second, hidden + n * HIDDEN, slopes + n * HIDDEN,
                PAIRS, HIDDEN, PADDED, BLOCK, BLOCKS, TANH, True,
            )  # fmt: skip
            x, a, b, c = back + own, x, a, b + c


@triton.jit
def _through(
    vector,  # [p]
    near,  # the first blocks of the matrices: [p, block] and [block, p]
    far,
    near_at,
    far_at,
    between,  # [h], what is between the two: written
    slopes,  # [h], read where BACK
    PAIRS: tl.constexpr,
    HIDDEN: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    TANH: tl.constexpr,
    BACK: tl.constexpr,
):
    """Return act(vector near) far, or (slopes * (vector near)) far where BACK, ``[p]``."""
    unit = tl.arange(0, BLOCK)
    if BLOCKS == 1:
        value = _between(vector, near, between, slopes, unit, HIDDEN, TANH, BACK)
        return tl.sum(value[:, None] * far, axis=0)
    else:
        products = tl.zeros([BLOCK, PADDED], dtype=tl.float64)
        for block in range(BLOCKS):
            first = block * BLOCK
            near = _tile(near_at, 0, first, PAIRS, HIDDEN, PADDED, BLOCK)
            value = _between(vector, near, between, slopes, first + unit, HIDDEN, TANH, BACK)
            far = _tile(far_at, first, 0, HIDDEN, PAIRS, BLOCK, PADDED)
            products += value[:, None] * far
        return tl.sum(products, axis=0)


@triton.jit
def _between(
    vector,
    near,
    between,
    slopes,
    unit,
    HIDDEN: tl.constexpr,
    TANH: tl.constexpr,
    BACK: tl.constexpr,
):
    """Return hidden ``unit`` behind the activation, or their gradients before it where BACK."""
    real = unit < HIDDEN
    if BACK:
        slope = tl.load(slopes + unit, mask=real, other=0.0)
        value = tl.sum(vector[:, None] * near, axis=0) * slope
        tl.store(between + unit, value, mask=real)
        return value
    else:
        inner = tl.sum(vector[:, None] * near, axis=0)
        tl.store(between + unit, inner, mask=real)
        # exp may overflow: the quotient is zero.
        if TANH:
            return 2.0 / (1.0 + tl.exp(-2.0 * inner)) - 1.0
        else:
            return inner / (1.0 + tl.exp(-inner))


@triton.jit
def _row(rule, n):
    return (
        tl.load(rule + 4 * n),
        tl.load(rule + 4 * n + 1),
        tl.load(rule + 4 * n + 2),
        tl.load(rule + 4 * n + 3),
    )


@triton.jit
def _tile(
    matrix,
    top,
    left,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Return ``[rows, columns]`` of a matrix ``[height, width]`` from (top, left) on."""
    row, column = top + tl.arange(0, ROWS)[:, None], left + tl.arange(0, COLUMNS)[None, :]
    real = (row < HEIGHT) & (column < WIDTH)
    return tl.load(matrix + row * WIDTH + column, mask=real, other=0.0)
