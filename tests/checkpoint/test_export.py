# SPDX-License-Identifier: Apache-2.0
"""What an export has beside the weights, models that never were a Hugging Face one, and memory."""

import json
import subprocess

import pytest
import torch
from support import hf_models as models
from support import ranks
from support.runs import FLAGS

from megatron_cream.errors import UserError

pytestmark = pytest.mark.usefixtures("cpu_megatron")

LIKE_LLAMA = [
    *("--swiglu", "--normalization", "RMSNorm", "--disable-bias-linear"),
    *("--untie-embeddings-and-output-weights", "--group-query-attention"),
    *("--num-query-groups", "2", "--train-iters", "2", "--eval-iters", "0"),
]


def test_model_trained_from_scratch(tmp_path, dataset):
    """No Hugging Face folder anywhere: config.json is made of the arguments."""
    from megatron_cream.checkpoint.export_hf import export_checkpoint
    from megatron_cream.checkpoint.loading import load_model

    save = ["--data-path", dataset, "--save", str(tmp_path / "run"), "--save-interval", "2"]
    layout = ["--tensor-model-parallel-size", "2"]
    ranks.train(tmp_path, [*FLAGS, *LIKE_LLAMA, *save, *layout], 2)
    done = export_checkpoint(str(tmp_path / "run"), str(tmp_path / "out"), quiet=True)
    assert done.shape.architecture == "LlamaForCausalLM"
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["vocab_size"] == 120  # 128 rows with Megatron's padding
    assert config["max_position_embeddings"] == 768
    assert config["rope_parameters"]["factor"] == 8.0
    assert "Trained from scratch" in (tmp_path / "out/README.md").read_text()
    ids = torch.arange(96)[None]
    with torch.no_grad():
        found = load_model(str(tmp_path / "run")).module(
            input_ids=ids, position_ids=ids, attention_mask=None
        )
    assert found.shape[-1] == 120  # rows of padding take no part in the softmax
    assert (found - models.logits(tmp_path / "out", ids)).abs().max() < 1e-4


def test_model_that_no_family_describes(initial, tmp_path):
    from megatron_cream.checkpoint.export_hf import export_checkpoint

    with pytest.raises(ValueError, match="--normalization of the checkpoint is 'LayerNorm'"):
        export_checkpoint(initial, str(tmp_path / "out"), quiet=True)


def test_import_keeps_the_files_beside_the_weights(tmp_path):
    from megatron_cream.checkpoint.export_hf import export_checkpoint
    from megatron_cream.checkpoint.import_hf import import_checkpoint

    source = models.make(tmp_path / "My-Model")
    kept = {"tokenizer.json": "{}", "chat_template.jinja": "{{ x }}", "LICENSE": "free"}
    for name, text in kept.items():
        (source / name).write_text(text)
    (source / "README.md").write_text("the card of the base model")
    (source / "training_args.bin").write_text("not for everyone")
    import_checkpoint(str(source), str(tmp_path / "imported"), quiet=True)
    # Nothing of the source is needed any more, and an import may be moved.
    source.rename(tmp_path / "gone")
    (tmp_path / "imported").rename(tmp_path / "moved")
    export_checkpoint(str(tmp_path / "moved"), str(tmp_path / "out"), quiet=True)
    for name, text in kept.items():
        assert (tmp_path / "out" / name).read_text() == text
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {
        *kept,
        *("config.json", "generation_config.json", "model.safetensors", "README.md"),
    }
    assert "`My-Model`, with its window of 96 tokens" in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize("version", [4, 5])
def test_config_of_either_transformers(version, tmp_path):
    """Version 4 has rope_theta and rope_scaling, and an older one no head count for keys."""
    from megatron_cream.checkpoint.export_hf import export_checkpoint
    from megatron_cream.checkpoint.import_hf import import_checkpoint

    source = models.make(tmp_path / "source", num_key_value_heads=4, rope_theta=20000.0)
    if version == 4:
        models.edit_config(
            source,
            rope_parameters=None,
            num_key_value_heads=None,
            head_dim=None,
            rope_theta=20000.0,
            torch_dtype="float32",
        )
    import_checkpoint(str(source), str(tmp_path / "imported"), quiet=True)
    export_checkpoint(str(tmp_path / "imported"), str(tmp_path / "out"), quiet=True)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 20000.0
    ids = torch.arange(90)[None]
    wanted = models.logits(source, ids)
    assert torch.equal(models.logits(tmp_path / "out", ids), wanted)


def lists(count, last):
    return {"short_factor": [1.0] * count, "long_factor": [1.0] * (count - 1) + [last]}


