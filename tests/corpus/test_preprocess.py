# SPDX-License-Identifier: Apache-2.0
import gzip
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zstandard
from support.commands import exit_status, load_file

from megatron_cream.corpus import encode, readers
from megatron_cream.corpus.preprocess import PreprocessConfig
from megatron_cream.corpus.tokenizers import ByteLevelTokenizer, load_tokenizer, train_bpe

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "preprocess_data.py"


def read(prefix):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    return IndexedDataset(str(prefix))


def test_one_sequence_a_document_reads_back(job, run, left_in, documents, kept):
    stats = run(job, append_eod=True)
    dataset = read(job.output_prefix)
    expected = [[*document.encode(), 256] for document in kept]
    assert [dataset[i].tolist() for i in range(len(dataset))] == expected
    assert dataset.document_indices.tolist() == list(range(len(kept) + 1))
    assert dataset[0].dtype == np.uint16
    assert left_in(job) == ["a.b.bin", "a.b.idx", "a.b.json"]
    lengths = [len(row) for row in expected]
    assert (stats.documents, stats.tokens, stats.longest_document) == (12, sum(lengths), 301)
    assert stats.metadata["mean_document"] == pytest.approx(np.mean(lengths))
    assert stats.metadata["median_document"] == np.median(lengths)
    assert stats.input_bytes == Path(job.input[0]).stat().st_size
    assert f"documents: 12\ntokens: {sum(lengths)}\ndropped: 3 shorter" in stats.summary()


def test_note_beside_the_dataset(job, run):
    run(job, append_eod=True, min_tokens=5, seq_length=100, target_length=302)
    lengths = [11] * 6 + [301] * 3
    note = json.loads(Path(job.output_prefix + ".json").read_text())
    assert len(note.pop("fingerprint")) == 32
    assert note == {
        "format_version": 1,
        "tokenizer_type": "ByteLevelTokenizer",
        "tokenizer_model": None,
        "vocab_size": 257,
        "eod_id": 256,
        "bos_id": None,
        "appended_eod": True,
        "prepended_bos": False,
        "min_tokens": 5,
        "max_tokens": None,
        "dtype": "uint16",
        "documents": 9,
        "sequences": 9,
        "tokens": sum(lengths),
        "dropped": {
            "shorter_than_min_tokens": 6,
            "longer_than_max_tokens": 0,
            "duplicates": 0,
        },
        "errors": {},
        "listed_errors": [],
        "longest_document": 301,
        "mean_document": sum(lengths) / 9,
        "median_document": 11.0,
        "documents_by_length": {"1": 0, "2": 0, "4": 0, "8": 6, "16": 0, "32": 0, "64": 0}
        | {"128": 0, "256": 3},
        "share_at_least": {"100": 3 / 9, "302": 0.0},
    }


def test_min_tokens_does_not_count_eod(job, run):
    run(job, append_eod=True, min_tokens=300)
    assert [len(row) for row in read(job.output_prefix)[:]] == [301] * 3
    with pytest.raises(ValueError, match=r"--min-tokens 301: none of the 15 .* at most 300"):
        run(job, append_eod=True, min_tokens=301, overwrite=True)
    assert len(read(job.output_prefix)) == 3


def test_bos_eod_and_wide_ids(job, tmp_path, run, kept):
    folder = tmp_path / "tokenizer"
    train_bpe(kept, 270, folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["zzz"] = 65_600
    content["added_tokens"].append({**content["added_tokens"][0], "id": 65_600, "content": "zzz"})
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "zzz", "bos_token": "a"}')
    run(
        job,
        tokenizer_type="HuggingFaceTokenizer",
        tokenizer_model=str(folder),
        append_eod=True,
        prepend_bos=True,
    )
    tokenizer = load_tokenizer("HuggingFaceTokenizer", folder)
    dataset = read(job.output_prefix)
    assert tokenizer.eod == 65_600
    assert dataset[0].dtype == np.int32
    for row, ids in zip(dataset[:], tokenizer.encode(kept), strict=True):
        assert row.tolist() == [tokenizer.bos, *ids, 65_600]


