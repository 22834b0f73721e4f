# SPDX-License-Identifier: Apache-2.0
import json
import struct

import numpy as np
import pytest

from megatron_cream.corpus.inspection import check, describe, document_text
from megatron_cream.corpus.merge import merge_datasets
from megatron_cream.corpus.storage import write_index
from megatron_cream.data.indexed import DatasetFiles, check_tokens, read_index, read_metadata
from megatron_cream.errors import UserError
from megatron_cream.evaluation.perplexity import read_first_tokens

pytestmark = pytest.mark.usefixtures("cpu_megatron")

LENGTHS = [5, 900, 17]


@pytest.fixture
def prefix(tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "d.bin"), dtype=np.uint16)
    for length in LENGTHS:
        builder.add_document(np.arange(length), [length])
    builder.finalize(str(tmp_path / "d.idx"))
    return tmp_path / "d"


def test_reads_what_megatron_wrote(prefix):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    ours, theirs = read_index(prefix), IndexedDataset(str(prefix))
    assert ours.dtype == np.uint16
    np.testing.assert_array_equal(ours.lengths, theirs.sequence_lengths)
    np.testing.assert_array_equal(ours.pointers, theirs.index.sequence_pointers)
    assert read_metadata(prefix) is None


def test_documents(prefix):
    (found,) = read_first_tokens(str(prefix), count=1, tokens=100)
    np.testing.assert_array_equal(found, np.arange(100))
    with pytest.raises(ValueError, match="--documents asks for 2"):
        read_first_tokens(str(prefix), count=2, tokens=100)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_missing_file(prefix, suffix):
    prefix.with_suffix(suffix).unlink()
    with pytest.raises(FileNotFoundError, match=rf"d\{suffix}"):
        read_index(prefix)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
@pytest.mark.parametrize("left", [0, 10, -1])
def test_truncated_file(prefix, suffix, left):
    path = prefix.with_suffix(suffix)
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(ValueError, match=rf"d\{suffix} is truncated"):
        read_index(prefix)


def test_not_an_index(prefix):
    prefix.with_suffix(".idx").write_bytes(b"PK" * 1000)
    with pytest.raises(ValueError, match="not a Megatron index"):
        read_index(prefix)


FIELDS = {"dtype": (17, "<B"), "sequences": (18, "<q"), "documents": (26, "<q")}


def patched(path, at, format, value):
    data = bytearray(path.read_bytes())
    struct.pack_into(format, data, at, value)
    path.write_bytes(data)


@pytest.mark.parametrize("code", [0, 1, 2, 4, 5, 6, 7, 9, 255])
def test_another_dtype_code(prefix, code):
    patched(prefix.with_suffix(".idx"), *FIELDS["dtype"], code)
    with pytest.raises(UserError, match=r"d\.idx is damaged"):
        read_index(prefix)


@pytest.mark.parametrize("field", ["sequences", "documents"])
@pytest.mark.parametrize("value", [-1, 0, 1, 2, 5, 1 << 40, 1 << 62])
def test_another_count_in_the_header(prefix, field, value):
    patched(prefix.with_suffix(".idx"), *FIELDS[field], value)
    with pytest.raises(
        UserError, match=r"d\.(idx|bin) (is|holds) (damaged|truncated|no documents)"
    ):
        read_index(prefix)


@pytest.mark.parametrize("i", range(3))
@pytest.mark.parametrize("value", [-(1 << 31), -1, 0, 1, 6, 901, (1 << 31) - 1])
def test_another_length(prefix, i, value):
    patched(prefix.with_suffix(".idx"), 34 + 4 * i, "<i", value)
    with pytest.raises(UserError, match=r"d\.(idx is damaged: sequence|bin is truncated|bin has)"):
        read_index(prefix)


@pytest.mark.parametrize("i", range(3))
@pytest.mark.parametrize("value", [-(1 << 63), -2, 1, 4, 11, 1812, 1 << 62])
def test_another_pointer(prefix, i, value):
    patched(prefix.with_suffix(".idx"), 46 + 8 * i, "<q", value)
    with pytest.raises(UserError, match=rf"damaged: sequence {i} does not follow the one before"):
        read_index(prefix)


