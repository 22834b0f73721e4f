# SPDX-License-Identifier: Apache-2.0
"""Flags that end in a line: numbers, lists of datasets, tokenizers, schedules; before the start."""

import sys
from argparse import Namespace
from pathlib import Path

import pytest
from support.runs import FLAGS

from megatron_cream.errors import UserError

pytestmark = pytest.mark.usefixtures("cpu_megatron")


@pytest.mark.parametrize(
    ("extra", "parts"),
    [
        (["--vocab-size", "0"], ["--vocab-size is 0", "at least 1"]),
        (["--train-iters", "-1"], ["--train-iters is -1", "at least 1"]),
        (["--num-workers", "-1"], ["--num-workers is -1", "at least 0"]),
        (["--micro-batch-size", "0"], ["--micro-batch-size is 0"]),
        (["--seq-length", "-96"], ["--seq-length is -96"]),
        (["--tensor-model-parallel-size", "0"], ["--tensor-model-parallel-size is 0"]),
        (["--log-interval", "0"], ["--log-interval is 0"]),
        (["--eval-interval", "0"], ["--eval-interval is 0"]),
        (["--norm-epsilon", "-1"], ["--norm-epsilon is -1"]),
        (["--lr", "nan"], ["--lr is nan", "at least 0"]),
        (["--hidden-dropout", "1"], ["--hidden-dropout is 1.0", "below 1"]),
        (["--lr-warmup-fraction", "2"], ["--lr-warmup-fraction is 2.0", "from 0 to 1"]),
        (["--rotary-percent", "0"], ["--rotary-percent", "above 0"]),
        (["--lr-warmup-iters", "10"], ["--lr-warmup-iters", "40 samples", "40 of the whole decay"]),
        (["--lr-decay-style", "WSD"], ["--lr-wsd-decay-iters is missing"]),
        (["--lr-warmup-init", "1"], ["--lr-warmup-init is 1.0", "--lr"]),
        (["--global-batch-size", "5", "--micro-batch-size", "2"], ["--global-batch-size is 5"]),
        (["--eval-micro-batch-size", "2"], ["--eval-micro-batch-size is 2", "left out"]),
        (["--full-validation"], ["--full-validation", "tools/evaluate.py"]),
        (["--validation-set-names", "a"], ["--validation-set-names"]),
        (["--phase-transition-iterations", "3"], ["--phase-transition-iterations"]),
        (["--decoder-seq-length", "96"], ["--decoder-seq-length is 96", "--seq-length"]),
        (["--yarn-beta-fast", "32"], ["--yarn-beta-fast is 32.0", "--rope-options"]),
        (["--rope-scaling-factor", "4"], ["--rope-scaling-factor is 4.0", "--rope-factor"]),
        (["--mask-prob", "0.3"], ["--mask-prob is 0.3", "left out"]),
        (["--split", "0,1"], ["--split is '0,1'", "above 0"]),
        (["--split", "a,b"], ["--split is 'a,b'", "99,1,0"]),
        (["--train-data-path", "x"], ["--data-path and --train-data-path are given"]),
        (["--save", "there"], ["--save-interval is missing"]),
        # Megatron's own refusals, some of which are assertions without a word.
        (["--min-lr", "1"], ["it needs --min-lr <= --lr", "--min-lr is 1.0", "--lr is 0.001"]),
        (["--seed", "4294967296"], ["--seed is 4294967296", "below 2 ** 32"]),
        (["--window-size", "4"], ["--window-size is 4", "two numbers"]),
        (["--wandb-project", "p"], ["--wandb-save-dir is missing"]),
        (["--optimizer", "muon"], ["--optimizer is 'muon'", "emerging-optimizers"]),
        (["--tokenizer-type", "MultimodalTokenizer"], ["--tokenizer-type", "NullTokenizer"]),
        (["--attention-backend", "local"], ["--attention-backend is local"]),
        (["--cuda-graph-impl", "local"], ["--cuda-graph-impl is 'local' with --cpu"]),
        (["--num-experts", "2"], ["--num-experts", "--cpu", "--disable-bias-linear"]),
        (
            ["--num-experts", "2", "--moe-token-dispatcher-type", "alltoall"],
            ["--moe-token-dispatcher-type is 'alltoall'", "'allgather'"],
        ),
        (["--transformer-impl", "transformer_engine"], ["--transformer-impl", "not installed"]),
        (["--bf16", "--fp16"], ["--bf16", "True"]),
        (["--save", "x", "--save-interval", "2", "--save-retain-interval", "3"], ["retain"]),
        (["--log-interval", "4", "--log-memory-interval", "6"], ["--log-memory-interval is 6"]),
        (["--num-attention-heads", "3"], ["--num-attention-heads is 3"]),
        (["--max-position-embeddings", "64"], ["max_position_embeddings"]),
        (["--checkpoint-activations"], ["--recompute-activations"]),
        (
            ["--group-query-attention", "--num-query-groups", "3"],
            ["--num-query-groups is 3", "--num-attention-heads, 4"],
        ),
        (["--recompute-granularity", "full"], ["recompute_method"]),
        (["--ddp-num-buckets", "0"], ["num_buckets", "--ddp-num-buckets is 0", "greater than 0"]),
        (["--vocab-size", "9" * 400], ["--vocab-size is 999", "below 2 ** 63"]),
        (
            ["--tensor-parallel-num-weight-shards", "2"],
            ["--tensor-parallel-num-weight-shards is 2 with --cpu", "be 1"],
        ),
        (
            ["--expert-tensor-parallel-num-weight-shards", "2"],
            ["--expert-tensor-parallel-num-weight-shards is 2 with --cpu", "be 1"],
        ),
    ],
)
def test_wrong_flags(refused, extra, parts):
    message = refused(*extra)
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["0", "A", "1", "B"], "gives A the weight 0: it must be above 0"),
        (["-1", "A", "1", "B"], "gives A the weight -1"),
        (["nan", "A", "1", "B"], "gives A the weight nan"),
        (["0.5", "A", "B", "C"], "a weight before each"),
        ([], "is empty"),
    ],
)
def test_blends_that_cannot_be_read(refused, words, part):
    assert part in refused("--data-path", *words)


