# SPDX-License-Identifier: Apache-2.0
"""Train at 4K, use at 256K: CREAM, PoSE and interpolated RoPE for Megatron-Core, without a fork.

    from megatron_cream import make_scaling, make_strategy

    strategy = make_strategy("cream", train_length=4096, target_length=262144)
    strategy.layout(seed=1234, index=7).position_ids  # int64 [4096], within [0, 262144)
    make_scaling("yarn", dim=128, factor=64.0, original_length=4096).inv_freq  # float64 [64]

The names of ``__all__`` are what is meant to be used from Python. Each is imported when it is first
used: importing this package imports neither torch nor megatron nor numpy, and changes nothing.

megatron_cream.positions   where training tokens pretend to stand (numpy only)
megatron_cream.rope        how a position becomes an angle (numpy only)
megatron_cream.attention   attention that reaches beyond the trained window without training
megatron_cream.corpus      text to dataset
megatron_cream.data        samples that read only their spans
megatron_cream.mcore       everything that meets Megatron
megatron_cream.training    flags and a run's start: torchrun -m megatron_cream.pretrain
megatron_cream.checkpoint  Hugging Face models in and out
megatron_cream.evaluation  perplexity and retrieval at any length
megatron_cream.planning    layouts of parallelism that fit
megatron_cream.config      the settings of an extension, as flags, checkpoint metadata and text
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_cream.attention import (
        dual_chunk_attention,
        self_extend_attention,
        string_attention,
    )
    from megatron_cream.checkpoint.export_hf import export_checkpoint
    from megatron_cream.checkpoint.import_hf import import_checkpoint
    from megatron_cream.checkpoint.loading import load_model
    from megatron_cream.config import ExtensionConfig
    from megatron_cream.corpus.job import PreprocessConfig
    from megatron_cream.corpus.preprocess import preprocess
    from megatron_cream.evaluation.evaluate import evaluate
    from megatron_cream.evaluation.evaluation_settings import EvaluationSettings
    from megatron_cream.planning.propose import propose
    from megatron_cream.positions import coverage, make_strategy
    from megatron_cream.rope import compose, hf_rope_fields, make_scaling, scaling_from_hf

__version__ = "0.1.0"

__all__ = [
    "EvaluationSettings",
    "ExtensionConfig",
    "PreprocessConfig",
    "compose",
    "coverage",
    "dual_chunk_attention",
    "evaluate",
    "export_checkpoint",
    "hf_rope_fields",
    "import_checkpoint",
    "load_model",
    "make_scaling",
    "make_strategy",
    "preprocess",
    "propose",
    "scaling_from_hf",
    "self_extend_attention",
    "string_attention",
]

_MODULES = {
    "attention": ("dual_chunk_attention", "self_extend_attention", "string_attention"),
    "checkpoint.export_hf": ("export_checkpoint",),
    "checkpoint.import_hf": ("import_checkpoint",),
    "checkpoint.loading": ("load_model",),
    "config": ("ExtensionConfig",),
    "corpus.preprocess": ("preprocess",),
    "corpus.job": ("PreprocessConfig",),
    "evaluation.evaluation_settings": ("EvaluationSettings",),
    "evaluation.evaluate": ("evaluate",),
    "planning.propose": ("propose",),
    "positions": ("coverage", "make_strategy"),
    "rope": ("compose", "hf_rope_fields", "make_scaling", "scaling_from_hf"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
