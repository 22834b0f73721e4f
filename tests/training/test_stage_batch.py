# SPDX-License-Identifier: Apache-2.0
"""What a middle stage draws is what the outer stages read, in validation too."""

from argparse import Namespace

import numpy as np
import pytest
import torch

from megatron_cream.config import ExtensionConfig

pytestmark = pytest.mark.usefixtures("cpu_megatron")

CLEX = {"rope_interpolation": "clex", "rope_factor": 8.0}


@pytest.mark.parametrize("rope", [{}, CLEX])
@pytest.mark.parametrize("original", [96, 40])  # a window shorter than N has a scale above 1
def test_a_middle_stage_validates_at_the_positions_and_scale_of_the_others(dataset, rope, original):
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    from megatron_cream.config import SETTINGS_KEY
    from megatron_cream.data.dataset import SpanDataset, SpanDatasetConfig
    from megatron_cream.training.step import _plain_positions

    extension = ExtensionConfig(96, 8 * original, original, position_strategy="cream", **rope)
    config = SpanDatasetConfig(
        random_seed=1,
        sequence_length=96,
        blend=([dataset], None),
        split="0,100,0",
        extension=extension,
    )
    source = IndexedDataset(dataset, multimodal=False)
    indices = np.arange(40, dtype=np.int32)
    read = SpanDataset(source, dataset, indices, 4, Split.valid, config)[2]
    args = Namespace(**{SETTINGS_KEY: extension.to_dict(), "seq_length": 96, "micro_batch_size": 3})
    drawn = _plain_positions(args)
    assert ("scale" in drawn) == ("scale" in read) == bool(rope)
    for name, value in drawn.items():
        assert torch.equal(value, read[name].expand_as(value)), name
    if rope and original < 96:
        assert drawn["scale"][0] > 1


def test_settings_of_a_run_are_made_once(monkeypatch):
    """And not for every micro-batch; those of another run are its own."""
    from megatron_cream.config import SETTINGS_KEY, extension_of

    made = []
    own = ExtensionConfig.from_dict
    monkeypatch.setattr(ExtensionConfig, "from_dict", lambda values: made.append(0) or own(values))
    runs = [Namespace(**{SETTINGS_KEY: ExtensionConfig(96, t, 96).to_dict()}) for t in (768, 960)]
    for run, target in zip(runs, (768, 960), strict=True):
        assert {extension_of(run).target_length for _ in range(3)} == {target}
    assert len(made) == 2
