# SPDX-License-Identifier: Apache-2.0
"""The module that takes the place of Megatron's rotary embedding under CLEX.

Every model chunk has a replica of the weights, as a parameter of its own, so that Megatron's
optimizers, checkpoints and parameter gathering treat it as they treat any. It is a vector, which
Megatron gives no weight decay, and of the model's type: in a bfloat16 model the optimizer has the
float32 master, and what is trained, evaluated and exported are frequencies of the same rounded
weights, themselves float32. (A float32 parameter in a bfloat16 model trains, too, but Megatron
0.19.2 cannot save its optimizer state.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
)
from torch import Tensor, nn

from megatron_cream.extras.clex.frozen import field_of
from megatron_cream.extras.clex.rotate import make_carrier
from megatron_cream.extras.clex.table import ScaleTable
from megatron_cream.mcore.rotary import PositionRotaryEmbedding, rounded_powers
from megatron_cream.rope.clex import ClexScaling, row_of


class ClexRotaryEmbedding(PositionRotaryEmbedding):
    """Rotary angles at the scale of each sample, from trained weights.

    With ``set_scales`` the next step turns each sample at its own scale and ``forward`` returns a
    carrier (see ``rotate``). Without, all turn at the scale of their length: evaluation.

    Attributes:
        weights: W_up and W_down, flat.
        table: frequencies of this step, shared by the chunks of a rank.
        replica: number of this replica over pipeline stages and chunks; 0 is the one that counts.
        fresh: the checkpoint to be loaded has no such weights; they stay as initialised.
    """

    def __init__(
        self,
        scaling: ClexScaling,
        *,
        rotary_interleaved: bool = False,
        device: torch.device | str | None = None,
        cp_group: Any = None,
    ) -> None:
        super().__init__(
            scaling, rotary_interleaved=rotary_interleaved, device=device, cp_group=cp_group
        )
        powers = rounded_powers(scaling, device)
        # Not of a layout that is only counted.
        self.table = None if powers.is_meta else ScaleTable(scaling, powers)
        self.weights = nn.Parameter(field_of(scaling).initial().to(device))
        self.replica = 0
        self.fresh = False
        self._scales: Tensor | None = None
        self._length: int | None = None

    def set_scales(self, scales: Tensor) -> None:
        """Hand over the scale t of each sample, ``[b]``, for the next ``forward``."""
        self._scales = scales

    def set_length(self, length: int) -> None:
        self._length = length

    def forward(
        self,
        max_seq_len: int,
        offset: int = 0,
        packed_seq: bool = False,
        cp_group: Any = None,
    ) -> Tensor:
        """Return a carrier ``[b, d / 2 + s]``, or angles ``[s, b, 1, d]`` where no scale was set.

        Raises:
            RuntimeError, ValueError: as ``PositionRotaryEmbedding.forward``.
        """
        scales, self._scales = self._scales, None
        if scales is None:
            scale = self.scaling.scale_of(self._length or max_seq_len)
            self.inv_freq = self.table.at(self.weights, scale)
            return super().forward(max_seq_len, offset, packed_seq, cp_group)
        position_ids = self.take_position_ids(max_seq_len, packed_seq, cp_group)
        rows = row_of(scales).to(torch.int64)
        inv_freq = self.table.solve(self.weights)[rows]
        return make_carrier(inv_freq, position_ids, self.weights)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Return the weights for a checkpoint: one replica over all ranks writes them."""
        if self.fresh:
            return {}
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        tensors = make_sharded_tensors_for_checkpoint(
            {"weights": self.weights},
            prefix,
            sharded_offsets=sharded_offsets,
            tp_group=mpu.get_tensor_model_parallel_group(),
            dp_cp_group=metadata["dp_cp_group"],
        )
        for tensor in tensors.values():
            tensor.replica_id = (self.replica, *tensor.replica_id[1:])
        return tensors

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        self.table.forget()
        if self.fresh and f"{prefix}weights" not in state_dict:
            self.fresh = False  # from now on they are saved
            return
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        if self.table is not None:
            self.table.forget()  # the weights move, or are rounded
        return super()._apply(fn, recurse)
