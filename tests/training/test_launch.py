# SPDX-License-Identifier: Apache-2.0
"""A script that knows nothing of us trains as our own entry does, to the last digit.

The stock scripts are Megatron-LM's, of the release that is installed; they are not part of its
wheel. MEGATRON_LM is the folder that holds pretrain_gpt.py and pretrain_hybrid.py.
"""

import os
from pathlib import Path

import pytest
from support import ranks
from support.runs import ITERATIONS

USERS_SCRIPT = """
from beside import add_own_flag, provider, step
from megatron.core.enums import ModelType
from megatron.training import pretrain
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args

if __name__ == "__main__":
    args = parse_and_validate_args(add_own_flag, args_defaults={"tokenizer_type": "NullTokenizer"})
    print("own flag", args.own_flag, flush=True)
    config = gpt_config_from_args(args)
    container = pretrain_cfg_container_from_args(args, config)
    pretrain(container, provider, ModelType.encoder_or_decoder, step)
    print("own last line", flush=True)
"""

BESIDE = """
def add_own_flag(parser):
    parser.add_argument("--own-flag", type=int)
    return parser

def provider(num_samples, vp_stage=None):
    raise AssertionError("the script's own datasets were asked for")

def step(data_iterator, model):
    raise AssertionError("the script's own forward step was called")
"""

# Another way to write the last call, and what it is refused with.
CALL = "pretrain(container, provider, ModelType.encoder_or_decoder, step)"
REFUSED = {
    "no call": ("pass", "it ended without a call of megatron.training.pretrain"),
    "no model config": (
        "pretrain(pretrain_cfg_container_from_args(args), provider, "
        "ModelType.encoder_or_decoder, step, model_provider=provider)",
        "it must give pretrain a model config (gpt_config_from_args or hybrid_config_from_args)",
    ),
    "another parser": (
        "vars(args).pop('megatron_cream'); " + CALL,
        "it must parse its flags with megatron.training.arguments.parse_and_validate_args",
    ),
}


@pytest.fixture
def script(tmp_path):
    """Writes a user's script, changed if asked to, and what stands beside it."""

    def write(old="", new=""):
        assert old in USERS_SCRIPT
        folder = tmp_path / "theirs"
        folder.mkdir()
        (folder / "beside.py").write_text(BESIDE)
        (folder / "train.py").write_text(USERS_SCRIPT.replace(old, new))
        return folder / "train.py"

    return write


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("", ""),
        (
            "from megatron.training import pretrain",
            "from megatron.training.training import pretrain",
        ),
        (
            "provider, ModelType.encoder_or_decoder, step",
            "forward_step_func=step, model_type=ModelType.encoder_or_decoder, "
            "train_valid_test_dataset_provider=provider",
        ),
    ],
    ids=["as it stands", "trainer by its other name", "arguments by name"],
)
def test_users_own_script(old, new, script, tmp_path, flags, initial, reference):
    tokenizer = flags.index("--tokenizer-type")  # the script's own default
    shorter = [*flags[:tokenizer], *flags[tokenizer + 2 :]]
    own = ["--own-flag", "7", "--pretrained-checkpoint", initial]
    run = ranks.train(tmp_path / "run", [*shorter, *own], script=script(old, new))
    assert run.losses == reference.losses
    assert run.lines("own flag") == ["own flag 7"]
    assert run.lines("target window T") == ["  target window T    768 tokens, 8 x N"]
    assert run.lines("own last line")


@pytest.mark.parametrize("name", REFUSED)
def test_scripts_that_cannot_be_served(name, script, tmp_path, flags):
    new, message = REFUSED[name]
    path = script(CALL, new)
    run = ranks.train(tmp_path / "run", flags, wait=False, script=path)
    assert run.status == [2]
    assert run.losses == {}
    (line,) = run.lines("error: ")
    assert line.startswith(f"error: script {path}: {message}")


@pytest.mark.parametrize(
    ("bad", "named"),
    [(["--target-length", "90"], "--target-length"), (["--inprocess-restart"], "for ever")],
    ids=["ours", "restart"],
)
def test_bad_flag_ends_in_one_line(bad, named, script, tmp_path, flags):
    run = ranks.train(tmp_path / "run", [*flags, *bad], wait=False, script=script())
    assert run.status == [2]
    (line,) = run.lines("error: ")
    assert bad[0] in line and named in line
    assert not run.lines("own flag")


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        ([], ValueError, "the first argument must be the script to start"),
        (["--cpu"], ValueError, "the first argument must be the script to start"),
        (["nowhere.py", "--cpu"], FileNotFoundError, "script nowhere.py: it must be an existing"),
    ],
)
def test_no_script(words, error, message):
    from megatron_cream.launch import find_script

    with pytest.raises(error, match=message):
        find_script(words)


@pytest.mark.usefixtures("cpu_megatron")
class TestMegatron:
    def test_other_release(self, monkeypatch):
        from megatron.core import package_info

        from megatron_cream.mcore.patches import validate_release

        validate_release("x")
        monkeypatch.setattr(package_info, "MINOR", 20)
        with pytest.raises(ValueError, match=r"from .*package_info.py: it must be 0\.19"):
            validate_release("x")

    def test_config_of_another_model(self):
        from types import SimpleNamespace

        from megatron_cream.mcore.hooks import add_hooks

        with pytest.raises(ValueError, match="must be Megatron's GPTModelConfig or"):
            add_hooks(SimpleNamespace(), None, None)


@pytest.mark.usefixtures("cpu_megatron")
@pytest.mark.parametrize(
    "extra",
    [
        ["--mock-data"],
        ["--logits-load-dir", "teacher"],
        ["--check-for-spiky-loss"],
        ["--overlap-moe-expert-parallel-comm"],
        ["--per-dataset-sequences-path", "counts.json"],
        ["--object-storage-cache-path", "cache"],
        ["--dataloader-fast-cache-load"],
        ["--dataloader-defer-npy-index-mmap"],
    ],
    ids=lambda extra: extra[0],
)
def test_flags_of_what_is_swapped_are_refused(extra, monkeypatch, flags):
    """The script's datasets and forward step would follow them; ours would not."""
    from megatron_cream import pretrain
    from megatron_cream.mcore.argument_table import cpu_flags

    monkeypatch.setattr("sys.argv", ["pretrain", *cpu_flags(), "--cpu", *flags, *extra])
    with pytest.raises(ValueError, match=f"^{extra[0]} is .*: it must be left out, "):
        pretrain.prepare()


@pytest.fixture
def stock(request):
    """A script of Megatron-LM's."""
    folder = os.environ.get("MEGATRON_LM")
    if not folder:
        pytest.skip("MEGATRON_LM is not set: it must be a folder of Megatron-LM's scripts, 0.19")
    return Path(folder) / request.param


PP2 = ["--pipeline-model-parallel-size", "2"]
STOCK = {
    "pretrain_gpt.py": ["--tensor-model-parallel-size", "2"],
    "pretrain_hybrid.py": ["--hybrid-layer-pattern", "*-*-|*-*-", *PP2],
}


@pytest.mark.parametrize(("stock", "layout"), STOCK.items(), indirect=["stock"], ids=STOCK)
def test_stock_script(stock, layout, tmp_path, flags):
    ours = ranks.train(tmp_path / "ours", [*flags, *layout], 2)
    theirs = ranks.train(tmp_path / "theirs", [*flags, *layout], 2, script=stock)
    assert len(ours.losses) == ITERATIONS
    assert theirs.losses == ours.losses
    assert theirs.lines("> Megatron-Core version"), "not the script's own output"
