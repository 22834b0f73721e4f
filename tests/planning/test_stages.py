# SPDX-License-Identifier: Apache-2.0
"""Layouts built rank by rank in one process, the 1024 ranks of a 70B model among them."""

import dataclasses
import re

import pytest
from support import forks, planning

from megatron_cream.parallel_layout import ParallelLayout, Tuning, Workload
from megatron_cream.planning.models import GIB, MODELS, padded_vocab, stage_memory, stage_parameters
from megatron_cream.planning.propose import uneven_ends
from megatron_cream.planning.script import argv, layout_flags, run_flags
from megatron_cream.planning.stages import RankView, _check_copy, _check_layers, _check_parameters

CREAM = Workload(4096, 32)
MIXTRAL = dataclasses.replace(MODELS["mixtral-8x7b"], layers=4, hidden=512, ffn=256, head_dim=16)
QWEN = dataclasses.replace(MODELS["qwen2.5-7b"], layers=9, vocabulary=150000)


def planned(shape, layout, work=CREAM, target=262144):
    return argv(run_flags(shape, layout, work, target, 1000))


@pytest.mark.slow
def test_70b_on_1024_ranks():
    """TP8 PP8 DP16: every stage, every tensor-parallel rank, and a rank of another copy."""
    shape, layout = MODELS["llama-2-70b"], ParallelLayout(8, 8, 1, 16)
    views, parameters, lines = forks.call(planning.views, planned(shape, layout), 1024)
    assert parameters == shape.parameters + 2 * 8192 * (padded_vocab(shape, 8) - 32000)
    assert len(views) == 65 and views[-1].rank == 1023
    for stage in range(8):
        of_stage = [view for view in views[:-1] if view.stage == stage]
        assert len(of_stage) == 8
        built = {(view.layers, view.parameters) for view in of_stage}
        first = 10 * stage + 1
        assert built == {(tuple(range(first, first + 10)), stage_parameters(shape, layout, stage))}
        gib = stage_memory(shape, layout, CREAM, stage).total / GIB
        assert lines[stage].startswith(f"stage {stage}: layers {first}..{first + 9}")
        assert lines[stage].endswith(f"{gib:.1f} GiB")
    assert "65 of 1024 ranks built" in lines[-1]
    assert "yarn, factor 64" in lines[-1]


@pytest.mark.parametrize(
    ("shape", "layout", "work"),
    [
        (MODELS["smollm2-135m"], ParallelLayout(3, 2, 1, 2), CREAM),  # tied, padded, 3 heads a rank
        (QWEN, ParallelLayout(4, 4, 1, 2, *uneven_ends(9, 4)), CREAM),  # biases, uneven, padded
        (QWEN, ParallelLayout(2, 1, 4, 2, recompute=True), Workload(131072, 2)),  # context parallel
        (MIXTRAL, ParallelLayout(2, 2, 1, 4, virtual=2, expert=4), CREAM),  # among tensor and data
        (MIXTRAL, ParallelLayout(2, 1, 2, 1, expert=2), CREAM),  # four experts of a layer per rank
    ],
    ids=["tied", "uneven", "context", "experts", "several experts"],
)
def test_stages_hold_what_the_closed_forms_say(shape, layout, work):
    views, parameters, lines = forks.call(planning.views, planned(shape, layout, work), layout.gpus)
    padding = (padded_vocab(shape, layout.tensor) - shape.vocabulary) * shape.hidden
    assert parameters == shape.parameters + (1 if shape.tied else 2) * padding
    stages = layout.stages(shape.layers)
    assert [view.parameters for view in views] == [
        stage_parameters(shape, layout, view.stage) for view in views
    ]
    for view in views:
        assert view.layers == tuple(n + 1 for n in stages[view.stage])
    assert "memory is not estimated" not in "\n".join(lines)
    assert len(lines) == layout.pipeline + 1


