# SPDX-License-Identifier: Apache-2.0
"""--inprocess-restart: a rank fails, all go on from the last checkpoint in the same processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_cream.mcore import cpu

if cpu.is_installed() or torch.cuda.device_count() < 2:
    pytest.skip("needs two GPUs: only NCCL lets a waiting rank go", allow_module_level=True)
pytest.importorskip("transformer_engine.pytorch", reason="needs Transformer Engine")
pytest.importorskip("nvidia_resiliency_ext.inprocess", reason="needs nvidia-resiliency-ext")

from support.ranks import read_losses
from support.runs import write_dataset

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
RESTART = ["--inprocess-restart", "--inprocess-granularity", "rank"]


def train(folder, script, flags):
    from rows import FLAGS

    folder.mkdir()
    save = ["--save", str(folder / "saved"), "--load", str(folder / "saved")]
    command = [
        # A fixed address: the restarts have stores of their own, at the next ports.
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
        *("--master-addr", "localhost", "--master-port", "29731", str(HERE / script), str(folder)),
        *(*FLAGS, *flags, *save, "--save-interval", "5"),
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "TORCH_CPP_LOG_LEVEL": "error"},
    )
    log = done.stdout + done.stderr
    assert done.returncode == 0, log[-6000:]
    return read_losses(folder, 2)


def test_goes_on_from_the_last_checkpoint(tmp_path):
    data = write_dataset(tmp_path / "text", [6000] * 40, vocabulary=1000)
    whole = train(tmp_path / "whole", "rank.py", ["--data-path", data])
    broken = tmp_path / "broken"
    found = train(broken, "failing_rank.py", ["--data-path", data, *RESTART])
    assert sorted(found) == sorted(whole) == list(range(1, 11))
    # Adding up in another order is all that two runs differ by.
    assert max(abs(found[i] - whole[i]) for i in whole) < 0.02
    # Both ranks write all losses; steps behind the checkpoint of step 5 are done again.
    lines = (broken / "rank0.losses").read_text().splitlines()
    assert [json.loads(line)[0] for line in lines] == [1, 2, 3, 4, 5, 6, 7, 6, 7, 8, 9, 10]
