# SPDX-License-Identifier: Apache-2.0
"""The doctor reads a checkpoint whole: with checksums it finds every change."""

import random
from pathlib import Path

import pytest
from support import hf_models, ranks
from support.checkpoints import DAMAGES, copy_run, data_file, flip
from support.commands import load_file

pytestmark = pytest.mark.usefixtures("cpu_megatron")

SUMS = "megatron_cream_checksums_00000.json"


@pytest.fixture
def iteration(initial, tmp_path):
    return copy_run(initial, tmp_path / "run") / "iter_0000002"


def examine_iteration(path):
    from megatron_cream.checkpoint.doctor import examine_iteration

    return examine_iteration(str(path))


def test_a_whole_checkpoint(iteration):
    report = examine_iteration(iteration.parent)  # the tracker says which
    assert report.folder == iteration
    assert not report.problems
    assert report.summed == report.files == 3
    assert report.records > 100


def test_each_rank_writes_checksums_of_its_files(tmp_path, flags):
    """The save of two ranks; what an interrupted one left in the folder is forgotten."""
    from megatron_cream.checkpoint.iterations import read_checksums

    one = tmp_path / "run/iter_0000001"
    one.mkdir(parents=True)
    (one / "megatron_cream_checksums_00007.json").write_text('{"made_by": "megatron_cream"}')
    (one / "megatron_cream_checksums_mine.json").write_text("{}")
    save = ["--save", str(tmp_path / "run"), "--save-interval", "1", "--train-iters", "1"]
    tp2 = ["--tensor-model-parallel-size", "2", "--eval-iters", "0"]
    ranks.train(tmp_path, [*flags, *save, *tp2], 2)
    (one / "megatron_cream_checksums_mine.json").unlink()  # which is no mark of ours
    sums, wrong = read_checksums(one)
    assert not wrong
    assert sums.keys() == {".metadata", "metadata.json", "__0_0.distcp", "__1_0.distcp"}
    assert not examine_iteration(one).problems


def test_an_empty_file_has_a_checksum(tmp_path):
    """It is missed when it is gone, and noticed when it has grown."""
    from megatron_cream.checkpoint import iterations as checksums

    (tmp_path / "__0_0.distcp").touch()
    checksums.write_checksums(tmp_path)
    sums, wrong = checksums.read_checksums(tmp_path)
    assert (sums, wrong) == ({"__0_0.distcp": (0, "00000000")}, [])
    (tmp_path / "__0_0.distcp").write_bytes(b"x")
    assert "has 1 bytes: 0 were saved" in "".join(
        checksums.checksum_differences(tmp_path, sums, sums)
    )


def test_an_import_has_checksums(tmp_path):
    from megatron_cream.checkpoint.import_hf import import_checkpoint

    hf_models.make(tmp_path / "hf")
    import_checkpoint(str(tmp_path / "hf"), str(tmp_path / "base"), quiet=True)
    report = examine_iteration(tmp_path / "base")
    assert not report.problems
    assert report.summed == report.files == 3
    (report.folder / SUMS).unlink()
    assert not examine_iteration(tmp_path / "base").problems, (
        "its records have no checksums in them"
    )


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "metadata.json", SUMS])
def test_every_changed_byte_is_found(name, iteration):
    path, draw = iteration / name, random.Random(5)
    size = path.stat().st_size
    for at in {0, size - 1, *draw.sample(range(size), 4)}:
        mask = draw.randrange(1, 256)
        flip(path, at, mask)
        assert name in "".join(examine_iteration(iteration).problems), f"byte {at} of {size}"
        flip(path, at, mask)
    assert not examine_iteration(iteration).problems


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("summed", [True, False])
def test_kinds_of_damage(kind, summed, iteration):
    if not summed:
        (iteration / SUMS).unlink()
    damage, named = DAMAGES[kind]
    damage(iteration)
    assert named in "".join(examine_iteration(iteration).problems)


def test_without_checksums_the_records_own_are_compared(iteration):
    from megatron_cream.checkpoint.torch_dist_table import read_table

    (iteration / SUMS).unlink()
    report = examine_iteration(iteration)
    assert not report.problems
    assert report.summed == 0
    assert "0 of 3 files compared" in "".join(report.lines())
    key = "decoder.layers.mlp.linear_fc1.weight"
    table = read_table(iteration)
    (record,) = [r for (name, _), r in table.records.items() if name == key][:1]
    flip(data_file(iteration), record.start + record.length // 2)
    (problem,) = examine_iteration(iteration).problems
    assert key in problem


def test_megatrons_own_checksums_are_compared(iteration):
    from megatron.core.dist_checkpointing.validation import save_integrity_manifest

    (iteration / SUMS).unlink()
    save_integrity_manifest(str(iteration))
    report = examine_iteration(iteration)
    assert not report.problems
    assert report.summed == 3
    flip(data_file(iteration), 50_000)
    assert "is not what" in "".join(examine_iteration(iteration).problems)


def test_an_asynchronous_save_is_summed_when_it_is_through(tmp_path, monkeypatch):
    from megatron.core import dist_checkpointing

    from megatron_cream.checkpoint import iterations as checksums
    from megatron_cream.mcore.trainer import patch_save

    class Request:
        finalizers = []

        def add_finalize_fn(self, function):
            self.finalizers.append(function)

    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    monkeypatch.setattr(dist_checkpointing, "save", lambda *_, **__: Request())
    for _ in range(2):  # idempotent
        patch_save.apply(checksums.remove_checksums, checksums.write_checksums_later)
    dist_checkpointing.save({}, str(tmp_path), async_sharded_save=True)
    (tmp_path / "__0_0.distcp").write_bytes(b"data")
    checksums._reader.submit(int).result()  # all before it are written
    assert not (tmp_path / SUMS).exists()
    (finalize,) = Request.finalizers
    finalize()
    checksums._reader.submit(int).result()  # all before it are written
    assert checksums.read_checksums(tmp_path) == ({"__0_0.distcp": (4, "adf3f363")}, [])


def test_a_disk_that_is_full_does_not_end_a_run(tmp_path, monkeypatch, capsys):
    from megatron_cream.checkpoint import iterations as checksums

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checksums, "write_checksums", full)
    checksums.write_checksums_later(tmp_path, 0)
    checksums.write_checksums_later(tmp_path / "removed meanwhile", 0)
    checksums._reader.submit(int).result()  # all before it are written
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "No space left on device" in said


def test_the_tool(iteration, capsys):

    path = Path(__file__).parents[2] / "tools/doctor.py"
    tool = load_file(path)
    assert tool.main([str(iteration.parent)]) == 0
    assert capsys.readouterr().out.endswith("whole\n")
    flip(data_file(iteration), 50_000)
    with pytest.raises(SystemExit) as ended:
        tool.main([str(iteration.parent)])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert "--ckpt-step 1" in error
    with pytest.raises(SystemExit):
        tool.main([str(iteration.parent.parent / "nothing")])
    assert "CHECKPOINT is" in capsys.readouterr().err
