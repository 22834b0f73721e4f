# SPDX-License-Identifier: Apache-2.0
"""Settings of an evaluation, small ones by default."""

from typing import Any

from megatron_cream.evaluation.evaluation_settings import EvaluationSettings

SMALL = {
    **{"tasks": ["perplexity"], "lengths": [96], "batch_tokens": 1000},
    **{"cases": 3, "seeds": 2, "documents": 6},
}


def arguments(**changes: Any) -> EvaluationSettings:
    """Return small settings with ``changes``."""
    return EvaluationSettings(**(SMALL | changes))
