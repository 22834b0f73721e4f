# SPDX-License-Identifier: Apache-2.0
"""The one patch that a pip-installed Megatron needs to start."""

from __future__ import annotations


def answer_for_dataset_helpers() -> None:
    """Keep Megatron from running ``make`` for helpers that its wheel ships compiled.

    Symbol: ``megatron.core.datasets.utils.compile_helpers``. ``initialize_megatron`` imports it
    there and calls it on rank 0; it runs ``make`` in a folder in which the wheel has no Makefile,
    and exits. Where the compiled module imports there is nothing to make. Idempotent.

    Raises:
        ImportError: the symbol moved in this version of Megatron.
    """
    from megatron.core.datasets import utils

    if not hasattr(utils, "compile_helpers"):
        raise ImportError(
            "megatron.core.datasets.utils.compile_helpers is gone: it may have changed in your "
            "version of megatron-core; megatron_cream is made for 0.19.2"
        )
    try:
        from megatron.core.datasets import helpers_cpp  # noqa: F401
    except ImportError:
        return  # a source checkout: let Megatron make them
    utils.compile_helpers = lambda: None
