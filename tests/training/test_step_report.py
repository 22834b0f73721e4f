# SPDX-License-Identifier: Apache-2.0
"""Planned and measured step beside each other: when it is said, and what is measured."""

from types import SimpleNamespace

import pytest
import torch

from megatron_cream.training import progress
from megatron_cream.training.progress import StepReport, kind_of_gpu


def said(durations, planned=(2.0, 0.5)):
    """What iterations of these durations print, each with its number from 1."""
    now = iter(torch.tensor([0.0, *durations]).cumsum(0)[1:].tolist())
    report = StepReport(planned, clock=lambda: next(now))
    lines = [report.after_iteration() for _ in durations]
    return {number: line for number, line in enumerate(lines, 1) if line}


def test_it_is_said_once_after_20_iterations():
    """Neither the first four, which compile, nor an evaluation among the others counts."""
    durations = [60.0, 9.0, 9.0, 9.0, *[2.5] * 8, 100.0, *[2.5] * 30]
    lines = said(durations)
    assert list(lines) == [20]
    assert "planned 2.000 s, MFU 50.0 %; measured 2.500 s, MFU 40.0 %" in lines[20]
    assert said(durations[:19]) == {}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA L4", None),
    ],
)
def test_kinds_of_gpus(name, kind, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert kind_of_gpu() == kind


def test_what_the_planner_does_not_know_has_no_report(monkeypatch):
    from megatron_cream.planning import stages

    plan = SimpleNamespace(step=SimpleNamespace(total=3.0))
    monkeypatch.setattr(progress, "kind_of_gpu", lambda: "h200")
    monkeypatch.setattr(stages, "plan_of", lambda args, gpu, node: (plan, gpu.memory / node))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    args = SimpleNamespace(cpu=False)
    monkeypatch.setattr(stages, "why_not_estimated", lambda args: None)
    assert progress.step_report(args).planned == (3.0, 139 / 2)
    monkeypatch.setattr(stages, "why_not_estimated", lambda args: "--num-experts is 8")
    assert progress.step_report(args) is None
    assert progress.step_report(SimpleNamespace(cpu=True)) is None
