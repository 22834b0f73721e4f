# SPDX-License-Identifier: Apache-2.0
"""CLEX: frequencies solve an ODE over the scale, with a trained term (arXiv:2310.16450).

What this package exposes is a ``rope.scaling.ScalingTrainer``, which ``ClexScaling`` names; nothing
else outside knows it. ``rope.formulas`` has its settings. Here are the frequencies of its weights:
a table per training step, and frozen at one scale for export.

ode             the equation, and its solution on the host                    (numpy)
ode_triton      the same on a GPU, for training                               (triton)
trained_rotary  what takes the place of Megatron's rotary embedding: its rotation, and the gradient
                of the weights, over all ranks, once per step

The weights do not change between two updates, so all micro-batches, pipeline chunks and recomputed
layers of a step share one table and add their gradients to it. The ODE is solved where the weights
are, in numpy on a CPU and by ``ode_triton`` on a GPU, where the host waits for nothing; its steps
wait there until ``trained_rotary`` has the table's gradient of all ranks. Frequencies of evaluation
are solved on the host, as those of an export are.

No server solves an ODE. At the scale of the longest sequence the model is an ordinary one with one
divisor per pair, which is LongRoPE's ``long_factor``; its ``short_factor`` are ones, CLEX at t = 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from megatron_cream.errors import UserError
from megatron_cream.extras.clex.ode import OdeSolution, VectorField, limits, solve
from megatron_cream.rope.formulas import ClexScaling
from megatron_cream.rope.scaling import RopeScaling, make_scaling, rounded_list

if TYPE_CHECKING:
    from megatron_cream.checkpoint.torch_dist_io import TorchDistTensors
    from megatron_cream.extras.clex import ode_triton
    from megatron_cream.extras.clex.trained_rotary import ClexRotaryEmbedding

WEIGHTS = "rotary_pos_emb.weights"
"""Name of the weights in a checkpoint."""

NOT_FINITE = (
    "CLEX's weights make frequencies that are not finite: train with a lower --lr, a smaller "
    "--clip-grad or --rope-options act=tanh"
)


def configure(config: Any, starts_without: bool) -> None:
    """Have Megatron make the gradient of the weights, and the chunks of a rank share one table.

    Args:
        config: Megatron's GPT or Hybrid model config, with hooks.
        starts_without: the checkpoint that the run starts from has no weights of CLEX.
    """
    from megatron_cream.extras.clex import trained_rotary

    trained_rotary.configure_finalizer(config.transformer)
    config.pre_wrap_hooks.append(partial(trained_rotary.share_table, fresh=starts_without))


def rotary_class() -> type[ClexRotaryEmbedding]:
    """Return the module that takes the place of Megatron's rotary embedding."""
    from megatron_cream.extras.clex.trained_rotary import ClexRotaryEmbedding

    return ClexRotaryEmbedding


def freeze_stored(scaling: ClexScaling, stored: TorchDistTensors) -> RopeScaling:
    """Return the frequencies of a checkpoint's weights at T, as LongRoPE's lists.

    Raises:
        UserError: it has no such weights, or others than the settings say.
    """
    return freeze(scaling, read_weights(stored), scaling.factor)


def read_weights(stored: TorchDistTensors) -> Tensor:
    """Return the weights ``[size]`` of a checkpoint, in their own type.

    Raises:
        UserError: it has none.
    """
    if WEIGHTS not in stored:
        raise UserError(f"checkpoint {stored.folder} lacks {WEIGHTS}: a clex model has it")
    (size,) = stored.shape(WEIGHTS)
    dtype = stored.dtype(WEIGHTS)
    values = np.empty((size, dtype.itemsize), dtype=np.uint8)
    stored.read_rows(WEIGHTS, (), 0, size, values)
    return torch.from_numpy(values.reshape(-1)).view(dtype)


def field_of(scaling: ClexScaling) -> VectorField:
    """Return the vector field that a run's settings describe."""
    return VectorField(
        dim=scaling.dim,
        base=scaling.base,
        width=int(scaling.option("param_factor")),
        act=scaling.option("act"),
        step=float(scaling.option("time_step")),
    )


def divisors(field: VectorField, log_stretch: np.ndarray) -> np.ndarray:
    """Return what each pair's frequency is divided by, float64."""
    return np.exp(np.clip(log_stretch, *limits(field)))


