# SPDX-License-Identifier: Apache-2.0
"""Killed at any moment, a full disk, a second process, broken input: nothing is taken for whole."""

import fcntl
import glob
import gzip
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_cream.corpus import readers
from megatron_cream.corpus.input_files import InputSpan
from megatron_cream.corpus.readers import Fields, read_documents, read_span
from megatron_cream.corpus.storage import PREPROCESSING, WorkFolder
from megatron_cream.corpus.tokenizers import train_bpe
from megatron_cream.ownership import MARK_NAME

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "preprocess_data.py"
BROKEN_LINES = 10_000
FUZZED_ARCHIVES = 600


@pytest.fixture
def big(job, tmp_path, pack):
    """A job of a few seconds' parts, from a plain file and a compressed one, with duplicates."""
    rng = random.Random(5)
    words = ["".join(rng.choices("abcdefgh", k=rng.randrange(1, 9))) for _ in range(400)]
    lines = [
        json.dumps({"text": " ".join(rng.choices(words, k=rng.randrange(1, 40)))}) + "\n"
        for _ in range(4000)
    ]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    (tmp_path / "b.jsonl.gz").write_bytes(pack("b.gz", "".join(lines[1000:3000]).encode()))
    train_bpe([" ".join(words)], 400, tmp_path / "tokenizer")
    return replace(
        job,
        input=(str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl.gz")),
        tokenizer_type="HuggingFaceTokenizer",
        tokenizer_model=str(tmp_path / "tokenizer"),
        append_eod=True,
        drop_duplicates=True,
    )


def command(job, *more):
    flags = [sys.executable, str(TOOL), "--input", *job.input, "--append-eod"]
    flags += ["--drop-duplicates", "--tokenizer-type", job.tokenizer_type]
    flags += ["--tokenizer-model", job.tokenizer_model, "--output-prefix", job.output_prefix]
    return [*flags, *more]


def test_killed_again_and_again(big, run, outputs):
    """Killed at once, or after some more parts, until there is nothing left to do."""
    run(big, output_prefix=big.output_prefix + "-whole")
    # So many parts that no kill meets the last ones: what is whole already is not continued.
    tool = command(big, "--workers", "2", "--part-bytes", "6000")
    pattern = big.output_prefix + ".parts/*-*.json"
    rng, parts, kills = random.Random(), [0], 0
    for more in (0, 1, 5, 2, 9, None):
        with subprocess.Popen(tool, stderr=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            while process.poll() is None and more is not None:
                if len(glob.glob(pattern)) >= parts[-1] + more:
                    time.sleep(rng.uniform(0, 0.05 if more else 0.5))
                    process.kill()
                    kills += 1
                    break
                time.sleep(0.001)
            error = process.stderr.read().decode()
        assert process.returncode in (0, -signal.SIGKILL), error
        if process.returncode == 0:
            break
        parts.append(len(glob.glob(pattern)))
    assert kills >= 3 and parts == sorted(parts)
    assert "continuing with " in error
    assert outputs(big.output_prefix) == outputs(big.output_prefix + "-whole")
    assert not os.path.exists(big.output_prefix + ".parts")


@pytest.mark.parametrize("drop_duplicates", [False, True])
def test_a_part_counts_when_all_of_it_is_on_the_disk(job, run, monkeypatch, drop_duplicates):
    synced, moved, sync, replace_file = set(), [], os.fsync, os.replace

    def fsync(descriptor):
        sync(descriptor)
        synced.add(os.fstat(descriptor).st_ino)

    def move(source, target):
        if re.search(r"[0-9]{8}-[0-9]{6}[.]", str(target)):
            moved.append((Path(target).suffix, os.stat(source).st_ino in synced))
        replace_file(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", move)
    run(job, drop_duplicates=drop_duplicates)
    hashes = [(".hash", True)] if drop_duplicates else []
    assert moved == [(".bin", True), (".len", True), *hashes, (".json", True)]


def test_damaged_parts_are_made_again(big, run, outputs, monkeypatch):
    from megatron_cream.corpus import preprocess as module

    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "build_dataset", stop)
        run(big, part_bytes=20_000)
    files = sorted(glob.glob(big.output_prefix + ".parts/*-*"))
    assert len(files) > 100
    for i, path in enumerate(files[::5]):
        data = Path(path).read_bytes()
        Path(path).write_bytes(data[: len(data) // 2] if i % 2 else b"")
    Path(files[-1]).with_suffix(".json").unlink()
    run(big, part_bytes=20_000)
    run(big, output_prefix=big.output_prefix + "-whole")
    assert outputs(big.output_prefix) == outputs(big.output_prefix + "-whole")


def test_other_settings_do_not_continue(big, run, monkeypatch):
    from megatron_cream.corpus import preprocess as module

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(module, "build_dataset", lambda *arguments: 1 / 0)
        run(big)
    with pytest.raises(ValueError, match=r"another min_tokens \(1, this one 3\); needs the same"):
        run(big, min_tokens=3)
    assert run(big, min_tokens=3, restart=True).documents > 0


def test_second_process_is_refused(job, run, outputs):
    with WorkFolder(job.output_prefix, PREPROCESSING) as folder:
        with pytest.raises(BlockingIOError, match="another process is writing it"):
            run(job)
        assert folder.path.exists()
    run(job)
    assert outputs(job.output_prefix)


def test_lock_of_a_deleted_folder_is_not_taken(job, monkeypatch):
    """The process before deletes its lock between this one's opening and locking of it."""
    prefix = job.output_prefix
    true_flock, folder = fcntl.flock, Path(prefix + ".parts")
    calls = []

    def flock(lock, operation):
        if not calls:
            (folder / MARK_NAME).unlink()
            folder.rmdir()
        calls.append(operation)
        true_flock(lock, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with WorkFolder(prefix, PREPROCESSING):
        assert len(calls) == 2
        assert (folder / MARK_NAME).exists()


def test_input_that_changes_meanwhile_is_an_error(job, run, monkeypatch):
    from megatron_cream.corpus import preprocess as module

    true_encode = module._encode_units

    def encode_units(*arguments):
        true_encode(*arguments)
        with open(job.input[0], "a") as file:
            file.write('{"text": "late"}\n')

    monkeypatch.setattr(module, "_encode_units", encode_units)
    with pytest.raises(ValueError, match=r"in\.jsonl: changed while it was read"):
        run(job)
    assert not os.path.exists(job.output_prefix + ".idx")


def test_a_shard_leaves_files_of_other_shards_to_them(job, run, tmp_path, monkeypatch):
    """It looks at each once, for the cut, and at its own once more."""
    from megatron_cream.corpus import preprocess as module

    other = tmp_path / "other.jsonl"
    other.write_bytes(Path(job.input[0]).read_bytes())
    true_encode, looked = module._encode_units, []

    def encode_units(*arguments):
        true_encode(*arguments)
        other.write_text("")

    monkeypatch.setattr(module, "_encode_units", encode_units)
    own = module.InputFile.of
    monkeypatch.setattr(
        module.InputFile, "of", lambda path, *rest: looked.append(path.name) or own(path, *rest)
    )
    run(job, input=(job.input[0], str(other)), shard=(0, 2), part_bytes=100)
    assert sorted(looked) == ["in.jsonl", "in.jsonl", "other.jsonl"]


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("limit", [3_000, 100_000])
def test_full_disk(big, run, outputs, workers, limit):
    """A file that may not grow over a limit is what a full disk looks like to a process."""

    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    tool = command(big, "--workers", workers, "--part-bytes", "30000")
    # Counting lines (make coverage) writes a file of its own at the end.
    kept = {name: text for name, text in os.environ.items() if not name.startswith("COVERAGE")}
    done = subprocess.run(tool, capture_output=True, text=True, preexec_fn=limited, env=kept)
    assert done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"error: --output-prefix {big.output_prefix}: File too large, needs")
    assert not os.path.exists(big.output_prefix + ".idx")
    done = subprocess.run(tool, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    run(big, output_prefix=big.output_prefix + "-whole")
    assert outputs(big.output_prefix) == outputs(big.output_prefix + "-whole")


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.jsonl.xz", "x.jsonl.zst"])
@pytest.mark.parametrize("on_error", ["fail", "skip"])
def test_truncated_archive_is_an_error_either_way(job, run, tmp_path, pack, name, on_error):
    path = tmp_path / name
    whole = pack(name, Path(job.input[0]).read_bytes() * 50)
    for left in (len(whole) - 1, len(whole) // 2, 1):
        path.write_bytes(whole[:left])
        with pytest.raises(ValueError, match=rf"{name}: byte \d+: broken compressed data"):
            run(job, input=(str(path),), on_error=on_error)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="is empty, needs a whole"):
        run(job, input=(str(path),), on_error=on_error)
    assert not os.path.exists(job.output_prefix + ".idx")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_unreadable_file(job, run):
    os.chmod(job.input[0], 0)
    with pytest.raises(PermissionError, match=r"in\.jsonl"):
        run(job)


def test_bad_lines_are_counted_with_file_and_line(job, run):
    good = b'{"text": "fine"}\n'
    bad = [b"{", b'{"text": 1}', b"[]", b'{"text": "\xff"}', b'{"text": "\\ud800"}', b"\0"]
    lines = [good if i % 7 else bad[i // 7 % 6] + b"\n" for i in range(84)]
    Path(job.input[0]).write_bytes(b"".join(lines))
    for part_bytes, workers in ((1 << 20, 1), (100, 2)):
        stats = run(job, on_error="skip", part_bytes=part_bytes, workers=workers, overwrite=True)
        note = stats.metadata
        assert note["documents"] == 72
        assert set(note["errors"].values()) == {2} and len(note["errors"]) == 6
        places = [place for place, _ in note["listed_errors"]]
        assert places == [f"{job.input[0]}: line {i + 1}" for i in range(0, 84, 7)]
        assert "bad records: 2 broken JSON, 2 wrong type, 2 not an object" in stats.summary()
        with pytest.raises(ValueError, match=r"in\.jsonl: line \d*[1-5]?[0-9]: "):
            run(job, part_bytes=part_bytes, workers=workers, overwrite=True)


def expected_of(line):
    """What the standard library alone says of a line: its text, or None."""
    try:
        record = json.loads(line.decode("utf-8"))
        text = record["text"] if isinstance(record, dict) else None
        json.dumps(record, ensure_ascii=False).encode("utf-8")
    except (ValueError, KeyError, RecursionError):
        return None
    return text if isinstance(text, str) and "\0" not in text else None


def mutated(rng, line):
    """The line with some bytes changed, lost, doubled or put in."""
    data = bytearray(line)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        at = rng.randrange(len(data)) if data else 0
        kind = rng.randrange(6)
        if kind == 0 and data:
            data[at] = rng.randrange(256)
        elif kind == 1:
            del data[at : at + rng.randrange(1, 9)]
        elif kind == 2:
            data[at:at] = data[at : at + rng.randrange(1, 9)]
        elif kind == 3:
            data = data[:at]
        else:
            bad = (b"\0", b"\\ud83d", b"\xed\xa0\x80", b"\xff", b"\\u0000", b'"', b"\\", b"{", b"]")
            data[at:at] = rng.choice(bad)
    return bytes(data).replace(b"\n", b" ")


@pytest.mark.parametrize("parser", ["orjson", "json"])
def test_broken_lines_are_never_taken_for_good(tmp_path, monkeypatch, parser):
    """Each of ten thousand broken lines gives an error, or the text that JSON says it has."""
    if parser == "json":
        monkeypatch.setattr(readers, "orjson", None)
    else:
        pytest.importorskip("orjson")
    rng = random.Random(2024)
    texts = ["plain words", 'κόσμε \\ " / \b', "🎈\u2028x", "", "a" * 200]
    kinds = [{"text": t, "n": [1, None, {"k": 1.5}]} for t in texts] + [{"text": 3}, ["text"]]
    lines, broken = [], 0
    while broken < BROKEN_LINES:
        record, escaped = rng.choice(kinds), rng.random() < 0.5
        line = mutated(rng, json.dumps(record, ensure_ascii=escaped).encode())
        if line.strip() and not line.startswith(b"\xef\xbb\xbf"):
            lines.append(line)
            broken += expected_of(line) is None
    path = tmp_path / "fuzz.jsonl"
    path.write_bytes(b"\n".join(lines))
    found = list(read_span(InputSpan(str(path), "jsonl"), Fields()))
    assert [record.number for record in found] == list(range(1, len(lines) + 1))
    for line, record in zip(lines, found, strict=True):
        assert (None if record.error else record.text) == expected_of(line), line
    kinds_found = {record.error.kind for record in found if record.error is not None}
    assert {readers.BROKEN_JSON, readers.NOT_UTF8, readers.SURROGATE, readers.NUL} <= kinds_found
    assert {readers.WRONG_TYPE, readers.MISSING_FIELD, readers.NOT_AN_OBJECT} <= kinds_found


def test_broken_archives_are_never_taken_for_whole(tmp_path, pack):
    """Cut anywhere, or with a byte changed: an error, or what was packed."""
    rng = random.Random(7)
    texts = [str(i) * 5 for i in range(60)]
    data = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)
    errors = 0
    for i in range(FUZZED_ARCHIVES):
        name = ("f.jsonl.gz", "f.jsonl.xz", "f.jsonl.zst")[i % 3]
        packed = bytearray(pack(name, data))
        cut = rng.random() < 0.5
        if cut:
            del packed[rng.randrange(len(packed)) :]
        else:
            packed[rng.randrange(len(packed))] ^= 1 << rng.randrange(8)
        (tmp_path / name).write_bytes(packed)
        try:
            found = list(read_documents(tmp_path / name))
        except ValueError as exc:
            assert name in str(exc)
            errors += 1
            continue
        # A flag in a header can change without a change of the content; zstd checks no sum here.
        assert packed == b"" or not cut
        if name != "f.jsonl.zst":
            assert found == (texts if packed else [])
    assert errors > FUZZED_ARCHIVES * 0.8


def test_archive_of_several_members_is_whole(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n') + gzip.compress(b'{"text": "b"}\n'))
    assert list(read_documents(path)) == ["a", "b"]