def small(*more):
    """Flags of a model that is built in no time, on one rank unless they say otherwise."""
    shape = dataclasses.replace(MODELS["llama-3-8b"], layers=8, hidden=256, ffn=512)
    shape = dataclasses.replace(shape, heads=8, groups=4, head_dim=32, vocabulary=1000)
    return [*planned(shape, ParallelLayout(1, 1, 1, 1)), *more]


def test_virtual_stages_experts_and_other_layouts_are_built_too():
    interleaved = ["--num-layers-per-virtual-pipeline-stage", "2"]
    flags = small("--pipeline-model-parallel-size", "2", *interleaved)
    views, _, lines = forks.call(planning.views, flags, 4)
    assert [view.layers for view in views[:2]] == [(1, 2, 5, 6), (3, 4, 7, 8)]
    assert lines[0].startswith("stage 0: layers 1..2, 5..6, embedding")
    assert lines[0].endswith("GiB") and "not estimated" not in "\n".join(lines)
    odd = [*flags, "--global-batch-size", "30"]
    assert "15 micro-batches per step are no multiple" in forks.call(planning.views, odd, 4)[2][2]

    experts = ["--num-experts", "4", "--expert-model-parallel-size", "2", "--moe-router-topk", "2"]
    flags = small("--tensor-model-parallel-size", "2", "--sequence-parallel", *experts)
    views, parameters, lines = forks.call(planning.views, flags, 8)
    assert sum(view.counted for view in views[:4]) == parameters
    assert views[2].counted > 0, "experts of the second expert-parallel rank"
    assert "--expert-tensor-parallel-size is 2" in "\n".join(lines), "as Megatron chooses"


def test_a_hybrid_model_is_built_too():
    pattern = ["--hybrid-layer-pattern", "*-*-|*-*-", "--pipeline-model-parallel-size", "2"]
    views, parameters, lines = forks.call(planning.views, small(*pattern), 4)
    assert [view.layers for view in views[:2]] == [(1, 2, 3, 4), (5, 6, 7, 8)]
    assert sum(view.counted for view in views[:2]) == parameters
    assert "memory is not estimated: --hybrid-layer-pattern is *-*-|*-*-" in lines[2]


def test_weights_and_optimizer_are_megatrons_own_estimate():
    shape, layout = MODELS["llama-2-70b"], ParallelLayout(8, 8, 1, 16)
    theirs = forks.call(planning.megatrons_estimate, planned(shape, layout), 1024)
    ours = stage_memory(shape, layout, CREAM, 0)
    total = ours.weights + ours.gradients + ours.optimizer
    # Theirs has an eighth of the last norm on every stage.
    assert total == pytest.approx(theirs, abs=8192 / 8 * 18)


@pytest.mark.parametrize(
    ("more", "world", "parts"),
    [
        (["--tensor-model-parallel-size", "3"], 8, ["world size (8)", "total_model_size"]),
        (["--pipeline-model-parallel-size", "3"], 3, ["Number of layers", "divisible"]),
        (["--no-such-flag"], 1, ["unrecognized arguments: --no-such-flag"]),
        (["--num-layers", "many"], 1, ["--num-layers", "many"]),
        (["--position-strategy", "crema"], 1, ["--position-strategy", "crema"]),
        (["--target-length", "90"], 1, ["--target-length", "90", "4096"]),
        (["--reset-position-ids"], 1, ["--reset-position-ids"]),
        (["--use-checkpoint-args"], 1, ["--use-checkpoint-args", "model's flags"]),
    ],
)
def test_bad_flags_are_one_line(more, world, parts):
    with pytest.raises(ValueError) as error:
        forks.call(planning.views, small(*more), world)
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


def test_a_vocabulary_must_be_given():
    flags = small()
    at = flags.index("--vocab-size")
    with pytest.raises(ValueError, match="--vocab-size is missing"):
        forks.call(planning.views, flags[:at] + flags[at + 2 :], 1)


