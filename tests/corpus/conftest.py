# SPDX-License-Identifier: Apache-2.0
import gzip
import json
import lzma
import os
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_cream.corpus.preprocess import PreprocessConfig, preprocess
from megatron_cream.corpus.storage import SUFFIXES


@pytest.fixture(scope="session")
def documents():
    return ["alpha beta", "κόσμε", "a", "", "x" * 300] * 3


@pytest.fixture(scope="session")
def kept(documents):
    """The documents that a job with --min-tokens 1 writes."""
    return [document for document in documents if document]


@pytest.fixture
def job(tmp_path, documents):
    """A byte level job with its input, in a folder of its own."""
    (tmp_path / "out").mkdir()
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    return PreprocessConfig(
        input=(str(source),),
        tokenizer_type="ByteLevelTokenizer",
        output_prefix=str(tmp_path / "out" / "a.b"),
    )


@pytest.fixture
def run():
    """Runs a job with some of its settings changed."""

    def call(config, say=lambda line: None, **changes):
        return preprocess(replace(config, **changes), progress=False, say=say)

    return call


@pytest.fixture
def outputs():
    """Reads the bytes of the files at a prefix."""

    def call(prefix):
        paths = {suffix: Path(str(prefix) + suffix) for suffix in SUFFIXES}
        return {suffix: path.read_bytes() for suffix, path in paths.items() if path.exists()}

    return call


@pytest.fixture
def content(outputs):
    """As ``outputs``, without what tells inputs of the same documents apart."""

    def call(prefix):
        found = outputs(prefix)
        note = json.loads(found[".json"])
        assert len(note.pop("fingerprint") or "no standard input has one") >= 16
        return found | {".json": note}

    return call


@pytest.fixture
def left_in():
    """Lists the folder that a job writes to."""

    def call(config):
        return sorted(os.listdir(os.path.dirname(config.output_prefix)))

    return call


@pytest.fixture(scope="session")
def pack():
    """Compresses bytes as the suffix of a name says."""

    def call(name, data):
        suffix = Path(name).suffix
        if suffix == ".zst":
            zstandard = pytest.importorskip("zstandard")
            return zstandard.compress(data)
        return {".gz": gzip.compress, ".xz": lzma.compress}.get(suffix, bytes)(data)

    return call