def solve_weights(field: VectorField, weights: Tensor, scales: list[float]) -> OdeSolution:
    """Solve the ODE with ``weights`` ``[size]`` of any float type, on any device.

    Raises:
        RuntimeError: they make no finite frequencies.
    """
    solved = solve(field, weights.detach().to("cpu", torch.float64, copy=True).numpy(), scales)
    if not np.isfinite(solved.log_stretch).all():
        raise RuntimeError(NOT_FINITE)
    return solved


def freeze(scaling: ClexScaling, weights: Tensor, scale: float) -> RopeScaling:
    """Return what serves every sequence beyond the original window as CLEX does at ``scale``.

    Args:
        weights: ``[size]`` of any float type.

    Raises:
        UserError: weights of another shape than the settings say.
        RuntimeError: as ``solve_weights``.
    """
    field = field_of(scaling)
    if weights.shape != (field.size,):
        raise UserError(
            f"{WEIGHTS} has shape {tuple(weights.shape)}: clex with dim {field.dim} and "
            f"param_factor {field.width} has ({field.size},)"
        )
    solved = solve_weights(field, weights, [scale])
    return make_scaling(
        "longrope",
        dim=scaling.dim,
        base=scaling.base,
        factor=scaling.factor,
        original_length=scaling.original_length,
        short_factor=[1.0] * (scaling.dim // 2),
        long_factor=divisors(field, solved.log_stretch)[0].tolist(),
        attention_factor=1.0,
    )


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
        self._solved: _OnHost | ode_triton.QueuedSolution | None = None
        self._others: dict[float, Tensor] = {}
        low, self._high = limits(self.field)
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
        return torch.isfinite(self._of_step()[1].log_stretch).all()

    def gradient(self) -> Tensor:
        """Return what this rank has added up, float64 ``[scales, d / 2]`` on the table's device."""
        frequencies, _ = self._of_step()
        gradient = frequencies.grad
        return (torch.zeros_like(frequencies) if gradient is None else gradient).double()

    def pull_back(self, gradient: Tensor) -> Tensor:
        """Return the weights' float64 gradient ``[size]`` for that of the table, on its device."""
        # inv_freq is base / exp(log_stretch).
        frequencies, solved = self._of_step()
        upstream = -(frequencies.detach().double() * gradient)
        stretch = solved.log_stretch
        # Beyond a limit only what leads back counts.
        outward = (stretch < self._low) & (upstream > 0)
        outward |= (stretch > self._high) & (upstream < 0)
        return solved.pull_back(upstream.masked_fill(outward, 0.0))

    def _of_step(self) -> tuple[Tensor, _OnHost | ode_triton.QueuedSolution]:
        """Return frequencies and solution."""
        if self.inv_freq is None or self._solved is None:
            raise RuntimeError("CLEX's table was not solved in this step: no layer turned anything")
        return self.inv_freq, self._solved

    def _solve_on_host(self, weights: Tensor) -> Tensor:
        solved = solve_weights(self.field, weights, self.scaling.scales)
        self._low = self._low.to(weights.device)
        self._solved = _OnHost(torch.from_numpy(solved.log_stretch).to(weights.device), solved)
        return self._rounded(solved, weights.device)

    def _solve_on_gpu(self, weights: Tensor) -> Tensor:
        from megatron_cream.extras.clex import ode_triton

        # Copies of the first step alone.
        self._low, self.powers = (x.to(weights.device) for x in (self._low, self.powers))
        self._solved = ode_triton.solve(self.field, weights, self.scaling.scales)
        return ode_triton.frequencies(self._solved.log_stretch, self.powers, self._low, self._high)

    def _rounded(self, solved: OdeSolution, device: torch.device) -> Tensor:
        # As an exported model's LongRoPE lists are rounded: bit for bit what will be served.
        powers = self.powers.cpu().numpy()
        frequencies = rounded_list(divisors(self.field, solved.log_stretch), powers)
        return torch.from_numpy(frequencies).to(device)


@dataclass(frozen=True)
class _OnHost:
    """``OdeSolution`` in tensors, of the device that asks."""

    log_stretch: Tensor
    solved: OdeSolution

    def pull_back(self, gradient: Tensor) -> Tensor:
        weights = torch.from_numpy(self.solved.pull_back(gradient.cpu().numpy()))
        return weights.to(gradient.device)
