# SPDX-License-Identifier: Apache-2.0
"""Where Megatron's own process handling stands in the way: its start, and its saves on a CPU."""

from __future__ import annotations

import queue

from megatron_cream.errors import MissingPackageError


def skip_dataset_helper_compilation() -> None:
    """Keep Megatron from running ``make`` for helpers that its wheel ships compiled.

    Symbol: ``megatron.core.datasets.utils.compile_helpers``. ``initialize_megatron`` imports it
    there and calls it on rank 0; it runs ``make`` in a folder in which the wheel has no Makefile,
    and exits. Where the compiled module imports there is nothing to make. Idempotent.

    Raises:
        ImportError: the symbol moved in this version of Megatron.
    """
    from megatron.core.datasets import utils

    if not hasattr(utils, "compile_helpers"):
        raise MissingPackageError(
            "megatron.core.datasets.utils.compile_helpers is gone: it may have changed in your "
            "version of megatron-core; megatron_cream is made for 0.19.2"
        )
    try:
        from megatron.core.datasets import helpers_cpp  # noqa: F401
    except ImportError:
        return  # a source checkout: let Megatron make them
    utils.compile_helpers = lambda: None


def use_in_process_save_queue() -> None:
    """Have the threads that save a checkpoint report through a queue of this process.

    Symbol: ``filesystem_async._results_queue`` of Megatron's torch_dist strategy, made by its
    ``get_write_results_queue`` where it is None. That starts a process for a queue, which imports
    torch and megatron anew: eight seconds a rank before the first save. Only a process that saves
    asynchronously needs it, and --cpu refuses those. Idempotent.

    Raises:
        ImportError: the symbol moved in this version of Megatron.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if not hasattr(filesystem_async, "_results_queue"):
        raise MissingPackageError(
            f"{filesystem_async.__name__}._results_queue is gone: it may have changed in your "
            "version of megatron-core; megatron_cream is made for 0.19.2"
        )
    if filesystem_async._results_queue is None:
        filesystem_async._results_queue = queue.Queue()
