# SPDX-License-Identifier: Apache-2.0
"""What is pickled in a checkpoint is read, and never run."""

import sys

import pytest
from support import hf_models
from support.checkpoints import PLACES, copy_run, extra_state, plant, replace_object, table
from support.runs import FLAGS

pytestmark = pytest.mark.usefixtures("cpu_megatron")


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    from megatron_cream.checkpoint.import_hf import import_checkpoint

    folder = tmp_path_factory.mktemp("imported")
    hf_models.make(folder / "hf")
    import_checkpoint(str(folder / "hf"), str(folder / "base"), quiet=True)
    return folder / "base"


@pytest.fixture(params=PLACES)
def malicious(request, imported, tmp_path):
    """A folder whose iteration has a payload; the marker that it would make."""
    root = copy_run(imported, tmp_path / "run", [1])
    marker = tmp_path / "marker"
    plant(root / "iter_0000001", request.param, marker)
    return root, marker


def refuses(call, marker, *errors):
    from megatron_cream.errors import UserError

    with pytest.raises(errors or UserError) as error:
        call()
    assert not marker.exists(), "the payload ran"
    return str(error.value)


def test_the_payload_runs_where_pickles_are_read_without_limits(imported, tmp_path):
    """Otherwise the tests below would find nothing."""
    root = copy_run(imported, tmp_path / "run", [1])
    for place in PLACES[:2]:
        marker = tmp_path / place.replace(" ", "")
        plant(root / "iter_0000001", place, marker)
        from megatron.core.dist_checkpointing import load_common_state_dict

        load_common_state_dict(str(root / "iter_0000001"))
        assert marker.exists()
        marker.rmdir()


def test_evaluation_refuses_it(malicious):
    from megatron_cream.checkpoint.loading import load_model

    root, marker = malicious
    message = refuses(lambda: load_model(str(root)), marker)
    assert "posix.mkdir" in message
    assert "iter_0000001" in message


def test_doctor_says_so(malicious):
    from megatron_cream.checkpoint.doctor import examine_iteration

    root, marker = malicious
    found = "\n".join(examine_iteration(str(root)).problems)
    assert "posix.mkdir" in found
    assert not marker.exists()


@pytest.mark.parametrize(
    "flags", [["--load"], ["--use-checkpoint-args", "--pretrained-checkpoint"]]
)
def test_training_refuses_it_before_it_starts(malicious, flags, monkeypatch, dataset):
    from megatron_cream import pretrain
    from megatron_cream.mcore.argument_table import cpu_flags

    root, marker = malicious
    argv = [*cpu_flags(), "--cpu", *FLAGS, "--data-path", dataset, *flags, str(root)]
    monkeypatch.setattr(sys, "argv", ["pretrain", *argv])
    assert "posix.mkdir" in refuses(pretrain.prepare, marker)


@pytest.mark.parametrize("place", PLACES[:3])
def test_export_and_every_reader_of_arguments_refuse_it(place, imported, tmp_path):
    from argparse import Namespace

    from megatron_cream.checkpoint.export_hf import export_checkpoint
    from megatron_cream.checkpoint.loading import starts_without_trained_rope

    root, marker = copy_run(imported, tmp_path / "run", [1]), tmp_path / "marker"
    plant(root / "iter_0000001", place, marker)
    refuses(lambda: export_checkpoint(str(root), str(tmp_path / "out"), quiet=True), marker)
    # What a dry run with CLEX asks.
    args = Namespace(load=None, pretrained_checkpoint=str(root), ckpt_step=None)
    refuses(lambda: starts_without_trained_rope(args), marker)


def test_megatrons_loader_is_limited_in_evaluation(imported, tmp_path):
    """Also where the check before saw nothing; without the limit the payload runs."""
    from megatron.core.dist_checkpointing import load_common_state_dict

    from megatron_cream.checkpoint.torch_dist_table import only_listed_globals

    root, marker = copy_run(imported, tmp_path / "run", [1]), tmp_path / "marker"
    folder = root / "iter_0000001"
    with only_listed_globals():
        assert load_common_state_dict(str(folder))["args"].num_layers == 4
        plant(folder, "common state", marker)
        refuses(lambda: load_common_state_dict(str(folder)), marker, BaseException)
    load_common_state_dict(str(folder))
    assert marker.exists()


def test_a_user_may_trust_a_name(imported, tmp_path, monkeypatch):
    from fractions import Fraction

    from megatron_cream.checkpoint.doctor import find_problems
    from megatron_cream.checkpoint.torch_dist_table import TRUSTED_VARIABLE

    folder = copy_run(imported, tmp_path / "run", [1]) / "iter_0000001"
    replace_object(folder, extra_state(folder), [Fraction(1, 3)])
    (found,) = find_problems(folder)
    assert f"{TRUSTED_VARIABLE}=fractions.Fraction" in found
    monkeypatch.setenv(TRUSTED_VARIABLE, "fractions.Fraction")
    assert not list(find_problems(folder))
    monkeypatch.setenv(TRUSTED_VARIABLE, "fractions.Nothing")
    assert "fractions.Nothing" in next(find_problems(folder))


def test_a_record_outside_the_folder_is_refused(imported, tmp_path):
    from support.checkpoints import write_table

    from megatron_cream.checkpoint.doctor import find_problems

    folder = copy_run(imported, tmp_path / "run", [1]) / "iter_0000001"
    metadata = table(folder)
    next(iter(metadata.storage_data.values())).relative_path = "../../hf/config.json"
    write_table(folder, metadata)
    (found,) = find_problems(folder)
    assert "'../../hf/config.json', which must be one in its folder" in found


def test_everything_that_megatron_saves_is_read(initial):
    """Random states, reruns, an optimizer: in one process that saved them and one that did not."""
    from pathlib import Path

    from megatron_cream.checkpoint.doctor import find_problems

    assert not list(find_problems(Path(initial) / "iter_0000001"))