def test_long_documents_have_the_same_tokens_around_them(job, tmp_path, run, kept, monkeypatch):
    """Those that are read and written piece by piece, in JSONL and in a file of their own."""
    train_bpe(kept, 270, tmp_path / "tokenizer")
    config = tmp_path / "tokenizer" / "tokenizer_config.json"
    config.write_text('{"eos_token": "<|endoftext|>", "bos_token": "a"}')
    long = tmp_path / "long.txt"
    long.write_text("word " * 200 + "κόσμε")
    changes = {
        "input": (job.input[0], str(long)),
        "tokenizer_type": "HuggingFaceTokenizer",
        "tokenizer_model": str(tmp_path / "tokenizer"),
        "append_eod": True,
        "prepend_bos": True,
        "drop_duplicates": True,
    }
    run(job, output_prefix=job.output_prefix + "-whole", **changes)
    monkeypatch.setattr(readers, "LONG_BYTES", 100)
    monkeypatch.setattr(readers, "PIECE_BYTES", 40)
    run(job, **changes)
    tokenizer = load_tokenizer("HuggingFaceTokenizer", tmp_path / "tokenizer")
    pieces, whole = read(job.output_prefix), read(job.output_prefix + "-whole")
    rows = [row.tolist() for row in pieces[:]]
    assert rows == [row.tolist() for row in whole[:]]
    assert len(rows) == 5
    for row in rows:
        assert row[0] == tokenizer.bos and row[-1] == tokenizer.eod
        assert tokenizer.eod not in row[:-1]


def test_equal_results_from_every_kind_of_input(job, tmp_path, run, content, documents):
    run(job)
    data = Path(job.input[0]).read_bytes()
    (tmp_path / "in.jsonl.gz").write_bytes(gzip.compress(data))
    (tmp_path / "in.jsonl.zst").write_bytes(zstandard.compress(data))
    folder = tmp_path / "folder"
    folder.mkdir()
    for i, document in enumerate(documents):
        (folder / f"{i:02}.txt").write_bytes(document.encode())
    (folder / "other.bin").write_bytes(b"x")
    for name in ("in.jsonl.gz", "in.jsonl.zst", "folder"):
        prefix = str(tmp_path / "out" / name)
        stats = run(job, input=(str(tmp_path / name),), output_prefix=prefix)
        assert content(prefix) == content(job.output_prefix)
        assert stats.skipped_files == (name == "folder")


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("older", [False, True])
def test_broken_line_leaves_everything_as_it_was(job, workers, older, run, outputs, left_in):
    if older:
        run(job)
    before = left_in(job), older and outputs(job.output_prefix)
    with open(job.input[0], "a") as stream:
        stream.write("{broken\n")
    with pytest.raises(ValueError, match=r"in\.jsonl: line 16: broken JSON"):
        run(job, workers=workers, overwrite=older)
    assert (left_in(job), older and outputs(job.output_prefix)) == before


def test_interrupt_half_way_keeps_what_is_finished(job, monkeypatch, run, outputs, left_in):
    run(job, output_prefix=job.output_prefix + "-whole")
    true_encode, calls = ByteLevelTokenizer.encode, 0

    def encode(self, texts):
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return true_encode(self, texts)

    said = []
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ByteLevelTokenizer, "encode", encode)
        run(job, part_bytes=300)
    assert "a.b.parts" in left_in(job)
    run(job, part_bytes=300, say=said.append)
    assert said[0].startswith("continuing with 2 finished parts in ")
    assert outputs(job.output_prefix) == outputs(job.output_prefix + "-whole")
    assert "a.b.parts" not in left_in(job)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_tokens": 4, "min_tokens": 5}, "--max-tokens 4: needs at least --min-tokens, 5"),
        ({"long_documents": "drop"}, "--long-documents drop: needs --max-tokens"),
        ({"shard": (2, 2)}, "--shard 2/2: needs 0/2 to 1/2"),
        ({"on_error": "ignore"}, "--on-error ignore: needs one of fail, skip"),
        ({"engine": "fast"}, "--engine fast: ByteLevelTokenizer has none, needs --engine auto"),
        ({"input": ("-", "-")}, "--input - -: standard input can be read once"),
        ({"input": ("-",), "workers": 2}, "--input -: standard input is read by one process"),
        ({"input": ("-",), "input_format": "arrow"}, "--input -: cannot be arrow, needs jsonl"),
        ({"workers": 0}, "--workers 0: needs 1 to 4096"),
        ({"min_tokens": 0}, "--min-tokens 0: needs 1 to 2147483645"),
        ({"prepend_bos": True}, "--prepend-bos: ByteLevelTokenizer has none, needs a tokenizer"),
        ({"tokenizer_type": "Other"}, "--tokenizer-type Other: needs one of"),
        ({"tokenizer_type": "SentencePieceTokenizer"}, r"--tokenizer-model \(not given\)"),
        ({"input": ("nowhere",)}, "--input nowhere: not found"),
        (
            {"output_prefix": "setup.cfg/x"},
            "--output-prefix setup.cfg/x: setup.cfg is not a folder",
        ),
        ({"output_prefix": "out/"}, "--output-prefix out/: names a folder, needs"),
    ],
)
def test_settings_are_checked_before_anything_is_read(
    job, monkeypatch, changes, message, run, left_in
):
    monkeypatch.setattr(encode, "read_span", pytest.fail)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(job, **changes)
    assert left_in(job) == []


