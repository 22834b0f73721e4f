# SPDX-License-Identifier: Apache-2.0
"""Attention that reaches beyond the trained window without training.

dual_chunk_attention    ChunkLlama's and Qwen's dual chunk attention (arXiv:2402.17463)
string_attention        STRING: far distances moved nearer by a constant (arXiv:2410.18745)
self_extend_attention   SelfExtend: far distances by groups of positions (arXiv:2401.01325)

All take unrotated queries and keys, rotate inside, have exact gradients and need memory linear in
the number of tokens. torch only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_cream.attention.beyond_window import (
        dual_chunk_attention,
        self_extend_attention,
        string_attention,
    )

__all__ = ["dual_chunk_attention", "self_extend_attention", "string_attention"]


def __getattr__(name: str) -> Any:
    """Import what is asked for, and torch, when it is first used: ``methods`` needs neither."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from megatron_cream.attention import beyond_window

    return getattr(beyond_window, name)
