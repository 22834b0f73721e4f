# SPDX-License-Identifier: Apache-2.0
"""Prices layouts whose tokens per second per GPU were published, and compares plan and measurement.

``published.json`` has a row for each: model (and layers, where it is not whole), GPUs, layout,
tokens per sample, samples per step, precision, what was measured, its source, and in ``missed`` why
a plan is more than ``TOLERANCE`` away. No constant of the plans belongs to one row alone.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any

from megatron_cream.parallel_layout import ParallelLayout, Tuning, Workload
from megatron_cream.planning.cost import GPUS, product_share, step_time
from megatron_cream.planning.models import MODELS, BaseModel

TOLERANCE = 0.12
"""Of what was measured, within which a plan is to be."""


@dataclass(frozen=True)
class PublishedRun:
    """A run that somebody measured.

    Attributes:
        document: tokens of a document in a packed sample, or None where attention spans samples.
        launch_ms: of its machine's host, where that was measured.
        measured: tokens per second per GPU.
        missed: why the plan is further away than ``TOLERANCE``, or None where it is not.
    """

    name: str
    shape: BaseModel
    gpu: str
    layout: ParallelLayout
    work: Workload
    tuning: Tuning
    measured: float
    source: str
    missed: str | None
    launch_ms: float | None = None

    @property
    def planned(self) -> float:
        """Tokens per second per GPU by the plan."""
        gpu = GPUS[self.gpu]
        if self.launch_ms is not None:
            gpu = replace(gpu, launch_ms=self.launch_ms)
        step = step_time(self.shape, self.layout, self.work, gpu, product_share(), 8, self.tuning)
        return self.work.tokens / self.layout.gpus / step.total

    @property
    def error(self) -> float:
        """Plan over measurement, less 1."""
        return self.planned / self.measured - 1


def published_runs() -> list[PublishedRun]:
    """Return all rows of ``published.json``."""
    text = files("megatron_cream.planning").joinpath("published.json").read_text("utf-8")
    return [_run(row) for row in json.loads(text)]


def _run(row: dict[str, Any]) -> PublishedRun:
    shape, layout = MODELS[row["model"]], ParallelLayout(**row["layout"])
    if "layers" in row:
        shape = replace(shape, layers=row["layers"])
    layout = replace(layout, data=row["gpus"] // layout.gpus)
    return PublishedRun(
        row["name"],
        shape,
        row["gpu"],
        layout,
        Workload(row["seq_length"], row["global_batch"], document=row["document"]),
        Tuning(row["fp8"], row["tp_overlap"], row["fused_gradients"]),
        row["tokens_per_second_per_gpu"],
        row["source"],
        row["missed"],
        row.get("launch_ms"),
    )


def published_table(runs: Sequence[PublishedRun]) -> str:
    """Return a Markdown table: run, layout, tokens per second per GPU measured and planned."""
    lines = [
        "| run | GPUs | layout | tokens / batch | measured | planned | error |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        cells = [run.name, f"{run.layout.gpus} {run.gpu.upper()}", str(run.layout)]
        cells += [f"{run.work.seq_length} / {run.work.global_batch}", f"{run.measured:,}"]
        cells += [f"{run.planned:,.0f}", f"{100 * run.error:+.0f} %"]
        lines.append(f"| {' | '.join(cells)}{' (missed)' if run.missed else ''} |")
    return "\n".join(lines)


class CheckPublished(argparse.Action):
    """Print the table and end, as --help does: no model is needed."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(nargs=0, **kwargs)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        """Print and end."""
        print(published_table(published_runs()))
        parser.exit()