@pytest.mark.parametrize("i", range(4))
@pytest.mark.parametrize("value", [-1, 4, 1 << 40])
def test_another_document(prefix, i, value):
    patched(prefix.with_suffix(".idx"), 70 + 8 * i, "<q", value)
    with pytest.raises(UserError, match="its documents do not cover its sequences"):
        read_index(prefix)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
@pytest.mark.parametrize("more", [1, 8, 1000])
def test_bytes_that_nothing_accounts_for(prefix, suffix, more):
    with prefix.with_suffix(suffix).open("ab") as file:
        file.write(bytes(more))
    with pytest.raises(UserError, match=rf"d\{suffix} .*has \d+ bytes"):
        read_index(prefix)


def test_a_byte_for_each_sequence_is_megatrons_own(prefix):
    with prefix.with_suffix(".idx").open("ab") as file:
        file.write(bytes(3))
    assert len(read_index(prefix).lengths) == 3


def test_checked_at_any_place_of_a_long_index(tmp_path, monkeypatch):
    """Also at the borders of the blocks that it is checked in."""
    count = (1 << 20) + 5
    ones = np.ones(count, dtype=np.int64)
    write_index(tmp_path / "d.idx", np.dtype(np.uint16), [(ones, ones)], count, count)
    with (tmp_path / "d.bin").open("wb") as file:
        file.truncate(2 * count)
    assert len(read_index(tmp_path / "d").lengths) == count
    whole = (tmp_path / "d.idx").read_bytes()
    for i in ((1 << 20) - 1, 1 << 20):
        for at, format in ((34 + 4 * i, "<i"), (34 + 4 * count + 8 * i, "<q")):
            data = bytearray(whole)
            struct.pack_into(format, data, at, -3)
            (tmp_path / "d.idx").write_bytes(data)
            with pytest.raises(UserError, match=f"sequence {i} "):
                read_index(tmp_path / "d")


def test_the_dataset_of_a_run_is_checked(prefix):
    from megatron_cream.data.dataset import SpanDataset

    patched(prefix.with_suffix(".idx"), 46 + 8, "<q", 12)
    with pytest.raises(UserError, match="sequence 1 does not follow the one before"):
        SpanDataset.build_low_level_dataset(str(prefix), None)


@pytest.mark.parametrize("place", [0, 450, 921])
def test_token_ids_are_checked(prefix, place):
    patched(prefix.with_suffix(".bin"), 2 * place, "<H", 60_000)
    index = read_index(prefix)
    for sample in (False, True):
        assert check_tokens(index, None, sample=sample) == 60_000
        assert check_tokens(index, 60_001, sample=sample) == 60_000
        with pytest.raises(UserError, match=r"d\.bin holds token 60000, needs all below vocab_s"):
            check_tokens(index, 60_000, sample=sample)


def test_a_sample_of_places_finds_what_is_common(tmp_path):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 1000, size=4_000_000).astype("<i4")
    tokens[rng.integers(0, len(tokens), size=200)] = 1000
    ones = np.ones(4000, dtype=np.int64)
    write_index(tmp_path / "d.idx", tokens.dtype, [(1000 * ones, ones)], 4000, 4000)
    for found, said in ((1000, "holds token 1000"), (-1, "holds a negative token, -1")):
        np.where(tokens == 1000, found, tokens).astype("<i4").tofile(tmp_path / "d.bin")
        for sample in (False, True):
            with pytest.raises(UserError, match=said):
                check_tokens(read_index(tmp_path / "d"), 1000, sample=sample)


NOTE = {
    "tokenizer_type": "ByteLevelTokenizer",
    "tokenizer_model": None,
    "vocab_size": 1000,
    "eod_id": None,
    "bos_id": None,
    "appended_eod": False,
    "prepended_bos": False,
    "dropped": {},
}


