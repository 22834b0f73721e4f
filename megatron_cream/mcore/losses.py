# SPDX-License-Identifier: Apache-2.0
"""The losses that Megatron prints, each over its own iterations."""

from __future__ import annotations

import functools
from typing import Any

from megatron_cream.errors import MissingPackageError


def count_first_iteration_once() -> None:
    """Have the line of a start's first iteration end its interval, if it is one of the interval's.

    Symbol: ``megatron.training.training.training_log``. It prints the first iteration after every
    start besides those that --log-interval asks for, and keeps that one's loss for the next line.
    Where the two fall together (at --log-interval 1 always) the next line is then the mean of its
    own interval and of an iteration that was printed before: a resume that is right to the last
    bit looks broken. Idempotent.

    Raises:
        ImportError: the symbol moved in this version of Megatron.
    """
    from megatron.training import get_args, training

    own = getattr(training, "training_log", None)
    if own is None:
        raise MissingPackageError(
            "megatron.training.training.training_log is gone: it may have changed in your version "
            "of megatron-core; megatron_cream is made for 0.19.2"
        )
    if hasattr(own, "counts_first_iteration_once"):
        return

    @functools.wraps(own)
    def training_log(
        loss_dict: Any, total: Any, rate: Any, iteration: int, *rest: Any, **more: Any
    ) -> Any:
        if iteration % get_args().log_interval == 0:
            more["is_first_iteration"] = False
        return own(loss_dict, total, rate, iteration, *rest, **more)

    training_log.counts_first_iteration_once = True
    training.training_log = training_log
