# SPDX-License-Identifier: Apache-2.0
"""Option: one setting of a position strategy or of a RoPE interpolation, declared on its class.

Flags, their help, checks, checkpoint settings and the tables of the docs follow from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_cream.json_values import is_finite


@dataclass(frozen=True)
class Option:
    """One setting.

    Attributes:
        help: what it says, for --help and the docs.
        default: its value where none is given; None where it follows from other settings.
        type: ``float`` (a positive number), ``int``, ``bool`` or ``str`` (one of ``choices``).
        choices: the words it may be.
        many: several values, a tuple.
        per_pair: one value per pair of rotated dimensions, a tuple; RoPE only.
        default_help: how the default follows from other settings, where it is None.
    """

    help: str
    default: Any = None
    type: type = float
    choices: tuple[str, ...] = ()
    many: bool = False
    per_pair: bool = False
    default_help: str = ""

    @property
    def full_help(self) -> str:
        """What it says and what it is by default."""
        default = self.default
        shown = self.default_help or (f"{default:g}" if self.type is float else f"{default}")
        return f"{self.help} (default: {shown})"

    def argument(self) -> dict[str, Any]:
        """Return the settings of its flag, for ``add_argument``; None stands for not given."""
        many = {"nargs": "+"} if self.many else {}
        choices = {"choices": self.choices} if self.choices else {}
        return {"type": self.type, "help": self.full_help, **choices, **many}

    def needed(self, value: Any) -> str | None:
        """Return what one value must be instead, None where it fits."""
        if self.choices:
            return None if value in self.choices else f"one of {self.choices}"
        if self.type is bool:
            return None if isinstance(value, bool) else "true or false"
        if not (is_finite(value) and value > 0):
            return "a positive number"
        if self.type is int and value != int(value):
            return "a whole number"
        return None
