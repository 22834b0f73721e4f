# SPDX-License-Identifier: Apache-2.0
"""CLEX in Megatron's real trainer: losses, gradient norms and weights at every layout."""

import pytest
import torch
from support import ranks
from support.runs import ITERATIONS

CLEX = ["--rope-interpolation", "clex"]
LOW = ["--lr", "1e-5", "--min-lr", "1e-6"]
KEPT = ["--save-interval", str(ITERATIONS), "--eval-iters", "0", *LOW]
TP2 = ["--tensor-model-parallel-size", "2"]
PP2 = ["--pipeline-model-parallel-size", "2"]
VIRTUAL = [*PP2, "--num-layers-per-virtual-pipeline-stage", "1"]
SHARDED = ["--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable"]
OVERLAP = ["--overlap-grad-reduce"]
LAYOUTS = {
    "TP2": (2, TP2),
    "PP2": (2, PP2),
    "PP2, two virtual stages each, overlap": (2, [*VIRTUAL, *OVERLAP]),
    "DP2, distributed optimizer, overlap": (2, [*SHARDED, *OVERLAP, "--overlap-param-gather"]),
    "micro-batch 2, recompute all": (
        1,
        [
            *("--micro-batch-size", "2", "--recompute-granularity", "full"),
            *("--recompute-method", "uniform", "--recompute-num-layers", "1"),
        ],
    ),
    "TP2 x PP2 x DP2": (8, [*TP2, *PP2, *SHARDED]),
}


def stored(folder, iteration):
    """CLEX's weights and Adam's average of their gradients, out of a checkpoint."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = FileSystemReader(str(folder / f"iter_{iteration:07d}"))
    known = reader.read_metadata().state_dict_metadata
    names = ("rotary_pos_emb.weights", "optimizer.state.exp_avg.rotary_pos_emb.weights")
    values = {name: torch.empty(known[name].size) for name in names if name in known}
    load(values, storage_reader=reader, no_dist=True)
    return list(values.values())


@pytest.fixture(scope="module")
def start(tmp_path_factory, flags, initial):
    """A checkpoint whose W_down is no longer zero, from weights that had none of CLEX's."""
    folder = tmp_path_factory.mktemp("start")
    save = ["--save", str(folder / "out"), "--save-interval", "4", "--train-iters", "4"]
    from_base = ["--pretrained-checkpoint", initial, "--eval-iters", "0"]
    run = ranks.train(folder, [*flags, *CLEX, *from_base, *save])
    assert len(run.losses) == 4
    return folder / "out"


@pytest.fixture(scope="module")
def train(flags, start):
    def run(folder, *extra, count=1):
        out = ["--load", str(start), "--finetune", "--save", str(folder / "out")]
        return ranks.train(folder, [*flags, *CLEX, *out, *KEPT, *extra], count)

    return run


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory, train):
    folder = tmp_path_factory.mktemp("one")
    return train(folder), folder / "out"


def test_weights_are_trained(one_rank, start):
    before, _ = stored(start, 4)
    after, gradient = stored(one_rank[1], ITERATIONS)
    assert before.count_nonzero() == before.numel()
    assert 1e-6 < (after - before).abs().max() < 1e-3
    assert gradient.norm() > 1e-4


SLOW = ("TP2 x PP2 x DP2",)  # eight ranks, each with an ODE


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in LAYOUTS],
)
def test_same_as_one_rank(name, tmp_path, train, one_rank):
    count, layout = LAYOUTS[name]
    reference, expected = one_rank[0], stored(one_rank[1], ITERATIONS)
    run, found = train(tmp_path, *layout, count=count), stored(tmp_path / "out", ITERATIONS)
    assert run.losses.keys() == reference.losses.keys() == set(range(1, ITERATIONS + 1))
    for iteration in run.losses:
        assert run.losses[iteration] == pytest.approx(reference.losses[iteration], abs=1e-5)
        assert run.norms[iteration] == pytest.approx(reference.norms[iteration], rel=1e-5)
    for ours, other in zip(found, expected, strict=True):
        assert (ours - other).norm() < 1e-5 * other.norm()


def test_norm_counts_the_weights(tmp_path, flags, start, train, one_rank):
    """The parity of norms would hold, too, if CLEX's gradient were in none of them."""
    first = one_rank[0].norms[1]
    out = ["--load", str(start), "--finetune", "--train-iters", "1", "--eval-iters", "0"]
    saved = ["--save", str(tmp_path / "out"), "--save-interval", "1", "--clip-grad", "0"]
    ranks.train(tmp_path, [*flags, *CLEX, *out, *saved])
    (_, average) = stored(tmp_path / "out", 1)
    share = (average.norm() / 0.1).item()  # Adam's first average is a tenth of the gradient
    assert 0.01 * first < share < first


