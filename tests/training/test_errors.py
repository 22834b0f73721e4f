# SPDX-License-Identifier: Apache-2.0
"""Bad input ends in one line that names the flag, before a process group or a GPU is asked for."""

import json
from argparse import ArgumentParser, Namespace
from pathlib import Path

import numpy as np
import pytest
from support import ranks
from support.runs import write_dataset

from megatron_cream.config import ExtensionConfig
from megatron_cream.data.indexed import read_index

pytestmark = pytest.mark.usefixtures("cpu_megatron")

PACKED = ["--sample-unit", "packed-documents"]


@pytest.mark.parametrize(
    ("extra", "parts"),
    [
        (["--target-length", "90"], ["--target-length", "90", "96"]),
        (["--cream-head-lengths", "48"], ["--cream-head-lengths", "48", "from 1 to 47"]),
        (["--target-length", "6000"], ["4 * factor", "--cream-head-lengths", "250"]),
        ([*PACKED, "--micro-batch-size", "2"], ["--micro-batch-size", "2", "must be 1"]),
        ([*PACKED, "--seq-length", "100"], ["--seq-length", "100", "multiple of 16"]),
        ([*PACKED, "--context-parallel-size", "16"], ["--context-parallel-size", "at most 8"]),
        ([*PACKED, "--hybrid-layer-pattern", "M*"], ["--hybrid-layer-pattern", "M*", "left out"]),
        (PACKED, ["--transformer-impl", "local", "'transformer_engine' on a GPU"]),
        (["--cream-sigma", "-1"], ["--cream-sigma", "-1", "positive"]),
        (["--position-strategy", "pose", "--pose-chunks", "97"], ["--pose-chunks", "97", "96"]),
        (["--rope-factor", "0.5"], ["--rope-factor", "0.5", "at least 1"]),
        (["--original-length", "0"], ["--original-length", "0"]),
        (["--rope-interpolation", "dynamic"], ["--rope-interpolation", "dynamic", "evaluation"]),
        (["--rope-base-config", "nowhere"], ["--rope-base-config", "nowhere"]),
        (["--position-embedding-type", "none"], ["--position-embedding-type", "none", "rope"]),
        (["--position-embedding-type", "mrope"], ["--position-embedding-type", "mrope"]),
        (["--position-embedding-type", "yarn"], ["--position-embedding-type", "yarn"]),
        (["--reset-position-ids"], ["--reset-position-ids"]),
        (["--reset-attention-mask"], ["--reset-attention-mask"]),
        (["--multi-latent-attention"], ["--multi-latent-attention"]),
        (["--flash-decode"], ["--flash-decode"]),
        (["--sft"], ["--sft"]),
        (["--fim-data"], ["--fim-data"]),
        (["--dataloader-inter-document-masking"], ["--dataloader-inter-document-masking"]),
        (["--multiple-validation-sets"], ["--multiple-validation-sets", "tools/evaluate.py"]),
        (["--use-rope-scaling"], ["--use-rope-scaling", "--rope-interpolation"]),
        (
            ["--rotary-seq-len-interpolation-factor", "8"],
            ["--rotary-seq-len-interpolation-factor", "8", "--rope-factor"],
        ),
        (["--dataloader-type", "cyclic"], ["--dataloader-type", "cyclic", "single"]),
        (["--sequence-parallel"], ["--sequence-parallel", "--cpu"]),
        (["--inprocess-restart"], ["--inprocess-restart", "nvidia-resiliency-ext"]),
        (["--te-cross-entropy"], ["--te-cross-entropy", "--cpu"]),
        (["--te-cross-entropy", "--fp16"], ["--fp16", "--te-cross-entropy"]),
        (
            ["--te-cross-entropy", "--cross-entropy-loss-fusion"],
            ["--cross-entropy-loss-fusion", "--te-cross-entropy", "left out"],
        ),
        (["--async-save", "--use-persistent-ckpt-worker"], ["--async-save", "--cpu"]),
        (["--context-parallel-size", "2"], ["--context-parallel-size", "2", "--cpu"]),
        (["--load", "nowhere", "--finetune"], ["--load", "nowhere", "checkpoint"]),
        (["--pretrained-checkpoint", "nowhere"], ["--pretrained-checkpoint", "nowhere"]),
        (["--eod-mask-loss"], ["--eod-mask-loss", "--append-eod"]),
    ],
)
def test_flags(refused, extra, parts):
    message = refused(*extra)
    for part in parts:
        assert part in message


def test_what_the_parser_refuses_comes_without_its_pages_of_usage(refused, capsys):
    message = refused("--position-strategy", "crema")
    assert "--position-strategy: invalid choice: 'crema'" in message
    assert "--nonsense" in refused("--nonsense")
    assert "usage" not in "".join(capsys.readouterr())


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_missing_dataset_file(refused, tmp_path, suffix):
    prefix = write_dataset(tmp_path / "d", [500] * 5)
    Path(prefix + suffix).unlink()
    assert f"d{suffix}" in refused(data=prefix)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_truncated_dataset_file(refused, tmp_path, suffix):
    prefix = write_dataset(tmp_path / "d", [500] * 5)
    path = Path(prefix + suffix)
    path.write_bytes(path.read_bytes()[:-5])
    assert f"d{suffix} is truncated" in refused(data=prefix)


def test_no_document_is_long_enough(refused, tmp_path):
    message = refused(data=write_dataset(tmp_path / "d", [50, 95]))
    for part in ("train split", "96 tokens", "--seq-length", "longest of its 2 has 95"):
        assert part in message


def test_vocabulary_smaller_than_the_datasets(refused, tmp_path):
    prefix = write_dataset(tmp_path / "d", [500] * 5)
    note = {"vocab_size": 32000, "tokenizer_type": "HF", "tokenizer_model": None, "dropped": {}}
    note |= {"eod_id": None, "bos_id": None, "appended_eod": False, "prepended_bos": False}
    Path(prefix + ".json").write_text(json.dumps(note))
    message = refused(data=prefix)
    assert "--vocab-size is 120" in message
    assert "32000" in message


@pytest.mark.parametrize("place", [0, 1234, 2499])
def test_token_beyond_the_vocabulary(refused, tmp_path, place):
    prefix = write_dataset(tmp_path / "d", [500] * 5)
    index = read_index(prefix)
    tokens = np.memmap(prefix + ".bin", mode="r+", dtype=index.dtype)
    tokens[place] = 60_000
    tokens.flush()
    assert "d.bin holds token 60000, needs all below vocab_size " in refused(data=prefix)


def test_damaged_index(refused, tmp_path):
    prefix = write_dataset(tmp_path / "d", [500] * 5)
    data = bytearray(Path(prefix + ".idx").read_bytes())
    data[34 + 4 * 5 + 8] += 2  # the second document begins a token later
    Path(prefix + ".idx").write_bytes(data)
    assert "d.idx is damaged: sequence 1 does not follow the one before" in refused(data=prefix)


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
    from megatron_cream.training import resume, startup
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
        startup._keep_begun(args)
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


def test_gpu_present_refuses_the_stand_in(monkeypatch):

    from megatron_cream.errors import UserError
    from megatron_cream.mcore import cpu

    monkeypatch.setattr(cpu, "is_installed", lambda: False)
    with pytest.raises(UserError, match="leave out --cpu"):
        cpu.install()
