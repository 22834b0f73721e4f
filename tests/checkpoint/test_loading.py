# SPDX-License-Identifier: Apache-2.0
"""A run never starts from other weights than it was told, and never saves over another run's."""

import os
import shutil
import sys
from argparse import ArgumentParser
from pathlib import Path

import pytest
from support.checkpoints import DAMAGES, TRACKER, copy_run, data_file
from support.runs import FLAGS

pytestmark = pytest.mark.usefixtures("cpu_megatron")


@pytest.fixture
def prepare():
    """Looks at the folders of a command line as a run does before it starts."""
    from megatron_cream.checkpoint.loading import validate_start

    def call(*extra):
        parser = ArgumentParser()
        for flag in ("--load", "--save", "--pretrained-checkpoint", "--non-persistent-ckpt-type"):
            parser.add_argument(flag)
        parser.add_argument("--ckpt-step", type=int)
        parser.add_argument("--finetune", action="store_true")
        args = parser.parse_args(list(map(str, extra)))
        validate_start(args)
        return args

    return call


@pytest.fixture
def refused(prepare, tmp_path):
    """Returns why a command line is refused; nothing may have been written."""

    def call(*extra):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises((ValueError, OSError)) as error:
            prepare(*extra)
        assert sorted(tmp_path.rglob("*")) == before
        assert "\n" not in str(error.value)
        return str(error.value)

    return call


@pytest.fixture
def run(initial, tmp_path):
    """A folder with iterations 1 and 2."""
    return copy_run(initial, tmp_path / "run")


def test_iterations_without_a_tracker_are_not_overwritten(run, refused, prepare):
    (run / TRACKER).unlink()
    message = refused("--load", run, "--save", run)
    for part in ("iter_0000001 to iter_0000002", "--ckpt-step 2", f"echo 2 > {run / TRACKER}"):
        assert part in message
    assert "echo 2" in refused("--pretrained-checkpoint", run)
    assert "echo 2" in refused("--load", run, "--pretrained-checkpoint", run)
    prepare("--load", run, "--save", run, "--ckpt-step", "2")
    (run / TRACKER).write_text("2")
    prepare("--load", run, "--save", run)


def test_iterations_are_in_the_order_of_their_numbers(tmp_path):
    from megatron_cream.checkpoint.iterations import list_iterations

    numbers = (2, 9_999_999, 10_000_000, 20_000_000, 3_000_000)
    for number in numbers:
        folder = tmp_path / f"iter_{number:07d}"
        folder.mkdir()
        (folder / ".metadata").touch()
    found = [int(path.name.removeprefix("iter_")) for path in list_iterations(tmp_path)]
    assert found == sorted(numbers)


def test_what_a_killed_first_save_left_is_no_iteration(run, prepare):
    shutil.rmtree(run / "iter_0000001")
    for name in (TRACKER, "iter_0000002/.metadata", "iter_0000002/metadata.json"):
        (run / name).unlink()
    prepare("--load", run, "--save", run)


@pytest.mark.parametrize("content", ["", "two", "-1", "7\x00", "iter_0000002", "1e3", "9" * 30])
def test_a_tracker_that_names_nothing(content, run, refused):
    (run / TRACKER).write_text(content)
    message = refused("--load", run, "--save", run)
    for part in (TRACKER, "it must be the number of an iteration", "iter_0000001 to iter_0000002"):
        assert part in message


def test_a_tracker_that_names_a_missing_iteration(run, refused):
    (run / TRACKER).write_text("30")
    message = refused("--load", run, "--save", run)
    for part in ("iter_0000030", "iter_0000002 before it is whole", "--ckpt-step 2"):
        assert part in message


def test_iterations_of_another_run_are_not_overwritten(run, initial, refused, prepare, tmp_path):
    for more in ([], ["--load", initial], ["--load", initial, "--finetune"]):
        message = refused("--save", run, *more)
        for part in (f"--save is {run}", "2 iterations", f"--load {run} --save {run}"):
            assert part in message
    assert "would overwrite" in refused("--save", run, "--load", run, "--finetune")
    assert "would overwrite" in refused("--save", run, "--pretrained-checkpoint", initial)
    link = tmp_path / "link"
    link.symlink_to(run)
    prepare("--save", link, "--load", run)
    prepare("--save", tmp_path / "new", "--load", run, "--finetune")