def test_append_eod_needs_a_tokenizer_that_has_it(job, tmp_path, run, kept):
    train_bpe(kept, 260, tmp_path / "t")
    (tmp_path / "t" / "tokenizer_config.json").unlink()
    changes = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": str(tmp_path / "t")}
    with pytest.raises(ValueError, match="--append-eod: .* has none, needs a tokenizer with an"):
        run(job, append_eod=True, **changes)


def test_output_folder_must_be_writable(job, monkeypatch, run):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ValueError, match="--output-prefix .*: folder .* needs to be writable"):
        run(job)


def test_output_never_replaces_an_input(job, tmp_path, run, documents):
    source = Path(job.input[0]).rename(tmp_path / "out" / "a.b.json")
    with pytest.raises(ValueError, match=r"a\.b\.json is an input, needs another prefix"):
        run(job, input=(str(source),), overwrite=True)
    assert source.read_text().count("\n") == len(documents)


def test_input_without_text(job, run, left_in):
    Path(job.input[0]).write_text('{"text": ""}\n')
    with pytest.raises(ValueError, match=r"--input .*in\.jsonl: holds no text"):
        run(job)
    assert left_in(job) == []


def arguments(job):
    flags = {"--tokenizer-type": job.tokenizer_type, "--output-prefix": job.output_prefix}
    return ["--input", *job.input, *(word for pair in flags.items() for word in pair)]


@pytest.fixture(scope="module", autouse=True)
def running_tool(tmp_path_factory, documents):
    """The tool at work, started first since it imports megatron while the other tests do."""
    folder = tmp_path_factory.mktemp("tool")
    (folder / "in.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    job = PreprocessConfig(
        (str(folder / "in.jsonl"),), "ByteLevelTokenizer", str(folder / "out"), append_eod=True
    )
    command = [sys.executable, str(TOOL), *arguments(job), "--append-eod", "--workers", "2"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as process:
        yield job, process
        process.kill()


def test_tool_writes_and_reports(running_tool, run, outputs):
    job, process = running_tool
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr
    assert stdout.startswith("documents: 12\n")
    assert f"{job.output_prefix}.idx" in stdout
    assert "B/s" in stderr
    run(job, output_prefix=job.output_prefix + "2")
    assert outputs(job.output_prefix) == outputs(job.output_prefix + "2")


def test_tool_prints_one_line_for_an_error(job):
    command = [sys.executable, str(TOOL), *arguments(job), "--workers", "0"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --workers 0: needs 1 to 4096\n"


@pytest.fixture
def tool():
    """The tool as a module; it handles SIGTERM, which is undone."""
    loaded = load_file(TOOL)
    before = signal.getsignal(signal.SIGTERM)
    yield loaded
    signal.signal(signal.SIGTERM, before)


def test_tool_exit_status(tool, job, capsys):
    Path(job.input[0]).write_text("{broken\n")
    assert exit_status(tool.main, arguments(job)) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {job.input[0]}: line 1: ")
    with pytest.raises(SystemExit) as caught:
        tool.main([*arguments(job), "--workers", "many"])
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("error: argument --workers: invalid int value")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_tool_without_a_finished_part_leaves_nothing(
    tool, job, monkeypatch, number, status, left_in
):
    def encode(self, texts):
        assert left_in(job) == ["a.b.parts"]
        signal.raise_signal(number)

    monkeypatch.setattr(ByteLevelTokenizer, "encode", encode)
    # A shell starts background jobs with SIGINT ignored, and Python leaves it so.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        returned = tool.main(arguments(job))
    except SystemExit as exc:
        returned = exc.code
    finally:
        signal.signal(signal.SIGINT, before)
    assert returned == status
    assert left_in(job) == []
