# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest

from megatron_cream.data.documents import read_documents
from megatron_cream.data.index import read_index, read_metadata

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
    (found,) = read_documents(str(prefix), count=1, tokens=100)
    np.testing.assert_array_equal(found, np.arange(100))
    with pytest.raises(ValueError, match="--documents asks for 2"):
        read_documents(str(prefix), count=2, tokens=100)


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