def test_blends_that_can(tmp_path, monkeypatch):
    from megatron_cream.training import blend

    listed = tmp_path / "list"
    listed.write_text("0.3 A 0.7 B")
    empty = dict.fromkeys((*blend._WHOLE, *blend._PER_SPLIT, "per_split_data_args_path"))
    split = tmp_path / "split.json"
    split.write_text('{"train": ["A"], "valid": "B", "test": "B C"}')
    for given in (
        {"data_path": ["A"]},
        {"data_path": ["A", "B"]},
        {"data_path": ["0.3", "A", "0.7", "B"], "split": "969, 30, 1"},
        {"train_data_path": ["A"], "valid_data_path": ["1", "B"]},
        {"data_args_path": str(listed)},
        {"per_split_data_args_path": str(split)},
    ):
        blend.validate_blend(Namespace(**{**empty, "split": None, **given}))
    with pytest.raises(FileNotFoundError):
        blend.validate_blend(Namespace(**{**empty, "data_args_path": str(tmp_path / "none")}))
    split.write_text('{"train": ["A"]}')
    with pytest.raises(UserError, match="--per-split-data-args-path is .*train, valid and test"):
        blend.validate_blend(Namespace(**{**empty, "per_split_data_args_path": str(split)}))


HUGGING_FACE = ["--tokenizer-type", "HuggingFaceTokenizer"]


@pytest.mark.parametrize(
    ("extra", "part"),
    [
        (HUGGING_FACE, "--tokenizer-model is missing"),
        ([*HUGGING_FACE, "--tokenizer-model", "no/such/model"], "there is no such folder"),
        ([*HUGGING_FACE, "--tokenizer-model", "."], "that folder has none of tokenizer.json"),
        (
            ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", "no.model"],
            "--tokenizer-model is no.model: it must be an existing file",
        ),
        (["--tokenizer-type", "GPT2BPETokenizer"], "--vocab-file is missing"),
    ],
)
def test_tokenizers_that_are_not_there(refused, tmp_path, monkeypatch, extra, part):
    monkeypatch.chdir(tmp_path)
    message = refused(*extra)
    assert part in message
    assert "NullTokenizer" in message or "missing" in message


