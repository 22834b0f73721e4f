# SPDX-License-Identifier: Apache-2.0
"""Context parallelism does not change what tools/evaluate.py scores; it runs on GPUs only."""

import json
import subprocess
from pathlib import Path

import pytest
import torch

from megatron_cream.mcore import cpu

if cpu.is_installed() or torch.cuda.device_count() < 2:
    pytest.skip("needs two GPUs", allow_module_level=True)
pytest.importorskip("transformer_engine.pytorch", reason="needs Transformer Engine")
pytest.importorskip("transformers")

from support import hf_models as models
from support.runs import write_dataset

from megatron_cream import torchrun
from megatron_cream.checkpoint.import_hf import import_checkpoint

TOOL = Path(__file__).parents[2] / "tools" / "evaluate.py"


def score(checkpoint, data, folder, ranks):
    """Return nll by case and the perplexities of a run on ``ranks`` context-parallel GPUs."""
    command = [
        *torchrun.command(ranks, str(TOOL), "perplexity", "--checkpoint", checkpoint),
        *("--data", data, "--documents", "3", "--lengths", "128", "512", "--output", str(folder)),
        *("--context-parallel-size", str(ranks)),
    ]
    done = subprocess.run(
        command, env=torchrun.environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "result.json").read_text())["lengths"]


def test_same_perplexities_on_two_ranks(tmp_path):
    source = models.make(tmp_path / "source", "Llama", dtype=torch.bfloat16)
    import_checkpoint(str(source), str(tmp_path / "imported"), quiet=True)
    data = write_dataset(tmp_path / "text", [1300] * 3, vocabulary=120)
    one, two = (
        score(str(tmp_path / "imported"), data, tmp_path / f"cp{ranks}", ranks) for ranks in (1, 2)
    )
    assert [row["length"] for row in two] == [128, 512]
    for found, wanted in zip(two, one, strict=True):
        assert found["targets"] == wanted["targets"]
        assert found["perplexity"] == pytest.approx(wanted["perplexity"], rel=2e-3)