def test_no_weight_decay(tmp_path, train, start):
    """With a learning rate that moves weights by decay alone they do not move."""
    decay = ["--weight-decay", "1000", "--adam-eps", "1e10", "--train-iters", "2"]
    train(tmp_path, *decay, "--save-interval", "2")
    before, after = stored(start, 4)[0], stored(tmp_path / "out", 2)[0]
    assert torch.equal(before, after)


@pytest.mark.slow
@pytest.mark.parametrize(("count", "layout"), [(2, TP2), (2, PP2)], ids=["TP2", "PP2"])
def test_resumes_at_another_layout(count, layout, tmp_path, flags, start, train, one_rank):
    train(tmp_path, "--save-interval", "3", "--exit-interval", "3")
    folder = str(tmp_path / "out")
    again = [*flags, *CLEX, "--load", folder, "--save", folder, *KEPT, *layout]
    run = ranks.train(tmp_path / "again", again, count)
    assert sorted(run.losses) == [4, 5, 6]
    for iteration, loss in run.losses.items():
        assert loss == pytest.approx(one_rank[0].losses[iteration], abs=1e-5)


def test_resumes_bit_for_bit(tmp_path, flags, train, one_rank):
    train(tmp_path, "--save-interval", "3", "--exit-interval", "3")
    folder = str(tmp_path / "out")
    again = [*flags, *CLEX, "--load", folder, "--save", folder, *KEPT]
    run = ranks.train(tmp_path / "again", again)
    assert run.losses == {i: one_rank[0].losses[i] for i in (4, 5, 6)}
    for ours, other in zip(
        stored(tmp_path / "out", ITERATIONS), stored(one_rank[1], ITERATIONS), strict=True
    ):
        assert torch.equal(ours, other)


@pytest.mark.parametrize(
    ("count", "layout"), [(1, []), (2, [*PP2, *SHARDED])], ids=["one rank", "PP2"]
)
def test_bfloat16_saves_and_resumes(count, layout, tmp_path, flags, start):
    """The optimizer's float32 master moves by less than bfloat16 can say, and is kept."""
    folder = tmp_path / "out"
    out = ["--bf16", "--save", str(folder), "--eval-iters", "0", "--save-interval", "2"]
    begin = ["--load", str(start), "--finetune", "--train-iters", "4", *LOW]
    begin += ["--exit-interval", "2"]
    ranks.train(tmp_path / "a", [*flags, *CLEX, *out, *begin, *layout], count)
    weights = stored(folder, 2)[0].bfloat16()
    assert weights.count_nonzero() == weights.numel()
    if not layout:  # Megatron resumes a distributed optimizer with a GPU's optimizers only
        again = ["--load", str(folder), "--train-iters", "4", *LOW]
        run = ranks.train(tmp_path / "b", [*flags, *CLEX, *out, *again, *layout], count)
        assert sorted(run.losses) == [3, 4]


def test_other_positions_and_scales_that_are_no_whole_numbers(tmp_path, flags, initial):
    from_base = ["--pretrained-checkpoint", initial, "--train-iters", "3"]
    for strategy in ("randpos", "pose"):
        options = ["--position-strategy", strategy, "--target-length", "700"]
        run = ranks.train(tmp_path / strategy, [*flags, *CLEX, *from_base, *options])
        assert len(run.losses) == 3
        assert run.lines("clex, scales 1 to 7.29167 over 96 tokens")


def test_validation_is_at_the_scale_of_its_length(tmp_path, flags, initial):
    """Weights of zero and a scale of 1: the base model's own angles, also on a middle stage."""
    evaluation = ["--pretrained-checkpoint", initial, "--train-iters", "1", "--lr", "1e-12"]
    layout = ["--pipeline-model-parallel-size", "4", "--min-lr", "0"]
    plain = ["--rope-interpolation", "none", "--target-length", "96"]
    found = [
        ranks.train(tmp_path / str(i), [*flags, *evaluation, *layout, *rope], 4)
        for i, rope in enumerate((CLEX, plain))
    ]
    lines = [run.lines("validation loss at iteration 1 on validation set")[-1] for run in found]
    losses = [float(line.split("lm loss value: ")[1].split()[0]) for line in lines]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