def test_a_hub_out_of_reach_is_told_at_once(monkeypatch):
    import time

    hub = pytest.importorskip("huggingface_hub")
    from megatron_cream.training.validate import validate_tokenizer

    def out_of_reach(self, name, timeout):
        raise OSError("no route to host")

    args = Namespace(tokenizer_type="HuggingFaceTokenizer", tokenizer_model="no-one/nothing")
    monkeypatch.setattr(hub.HfApi, "model_info", out_of_reach)
    began = time.monotonic()
    with pytest.raises(FileNotFoundError, match="--tokenizer-model is no-one.*no route to host"):
        validate_tokenizer(args)
    assert time.monotonic() - began < 5
    monkeypatch.setattr(hub.HfApi, "model_info", lambda self, name, timeout: None)
    validate_tokenizer(args)


@pytest.mark.parametrize(
    "flag",
    ["--async-save", "--full-validation", "--sequence-parallel", "--context-parallel-size=2"],
)
def test_the_dry_run_refuses_what_the_run_does(refused, dataset, flag):
    from megatron_cream.mcore import fake_world

    with pytest.raises(UserError) as error:
        fake_world.parse(["--cpu", *FLAGS, "--data-path", dataset, flag], 1)
    assert str(error.value) == refused(flag)


def test_packed_documents_pass_the_dry_run_of_a_gpu_run(dataset):
    """The CPU that stands in is not the machine that the flags are for."""
    from megatron_cream.mcore import fake_world

    argv = [*FLAGS, "--data-path", dataset, "--sample-unit", "packed-documents"]
    args, _ = fake_world.parse(argv, 1)
    assert args.sample_unit == "packed-documents"


def test_help_is_printed(monkeypatch, capsys):
    from megatron_cream.mcore import fake_world

    with pytest.raises(SystemExit) as ended:
        fake_world.parse(["--help"], 1)
    assert not ended.value.code
    printed = capsys.readouterr().out
    assert "--target-length" in printed and "--moe-paged-stash-buffer-size-factor-cuda" in printed


def test_megatrons_list_of_arguments_is_left_out_and_the_rest_kept():
    from megatron_cream.mcore.validation import without_arguments

    text = "using 1 GPU\n--- arguments ---\n  lr ... 1\n--- end of arguments ---\nlast\n"
    assert without_arguments(text) == "using 1 GPU\nlast\n"
    assert without_arguments("a\nb") == "a\nb"


def test_a_run_prints_no_list_of_arguments(reference):
    assert not reference.lines("end of arguments")
    assert reference.lines("trained window N")
    assert len(reference.log.splitlines()) < 150, "with ten iterations"


def test_without_torchrun_there_is_one_line(monkeypatch, capsys):
    from megatron_cream import launch, pretrain

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for main, words in ((pretrain.main, []), (launch.main, [__file__])):
        monkeypatch.setattr(sys, "argv", ["x", *words, "--cpu", *FLAGS])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        error = capsys.readouterr().err.splitlines()
        assert len(error) == 1 and "MASTER_ADDR" in error[0] and "torchrun" in error[0]


def test_without_a_gpu_cpu_is_named(monkeypatch):
    import torch

    from megatron_cream.training import startup

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(UserError, match="no GPU here .CUDA_VISIBLE_DEVICES is ''.*--cpu"):
        startup.require_gpu([])
    startup.require_gpu(["--help"])


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


def test_printed_losses_are_those_of_their_own_iterations(reference):
    """Megatron's line of the second iteration after a start would be the mean of two."""
    import re

    lines = reference.lines("lm loss:")
    printed = [float(re.search(r"lm loss: (\S+)", line)[1]) for line in lines]
    assert printed == pytest.approx(list(reference.losses.values()), rel=1e-5)
    assert len(set(printed)) == 10


@pytest.mark.parametrize("rank", [0, 2])
def test_an_error_is_told_by_one_rank_and_repeated_by_torchrun(rank, monkeypatch, capsys, tmp_path):
    import json

    from megatron_cream import errors

    waited, report = [], tmp_path / "error.json"
    monkeypatch.setattr(errors.time, "sleep", waited.append)
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(report))
    with pytest.raises(SystemExit) as ended, errors.one_line_errors():
        raise UserError("--lr is\n-1: it must be at least 0")
    said = "error: rank 2: " if rank else "error: "
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"{said}--lr is -1: it must be at least 0\n"
    assert bool(waited) == bool(rank), "the others leave it to rank 0, which ends them"
    assert json.loads(report.read_text())["message"].startswith(f"{said}--lr")
