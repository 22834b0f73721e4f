# SPDX-License-Identifier: Apache-2.0
"""Megatron's own hand-over of position ids, mrope: what docs/megatron.md says of it.

A test that fails here after an update of Megatron is a reason to look at that page again.
"""

import inspect

import pytest
import torch

from megatron_cream.rope import make_scaling

pytestmark = pytest.mark.usefixtures("cpu_megatron")

SECTION = [16, 8, 8]


def megatron_angles(ids, **options):
    """Angles of Megatron's embedding, all three axes of which get the same position ids."""
    from megatron.core.models.common.embeddings.rotary_pos_embedding import (
        MultimodalRotaryEmbedding,
    )

    return MultimodalRotaryEmbedding(64, 1.0, **options)(ids.expand(3, *ids.shape), SECTION)


def random_ids():
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randperm(262144, generator=generator)[:128].sort().values for _ in range(3)]
    return torch.stack(rows)


def test_angles_are_bit_equal():
    from megatron_cream.mcore.rotary import PositionRotaryEmbedding

    scaling = make_scaling("none", dim=64, base=1e4, factor=1.0, original_length=4096)
    ids = random_ids()
    assert torch.equal(PositionRotaryEmbedding(scaling).angles(ids), megatron_angles(ids))


def test_it_fails_for_interleaved_pairs():
    with pytest.raises(RuntimeError):
        megatron_angles(random_ids(), rotary_interleaved=True)


def test_only_gpt_model_knows_it():
    from megatron.core.models.gpt import gpt_model
    from megatron.core.models.hybrid import hybrid_model

    assert "mrope" in inspect.getsource(gpt_model)
    assert "mrope" not in inspect.getsource(hybrid_model)