def test_nothing_to_load(refused, prepare, tmp_path, initial):
    empty, new = tmp_path / "empty", tmp_path / "new"
    empty.mkdir()
    for folder in (empty, new):
        assert "random weights" in refused("--load", folder)
        assert "random weights" in refused("--load", folder, "--save", tmp_path / "other")
        assert "random weights" in refused("--load", folder, "--save", folder, "--finetune")
        assert "random weights" in refused("--pretrained-checkpoint", folder)
        prepare("--load", folder, "--save", folder)  # how a run starts that will be resumed
        prepare("--load", folder, "--save", folder, "--pretrained-checkpoint", initial)
    assert not new.exists()


@pytest.mark.parametrize("more", [[], ["--finetune"]])
def test_a_folder_of_one_iteration(more, run, refused, prepare):
    one = run / "iter_0000001"
    message = refused("--load", one, *more)
    assert f"--load {run} --ckpt-step 1" + " --finetune" * bool(more) in message
    prepare("--load", run, "--ckpt-step", "1", *more)


def test_a_folder_of_one_iteration_as_pretrained(run, refused, prepare, tmp_path, monkeypatch):
    message = refused("--pretrained-checkpoint", run / "iter_0000001")
    monkeypatch.chdir(tmp_path)
    os.system(message.rpartition("give that: ")[2])
    assert (Path("START") / TRACKER).read_text() == "1\n"
    prepare("--pretrained-checkpoint", "START", "--load", "OUT", "--save", "OUT")


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("flag", ["--load", "--pretrained-checkpoint"])
def test_damage_is_named_with_the_way_on(kind, flag, run, refused, prepare):
    damage, named = DAMAGES[kind]
    damage(run / "iter_0000002")
    message = refused(flag, run)
    for part in (f"{flag} is {run}", named, "iter_0000002", "iter_0000001 before it is whole"):
        assert part in message
    prepare(flag, run, "--ckpt-step", "1")
    command = message.rpartition("for good by: ")[2]
    assert os.system(command) == 0
    prepare(flag, run)


def test_only_a_whole_iteration_is_named_as_the_way_on(run, refused):
    for iteration in ("iter_0000001", "iter_0000002"):
        data_file(run / iteration).unlink()
    assert "no whole iteration before it" in refused("--load", run)


def test_the_iteration_that_is_taken_is_the_one_that_is_looked_at(run, prepare):
    """Not the latest: it may be why another was named."""
    data_file(run / "iter_0000002").unlink()
    assert prepare("--load", run, "--save", run, "--ckpt-step", "1").ckpt_step == 1


def test_evaluation_names_the_iteration_before(run):
    from megatron_cream.checkpoint.loading import load_model

    data_file(run / "iter_0000002").unlink()
    with pytest.raises(ValueError, match=f"--checkpoint {run}/iter_0000001"):
        load_model(str(run))


def test_a_save_that_cannot_be_written_is_found_at_start(refused, tmp_path):
    (tmp_path / "file").write_text("")
    message = refused("--save", tmp_path / "file" / "run")
    for part in ("--save is", "file/run", "cannot be written"):
        assert part in message
    assert "cannot be written" in refused("--save", "/proc/run")  # no user can, nor root


def test_the_start_block_says_what_a_checkpoint_may_do(initial):
    from megatron_cream.checkpoint.iterations import read_saved_arguments
    from megatron_cream.config import saved_extension
    from megatron_cream.training.start_block import start_block

    args = read_saved_arguments(initial)
    extension = saved_extension(args)
    assert "  random" in start_block(args, extension)
    args.load = initial
    line = f"{initial}/iter_0000001; Megatron's loader runs what is in it"
    assert line in start_block(args, extension)


def test_a_run_asks_before_megatron_reads(run, monkeypatch, dataset, capsys):
    """Also where Megatron's own validation takes arguments from the checkpoint."""
    from megatron_cream import pretrain
    from megatron_cream.mcore.argument_table import cpu_flags

    data_file(run / "iter_0000002").unlink()
    for more in ([], ["--use-checkpoint-args"]):
        argv = [*cpu_flags(), "--cpu", *FLAGS, "--data-path", dataset, "--load", str(run), *more]
        monkeypatch.setattr(sys, "argv", ["pretrain", *argv])
        with pytest.raises(ValueError, match="iter_0000001 before it is whole"):
            pretrain.prepare()
        assert "arguments" not in capsys.readouterr().out
