# SPDX-License-Identifier: Apache-2.0
"""What a model is: the one description that config.json, Megatron's arguments and plans share.

``ModelShape`` is read from either of the first two and written as the other (``config_json``,
``flags``), so that two descriptions of one model can be compared field by field.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from megatron_cream.checkpoint.weight_map import FAMILIES, Family, Part, Row


@dataclass(frozen=True)
class ModelShape:
    """Everything but the weights and the angles of a model.

    Attributes:
        architecture: a key of ``FAMILIES``.
        window: tokens that a token attends to, itself included, or None for all before it.
        linear_bias: biases on all linear layers, those of queries, keys and values included.
    """

    architecture: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    groups: int
    head_dim: int
    vocabulary: int
    norm_epsilon: float
    tied: bool
    qkv_bias: bool = False
    linear_bias: bool = False
    qk_norm: bool = False
    experts: int | None = None
    experts_per_token: int | None = None
    window: int | None = None

    @property
    def family(self) -> Family:
        """The table of its tensors."""
        return FAMILIES[self.architecture]

    @property
    def parameters(self) -> int:
        """Elements of all its Hugging Face tensors."""
        rows = self.rows()
        return sum(
            math.prod(self.leading(row)) * sum(math.prod(self.part_shape(p)) for p in row.parts)
            for row in rows
        )

    @property
    def untied(self) -> bool:
        """Whether the output layer has weights of its own."""
        return not self.tied

    @property
    def tensors(self) -> int:
        """How many Hugging Face tensors it has."""
        return sum(math.prod(self.leading(row)) * len(row.parts) for row in self.rows())

    def rows(self) -> list[Row]:
        """Return the rows of the family's table that this model has."""
        return [r for r in self.family.rows if r.when is None or getattr(self, r.when)]

    def part_shape(self, part: Part) -> tuple[int, ...]:
        """Return the shape of a Hugging Face tensor."""
        sizes = {
            "h": self.hidden,
            "q": self.heads * self.head_dim,
            "kv": self.groups * self.head_dim,
            "d": self.head_dim,
            "f": self.ffn,
            "v": self.vocabulary,
            "e": self.experts,
        }
        return tuple(sizes[axis] for axis in part.shape)

    def leading(self, row: Row) -> tuple[int, ...]:
        """Return the sizes of the leading axes of a row: (), (layers,) or (layers, experts)."""
        return tuple({"l": self.layers, "e": self.experts}[axis] for axis in row.axes)

    def places(self) -> Iterator[tuple[Row, tuple[int, ...]]]:
        """Yield every tensor: its row, and its index along the leading axes, layer by layer."""
        rows = self.rows()
        yield from ((row, ()) for row in rows if not row.axes)
        for layer in range(self.layers):
            for row in (row for row in rows if row.axes):
                for rest in product(*map(range, self.leading(row)[1:])):
                    yield row, (layer, *rest)

    def differences(self, other: ModelShape) -> list[str]:
        """Name each field that differs, with both values, this one's first."""
        return [
            f"{field.name} {getattr(self, field.name)} != {getattr(other, field.name)}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != getattr(other, field.name)
        ]
