# SPDX-License-Identifier: Apache-2.0
"""A model of every family is the same in Megatron, and comes back bit by bit."""

import pytest
import torch
from support import hf_models as models

pytestmark = pytest.mark.usefixtures("cpu_megatron")


@pytest.fixture(scope="module")
def record_difference():
    """Collects differences and prints them as one table at the end (pytest -s shows it)."""
    rows = []
    yield rows.append
    print("\n| family | largest logit | largest difference |\n|---|---|---|")
    for name, largest, difference in rows:
        print(f"| {name} | {largest:.2f} | {difference:.1e} |")


@pytest.mark.parametrize("name", models.FAMILIES)
def test_same_logits_and_same_bits(name, tmp_path, record_difference):
    from megatron_cream.checkpoint.export_hf import export_checkpoint
    from megatron_cream.checkpoint.import_hf import import_checkpoint
    from megatron_cream.checkpoint.loading import load_model

    source = models.make(tmp_path / "source", name)
    import_checkpoint(str(source), str(tmp_path / "imported"), quiet=True)
    model = load_model(str(tmp_path / "imported")).module
    ids = torch.randint(0, 120, (2, 96), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(96).expand_as(ids)
    with torch.no_grad():
        found = model(input_ids=ids, position_ids=positions, attention_mask=None)
    wanted = models.logits(source, ids)
    difference = float((found - wanted).abs().max())
    record_difference((name, float(wanted.abs().max()), difference))
    assert found.shape == wanted.shape  # no padded rows
    assert difference < 1e-4

    export_checkpoint(str(tmp_path / "imported"), str(tmp_path / "exported"), quiet=True)
    assert models.same_bits(source, tmp_path / "exported")
    assert torch.equal(models.logits(tmp_path / "exported", ids), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_comes_back_bit_by_bit(dtype, tmp_path):
    from megatron_cream.checkpoint.export_hf import export_checkpoint
    from megatron_cream.checkpoint.import_hf import import_checkpoint
    from megatron_cream.checkpoint.iterations import read_saved_arguments

    source = models.make(tmp_path / "source", dtype=dtype)
    imported = import_checkpoint(str(source), str(tmp_path / "imported"), quiet=True)
    assert imported.dtype == dtype
    assert read_saved_arguments(str(tmp_path / "imported")).params_dtype == dtype
    export_checkpoint(str(tmp_path / "imported"), str(tmp_path / "exported"), quiet=True)
    assert models.same_bits(source, tmp_path / "exported")


def test_other_type_is_the_rounded_one(tmp_path):
    from megatron_cream.checkpoint.export_hf import export_checkpoint
    from megatron_cream.checkpoint.import_hf import import_checkpoint

    source = models.make(tmp_path / "source")
    import_checkpoint(str(source), str(tmp_path / "half"), torch.bfloat16, quiet=True)
    export_checkpoint(str(tmp_path / "half"), str(tmp_path / "a"), quiet=True)
    import_checkpoint(str(source), str(tmp_path / "full"), quiet=True)
    export_checkpoint(str(tmp_path / "full"), str(tmp_path / "b"), dtype=torch.bfloat16, quiet=True)
    wanted = {name: t.bfloat16() for name, t in models.tensors(source).items()}
    for folder in ("a", "b"):
        found = models.tensors(tmp_path / folder)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_small_pieces_and_several_shards(tmp_path, monkeypatch):
    """Pieces that cut through heads, and files smaller than the model."""
    from megatron_cream.checkpoint import export_hf, import_hf, torch_dist_io

    monkeypatch.setattr(import_hf, "CHUNK_BYTES", 5000)
    monkeypatch.setattr(export_hf, "BLOCK_BYTES", 3000)
    monkeypatch.setattr(torch_dist_io, "_FILE_BYTES", 50_000)
    source = models.make(tmp_path / "source")
    import_hf.import_checkpoint(str(source), str(tmp_path / "imported"), quiet=True)
    assert len(list((tmp_path / "imported/release").glob("*.distcp"))) > 5
    export_hf.export_checkpoint(
        str(tmp_path / "imported"), str(tmp_path / "exported"), shard_bytes=100_000, quiet=True
    )
    assert models.same_bits(source, tmp_path / "exported")
    files = sorted((tmp_path / "exported").glob("*.safetensors"))
    assert len(files) > 4
    assert all(file.stat().st_size < 100_000 + 5_000 for file in files)  # and a header
    ids = torch.arange(50)[None]
    assert torch.equal(models.logits(tmp_path / "exported", ids), models.logits(source, ids))
    # In pieces or not, the file that was imported is read at any chunking.
    from megatron_cream.checkpoint.loading import load_model

    model = load_model(str(tmp_path / "imported")).module
    with torch.no_grad():
        found = model(input_ids=ids, position_ids=ids, attention_mask=None)
    assert (found - models.logits(source, ids)).abs().max() < 1e-4
