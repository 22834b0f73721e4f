# SPDX-License-Identifier: Apache-2.0
"""What is beside an output is a user's until a mark says otherwise; what is done is not redone."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_cream import ownership
from megatron_cream.corpus import merge as merge_module
from megatron_cream.corpus import preprocess as module
from megatron_cream.corpus.merge import merge_datasets
from megatron_cream.corpus.storage import MERGING, PREPROCESSING, SUFFIXES
from megatron_cream.errors import UserError

PARTS = {"part_bytes": 200}


class Killed(BaseException):
    pass


def killed(*arguments, **named):
    raise Killed


@pytest.fixture
def working(job):
    return Path(job.output_prefix + ".parts")


@pytest.fixture
def unfinished(job, run, monkeypatch, working):
    """Leaves a job that was killed when its parts were there."""
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(module, "build_dataset", killed)
        run(job, **PARTS)
    assert ownership.marked_kind(working) == PREPROCESSING
    return working


def listing(folder):
    return {str(p.relative_to(folder)): p.is_file() and p.read_bytes() for p in folder.rglob("*")}


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("linked", [False, True])
def test_a_users_folder_named_as_the_working_folder_is_kept(job, run, working, linked, fails):
    place = working.with_name("elsewhere") if linked else working
    place.mkdir()
    (place / "1.txt").write_text("one" if not fails else "\0")
    (place / "inside").mkdir()
    if linked:
        working.symlink_to(place)
    before = listing(place)
    for changes in ({}, {"restart": True}, {"overwrite": True}):
        for source in (str(working), job.input[0]):
            with pytest.raises(UserError, match=r"a\.b\.parts"):
                run(job, input=(source,), **changes)
    with pytest.raises(UserError, match=r"a\.b\.parts"):
        merge_datasets([job.output_prefix + "x"], job.output_prefix)
    assert listing(place) == before


def test_an_input_in_the_folder_of_an_unfinished_job_is_refused(job, run, unfinished):
    (unfinished / "in.txt").write_text("mine")
    before = listing(unfinished)
    with pytest.raises(UserError, match="where unfinished work is kept, needs another output"):
        run(job, input=(str(unfinished / "in.txt"),), restart=True)
    with pytest.raises(UserError, match="where unfinished work is kept, needs another output"):
        merge_datasets([str(unfinished / "in")], job.output_prefix)
    assert listing(unfinished) == before


def test_merging_keeps_an_unfinished_job(job, run, unfinished, outputs):
    run(job, output_prefix=job.output_prefix + "-done")
    before = listing(unfinished)
    with pytest.raises(UserError, match=r"another kind \(preprocessing, this one merging\)"):
        merge_datasets([job.output_prefix + "-done"], job.output_prefix)
    assert listing(unfinished) == before
    assert run(job, **PARTS).documents == 12
    assert outputs(job.output_prefix) == outputs(job.output_prefix + "-done")


def test_preprocessing_keeps_an_unfinished_merge(job, run, working):
    working.mkdir()
    ownership.mark(working, MERGING)
    (working / "data.bin").write_bytes(b"work")
    with pytest.raises(UserError, match=r"another kind \(merging, this one preprocessing\)"):
        run(job)
    assert (working / "data.bin").exists()


def test_merging_onto_an_input_is_refused(job, run, outputs, tmp_path):
    run(job)
    before = outputs(job.output_prefix)
    (tmp_path / "linked.bin").symlink_to(job.output_prefix + ".bin")
    for source in (job.output_prefix, str(tmp_path / "linked")):
        with pytest.raises(UserError, match="is an input, needs another prefix"):
            merge_datasets([source], job.output_prefix, overwrite=True)
    assert outputs(job.output_prefix) == before


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_overwrite_replaces_datasets_only(job, run, suffix):
    mine = Path(job.output_prefix + suffix)
    mine.write_text('{"weights": [1, 2]}')
    with pytest.raises(UserError, match="is not of a dataset, which is all that --overwrite"):
        run(job, overwrite=True)
    assert mine.read_text() == '{"weights": [1, 2]}'


def test_a_users_note_beside_another_tools_dataset_is_kept(job, run):
    run(job)
    note = Path(job.output_prefix + ".json")
    note.write_text('{"text": "mine"}\n{"text": "too"}\n')
    with pytest.raises(UserError, match=r"a\.b\.json is not of a dataset"):
        run(job, overwrite=True)
    note.unlink()
    assert run(job, overwrite=True).documents == 12


def test_folders_of_the_output_are_made(job, run, outputs):
    prefix = os.path.dirname(job.output_prefix) + "/data/new/train"
    run(job, output_prefix=prefix)
    merge_datasets([prefix], os.path.dirname(prefix) + "/more/merged")
    assert outputs(os.path.dirname(prefix) + "/more/merged")[".bin"] == outputs(prefix)[".bin"]


@pytest.mark.parametrize("name", ["", "out/", "out/.", "out/.."])
def test_an_output_that_names_a_folder_is_refused(job, run, tmp_path, monkeypatch, name):
    run(job)
    monkeypatch.chdir(tmp_path)
    before = listing(tmp_path)
    for call in (
        lambda: run(job, output_prefix=name),
        lambda: merge_datasets([job.output_prefix], name),
    ):
        with pytest.raises(UserError, match="names a folder, needs FOLDER/NAME"):
            call()
    assert listing(tmp_path) == before


def test_an_empty_input_is_not_the_current_folder(job, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="--input '': names nothing"):
        run(job, input=("",))
    with pytest.raises(UserError, match="--input '': names no dataset"):
        merge_datasets([""], job.output_prefix)


def test_a_finished_job_ends_well_and_is_not_done_again(job, run, outputs, monkeypatch):
    run(job, append_eod=True)
    before = outputs(job.output_prefix)
    monkeypatch.setattr(module, "_make_dataset", killed)
    for changes in ({}, {"workers": 2}, PARTS, {"restart": True}):
        stats = run(job, append_eod=True, **changes)
        assert stats.documents == 12
        assert f"finished before: {job.output_prefix}.bin" in stats.summary()
        assert "speed" not in stats.summary()
    assert outputs(job.output_prefix) == before
    assert not os.path.exists(job.output_prefix + ".parts")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"append_eod": True, "min_tokens": 2},
        {"append_eod": True, "seq_length": 10},
        {"append_eod": True, "on_error": "skip"},
    ],
)
def test_other_settings_are_not_the_finished_job(job, run, changes):
    run(job, append_eod=True)
    with pytest.raises(UserError, match="exists, needs a new prefix or --overwrite"):
        run(job, **changes)


def cut(path):
    path.write_bytes(path.read_bytes()[:-2])


def change_note(key, value):
    def call(path):
        path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))

    return call


@pytest.mark.parametrize(
    ("suffix", "damage"),
    [
        (".bin", cut),
        (".idx", cut),
        (".json", cut),
        (".bin", os.unlink),
        (".idx", os.unlink),
        (".json", os.unlink),
        (".json", change_note("tokens", 7)),
        (".json", change_note("fingerprint", None)),
        (".json", change_note("shard", [0, 2])),
    ],
)
def test_a_damaged_dataset_is_not_a_finished_job(job, run, suffix, damage):
    run(job)
    damage(Path(job.output_prefix + suffix))
    with pytest.raises(UserError, match="exists, needs a new prefix or --overwrite"):
        run(job)


def test_changed_input_is_not_the_finished_job(job, run):
    run(job)
    os.utime(job.input[0], (1, 1))
    with pytest.raises(UserError, match="exists, needs a new prefix or --overwrite"):
        run(job)


def test_a_finished_shard_is_not_another(job, run):
    run(job, shard=(0, 2))
    assert run(job, shard=(0, 2)).finished_before
    first, other = (job.output_prefix + f"-0000{i}-of-00002" for i in range(2))
    for suffix in SUFFIXES:
        if os.path.exists(first + suffix):
            shutil.copy(first + suffix, other + suffix)
    with pytest.raises(UserError, match="exists, needs a new prefix or --overwrite"):
        run(job, shard=(1, 2))


@pytest.mark.parametrize("left", [0, 1, 9, 20])
def test_killed_while_cleaning_up(job, run, outputs, monkeypatch, working, left):
    """Whatever is left of the working folder, the next start says that the job is done."""
    run(job, output_prefix=job.output_prefix + "-whole")
    calls = []

    def unlink(path):
        if len(calls) == left:
            raise Killed
        calls.append(path)
        os.unlink(path)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(ownership, "os", SimpleNamespace(**{**vars(os), "unlink": unlink}))
        run(job, **PARTS)
    assert working.exists()
    with pytest.raises(UserError, match="exists, needs a new prefix or --overwrite"):
        run(job, min_tokens=3)
    assert run(job, **PARTS).finished_before
    assert not working.exists()
    assert outputs(job.output_prefix) == outputs(job.output_prefix + "-whole")


def test_killed_before_the_mark_is_written(job, run, working):
    working.mkdir()
    (working / ownership.MARK_NAME).write_text("")
    assert run(job).documents == 12


def test_a_damaged_note_of_the_unfinished_job(job, run, unfinished):
    (unfinished / "job.json").write_text("{")
    with pytest.raises(UserError, match=r"job\.json is damaged, needs --restart"):
        run(job, **PARTS)
    assert run(job, restart=True, **PARTS).documents == 12


def test_the_folder_of_the_next_process_is_not_removed(job, run, monkeypatch, working):
    """This process has removed its folder; another one makes a new one at once."""
    true_remove = ownership.remove

    def remove(folder, kind):
        true_remove(folder, kind)
        folder.mkdir()
        ownership.mark(folder, kind)

    monkeypatch.setattr(ownership, "remove", remove)
    run(job)
    assert ownership.marked_kind(working) == PREPROCESSING


def test_shards_without_their_hashes_are_not_merged(job, run):
    prefixes = [f"{job.output_prefix}-0000{i}-of-00002" for i in range(2)]
    for i in range(2):
        run(job, shard=(i, 2), drop_duplicates=True, **PARTS)
    for prefix in reversed(prefixes):  # first one of them, then all
        Path(prefix + ".hashes").unlink()
        with pytest.raises(UserError, match=r"there is no .*\.hashes, needs it to find duplicates"):
            merge_datasets(prefixes, job.output_prefix)


def test_a_merge_of_other_datasets_is_no_finished_job(job, run):
    run(job, output_prefix=job.output_prefix + "-1")
    merge_datasets([job.output_prefix + "-1"] * 2, job.output_prefix)
    note = json.loads(Path(job.output_prefix + ".json").read_text())
    assert "fingerprint" not in note and note["documents"] == 24
    with pytest.raises(UserError, match="exists, needs a new prefix or --overwrite"):
        run(job)


def test_a_document_longer_than_an_index_can_say(tmp_path):
    from megatron_cream.corpus.storage import write_index

    lengths, counts = np.array([1 << 31]), np.array([1])
    with pytest.raises(UserError, match="a document has 2147483648 tokens and an index can hold"):
        write_index(tmp_path / "x.idx", np.dtype(np.uint16), [(lengths, counts)], 1, 1)


def test_standard_input_is_never_finished_before(job):
    from megatron_cream.corpus.job import plan_job

    planned = plan_job(replace(job, input=("-",)))[0]
    assert planned.fingerprint() is None
    assert not planned.is_made()


def test_a_finished_merge_ends_well_and_is_not_done_again(job, run, outputs, monkeypatch):
    shards = [f"{job.output_prefix}-0000{i}-of-00002" for i in range(2)]
    for i in range(2):
        run(job, shard=(i, 2), **PARTS)
    assert "\nwritten: " in merge_datasets(shards, job.output_prefix)
    before = outputs(job.output_prefix)
    monkeypatch.setattr(merge_module, "_write", killed)
    said = merge_datasets(shards[::-1], job.output_prefix)
    assert (
        said.endswith(f"\nfinished before: {job.output_prefix}.bin .idx") and "documents: 1" in said
    )
    assert outputs(job.output_prefix) == before
    assert not os.path.exists(job.output_prefix + ".parts")
    with pytest.raises(Killed):
        merge_datasets(shards, job.output_prefix, overwrite=True)


@pytest.mark.parametrize("what", ["one shard", "one twice", "other input", "damaged", "no shards"])
def test_another_merge_is_not_the_finished_one(job, run, what):
    shards = [f"{job.output_prefix}-0000{i}-of-00002" for i in range(2)]
    for i in range(2):
        run(job, shard=(i, 2), **PARTS)
    merge_datasets(shards, job.output_prefix)
    if what == "other input":
        os.utime(job.input[0], (1, 1))
        for i in range(2):
            run(job, shard=(i, 2), overwrite=True, **PARTS)
    elif what == "damaged":
        cut(Path(job.output_prefix + ".bin"))
    elif what == "no shards":
        run(job, output_prefix=job.output_prefix + "-all")
    given = {"one shard": shards[:1], "one twice": shards[:1] * 2}.get(what, shards)
    given = [job.output_prefix + "-all"] if what == "no shards" else given
    with pytest.raises(UserError, match="exists, needs a new prefix or --overwrite"):
        merge_datasets(given, job.output_prefix)
