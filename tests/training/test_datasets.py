# SPDX-License-Identifier: Apache-2.0
"""A blend of datasets that cannot be read ends in one line: its flags, its files, its tokens."""

import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from support.runs import write_dataset

from megatron_cream.data.indexed import read_index
from megatron_cream.errors import UserError

pytestmark = pytest.mark.usefixtures("cpu_megatron")


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["0", "A", "1", "B"], "gives A the weight 0: it must be above 0"),
        (["-1", "A", "1", "B"], "gives A the weight -1"),
        (["nan", "A", "1", "B"], "gives A the weight nan"),
        (["0.5", "A", "B", "C"], "a weight before each"),
        ([], "is empty"),
    ],
)
def test_blends_that_cannot_be_read(refused, words, part):
    assert part in refused("--data-path", *words)


def test_blends_that_can(tmp_path, monkeypatch):
    from megatron_cream.training import datasets

    listed = tmp_path / "list"
    listed.write_text("0.3 A 0.7 B")
    empty = dict.fromkeys((*datasets._WHOLE, *datasets._PER_SPLIT, "per_split_data_args_path"))
    split = tmp_path / "split.json"
    split.write_text('{"train": ["A"], "valid": "B", "test": "B C"}')
    for given in (
        {"data_path": ["A"]},
        {"data_path": ["A", "B"]},
        {"data_path": ["0.3", "A", "0.7", "B"], "split": "969, 30, 1"},
        {"train_data_path": ["A"], "valid_data_path": ["1", "B"]},
        {"data_args_path": str(listed)},
        {"per_split_data_args_path": str(split)},
    ):
        datasets.validate_blend(Namespace(**{**empty, "split": None, **given}))
    with pytest.raises(FileNotFoundError):
        datasets.validate_blend(Namespace(**{**empty, "data_args_path": str(tmp_path / "none")}))
    split.write_text('{"train": ["A"]}')
    with pytest.raises(UserError, match="--per-split-data-args-path is .*train, valid and test"):
        datasets.validate_blend(Namespace(**{**empty, "per_split_data_args_path": str(split)}))


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_missing_dataset_file(refused, tmp_path, suffix):
    prefix = write_dataset(tmp_path / "d", [500] * 5)
    Path(prefix + suffix).unlink()
    assert f"d{suffix}" in refused(data=prefix)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_truncated_dataset_file(refused, tmp_path, suffix):
    prefix = write_dataset(tmp_path / "d", [500] * 5)
    path = Path(prefix + suffix)
    path.write_bytes(path.read_bytes()[:-5])
    assert f"d{suffix} is truncated" in refused(data=prefix)


def test_no_document_is_long_enough(refused, tmp_path):
    message = refused(data=write_dataset(tmp_path / "d", [50, 95]))
    for part in ("train split", "96 tokens", "--seq-length", "longest of its 2 has 95"):
        assert part in message


def test_vocabulary_smaller_than_the_datasets(refused, tmp_path):
    prefix = write_dataset(tmp_path / "d", [500] * 5)
    note = {"vocab_size": 32000, "tokenizer_type": "HF", "tokenizer_model": None, "dropped": {}}
    note |= {"eod_id": None, "bos_id": None, "appended_eod": False, "prepended_bos": False}
    Path(prefix + ".json").write_text(json.dumps(note))
    message = refused(data=prefix)
    assert "--vocab-size is 120" in message
    assert "32000" in message


@pytest.mark.parametrize("place", [0, 1234, 2499])
def test_token_beyond_the_vocabulary(refused, tmp_path, place):
    prefix = write_dataset(tmp_path / "d", [500] * 5)
    index = read_index(prefix)
    tokens = np.memmap(prefix + ".bin", mode="r+", dtype=index.dtype)
    tokens[place] = 60_000
    tokens.flush()
    assert "d.bin holds token 60000, needs all below vocab_size " in refused(data=prefix)


def test_damaged_index(refused, tmp_path):
    prefix = write_dataset(tmp_path / "d", [500] * 5)
    data = bytearray(Path(prefix + ".idx").read_bytes())
    data[34 + 4 * 5 + 8] += 2  # the second document begins a token later
    Path(prefix + ".idx").write_bytes(data)
    assert "d.idx is damaged: sequence 1 does not follow the one before" in refused(data=prefix)
