# SPDX-License-Identifier: Apache-2.0
"""Frequencies at every scale that training draws: solved once a step, whatever takes part in it.

The weights do not change between two updates, so all micro-batches, pipeline chunks and recomputed
layers of a step share one table and add their gradients to it. The ODE is solved where the weights
are, in numpy on a CPU and by ``on_gpu`` on a GPU, where the host waits for nothing; its steps wait
there until ``gradients`` has the table's gradient of all ranks. Frequencies of evaluation are
solved on the host, as those of an export are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_cream.extras.clex import ode, on_gpu
from megatron_cream.extras.clex.frozen import divisors, field_of, solve_weights
from megatron_cream.rope.clex import ClexScaling
from megatron_cream.rope.scaling import rounded_list


class ScaleTable:
    """The frequencies of one set of weights; stale after ``forget``.

    Args:
        scaling: the run's settings.
        powers: float32 ``[d / 2]``, base ** (2 i / d) as the model's own rotary rounds it.
    """

    def __init__(self, scaling: ClexScaling, powers: Tensor) -> None:
        self.scaling = scaling
        self.field = field_of(scaling)
        self.powers = powers
        self.inv_freq: Tensor | None = None
        self._solved: _OnHost | on_gpu.Solved | None = None
        self._others: dict[float, Tensor] = {}
        low, self._high = ode.limits(self.field)
        self._low = torch.from_numpy(low)

    def forget(self) -> None:
        """Weights have changed, or will have before the next step."""
        self.inv_freq = self._solved = None
        self._others = {}

    def solve(self, weights: Tensor) -> Tensor:
        """Return float32 frequencies ``[scales, d / 2]``, a leaf that gradients add up in.

        Raises:
            RuntimeError: the weights make no finite frequencies; on a GPU ``finite`` says so.
        """
        if self.inv_freq is None:
            # Evaluation in inference mode may be first; training needs a leaf of its own.
            with torch.inference_mode(False):
                solve = self._solve_on_gpu if weights.is_cuda else self._solve_on_host
                self.inv_freq = solve(weights).requires_grad_()
        return self.inv_freq

    def at(self, weights: Tensor, scale: float) -> Tensor:
        """Return float32 frequencies ``[d / 2]`` at any scale, bit for bit those of an export.

        Raises:
            RuntimeError: the weights make no finite frequencies.
        """
        if scale not in self._others:
            solved = solve_weights(self.field, weights, [scale])
            with torch.inference_mode(False):
                self._others[scale] = self._rounded(solved, weights.device)[0]
        return self._others[scale]

    def finite(self) -> Tensor:
        """Return whether the weights made finite frequencies: a bool on the table's device."""
        return torch.isfinite(self._solved.log_stretch).all()

    def gradient(self) -> Tensor:
        """Return what this rank has added up, float64 ``[scales, d / 2]`` on the table's device."""
        if self.inv_freq is None:
            raise RuntimeError("CLEX's table was not solved in this step: no layer turned anything")
        gradient = self.inv_freq.grad
        gradient = torch.zeros_like(self.inv_freq) if gradient is None else gradient
        return gradient.double()

    def pull_back(self, gradient: Tensor) -> Tensor:
        """Return the weights' float64 gradient ``[size]`` for that of the table, on its device."""
        # inv_freq is base / exp(log_stretch).
        upstream = -(self.inv_freq.detach().double() * gradient)
        stretch = self._solved.log_stretch
        # Beyond a limit only what leads back counts.
        outward = (stretch < self._low) & (upstream > 0)
        outward |= (stretch > self._high) & (upstream < 0)
        return self._solved.pull_back(upstream.masked_fill(outward, 0.0))

    def _solve_on_host(self, weights: Tensor) -> Tensor:
        solved = solve_weights(self.field, weights, self.scaling.scales)
        self._low = self._low.to(weights.device)
        self._solved = _OnHost(torch.from_numpy(solved.log_stretch).to(weights.device), solved)
        return self._rounded(solved, weights.device)

    def _solve_on_gpu(self, weights: Tensor) -> Tensor:
        # Copies of the first step alone.
        self._low, self.powers = (x.to(weights.device) for x in (self._low, self.powers))
        self._solved = on_gpu.solve(self.field, weights, self.scaling.scales)
        return on_gpu.frequencies(self._solved.log_stretch, self.powers, self._low, self._high)

    def _rounded(self, solved: ode.Solved, device: torch.device) -> Tensor:
        # As an exported model's LongRoPE lists are rounded: bit for bit what will be served.
        powers = self.powers.cpu().numpy()
        frequencies = rounded_list(divisors(self.field, solved.log_stretch), powers)
        return torch.from_numpy(frequencies).to(device)


@dataclass(frozen=True)
class _OnHost:
    """``ode.Solved`` in tensors, of the device that asks."""

    log_stretch: Tensor
    solved: ode.Solved

    def pull_back(self, gradient: Tensor) -> Tensor:
        weights = torch.from_numpy(self.solved.pull_back(gradient.cpu().numpy()))
        return weights.to(gradient.device)
