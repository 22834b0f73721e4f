# SPDX-License-Identifier: Apache-2.0
"""HybridModel follows positions as GPTModel does: same weights, same losses, at every layout.

Its layers are attention and MLP here: what recurs (Mamba, gated delta nets) needs GPU kernels and
has no angles.
"""

import pytest
from support import ranks
from support.ranks import largest_difference
from support.runs import ITERATIONS

PATTERN = "*-*-*-*-"  # the layers of the small GPT of these tests
TP2 = ["--tensor-model-parallel-size", "2"]
PP2 = ["--pipeline-model-parallel-size", "2"]
LAYOUTS = {
    "one rank": (1, PATTERN, []),
    "TP2": (2, PATTERN, TP2),
    "PP2, cut unevenly within a layer of GPT's": (2, "*-*-*|-*-", PP2),
    "PP2, two virtual stages each": (2, "*-|*-|*-|*-", PP2),
    "PP4": (4, "*-|*-|*-|*-", ["--pipeline-model-parallel-size", "4"]),
    "DP2, distributed optimizer": (2, PATTERN, ["--use-distributed-optimizer"]),
    "recompute all": (
        1,
        PATTERN,
        [
            *("--recompute-granularity", "full"),
            *("--recompute-method", "uniform", "--recompute-num-layers", "1"),
        ],
    ),
}


@pytest.fixture(scope="module")
def train(flags, initial):
    """Trains a pattern from the weights that the GPT of ``reference`` starts from.

    Megatron would take a GPT's optimizer state along, which it does not where a GPT starts.
    """
    weights = ["--pretrained-checkpoint", initial, "--no-load-optim"]

    def call(folder, pattern, extra=(), count=1, start=weights):
        model = ["--hybrid-layer-pattern", pattern]
        return ranks.train(folder, [*flags, *model, *start, *extra], count)

    return call


@pytest.mark.parametrize("name", LAYOUTS)
def test_same_losses_as_gpt(name, tmp_path, train, reference):
    count, pattern, layout = LAYOUTS[name]
    run = train(tmp_path, pattern, layout, count)
    assert run.lines("loading a GPT checkpoint into the hybrid model: 4 GPT layers")
    difference = largest_difference(run.losses, reference.losses)
    print(f"| {name} | {difference:.1e} |")
    assert difference < 1e-5


def test_angles_matter(tmp_path, train, reference):
    other = train(tmp_path, PATTERN, ["--rope-factor", "16"])
    assert largest_difference(other.losses, reference.losses) > 1e-4


def test_saved_at_pp2_resumed_at_tp2(tmp_path, train, reference):
    out = str(tmp_path / "checkpoint")
    save = ["--save", out, "--save-interval", "3", "--load", out]
    before = train(tmp_path / "a", "*-*-|*-*-", [*save, *PP2, "--exit-interval", "3"], 2)
    after = train(tmp_path / "b", PATTERN, [*save, *TP2], 2, start=[])
    assert sorted(before.losses) == [1, 2, 3]
    assert sorted(after.losses) == [4, 5, 6]
    assert largest_difference(before.losses | after.losses, reference.losses) < 1e-5


@pytest.mark.usefixtures("cpu_megatron")
def test_checkpoint_is_loaded_for_evaluation(tmp_path, train, initial):
    """A step at learning rate 0 keeps the weights: the hybrid must answer as its GPT does."""
    import torch

    from megatron_cream.checkpoint.loading import load_model

    out = str(tmp_path / "checkpoint")
    still = ["--lr", "0", "--min-lr", "0", "--train-iters", "1", "--eval-iters", "0"]
    train(tmp_path, "*-*-|*-*-", [*still, *PP2, "--save", out, "--save-interval", "1"], 2)
    ids = torch.arange(96)[None]
    far = torch.cat([torch.arange(48), torch.arange(720, 768)])[None]
    answers = []
    for path in (initial, out):
        model = load_model(path).module
        with torch.no_grad():
            answers += [
                model(input_ids=ids, position_ids=p, attention_mask=None) for p in (ids, far)
            ]
    near_gpt, far_gpt, near_hybrid, far_hybrid = answers
    torch.testing.assert_close(near_hybrid, near_gpt, rtol=0, atol=1e-5)
    torch.testing.assert_close(far_hybrid, far_gpt, rtol=0, atol=1e-5)
    assert (far_gpt - near_gpt).abs().max() > 1e-2


MOE = [
    *("--num-experts", "4", "--moe-router-topk", "2", "--moe-ffn-hidden-size", "96"),
    *("--moe-token-dispatcher-type", "allgather", "--moe-router-load-balancing-type", "none"),
    *("--disable-bias-linear", "--normalization", "RMSNorm"),
]


def test_experts(tmp_path, flags):
    """A mixture with its own checkpoint, on one rank and over pipeline and expert parallelism."""
    out = str(tmp_path / "checkpoint")
    base = [*flags, *MOE]
    save = ["--save", out, "--save-interval", "1", "--train-iters", "1", "--eval-iters", "0"]
    ranks.train(tmp_path / "start", [*base, *save, "--hybrid-layer-pattern", "*E*-*E"])
    start = [*base, "--pretrained-checkpoint", out, "--hybrid-layer-pattern"]
    one = ranks.train(tmp_path / "one", [*start, "*E*-*E"])
    layout = [*PP2, "--expert-model-parallel-size", "2"]
    four = ranks.train(tmp_path / "four", [*start, "*E*|-*E", *layout], 4)
    assert len(one.losses) == ITERATIONS
    assert largest_difference(one.losses, four.losses) < 1e-5


@pytest.mark.usefixtures("cpu_megatron")
@pytest.mark.parametrize(
    ("pattern", "parts"),
    [
        ("*-M-", ["M need GPU kernels", "--cpu"]),
        ("G*-", ["G need GPU kernels", "--cpu"]),
        ("*-D-", ["without 'D'", "sparse MLA"]),
        ("*-+-", ["without '+'", "MLA"]),
        ("*-/*-", ["without '/'", "multi-token prediction"]),
        ("M-E", ["must have attention, '*'"]),
    ],
)
@pytest.mark.parametrize("flag", ["--hybrid-layer-pattern", "--hybrid-override-pattern"])
def test_patterns_that_cannot_be_served(flag, pattern, parts, flags, monkeypatch):
    from megatron_cream import pretrain
    from megatron_cream.mcore.argument_table import cpu_flags

    argv = ["pretrain", *cpu_flags(), "--cpu", *flags, flag, pattern]
    monkeypatch.setattr("sys.argv", argv)
    with pytest.raises(ValueError) as error:
        pretrain.prepare()
    assert str(error.value).startswith(f"{flag} is {pattern!r}")
    for part in parts:
        assert part in str(error.value)


@pytest.mark.usefixtures("cpu_megatron")
def test_checkpoint_with_layers_that_need_gpu_kernels():
    """A layer left out of the local stack would be passed through in silence."""
    from types import SimpleNamespace

    from megatron_cream.extras.hybrid import configure_local_layers

    config = SimpleNamespace(hybrid_layer_pattern="M*-", hybrid_stack_spec=None)
    with pytest.raises(ValueError, match="layers M need GPU kernels"):
        configure_local_layers(config, SimpleNamespace(transformer_impl="local"))
