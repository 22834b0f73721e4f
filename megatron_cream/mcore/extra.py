# SPDX-License-Identifier: Apache-2.0
"""Interface of ``extras``: the places where a part that a run can do without is asked."""

from __future__ import annotations

import importlib
from argparse import Namespace
from collections.abc import Callable
from typing import Any

_NAMES = (
    *("hybrid", "te_cross_entropy", "rotation", "dual_chunk", "inprocess_restart"),
    "long_validation",
)


class Extra:
    """What a part may do, and when; each module of ``extras`` has one as ``EXTRA``."""

    def add_flags(self, add: Callable[..., Any]) -> None:
        """Add its flags by ``add``, the ``add_argument`` of our group."""

    def validate_flags(self, args: Namespace, extension: Any) -> None:
        """Validate flags alone.

        Raises:
            UserError: naming the flag, its value and the value needed.
        """

    def validate_machine(self, args: Namespace) -> None:
        """Validate that packages which flags need are installed here.

        Raises:
            UserError: naming the flag and the package.
        """

    def configure(self, config: Any, args: Namespace, extension: Any) -> None:
        """Put it into Megatron's model config, before the model is built. Idempotent."""

    def wrap_start(self, start: Callable[..., None], args: Namespace) -> Callable[..., None]:
        """Return what is called in place of ``start``, which calls Megatron's ``pretrain``."""
        return start


def extras() -> list[Extra]:
    """Return all parts, in the order in which they are asked."""
    return [importlib.import_module(f"megatron_cream.extras.{name}").EXTRA for name in _NAMES]
