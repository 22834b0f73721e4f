# SPDX-License-Identifier: Apache-2.0
"""What a run must share with the checkpoint that it goes on from, and what it takes from it."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

import pytest
from support import ranks

from megatron_cream.config import ExtensionConfig
from megatron_cream.errors import UserError

pytestmark = pytest.mark.usefixtures("cpu_megatron")


def test_resuming_with_other_settings(refused, initial):
    message = refused("--load", initial, "--target-length", "960", "--cream-sigma", "2")
    for part in ("--target-length 768 != 960", "--cream-sigma 3.0 != 2.0", "--finetune"):
        assert part in message


def test_a_scaling_of_the_base_that_would_be_dropped(refused, initial):
    further = ("--original-length", "768", "--target-length", "1536", "--position-strategy", "pose")
    message = refused("--pretrained-checkpoint", initial, *further)
    for part in ("--original-length is 768", "yarn over 96", "--rope-base-config"):
        assert part in message


def test_resuming_with_an_optimizer_of_another_kind(refused, initial):
    message = refused("--load", initial, "--target-length", "768", "--use-distributed-optimizer")
    for part in ("--use-distributed-optimizer is True", "left out", "--no-load-optim"):
        assert part in message


@pytest.fixture(scope="module")
def sharded(flags, tmp_path_factory):
    """A checkpoint of the distributed optimizer in its default format."""
    folder = tmp_path_factory.mktemp("sharded")
    one = ["--train-iters", "1", "--eval-iters", "0", "--save-interval", "1"]
    save = [*one, "--save", str(folder / "c"), "--use-distributed-optimizer"]
    ranks.train(folder, [*flags, *save], 2)
    return str(folder / "c")


def test_resuming_a_distributed_optimizer_without_a_gpu(refused, sharded):
    message = refused("--load", sharded, "--use-distributed-optimizer")
    for part in ("--use-distributed-optimizer", "with --cpu", "--no-load-optim"):
        assert part in message


def test_resuming_a_distributed_optimizer_on_a_layout_it_cannot_read(sharded):
    from megatron_cream.checkpoint.iterations import read_saved_arguments
    from megatron_cream.config import saved_extension
    from megatron_cream.training.resume import validate_checkpoint

    saved = read_saved_arguments(sharded)
    now = Namespace(**{**vars(saved), "cpu": False, "load": sharded, "no_load_optim": False})
    validate_checkpoint(now, saved_extension(saved))
    now.pipeline_model_parallel_size = 2
    with pytest.raises(ValueError) as error:
        validate_checkpoint(now, saved_extension(saved))
    for part in ("--pipeline-model-parallel-size is 2", "--dist-ckpt-optim-fully-reshardable"):
        assert part in str(error.value)


@pytest.fixture
def resumed(monkeypatch, tmp_path):
    """Makes the settings of a run at 16 x N from those that a checkpoint has, and flags."""
    from megatron_cream import pretrain
    from megatron_cream.training import resume
    from megatron_cream.training.arguments import add_arguments, extension_from_args

    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7")
    monkeypatch.setattr(resume, "check_whole", lambda folder, flag, objects: None)

    def make(saved, *flags, **others):
        given = Namespace(megatron_cream=saved)
        monkeypatch.setattr(resume, "read_arguments", lambda folder: given)
        parser = add_arguments(ArgumentParser())
        parser.set_defaults(seq_length=960, rotary_base=10000, seed=1234, hidden_size=None)
        parser.set_defaults(load=str(tmp_path), pretrained_checkpoint=None, finetune=False)
        parser.set_defaults(**others)
        args = parser.parse_args(["--target-length", "15360", *flags])
        pretrain._take_over_settings(args)
        return extension_from_args(args)

    return make


OLD = {"position_strategy": "cream", "rope_interpolation": "linear", "rope_factor": 16.0}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"sample_unit": "window"},
        {"position_options": {"sigma_relative": 0.375}},
        {"rope_interpolation": "ntk"},
    ],
)
def test_a_resumed_run_goes_on_as_it_began(resumed, settings):
    """With defaults of then: documents, linear, the published width at 16 times the window."""
    before = ExtensionConfig(960, 15360, 960, **OLD | settings)
    saved = before.to_dict()
    if not settings:
        del saved["sample_unit"]  # before there was a choice
    assert before.differences(resumed(saved)) == []
    for elsewhere in ({"load": None}, {"finetune": True}):
        new = resumed(saved, **elsewhere)
        assert (new.sample_unit, new.rope_interpolation) == ("window", "yarn")
        assert new.position_options["sigma_relative"] == 0.375


def test_a_resumed_run_that_is_told_otherwise_differs(resumed):
    saved = ExtensionConfig(960, 15360, 960, **OLD).to_dict()
    flags = ("--rope-interpolation", "yarn", "--cream-sigma", "2", "--sample-unit", "packed")
    assert len(ExtensionConfig.from_dict(saved).differences(resumed(saved, *flags))) == 3


def test_a_checkpoint_that_is_not_whole(refused, initial, tmp_path):
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    tracker.write_text("7")
    assert "iter_0000007" in refused("--load", str(tmp_path))


def test_training_longer_names_the_flags_that_allow_it(refused, initial):
    again = ["--load", initial, "--train-iters", "20"]
    message = refused(*again)
    for part in (
        "--train-iters or --lr-decay-iters: 1 iterations != 20 iterations",
        "--override-opt_param-scheduler",
        "--use-checkpoint-opt_param-scheduler",
    ):
        assert part in message
    assert "--lr: 0.001 != 0.01" in refused(*again, "--lr", "0.01")


def test_the_schedule_is_compared_with_the_iteration_that_is_taken(tmp_path, initial):
    """Of two iterations, --ckpt-step names the one before the latest."""
    from megatron_cream.checkpoint.iterations import read_saved_arguments
    from megatron_cream.training.resume import validate_same_schedule

    run = tmp_path / "run"
    run.mkdir()
    (run / "iter_0000001").symlink_to(Path(initial) / "iter_0000001")
    (run / "latest_checkpointed_iteration.txt").write_text("2")  # of which nothing is read
    saved = vars(read_saved_arguments(initial)) | {"load": str(run), "pretrained_checkpoint": None}
    validate_same_schedule(Namespace(**saved | {"ckpt_step": 1}))
    with pytest.raises(UserError, match="--lr: 0.001 != 0.1"):
        validate_same_schedule(Namespace(**saved | {"ckpt_step": 1, "lr": 0.1}))


@pytest.mark.parametrize(
    "allowed",
    ["--override-opt_param-scheduler", "--use-checkpoint-opt_param-scheduler", "--no-load-optim"],
)
def test_training_longer_is_allowed_by_them(initial, allowed):
    from megatron_cream.checkpoint.iterations import read_saved_arguments
    from megatron_cream.training.resume import validate_same_schedule

    started = {"load": initial, "pretrained_checkpoint": None, "train_iters": 20}
    now = Namespace(**vars(read_saved_arguments(initial)) | started)
    with pytest.raises(UserError, match="another learning-rate schedule"):
        validate_same_schedule(now)
    setattr(now, allowed[2:].replace("-", "_"), True)
    validate_same_schedule(now)


def test_the_schedule_is_megatrons(initial, monkeypatch):
    from types import SimpleNamespace

    from megatron.training import training

    from megatron_cream.checkpoint.iterations import read_saved_arguments
    from megatron_cream.training.resume import schedule

    saved = read_saved_arguments(initial)
    iterations = {"train_iters": 30, "lr_decay_iters": 20, "lr_warmup_fraction": 0.1}
    samples = {"train_iters": None, "train_samples": 90, "lr_warmup_samples": 7}
    samples |= {"lr_decay_iters": None, "lr_decay_samples": 80}
    for changes in ({}, iterations, samples):
        args = Namespace(**{**vars(saved), **changes})
        monkeypatch.setattr(training, "get_args", lambda args=args: args)
        monkeypatch.setattr(training, "update_train_iters", lambda args: None)
        theirs = training.get_optimizer_param_scheduler(SimpleNamespace(param_groups=[]))
        for name, value in schedule(args).items():
            assert getattr(theirs, name) == value, name
