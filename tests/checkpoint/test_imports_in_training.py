# SPDX-License-Identifier: Apache-2.0
"""Megatron's real trainer starts from an import at any layout, and what it saves comes back."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from support import hf_models as models
from support import ranks
from support.runs import write_dataset

pytestmark = pytest.mark.usefixtures("cpu_megatron")

TP2 = ["--tensor-model-parallel-size", "2"]
PP2 = ["--pipeline-model-parallel-size", "2"]
EP2 = ["--expert-model-parallel-size", "2"]
DISTRIBUTED = ["--use-distributed-optimizer"]
STANDING_STILL = ["--lr", "0", "--min-lr", "0", "--weight-decay", "0", "--train-iters", "1"]
MOE = ["--moe-token-dispatcher-type", "allgather", "--moe-router-load-balancing-type", "none"]

# Model, ranks, flags. A vocabulary of 128 is not padded, and has transformers' loss.
LAYOUTS = {
    "TP2, q and k norm": ("Qwen3, q and k norm", 2, TP2),
    "TP2, biases": ("Llama, biases everywhere", 2, TP2),
    "PP2, window": ("Mistral, window of 24", 2, PP2),
    "PP2, virtual stages": ("Llama", 2, [*PP2, "--num-layers-per-virtual-pipeline-stage", "1"]),
    "TP2 x PP2, tied": ("Qwen2, tied", 4, [*TP2, *PP2, *DISTRIBUTED]),
    "EP2 x PP2": ("Mixtral", 4, [*EP2, *PP2, *MOE]),
}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A dataset of equal documents of 97 tokens: every sample is the same."""
    prefix = tmp_path_factory.mktemp("text") / "same"
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    tokens = np.random.default_rng(0).integers(0, 120, size=97)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for _ in range(4):
        builder.add_document(torch.from_numpy(tokens), [len(tokens)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix), torch.from_numpy(tokens)[None]


def flags(prefix, start, save, *more, vocabulary=120):
    return [
        *("--pretrained-checkpoint", str(start), "--use-checkpoint-args", "--save", str(save)),
        *("--data-path", prefix, "--split", "100,0,0", "--num-workers", "0", "--seq-length", "96"),
        *(
            "--tokenizer-type",
            "NullTokenizer",
            "--vocab-size",
            str(vocabulary),
            "--micro-batch-size",
            "1",
        ),
        *("--global-batch-size", "4", "--eval-iters", "0", "--eval-interval", "100"),
        *("--save-interval", "1", "--log-interval", "1"),
        *("--no-create-attention-mask-in-dataloader", *more),
    ]


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_starts_from_it_and_comes_back(name, tmp_path, text):
    from megatron_cream.checkpoint.export_hf import export_checkpoint
    from megatron_cream.checkpoint.import_hf import import_checkpoint

    family, count, layout = LAYOUTS[name]
    prefix, tokens = text
    source = models.make(tmp_path / "source", family, vocab_size=128)
    import_checkpoint(str(source), str(tmp_path / "imported"), quiet=True)
    run = ranks.train(
        tmp_path,
        flags(
            prefix,
            tmp_path / "imported",
            tmp_path / "run",
            *STANDING_STILL,
            *layout,
            vocabulary=128,
        ),
        count,
    )
    logits = models.logits(source, tokens[:, :-1])
    wanted = torch.nn.functional.cross_entropy(logits[0], tokens[0, 1:])
    assert abs(run.losses[1] - float(wanted)) < 1e-5
    export_checkpoint(str(tmp_path / "run"), str(tmp_path / "exported"), quiet=True)
    assert models.same_bits(source, tmp_path / "exported")


def test_states_that_only_some_implementations_ask_for(tmp_path):
    """The loader of a GPU's modules ends a run for one that is missing."""
    from torch.distributed.checkpoint import FileSystemReader

    from megatron_cream.checkpoint.import_hf import import_checkpoint
    from megatron_cream.checkpoint.iterations import find_checkpoint

    source = models.make(tmp_path / "source", "Llama")
    import_checkpoint(str(source), str(tmp_path / "imported"), quiet=True)
    folder = find_checkpoint(str(tmp_path / "imported"))
    keys = set(FileSystemReader(folder).read_metadata().state_dict_metadata)
    layers = json.loads((source / "config.json").read_text())["num_hidden_layers"]
    for module in ("mlp.linear_fc1", "mlp.activation_func", "self_attention.linear_qkv"):
        for layer in range(layers):
            assert f"decoder.layers.{module}._extra_state/shard_{layer}_{layers}" in keys
    assert "decoder.final_layernorm._extra_state/shard_0_1" in keys


def test_vocabulary_is_padded_and_unpadded_in_half_precision(tmp_path, text):
    """120 tokens, 128 rows on two tensor-parallel ranks, distributed optimizer, bfloat16."""
    from megatron_cream.checkpoint.export_hf import export_checkpoint
    from megatron_cream.checkpoint.import_hf import import_checkpoint
    from megatron_cream.checkpoint.iterations import find_checkpoint
    from megatron_cream.checkpoint.torch_dist_io import TorchDistTensors

    source = models.make(tmp_path / "source", dtype=torch.bfloat16)
    import_checkpoint(str(source), str(tmp_path / "imported"), quiet=True)
    layout = [*STANDING_STILL, *TP2, *DISTRIBUTED, "--bf16"]
    start = flags(text[0], tmp_path / "imported", tmp_path / "run", *layout)
    ranks.train(tmp_path, start, 2)
    saved = TorchDistTensors(find_checkpoint(str(tmp_path / "run")))
    assert saved.shape("embedding.word_embeddings.weight") == (128, 64)
    assert saved.shape("output_layer.weight") == (128, 64)
    export_checkpoint(str(tmp_path / "run"), str(tmp_path / "exported"), quiet=True)
    assert models.same_bits(source, tmp_path / "exported")


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """A CREAM run of 12 steps from 96 to 384 tokens at TP2 x PP2, and its export."""
    from megatron_cream.checkpoint.export_hf import export_checkpoint
    from megatron_cream.checkpoint.import_hf import import_checkpoint

    folder = tmp_path_factory.mktemp("extended")
    prefix = write_dataset(folder / "text", np.full(8, 800))
    source = models.make(folder / "source", "Qwen3, q and k norm", initializer_range=0.05)
    (source / "tokenizer_config.json").write_text('{"model_max_length": 96, "x": "y"}')
    (source / "LICENSE").write_text("as you like")
    import_checkpoint(str(source), str(folder / "imported"), quiet=True)
    start = flags(
        prefix,
        folder / "imported",
        folder / "run",
        *("--target-length", "384", "--rope-interpolation", "linear", "--train-iters", "12"),
        *("--lr", "1e-2", "--min-lr", "1e-3", *TP2, *PP2),
    )
    start[start.index("--save-interval") + 1] = "12"
    run = ranks.train(folder, start, 4)
    assert run.losses[12] < run.losses[1] - 0.3  # so that it is another model now
    # The import is found through the run's own arguments.
    export_checkpoint(str(folder / "run"), str(folder / "exported"), quiet=True)
    return folder, prefix


LENGTHS = (64, 96, 192, 384)

# Plain transformers, in a process with nothing of ours in it.
_TRANSFORMERS = """
import json, sys, numpy as np, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokens = torch.from_numpy(np.load(sys.argv[2]))
found = {}
for length in json.loads(sys.argv[3]):
    with torch.no_grad():
        logits = model(tokens[None, :length]).logits[0]
    found[length] = float(torch.nn.functional.cross_entropy(logits, tokens[1 : length + 1]))
assert not {"megatron", "megatron_cream"} & {name.split(".")[0] for name in sys.modules}
print(json.dumps([found, model.config.max_position_embeddings, model.config.rope_parameters]))
"""


def test_extended_model_has_the_same_perplexities_in_transformers(extended, tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    from megatron_cream.checkpoint.loading import load_model

    folder, prefix = extended
    dataset = IndexedDataset(prefix)  # a document is a view of its file
    tokens = np.array(dataset[3], dtype=np.int64)
    np.save(tmp_path / "tokens.npy", tokens)
    model = load_model(str(folder / "run")).module
    ids = torch.from_numpy(tokens)[None]
    ours = {}
    for length in LENGTHS:
        with torch.no_grad():
            losses = model(
                input_ids=ids[:, :length],
                position_ids=torch.arange(length)[None],
                attention_mask=None,
                labels=ids[:, 1 : length + 1].contiguous(),
            )
        ours[length] = math.exp(float(losses.double().mean()))
    command = [sys.executable, "-c", _TRANSFORMERS, str(folder / "exported")]
    command += [str(tmp_path / "tokens.npy"), json.dumps(LENGTHS)]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    nll, window, rope = json.loads(ended.stdout)
    theirs = {length: math.exp(nll[str(length)]) for length in LENGTHS}
    print(f"\n| length | Megatron | transformers |\n|---|---|---|\n{_table(ours, theirs)}")
    for length in LENGTHS:
        assert theirs[length] == pytest.approx(ours[length], rel=1e-3)
    assert window == 384
    assert rope["rope_type"] == "linear"
    assert rope["factor"] == 4.0


def _table(ours, theirs):
    return "\n".join(f"| {n} | {ours[n]:.4f} | {theirs[n]:.4f} |" for n in ours)


def test_extended_model_says_how(extended):
    folder = extended[0] / "exported"
    card = (folder / "README.md").read_text()
    assert "`source`, extended from 96 to 384 tokens with CREAM" in card
    assert "trained on 96 tokens at a time" in card
    assert '"rope_type": "linear"' in card
    assert "linear, factor 4 over 96 tokens" in card
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings == {"model_max_length": 384, "x": "y"}
    assert (folder / "LICENSE").read_text() == "as you like"
    config = json.loads((folder / "config.json").read_text())
    assert config["rope_scaling"]["type"] == "linear"  # for readers older than transformers 5
    assert config["rope_theta"] == 10000.0
    assert config["architectures"] == ["Qwen3ForCausalLM"]


def test_export_needs_the_import_or_hf(extended, tmp_path):
    from megatron_cream.checkpoint.export_hf import export_checkpoint

    folder = extended[0]
    moved = folder / "imported.moved"
    (folder / "imported").rename(moved)
    try:
        with pytest.raises(FileNotFoundError, match="say with --hf which folder"):
            export_checkpoint(str(folder / "run"), str(tmp_path / "out"), quiet=True)
        export_checkpoint(
            str(folder / "run"), str(tmp_path / "out"), hf=str(folder / "source"), quiet=True
        )
    finally:
        moved.rename(folder / "imported")
    assert models.same_bits(folder / "exported", tmp_path / "out")


def test_flags_of_another_model_are_refused(tmp_path, text):
    """Norm epsilon and theta do not change a shape: nothing would be noticed."""
    from megatron_cream.checkpoint.import_hf import import_checkpoint

    source = models.make(tmp_path / "source", "Llama, one head a group, theta 5e5")
    import_checkpoint(str(source), str(tmp_path / "imported"), quiet=True)
    start = flags(text[0], tmp_path / "imported", tmp_path / "run", *STANDING_STILL)
    start.remove("--use-checkpoint-args")
    start += ["--num-layers", "4", "--hidden-size", "64", "--num-attention-heads", "4"]
    start += ["--max-position-embeddings", "96", "--position-embedding-type", "rope"]
    run = ranks.train(tmp_path, start, wait=False)
    assert run.status == [2]
    (line,) = run.lines("error:")
    assert "--norm-epsilon 1e-06 != 1e-05" in line
    assert "--rotary-base 500000 != 10000" in line
    assert "--use-checkpoint-args" in line