def test_what_is_wrong_is_found():
    with pytest.raises(ValueError, match="rank 0 rotates by RotaryEmbedding"):
        forks.call(planning.with_stock_rotary, small(), 1)
    flags = small(*layout_flags(ParallelLayout(1, 2, 1, 1)))
    with pytest.raises(ValueError, match=re.escape("the stages have layers [1, 2, 3, 5, 6, 7]")):
        forks.call(planning.with_layers_left_out, flags, 2)
    with pytest.raises(RuntimeError, match="in one of its own"):
        forks.call(planning.inside_a_process_group, small(), 1)


VIEWS = [
    RankView(0, 0, (1, 2), True, False, 30, 30),
    RankView(1, 1, (3, 4), False, True, 31, 31),
]
WHOLE = RankView(0, 0, (1, 2, 3, 4), True, True, 61, 61)


def changed(index, **fields):
    views = list(VIEWS)
    views[index] = dataclasses.replace(views[index], **fields)
    return views


def test_checks_of_views():
    _check_layers(VIEWS, WHOLE)
    _check_parameters(VIEWS, WHOLE)
    _check_copy([*VIEWS, dataclasses.replace(VIEWS[1], rank=3)])
    with pytest.raises(ValueError, match="embedding: True, output layer: True"):
        _check_layers(changed(1, embedding=True), WHOLE)
    with pytest.raises(ValueError, match="embedding: True, output layer: True"):
        _check_layers(changed(0, output=True), WHOLE)
    with pytest.raises(ValueError, match=re.escape("layers [1, 2, 2, 3]: the model has")):
        _check_layers(changed(1, layers=(2, 3)), WHOLE)
    with pytest.raises(ValueError, match="its stage has others"):
        _check_layers([*VIEWS, dataclasses.replace(VIEWS[1], layers=(3,))], WHOLE)
    with pytest.raises(ValueError, match="hold 62 parameters of the model: it has 61"):
        _check_parameters(changed(0, counted=31), WHOLE)
    with pytest.raises(ValueError, match="rank 3 holds 7 parameters"):
        _check_copy([*VIEWS, dataclasses.replace(VIEWS[1], rank=3, parameters=7)])


LESS_MEMORY = {"gradient_bytes": 2, "optimizer_bytes": 6}


def test_options_of_speed_are_flags_that_megatron_takes():
    """Virtual stages, overlap and FP8 as the plan prints them, built rank by rank."""
    shape = dataclasses.replace(MODELS["llama-3-8b"], layers=8, hidden=256, ffn=512)
    shape = dataclasses.replace(shape, heads=8, groups=4, head_dim=32, vocabulary=1000)
    layout = ParallelLayout(2, 2, 1, 1, virtual=2)
    tuning = Tuning(True, tp_overlap=True, fused_gradients=False, **LESS_MEMORY)
    layout = dataclasses.replace(layout, recompute=True, recompute_layers=1)
    flags = argv(run_flags(shape, layout, CREAM, 262144, 1000, tuning))
    views, _, lines = forks.call(planning.views, flags, 4)
    assert {view.layers for view in views} == {(1, 2, 5, 6), (3, 4, 7, 8)}
    for stage in range(2):
        gib = stage_memory(shape, layout, CREAM, stage, tuning=tuning).total / GIB
        assert lines[stage].endswith(f"{gib:.1f} GiB"), "FP8, blocks and the optimizer's variant"
    gathered = [*flags, "--fp8-param-gather"]
    assert "without --fp8-param-gather" in "\n".join(forks.call(planning.views, gathered, 4)[2])


def test_a_stage_with_virtual_stages_has_the_planned_memory():
    shape = dataclasses.replace(MODELS["llama-3-8b"], layers=8, hidden=256, ffn=512)
    layout = ParallelLayout(1, 2, 1, 2, virtual=4)
    _, _, lines = forks.call(planning.views, planned(shape, layout), 4)
    for stage in range(2):
        gib = stage_memory(shape, layout, CREAM, stage).total / GIB
        assert lines[stage].endswith(f"{gib:.1f} GiB")
