# SPDX-License-Identifier: Apache-2.0
"""The layout of a run does not change its result, on GPUs."""

import sys
from pathlib import Path

import pytest
import torch

from megatron_cream.mcore import cpu

if cpu.is_installed() or not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)
pytest.importorskip("transformer_engine.pytorch", reason="needs Transformer Engine")

sys.path.insert(0, str(Path(__file__).parent))


def test_layouts_agree(tmp_path):
    import layouts

    assert not layouts.too_far(layouts.table(tmp_path, torch.cuda.device_count()))
