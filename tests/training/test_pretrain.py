# SPDX-License-Identifier: Apache-2.0
"""A process without torchrun or a GPU is told what to do."""

import sys

import pytest
from support.runs import FLAGS

from megatron_cream.errors import UserError

pytestmark = pytest.mark.usefixtures("cpu_megatron")


def test_without_torchrun_there_is_one_line(monkeypatch, capsys):
    from megatron_cream import launch, pretrain

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for main, words in ((pretrain.main, []), (launch.main, [__file__])):
        monkeypatch.setattr(sys, "argv", ["x", *words, "--cpu", *FLAGS])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        error = capsys.readouterr().err.splitlines()
        assert len(error) == 1 and "MASTER_ADDR" in error[0] and "torchrun" in error[0]


def test_without_a_gpu_cpu_is_named(monkeypatch):
    import torch

    from megatron_cream import pretrain

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(UserError, match="no GPU here .CUDA_VISIBLE_DEVICES is ''.*--cpu"):
        pretrain.require_gpu()
    monkeypatch.setattr(sys, "argv", ["x", "--help"])
    pretrain.prepare_process("x")


def test_more_processes_than_gpus_are_refused(monkeypatch):
    import torch

    from megatron_cream import pretrain

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(UserError, match="--nproc-per-node is 8 .* at most 4"):
        pretrain.require_gpu()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    pretrain.require_gpu()


def test_gpu_present_refuses_the_stand_in(monkeypatch):

    from megatron_cream.errors import UserError
    from megatron_cream.mcore import cpu

    monkeypatch.setattr(cpu, "is_installed", lambda: False)
    with pytest.raises(UserError, match="leave out --cpu"):
        cpu.install()
