# SPDX-License-Identifier: Apache-2.0
"""A mask beside a dataset. Every token is its own place in the file, so that a label names it."""

import json
import pickle
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_cream.config import ExtensionConfig
from megatron_cream.corpus.inspection import check, describe
from megatron_cream.corpus.merge import merge_datasets
from megatron_cream.data.indexed import DatasetFiles, read_metadata
from megatron_cream.errors import UserError

pytestmark = pytest.mark.usefixtures("cpu_megatron")

N, T = 48, 200
LENGTHS = [47, 48, 49, 200, 30, 530, 96, 16]
TOKENS = sum(LENGTHS)
UNITS = ["document", "window", "packed", "packed-documents"]


def write(prefix, mask=None, note=None, first=0):
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    ends = first + np.cumsum([0, *LENGTHS])
    for start, end in zip(ends, ends[1:], strict=False):
        builder.add_document(np.arange(start, end), [end - start])
    builder.finalize(f"{prefix}.idx")
    if mask is not None:
        Path(f"{prefix}.mask").write_bytes(mask.tobytes())
    if note is not None:
        common = {
            **{"format_version": 1, "vocab_size": 10 * TOKENS, "tokenizer_type": "test"},
            **{"tokenizer_model": None, "eod_id": None, "bos_id": None, "appended_eod": False},
            **{"prepended_bos": False, "dropped": {}},
        }
        Path(f"{prefix}.json").write_text(json.dumps(common | note))
    return str(prefix)


def recorded(mask):
    return {"mask_bytes": len(mask), "trained_tokens": int(mask.sum())}


@pytest.fixture(scope="module")
def mask():
    return (np.random.default_rng(4).random(TOKENS) < 0.3).astype(np.uint8)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return write(tmp_path_factory.mktemp("plain") / "a", note={})


@pytest.fixture(scope="module")
def masked(tmp_path_factory, mask):
    return write(tmp_path_factory.mktemp("masked") / "a", mask, recorded(mask))


def build(prefixes, unit, mapped=True, weights=None, **changes):
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )

    from megatron_cream.data.dataset import SpanDataset, SpanDatasetConfig
    from megatron_cream.data.packed import PackedSpanDataset

    config = SpanDatasetConfig(
        random_seed=7,
        sequence_length=N,
        blend=(prefixes, weights),
        split="100,0,0",
        mmap_bin_files=mapped,
        extension=ExtensionConfig(N, T, N, sample_unit=unit, **changes),
    )
    kind = PackedSpanDataset if unit == "packed-documents" else SpanDataset
    return BlendedMegatronDatasetBuilder(kind, [30, 0, 0], lambda: True, config).build()[0]


@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize("rule", ["true-next", "masked", "reference"])
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("strategy", ["cream", "randpos"])
def test_a_label_has_a_loss_where_its_token_is_trained(
    plain, masked, mask, mapped, rule, unit, strategy
):
    options = {"position_strategy": strategy, "label_rule": rule}
    whole = build([plain], unit, mapped, **options)
    some = pickle.loads(pickle.dumps(build([masked], unit, mapped, **options)))  # as for a worker
    trained = 0
    for index in range(30):
        before, after = whole[index], some[index]
        expected = before["loss_mask"] * torch.from_numpy(mask)[before["labels"]]
        assert after["loss_mask"].dtype == torch.float32
        assert torch.equal(after["loss_mask"], expected)
        assert all(torch.equal(after[key], before[key]) for key in before if key != "loss_mask")
        trained += int(expected.sum())
    assert 0.2 * 30 * N < trained < 0.4 * 30 * N


@pytest.mark.parametrize("unit", ["window", "packed-documents"])
def test_a_blend_masks_the_dataset_that_has_a_mask(tmp_path, masked, mask, unit):
    other = write(tmp_path / "b", first=TOKENS)
    blend, seen = build([masked, other], unit, weights=[0.5, 0.5]), set()
    every = torch.from_numpy(np.concatenate([mask, np.ones(TOKENS, dtype=np.uint8)])).float()
    for index in range(30):
        sample = blend[index]
        inside = sample["loss_mask"] > 0
        assert every[sample["labels"][inside]].all()
        second = bool(sample["tokens"].max() >= TOKENS)
        seen.add(second)
        share = inside[sample["labels"] > 0].float().mean()  # padding apart
        assert share > 0.7 if second else share < 0.6
    assert seen == {False, True}