def test_longrope_comes_back_for_either_transformers(tmp_path):
    """Version 4 chooses between the lists by the original window at the top of config.json."""
    from megatron_cream.checkpoint.export_hf import describe, export_checkpoint
    from megatron_cream.checkpoint.import_hf import import_checkpoint

    rope = {"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 24}
    source = models.make(tmp_path / "source", rope_scaling=rope | lists(8, 4.0))
    (source / "tokenizer_config.json").write_text('{"model_max_length": 1000}')
    import_checkpoint(str(source), str(tmp_path / "imported"), quiet=True)
    done = export_checkpoint(str(tmp_path / "imported"), str(tmp_path / "out"), quiet=True)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["original_max_position_embeddings"] == 24
    assert config["rope_scaling"]["original_max_position_embeddings"] == 24
    for length in (20, 90):  # below and beyond it
        ids = torch.arange(length)[None]
        assert torch.equal(models.logits(tmp_path / "out", ids), models.logits(source, ids))
    said = "rope_type longrope is read by transformers 5, transformers 4.57, vLLM, SGLang; refused"
    assert said in describe(done, "out")
    assert said in (tmp_path / "out/README.md").read_text()
    kept = (tmp_path / "out/tokenizer_config.json").read_text()
    assert kept == '{"model_max_length": 1000}', "it is raised, never lowered"


def test_an_export_is_no_part_of_its_checkpoint_and_files_are_read_first(tmp_path):
    from megatron_cream.checkpoint.export_hf import export_checkpoint
    from megatron_cream.checkpoint.import_hf import import_checkpoint

    source = models.make(tmp_path / "source")
    (source / "tokenizer_config.json").write_text("[]")
    with pytest.raises(UserError, match="tokenizer_config.json is not a JSON object"):
        import_checkpoint(str(source), str(tmp_path / "run"), quiet=True)
    (source / "tokenizer_config.json").write_text('{"model_max_length": null}')
    (source / "generation_config.json").write_text('{"cut')
    with pytest.raises(UserError, match="generation_config.json is not JSON"):
        import_checkpoint(str(source), str(tmp_path / "run"), quiet=True)
    (source / "generation_config.json").unlink()
    assert not (tmp_path / "run").exists()
    import_checkpoint(str(source), str(tmp_path / "run"), quiet=True)
    (tmp_path / "run/hf").rename(tmp_path / "hf")
    for name in ("hf", "release", "iter_0000007"):
        output = tmp_path / "run" / name
        if not output.exists():
            with pytest.raises(UserError, match="is read as a part of the checkpoint"):
                export_checkpoint(str(tmp_path / "run"), str(output), str(source), quiet=True)
    export_checkpoint(str(tmp_path / "run"), str(tmp_path / "run/out"), str(source), quiet=True)
    assert (tmp_path / "run/out/tokenizer_config.json").read_text() == '{"model_max_length": null}'


_PEAK = """
import re, sys, warnings
warnings.simplefilter("ignore")
import megatron.training.arguments
from megatron_cream.checkpoint.export_hf import export_checkpoint
from megatron_cream.checkpoint.import_hf import import_checkpoint

def peak():  # ru_maxrss would be that of the process that started this one, if larger
    with open("/proc/self/status") as file:
        return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", file.read())[1])

source, imported, exported = sys.argv[1:]
before = peak()
import_checkpoint(source, imported, quiet=True)
between = peak()
export_checkpoint(imported, exported, quiet=True)
print(before, between, peak())
"""


def test_memory_does_not_grow_with_the_model(tmp_path, quick_python):
    """A model of half a gigabyte is converted in a quarter of one, on top of the imports."""
    source = models.make(
        tmp_path / "source",
        dtype=torch.bfloat16,
        hidden_size=2048,
        intermediate_size=8192,
        num_attention_heads=16,
        num_key_value_heads=16,
    )
    size = (source / "model.safetensors").stat().st_size
    folders = [str(source), str(tmp_path / "imported"), str(tmp_path / "out")]
    ended = subprocess.run([quick_python, "-c", _PEAK, *folders], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    before, imported, exported = map(int, ended.stdout.split())
    print(f"\n{size / 2**20:.0f} MiB: before {before / 2**20:.0f} MiB, after the import "
          f"{imported / 2**20:.0f} MiB, after the export {exported / 2**20:.0f} MiB")  # fmt: skip
    assert size > 500 << 20
    assert before < imported  # it is measured
    assert exported - before < 256 << 20
    assert models.same_bits(source, tmp_path / "out")
