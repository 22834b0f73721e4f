# SPDX-License-Identifier: Apache-2.0
"""Arguments of tools/evaluate.py with its defaults."""

from argparse import Namespace
from typing import Any

DEFAULTS = {
    "tasks": ["perplexity"],
    "checkpoint": None,
    "hf": None,
    "name": None,
    "lengths": [96],
    "output": None,
    "batch_tokens": 1000,
    "dtype": None,
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "context_parallel_size": 1,
    "rope_interpolation": None,
    "rope_factor": None,
    "rope_theta": None,
    "rope_options": None,
    "rope_factors_file": None,
    "cases": 3,
    "seeds": 2,
    "first_seed": 0,
    "cases_file": None,
    "most_tokens": None,
    "prompt": "base",
    "shots": 0,
    "bos": None,
    "tokenizer_type": None,
    "tokenizer_model": None,
    "data": None,
    "documents": 6,
    "document_tokens": None,
    "stride": None,
}


def arguments(**changes: Any) -> Namespace:
    """Return the defaults with ``changes``."""
    return Namespace(**(DEFAULTS | changes))