def test_labels_and_loss_are_cut_alike_for_context_parallel_ranks(masked, monkeypatch):
    from megatron.core import utils

    sample = build([masked], "window")[0]
    batch = {key: value[None] for key, value in sample.items()}
    by_label = dict(zip(sample["labels"].tolist(), sample["loss_mask"].tolist(), strict=True))
    found = {}
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: 2)
    for rank in range(2):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda group=None, rank=rank: rank)
        part = utils.get_batch_on_this_cp_rank(
            {"cu_seqlens": None, "cu_seqlens_padded": None, **batch},
            is_hybrid_cp=False,
            cp_group=object(),
        )
        labels, loss = part["labels"][0].tolist(), part["loss_mask"][0].tolist()
        assert len(labels) == len(loss) == N // 2
        found |= dict(zip(labels, loss, strict=True))
    assert found == by_label


def test_masks_are_merged_with_ones_for_a_dataset_without(tmp_path, plain, masked, mask):
    merged = str(tmp_path / "c")
    merge_datasets([masked, plain, masked], merged)
    expected = np.concatenate([mask, np.ones(TOKENS, dtype=np.uint8), mask])
    assert Path(merged + ".mask").read_bytes() == expected.tobytes()
    assert recorded(expected).items() <= read_metadata(merged).items()
    merge_datasets([plain, plain], merged, overwrite=True)
    assert not Path(merged + ".mask").exists() and "mask_bytes" not in read_metadata(merged)


def test_what_inspect_says_of_a_mask(plain, masked, mask):
    share = f"loss on {mask.sum()} tokens, {mask.mean():.1%}: {masked}.mask"
    assert share in describe(masked).splitlines()
    assert check(masked).endswith(f", loss on {mask.sum()} of them")
    assert "loss" not in describe(plain) + check(plain)


def damage(prefix, how):
    path = Path(prefix + ".mask")
    content = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    elif how == "unrecorded":
        write(prefix, note={})
    elif how == "truncated":
        path.write_bytes(content[:-1])
    elif how == "longer":
        path.write_bytes(content + b"\0")
    elif how == "byte":
        content[5] = 7
        path.write_bytes(content)
    else:
        path.write_bytes(bytes(len(content)))
        write(prefix, note={"mask_bytes": TOKENS, "trained_tokens": 0})


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("missing", "a.mask is missing: .*a.json records 1016 bytes"),
        ("unrecorded", "a.mask is not of this dataset: .*records no mask"),
        ("truncated", "a.mask has 1015 bytes and needs 1016"),
        ("longer", "a.mask has 1017 bytes and needs 1016"),
        ("byte", "a.mask holds the byte 7: it must be 0 or 1"),
        ("empty", "a.mask is 0 everywhere: no token"),
    ],
)
def test_a_mask_that_cannot_be_right_is_refused(tmp_path, mask, how, words):
    from megatron_cream.training.datasets import _validate_content

    args = Namespace(padded_vocab_size=None, vocab_size=None, eod_mask_loss=False)
    prefix = write(tmp_path / "a", mask, recorded(mask))
    _validate_content(args, DatasetFiles.open(prefix, whole=False))
    damage(prefix, how)
    with pytest.raises(UserError, match=words):
        _validate_content(args, DatasetFiles.open(prefix, whole=False))
    if how in ("missing", "unrecorded", "truncated", "longer"):
        for use in (describe, lambda prefix: build([prefix], "window")):
            with pytest.raises(UserError, match=words):
                use(prefix)
        with pytest.raises(UserError, match=words):
            merge_datasets([prefix], str(tmp_path / "b"))
    elif how == "byte":
        for use in (check, lambda prefix: merge_datasets([prefix], str(tmp_path / "b"))):
            with pytest.raises(UserError, match=words):
                use(prefix)


def test_a_mask_of_as_many_other_tokens_is_noticed_by_a_full_check(tmp_path, mask):
    prefix = write(tmp_path / "a", 1 - mask, recorded(mask))
    with pytest.raises(UserError, match=f"has {TOKENS - mask.sum()} trained tokens and .* records"):
        check(prefix)


def test_a_mask_without_a_note_is_counted(tmp_path, mask):
    prefix = write(tmp_path / "a", mask)
    files = DatasetFiles.open(prefix)
    assert files.masked and files.metadata is None and files.trained_tokens() == mask.sum()
