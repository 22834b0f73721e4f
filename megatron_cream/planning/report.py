# SPDX-License-Identifier: Apache-2.0
"""Prints a plan as a table for a person and as plain values, and plans beside published runs.

``published.json`` has a row for each run whose tokens per second per GPU were published: model (and
layers, where it is not whole), GPUs, layout, tokens per sample, samples per step, precision, what
was measured, its source, and in ``missed`` why a plan is more than ``TOLERANCE`` away.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any

from megatron_cream.errors import UserError
from megatron_cream.parallel_layout import MEGATRON_DEFAULTS, ParallelLayout, Tuning, Workload
from megatron_cream.planning.cost import GPUS, product_share, step_time
from megatron_cream.planning.models import GIB, MODELS, BaseModel
from megatron_cream.planning.propose import Cluster, Plan, propose


@dataclass(frozen=True)
class Comparison:
    """A CREAM run next to full-length training of the same model on the same GPUs.

    Attributes:
        short: plan at N tokens.
        full: plan at T tokens, or None where it does not fit.
        why_not: says why, where ``full`` is None.
        target: T.
        iterations: steps of the CREAM run.
        tuning: options of both runs that change their speed.
        fixed: sizes of the CREAM run's layout that were given, as ``propose`` takes them.
    """

    shape: BaseModel
    cluster: Cluster
    short: Plan
    full: Plan | None
    why_not: str
    target: int
    iterations: int
    tuning: Tuning = MEGATRON_DEFAULTS
    fixed: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Tokens of the CREAM run."""
        return self.iterations * self.short.work.tokens

    @property
    def seconds(self) -> float:
        """Seconds of the CREAM run's steps."""
        return self.iterations * self.short.step.total

    @property
    def full_tokens(self) -> int:
        """Tokens of full-length training on as many samples as the CREAM run has."""
        return self.iterations * self.short.work.global_batch * self.target


def table(found: Comparison) -> str:
    """Return the plan for a person: memory in GiB, times in seconds, hours or days."""
    columns = [_column(found, found.short)]
    if found.full is not None:
        columns.append(_column(found, found.full))
    labels = list(columns[0])
    width = max(map(len, labels))
    cells = [max(len(column[label]) for label in labels) for column in columns]
    lines = [_heading(found), ""]
    for label in labels:
        row = [c[label].ljust(n) for c, n in zip(columns, cells, strict=True)]
        lines.append(f"{label:<{width}}  {'  '.join(row)}".rstrip())
    return "\n".join([*lines, "", *_runs(found), *advice(found)])


def _heading(found: Comparison) -> str:
    shape, cluster = found.shape, found.cluster
    return (
        f"{shape.name}: {shape.parameters:,} parameters, {shape.layers} layers, trained at "
        f"{shape.trained_length} tokens\n"
        f"{cluster.gpus} GPUs, {cluster.memory:g} GiB of each to fill, products at "
        f"{100 * cluster.mfu:.1f} % of {cluster.gpu.tflops:g} TFLOP/s"
    )


def _column(found: Comparison, plan: Plan) -> dict[str, str]:
    short = plan is found.short
    memory, step = plan.memory, plan.step
    return {
        "": f"CREAM at {plan.work.seq_length}" if short else f"full length {plan.work.seq_length}",
        "layout": str(plan.layout),
        "micro-batches per step": _micro_batches(plan),
        "memory per GPU, GiB": f"{memory.total / GIB:.1f}",
        **{f"  {name}": f"{size / GIB:.1f}" for name, size in dataclasses.asdict(memory).items()},
        "step": duration(step.total),
        **{f"  {name}": duration(s) for name, s in dataclasses.asdict(step).items()},
        "MFU of the step": f"{100 * plan.mfu(found.shape, found.cluster):.1f} %",
    }


def _micro_batches(plan: Plan) -> str:
    size = plan.work.micro_batch
    return f"{plan.layout.micro_batches(plan.work)}" + (f" of {size}" if size > 1 else "")


def _runs(found: Comparison) -> list[str]:
    samples = found.iterations * found.short.work.global_batch
    lines = [
        f"CREAM to {found.target}, {found.iterations} steps, {samples} samples: "
        f"{_tokens(found.tokens)}, {duration(found.seconds)}"
    ]
    if found.full is None:
        return [*lines, f"full length: {found.why_not}"]
    for what, tokens in (("samples", found.full_tokens), ("tokens", found.tokens)):
        seconds = found.full.seconds(tokens)
        lines.append(
            f"full length, as many {what}: {_tokens(tokens)}, {duration(seconds)}, "
            f"{seconds / found.seconds:.1f} x"
        )
    return lines


