# SPDX-License-Identifier: Apache-2.0
"""Frequencies at every scale that training draws: solved once a step, whatever takes part in it.

The weights do not change between two updates, so all micro-batches, pipeline chunks and recomputed
layers of a step share one table and add their gradients to it. The ODE is solved on the host; its
steps wait there until ``gradients`` has the table's gradient of all ranks.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from megatron_cream.rope.base import rounded_list
from megatron_cream.rope.clex.frozen import divisors, field_of, solve_weights
from megatron_cream.rope.clex.ode import Solved, limits
from megatron_cream.rope.clex.scaling import ClexScaling, row_of


class ScaleTable:
    """The frequencies of one set of weights; stale after ``forget``.

    Args:
        scaling: the run's settings.
        powers: float32 ``[d / 2]``, base ** (2 i / d) as the model's own rotary rounds it.
    """

    def __init__(self, scaling: ClexScaling, powers: Tensor) -> None:
        self.scaling = scaling
        self.field = field_of(scaling)
        self.powers = powers.cpu().numpy()
        self.inv_freq: Tensor | None = None
        self._solved: Solved | None = None
        self._others: dict[float, Tensor] = {}

    def forget(self) -> None:
        """Weights have changed, or will have before the next step."""
        self.inv_freq = self._solved = None
        self._others = {}

    def solve(self, weights: Tensor) -> Tensor:
        """Return float32 frequencies ``[scales, d / 2]``, a leaf that gradients add up in.

        Raises:
            RuntimeError: the weights make no finite frequencies.
        """
        if self.inv_freq is None:
            self._solved = solve_weights(self.field, weights, self.scaling.scales)
            # Evaluation in inference mode may be first; training needs a leaf of its own.
            with torch.inference_mode(False):
                self.inv_freq = self._rounded(self._solved, weights.device).requires_grad_()
        return self.inv_freq

    def at(self, weights: Tensor, scale: float) -> Tensor:
        """Return float32 frequencies ``[d / 2]`` at any scale."""
        if scale in self.scaling.scales:
            return self.solve(weights).detach()[row_of(scale)]
        if scale not in self._others:
            solved = solve_weights(self.field, weights, [scale])
            with torch.inference_mode(False):
                self._others[scale] = self._rounded(solved, weights.device)[0]
        return self._others[scale]

    def gradient(self) -> Tensor:
        """Return what this rank has added up, float64 ``[scales, d / 2]`` on the table's device."""
        if self.inv_freq is None:
            raise RuntimeError("CLEX's table was not solved in this step: no layer turned anything")
        gradient = self.inv_freq.grad
        gradient = torch.zeros_like(self.inv_freq) if gradient is None else gradient
        return gradient.double()

    def pull_back(self, gradient: Tensor) -> Tensor:
        """Return the weights' float64 gradient ``[size]`` on the CPU for that of the table."""
        # inv_freq is base / exp(log_stretch).
        upstream = -(self.inv_freq.detach().double() * gradient).cpu().numpy()
        stretch, (low, high) = self._solved.log_stretch, limits(self.field)
        # Beyond a limit only what leads back counts.
        outward = ((stretch < low) & (upstream > 0)) | ((stretch > high) & (upstream < 0))
        return torch.from_numpy(self._solved.pull_back(np.where(outward, 0.0, upstream)))

    def _rounded(self, solved: Solved, device: torch.device) -> Tensor:
        # As an exported model's LongRoPE lists are rounded: bit for bit what will be served.
        frequencies = rounded_list(divisors(self.field, solved.log_stretch), self.powers)
        return torch.from_numpy(frequencies).to(device)
