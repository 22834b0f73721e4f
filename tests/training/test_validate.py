# SPDX-License-Identifier: Apache-2.0
"""Wrong flags end in one line that names them, before a process group or a GPU is asked for.

Facts about single arguments are tested in tests/mcore/test_argument_table.py.
"""

from argparse import Namespace

import pytest
from support.runs import FLAGS

from megatron_cream.errors import UserError

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
        (["--vocab-size", "0"], ["--vocab-size is 0", "at least 1"]),
        (["--num-workers", "-1"], ["--num-workers is -1", "at least 0"]),
        (["--seq-length", "-96"], ["--seq-length is -96"]),
        (["--norm-epsilon", "-1"], ["--norm-epsilon is -1"]),
        (["--lr", "nan"], ["--lr is nan", "at least 0"]),
        (["--hidden-dropout", "1"], ["--hidden-dropout is 1.0", "below 1"]),
        (["--lr-warmup-fraction", "2"], ["--lr-warmup-fraction is 2.0", "from 0 to 1"]),
        (["--rotary-percent", "0"], ["--rotary-percent", "above 0"]),
        (["--lr-warmup-iters", "10"], ["--lr-warmup-iters", "40 samples", "24 of the whole decay"]),
        (["--lr-decay-style", "WSD"], ["--lr-wsd-decay-iters is missing"]),
        (["--lr-warmup-init", "1"], ["--lr-warmup-init is 1.0", "--lr"]),
        (["--global-batch-size", "5", "--micro-batch-size", "2"], ["--global-batch-size is 5"]),
        (["--eval-micro-batch-size", "2"], ["--eval-micro-batch-size is 2", "left out"]),
        (["--full-validation"], ["--full-validation", "tools/evaluate.py"]),
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


def test_what_the_parser_refuses_comes_without_its_pages_of_usage(refused, capsys):
    message = refused("--position-strategy", "crema")
    assert "--position-strategy: invalid choice: 'crema'" in message
    assert "--nonsense" in refused("--nonsense")
    assert "usage" not in "".join(capsys.readouterr())


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