def summary(found: Comparison) -> str:
    """Return the plan at N tokens in one line, without what it is compared with."""
    plan = found.short
    return (
        f"{plan.layout}: {plan.memory.total / GIB:.1f} GiB per GPU, {duration(plan.step.total)} "
        f"per step, {found.iterations} steps in {duration(found.seconds)}"
    )


LOW_MFU, GOOD_MFU = 0.30, 0.40
WORTH_A_NOTE = 0.03
"""Share of a step that gradients in bf16 must save for it to be said: they are less exact."""


def advice(found: Comparison) -> list[str]:
    """Return what a reader should know before the run: waste of GPUs, and a better alternative."""
    lines = []
    mfu = found.short.mfu(found.shape, found.cluster)
    if mfu < LOW_MFU:
        lines.append(f"warning: MFU is {100 * mfu:.1f} %, below 30 %{_fewer_gpus(found)}")
    if found.full is not None and found.full.seconds(found.tokens) <= found.seconds:
        lines.append(
            f"note: full length at {found.target} tokens is as fast for the same number of tokens"
        )
    return lines + _room_for_another(found)


def _room_for_another(found: Comparison) -> list[str]:
    """Name the layout that gradients in bf16 would leave room for, where it is faster."""
    tuning = replace(found.tuning, gradient_bytes=2)
    work, now = found.short.work, found.short
    plan = propose(found.shape, found.cluster, work, dict(found.fixed), tuning)
    saved = 1 - plan.step.total / now.step.total
    if plan.layout == now.layout or saved < WORTH_A_NOTE:
        return []
    return [
        f"note: --grad-reduce-in-bf16 would leave room for {plan.layout}: "
        f"{duration(plan.step.total)} per step, {100 * saved:.0f} % less"
    ]


def _fewer_gpus(found: Comparison) -> str:
    """Name the largest halving of the GPUs on which the step reaches 40 % MFU."""
    gpus = found.cluster.gpus
    while gpus % 2 == 0:
        gpus //= 2
        cluster = replace(found.cluster, gpus=gpus)
        try:
            plan = propose(found.shape, cluster, found.short.work, tuning=found.tuning)
        except UserError:
            continue  # this many do not hold the model or do not divide the batch
        if plan.mfu(found.shape, cluster) >= GOOD_MFU:
            return f": {gpus} GPUs would reach 40 %"
    return ": no fewer GPUs (by halves) would reach 40 %"


def _tokens(tokens: int) -> str:
    return f"{tokens / 1e9:.2f} B tokens" if tokens >= 1e9 else f"{tokens / 1e6:.1f} M tokens"


def duration(seconds: float) -> str:
    """Return a time in the largest unit of which it has two."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.2f} s"


def plain_values(found: Comparison, command: str) -> dict[str, Any]:
    """Return the plan as plain values: bytes, seconds, tokens."""
    full = found.full
    return {
        "model": dataclasses.asdict(found.shape) | {"parameters": found.shape.parameters},
        "cluster": dataclasses.asdict(found.cluster),
        "target_length": found.target,
        "tuning": dataclasses.asdict(found.tuning),
        "cream": _plan_values(found, found.short)
        | {"iterations": found.iterations, "tokens": found.tokens, "seconds": found.seconds},
        "full_length": {"why_not": found.why_not}
        if full is None
        else _plan_values(found, full)
        | {
            "same_samples": {
                "tokens": found.full_tokens,
                "seconds": full.seconds(found.full_tokens),
            },
            "same_tokens": {"tokens": found.tokens, "seconds": full.seconds(found.tokens)},
        },
        "command": command,
    }


def _plan_values(found: Comparison, plan: Plan) -> dict[str, Any]:
    return {
        "layout": dataclasses.asdict(plan.layout),
        "work": dataclasses.asdict(plan.work),
        "memory": dataclasses.asdict(plan.memory) | {"total": plan.memory.total},
        "step": dataclasses.asdict(plan.step) | {"total": plan.step.total},
        "mfu": plan.mfu(found.shape, found.cluster),
    }


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
