# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face model trained with CLEX, evaluated at several lengths, and given back."""

import json

import pytest
import torch
from support import hf_models as models
from support import ranks
from support.runs import FLAGS

pytestmark = pytest.mark.usefixtures("cpu_megatron")

MODEL = [
    *("--swiglu", "--normalization", "RMSNorm", "--disable-bias-linear", "--norm-epsilon", "1e-6"),
    *("--untie-embeddings-and-output-weights", "--group-query-attention"),
    *("--num-query-groups", "2", "--train-iters", "4", "--eval-iters", "0"),
    *("--ffn-hidden-size", "96"),
]
CLEX = ["--rope-interpolation", "clex", "--rope-options", "act=silu", "param_factor=2"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, dataset):
    """An imported model after four steps, at TP2 x PP2 from weights that knew nothing of CLEX."""
    from megatron_cream.checkpoint.import_hf import import_checkpoint

    folder = tmp_path_factory.mktemp("served")
    source = models.make(folder / "source")
    import_checkpoint(str(source), str(folder / "imported"), quiet=True)
    start = ["--pretrained-checkpoint", str(folder / "imported"), "--data-path", dataset]
    save = ["--save", str(folder / "run"), "--save-interval", "4", "--lr", "3e-3"]
    layout = ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]
    ranks.train(folder / "log", [*FLAGS, *MODEL, *CLEX, *start, *save, *layout], 4)
    return folder


def test_evaluates_and_exports_alike(trained):
    from megatron_cream.checkpoint.export_hf import export_checkpoint
    from megatron_cream.checkpoint.loading import load_model

    export_checkpoint(str(trained / "run"), str(trained / "out"), quiet=True)
    rope = json.loads((trained / "out/config.json").read_text())["rope_parameters"]
    assert rope["rope_type"] == "longrope"
    assert rope["attention_factor"] == 1.0
    assert rope["short_factor"] == [1.0] * 8
    assert "RoPE interpolation | clex" in (trained / "out/README.md").read_text()
    model = load_model(str(trained / "run")).module
    for length in (90, 768):  # served at t = 1 and t = 8, as the export has them
        ids = torch.arange(length)[None]
        with torch.no_grad():
            found = model(input_ids=ids % 120, position_ids=ids, attention_mask=None)
        wanted = models.logits(trained / "out", ids % 120)
        assert (found - wanted).abs().max() < 2e-4
    model.rotary_pos_emb.set_length(96)
    with torch.no_grad():
        other = model(input_ids=ids % 120, position_ids=ids, attention_mask=None)
    assert (other - wanted).abs().max() > 0.01, "the scale is not felt"


def test_other_weights_cannot_be_evaluated_so(trained):
    from megatron_cream.checkpoint.iterations import read_saved_arguments
    from megatron_cream.checkpoint.loading import load_model
    from megatron_cream.config import saved_extension

    extension = saved_extension(read_saved_arguments(str(trained / "run")))
    with pytest.raises(ValueError, match="'clex': its weights are trained, and --checkpoint"):
        load_model(str(trained / "imported"), extension)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rope-factor", "16"], "--rope-factor"),
        (["--use-torch-fsdp2"], "--use-torch-fsdp2 is"),
        (["--rope-options", "act=relu"], "--rope-options has 'act=relu'"),
        (["--sample-unit", "packed-documents"], "packed-documents"),
    ],
)
def test_refused_before_anything_starts(flags, message, tmp_path, dataset):
    start = ["--data-path", dataset, "--rope-interpolation", "clex"]
    run = ranks.train(tmp_path, [*FLAGS, *start, *flags], wait=False)
    assert run.status == [2]
    (line,) = run.lines("error: ")
    assert message in line
