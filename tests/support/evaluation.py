# SPDX-License-Identifier: Apache-2.0
"""What a rank of an evaluation runs in a test."""

import json

from megatron_cream.training import cpu


def scored_lines(checkpoint: str, task: str, settings: dict, layout: tuple[int, int]) -> None:
    """Run tools/evaluate.py's run on this rank."""
    cpu.install()
    from megatron_cream.evaluation.run import run
    from support.arguments import arguments

    tensor, pipeline = layout
    args = arguments(
        tasks=[task],
        checkpoint=checkpoint,
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        **settings,
    )
    print(json.dumps(run(args)))