@pytest.mark.parametrize(
    ("note", "said"),
    [
        ("", "Expecting value"),
        ('{"text": "a"}\n{"text": "b"}\n', "Extra data"),
        ("[" * 100_000, "recursion"),
        ("[1]", "holds a list, not an object"),
        ("{}", "has no tokenizer_type"),
        (NOTE | {"vocab_size": "1000"}, "vocab_size is '1000', not 1 or more"),
        (NOTE | {"vocab_size": 0}, "vocab_size is 0, not 1 or more"),
        (NOTE | {"eod_id": 1000}, "eod_id 1000 is outside vocab_size 1000"),
        (NOTE | {"eod_id": True}, "eod_id is True, not an id or null"),
        (NOTE | {"appended_eod": 1}, "appended_eod is 1, not true or false"),
        (NOTE | {"dropped": {"x": "many"}}, "dropped is .*, not an object of counts"),
        (NOTE | {"listed_errors": [["place"]]}, "listed_errors is .*, not a list of pairs"),
        (NOTE | {"shard": [2, 2]}, "shard is .*, not two numbers, I of N"),
    ],
)
def test_a_damaged_note_is_named(prefix, note, said):
    path = prefix.with_suffix(".json")
    path.write_text(note if isinstance(note, str) else json.dumps(note))
    with pytest.raises(UserError, match=rf"d\.json is not what .* writes .*{said}"):
        read_metadata(prefix)


@pytest.mark.parametrize("key", ["dtype", "documents", "sequences", "tokens"])
def test_a_note_of_another_dataset(prefix, key):
    write = prefix.with_suffix(".json").write_text
    fits = NOTE | {"dtype": "uint16", "documents": 3, "sequences": 3, "tokens": 922}
    write(json.dumps(fits))
    assert DatasetFiles.open(str(prefix)).metadata == read_metadata(prefix)
    write(json.dumps(fits | {key: "int32" if key == "dtype" else 4}))
    for call in (describe, check, lambda prefix: merge_datasets([prefix], prefix + "-merged")):
        with pytest.raises(UserError, match=rf"d\.json has {key} .*, needs files of one dataset"):
            call(str(prefix))


def test_merging_damaged_datasets_is_refused(prefix, tmp_path):
    prefix.with_suffix(".json").write_text(json.dumps(NOTE))
    merge_datasets([str(prefix)], str(tmp_path / "fine"))
    patched(prefix.with_suffix(".bin"), 4, "<H", 1000)
    with pytest.raises(UserError, match=r"d\.bin holds token 1000"):
        merge_datasets([str(prefix)], str(tmp_path / "merged"))
    patched(prefix.with_suffix(".idx"), 34, "<i", 6)
    with pytest.raises(UserError, match=r"d\.idx is damaged"):
        merge_datasets([str(prefix)], str(tmp_path / "merged"))
    assert not list(tmp_path.glob("merged*"))


def test_inspection_takes_a_vocabulary(prefix):
    assert "compared with no vocabulary" in check(str(prefix))
    assert check(str(prefix), 900).endswith("largest id 899")
    with pytest.raises(UserError, match="holds token 899, needs all below vocab_size 899"):
        check(str(prefix), 899)
    with pytest.raises(UserError, match="--vocab-size 0: needs 1 to"):
        check(str(prefix), 0)


def test_text_of_ids_outside_the_vocabulary(prefix):
    text = ("ByteLevelTokenizer", None)
    assert document_text(str(prefix), 0, *text, 0) == "\0\1\2\3\4"
    with pytest.raises(UserError, match="holds ids 0 to 899 in document 1, needs 0 to 256"):
        document_text(str(prefix), 1, *text, 0)
    with pytest.raises(UserError, match="--tokens -1: needs 0 to"):
        document_text(str(prefix), 0, *text, -1)
    with pytest.raises(UserError, match=f"--seq-length {10**20}: needs 1 to"):
        describe(str(prefix), (10**20, None))
