# SPDX-License-Identifier: Apache-2.0
"""Lists the names that Megatron writes into the pickles of a checkpoint."""

from __future__ import annotations

import importlib
from enum import Enum
from typing import Any

_LAYOUT = "megatron.core.transformer.pipeline_parallel_layer_layout.PipelineParallelLayerLayout"
_ENUMS = ("megatron.core.enums", "megatron.core.transformer.enums")  # all of theirs


def named_by_megatron() -> dict[str, Any]:
    """Return what saved arguments and states name, beside what Megatron tells torch itself."""
    import megatron.core  # noqa: F401  # adds its SAFE_GLOBALS to torch's

    layout, _, name = _LAYOUT.rpartition(".")
    found = {_LAYOUT: getattr(importlib.import_module(layout), name)}
    for module in _ENUMS:
        for name, value in vars(importlib.import_module(module)).items():
            if isinstance(value, type) and issubclass(value, Enum):
                found[f"{module}.{name}"] = value
    return found


def is_extra_state_name(module: str, name: str) -> bool:
    """Whether Megatron reads it in the state that a layer keeps beside its weights, as for fp8."""
    from megatron.core.safe_globals import SafeUnpickler

    return (module, name) in SafeUnpickler._SAFE_CLASSES
