# SPDX-License-Identifier: Apache-2.0
"""Plans beside published tokens per second per GPU: every row within 12 %, or marked with why."""

import pytest

from megatron_cream import cli
from megatron_cream.planning import report
from megatron_cream.planning.report import TOLERANCE, published_runs

RUNS = published_runs()


@pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run.name} {run.layout} {run.measured}")
def test_a_plan_is_within_the_tolerance_or_marked(run):
    """A row that is marked is missed in fact: a mark is no excuse kept in store."""
    assert run.source
    assert (abs(run.error) > TOLERANCE) == (run.missed is not None), f"{100 * run.error:+.1f} %"


def test_layouts_are_whole_and_fit_their_batch():
    for run in RUNS:
        layout, work = run.layout, run.work
        assert work.global_batch % (layout.data * work.micro_batch) == 0
        assert layout.virtual == 1 or layout.micro_batches(work) % layout.pipeline == 0
        assert run.shape.layers % (layout.pipeline * layout.virtual) == 0


def test_few_rows_are_missed_and_both_precisions_are_there():
    missed = [run for run in RUNS if run.missed]
    assert len(missed) <= len(RUNS) / 8
    assert {run.tuning.fp8 for run in RUNS} == {True, False}
    assert {run.gpu for run in RUNS} == {"h100", "h200"}


def test_a_slower_machine_leaves_the_tolerance(monkeypatch):
    """The table would notice a constant that is wrong by a quarter."""
    monkeypatch.setattr(report, "product_share", lambda: 0.75 * 0.612)
    assert sum(abs(run.error) > TOLERANCE for run in RUNS) > len(RUNS) / 2


def test_the_command_prints_the_table(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["plan", "--check-published"])
    assert stopped.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(RUNS)
    for run, line in zip(RUNS, lines[2:], strict=True):
        assert run.name in line and f"{run.measured:,}" in line
        assert f"{run.planned:,.0f} | {100 * run.error:+.0f} %" in line
        assert ("missed" in line) == (run.missed is not None)
