# SPDX-License-Identifier: Apache-2.0
"""Trained CLEX weights as frequencies at one scale: what is trained, served and written down.

No server solves an ODE. At the scale of the longest sequence the model is an ordinary one with a
divisor a pair, which is LongRoPE's ``long_factor``; its ``short_factor`` are ones, CLEX at t = 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from megatron_cream.errors import UserError
from megatron_cream.extras.clex.ode import Field, Solved, limits, solve
from megatron_cream.rope.by_pair import LongRopeScaling
from megatron_cream.rope.clex import ClexScaling
from megatron_cream.rope.scaling import make_scaling

if TYPE_CHECKING:
    from megatron_cream.checkpoint.torch_dist_io import TorchDistTensors

WEIGHTS = "rotary_pos_emb.weights"
"""Name of the weights in a checkpoint."""

NOT_FINITE = (
    "CLEX's weights make frequencies that are not finite: train with a lower --lr, a smaller "
    "--clip-grad or --rope-options act=tanh"
)


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


def field_of(scaling: ClexScaling) -> Field:
    """Return the vector field that a run's settings describe."""
    return Field(
        dim=scaling.dim,
        base=scaling.base,
        width=int(scaling.option("param_factor")),
        act=scaling.option("act"),
        step=float(scaling.option("time_step")),
    )


def divisors(field: Field, log_stretch: np.ndarray) -> np.ndarray:
    """Return what each pair's frequency is divided by, float64."""
    return np.exp(np.clip(log_stretch, *limits(field)))


def solve_weights(field: Field, weights: Tensor, scales: list[float]) -> Solved:
    """Solve the ODE with ``weights`` ``[size]`` of any float type, on any device.

    Raises:
        RuntimeError: they make no finite frequencies.
    """
    solved = solve(field, weights.detach().to("cpu", torch.float64, copy=True).numpy(), scales)
    if not np.isfinite(solved.log_stretch).all():
        raise RuntimeError(NOT_FINITE)
    return solved


def freeze(scaling: ClexScaling, weights: Tensor, scale: float) -> LongRopeScaling:
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
