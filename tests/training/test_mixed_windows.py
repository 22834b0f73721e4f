# SPDX-License-Identifier: Apache-2.0
"""Mixed windows in Megatron's real trainer: every layout, resumed, exported, read back, scored."""

import json

import pytest
import torch
from support import ranks
from support.arguments import arguments
from support.evaluation import write_small_hf
from support.ranks import largest_difference
from support.runs import write_dataset

pytestmark = pytest.mark.usefixtures("cpu_megatron")

MIXED = ["--mixed-windows", "--plain-share", "0.5", "--train-iters", "4"]


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory, flags, initial):
    folder = tmp_path_factory.mktemp("mixed")
    start = ["--pretrained-checkpoint", initial, "--eval-iters", "0"]
    return folder, ranks.train(folder / "log", [*flags, *MIXED, *start])


def test_every_stage_knows_which_samples_are_far(tmp_path, flags, initial, one_rank):
    layout = ["--pipeline-model-parallel-size", "4", "--micro-batch-size", "2"]
    start = ["--pretrained-checkpoint", initial]
    run = ranks.train(tmp_path / "pp4", [*flags, *MIXED, *start, *layout], 4)
    assert largest_difference(run.losses, one_rank[1].losses) < 1e-5
    assert one_rank[1].lines("rope  ")[0].endswith("the model's own (mixed windows)")
    # And it matters: the same samples, all of them interpolated.
    alike = [flag for flag in MIXED if flag != "--mixed-windows"]
    alone = ranks.train(tmp_path / "alone", [*flags, *alike, *start])
    assert largest_difference(alone.losses, one_rank[1].losses) > 1e-4


def test_a_run_goes_on_as_it_began_and_with_nothing_else(tmp_path, flags, initial, one_rank):
    save = ["--save", str(tmp_path / "c"), "--load", str(tmp_path / "c"), "--save-interval", "2"]
    start = [*flags, *MIXED, *save, "--pretrained-checkpoint", initial]
    ranks.train(tmp_path / "a", [*start, "--exit-interval", "2"], wait=False)
    after = ranks.train(tmp_path / "b", start)
    assert sorted(after.losses) == [3, 4]
    wanted = {i: one_rank[1].losses[i] for i in after.losses}
    assert largest_difference(after.losses, wanted) < 1e-6
    other = [flag for flag in start if flag != "--mixed-windows"]
    refused = ranks.train(tmp_path / "c2", other, wait=False)
    assert "--mixed-windows True != False" in refused.log


def test_exported_and_scored_alike_at_both_windows(tmp_path):
    """Import, train and export; folder and checkpoint then give the same scores, near and far."""
    from megatron_cream.checkpoint.export_hf import export_checkpoint
    from megatron_cream.checkpoint.import_hf import import_checkpoint
    from megatron_cream.evaluation.evaluate import evaluate, open_model

    source = write_small_hf(tmp_path / "hf")
    import_checkpoint(source, str(tmp_path / "import"), quiet=True)
    text = write_dataset(tmp_path / "text", [2400] * 8, vocabulary=300)
    start = [
        *("--pretrained-checkpoint", str(tmp_path / "import"), "--use-checkpoint-args"),
        *("--save", str(tmp_path / "run"), "--data-path", text, "--split", "100,0,0"),
        *("--tokenizer-type", "NullTokenizer", "--vocab-size", "384", "--num-workers", "0"),
        *("--seq-length", "512", "--target-length", "2048", "--train-iters", "1", "--lr", "1e-3"),
        *("--micro-batch-size", "1", "--global-batch-size", "4", "--save-interval", "1"),
        *("--eval-iters", "0", "--eval-interval", "9", "--no-create-attention-mask-in-dataloader"),
    ]
    ranks.train(tmp_path / "log", [*start, "--mixed-windows", "--plain-share", "0.5"])
    exported = export_checkpoint(str(tmp_path / "run"), str(tmp_path / "out"), quiet=True)
    assert exported.rope_type == "longrope"
    assert "within 512 tokens" in (tmp_path / "out" / "README.md").read_text()
    rope = json.loads((tmp_path / "out" / "config.json").read_text())["rope_parameters"]
    assert rope["short_factor"] == [1.0] * 4 and rope["long_factor"][-1] == 4.0
    settings = {"tasks": ["passkey"], "lengths": [512, 1024], "cases": 2, "seeds": 1}
    scores = {}
    for kind, path in (("checkpoint", "run"), ("hf", "out")):
        found = evaluate(arguments(**settings, **{kind: str(tmp_path / path)}))
        scores[kind] = [row["logprob"] for row in found[0]["lengths"]]
    assert scores["checkpoint"] == pytest.approx(scores["hf"], rel=1e-4)
    # The checkpoint as one that is interpolated at every length answers otherwise when it is near.
    module = open_model(arguments(checkpoint=str(tmp_path / "run"))).stage.module
    ids = torch.arange(512)[None]
    answers = []
    for length in (512, 2048):
        module.rotary_pos_emb.set_length(length)
        with torch.no_grad():
            answers.append(module(input_ids=ids % 300, position_ids=ids, attention_mask=None))
    assert not torch.allclose(*answers, atol=1e-3)
