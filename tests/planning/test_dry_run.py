# SPDX-License-Identifier: Apache-2.0
"""A dry run: what it prints next to the whole check of a layout, and what it refuses."""

import dataclasses
from types import SimpleNamespace

import pytest
from support import forks, planning

from megatron_cream.dry_run import _check_positions, world_size
from megatron_cream.errors import UserError
from megatron_cream.parallel_layout import ParallelLayout, Workload
from megatron_cream.planning.cost import GPUS, model_flops, product_share, step_time
from megatron_cream.planning.models import MODELS
from megatron_cream.planning.propose import uneven_ends
from megatron_cream.planning.report import duration
from megatron_cream.planning.script import argv, run_flags
from megatron_cream.planning.stages import machine
from megatron_cream.positions import make_strategy

SMALL = dataclasses.replace(
    MODELS["llama-3-8b"],
    **{"layers": 9, "hidden": 256, "ffn": 512, "vocabulary": 1000, "heads": 8, "groups": 4},
    head_dim=32,
)
LAYOUT = ParallelLayout(2, 4, 1, 2, *uneven_ends(9, 4))
WORK = Workload(4096, 32)


def planned(*more):
    return [*argv(run_flags(SMALL, LAYOUT, WORK, 262144, 1000)), *more]


def test_its_stages_are_those_of_the_whole_check():
    quick = forks.call(planning.dry_run_lines, planned(), 16)
    _, _, whole = forks.call(planning.views, planned(), 16)
    assert quick[0].startswith("16 GPUs: TP2 PP4 DP2; a step of 32 samples is 16 micro-batches")
    assert quick[1:4] == [whole[0], whole[1], whole[3]], "first, middle, last"


def test_it_prints_positions_of_the_samples_that_are_trained_first():
    lines = forks.call(planning.dry_run_lines, planned("--position-seed", "7"), 16)
    strategy = make_strategy("cream", 4096, 262144, sigma_relative=0.375)
    for index in range(3):
        runs = strategy.layout(7, index).runs()
        pieces = ", ".join(f"{start}..{start + length - 1}" for start, length in runs)
        assert f"  sample {index}: {pieces}" in lines
    many = forks.call(
        planning.dry_run_lines,
        planned("--position-strategy", "pose", "--pose-chunks", "9"),
        16,
    )
    assert any(line.startswith("  sample 0: 0..") and "more" in line for line in many)


def test_a_model_outside_the_estimates_says_why():
    lines = forks.call(planning.dry_run_lines, planned("--num-experts", "4"), 16)
    assert "nothing is estimated: --expert-tensor-parallel-size is 2" in "\n".join(lines)


def test_it_says_what_a_run_and_its_checkpoints_take(monkeypatch):
    """Time and MFU of the plan; 14 bytes per parameter, 2 without Adam's."""
    args = planned("--save-interval", "250", "--save-retain-interval", "500")
    said = "\n".join(forks.call(planning.dry_run_lines, args, 16))
    gpu = GPUS["h100"]
    shape = dataclasses.replace(SMALL, vocabulary=1024)  # padded
    step = step_time(shape, LAYOUT, WORK, gpu, product_share()).total
    flops = model_flops(shape, 4096) * WORK.tokens
    mfu = 100 * flops / (step * 16 * gpu.tflops * 1e12)
    assert f"on h100 as planned: {duration(step)} per step, MFU {mfu:.1f} %, 1000 steps in" in said
    size = 14 * shape.parameters / 1e9
    assert f"every 250 steps is {size / (250 * step):.2f} GB/s; each is removed" in said
    assert "when the next one is whole, but for those of every 500 steps" in said
    weights = planned("--no-save-optim", "--micro-batch-size", "8")
    said = "\n".join(forks.call(planning.dry_run_lines, weights, 16))
    assert f"all of the run have {10 * 2 * shape.parameters / 1e9:,.0f} GB" in said
    monkeypatch.setenv("GPU_KIND", "h200")
    assert machine() == ("h200", GPUS["h200"], 8)
    monkeypatch.setenv("GPU_KIND", "b300")
    with pytest.raises(UserError, match="GPU_KIND is 'b300': it must be one of a100, h100, h200"):
        machine()


def test_every_virtual_stage_has_the_trained_frequencies():
    """CLEX's, beside the parameters of the closed forms: otherwise it would be refused."""
    layout = ParallelLayout(1, 2, 1, 2, virtual=2)
    flags = argv(run_flags(dataclasses.replace(SMALL, layers=8), layout, WORK, 262144, 1000))
    clex = ["--position-strategy", "randpos", "--rope-interpolation", "clex"]
    assert forks.call(planning.dry_run_lines, [*flags, *clex], 4)[-1].startswith("dry run: ")


def test_what_is_wrong_is_found():
    with pytest.raises(ValueError, match=r"stage 0 has .* in layers \(1,\): it must have"):
        forks.call(planning.dry_run_with_layers_left_out, planned(), 16)
    with pytest.raises(ValueError, match="--reset-position-ids"):
        forks.call(planning.dry_run_lines, planned("--reset-position-ids"), 16)
    with pytest.raises(ValueError, match=r"world size \(15\)"):
        forks.call(planning.dry_run_lines, planned(), 15)


def test_positions_are_looked_at():
    def look(*ids):
        _check_positions(3, SimpleNamespace(position_ids=ids, train_length=4, target_length=9))

    look(0, 1, 7, 8)
    with pytest.raises(ValueError, match="sample 3 has 4 positions that do not all increase"):
        look(0, 1, 1, 2)
    with pytest.raises(ValueError, match="sample 3 has 3 positions"):
        look(0, 1, 8)
    with pytest.raises(ValueError, match=r"stands at 0\.\.9: .*--target-length 9"):
        look(0, 1, 8, 9)


@pytest.mark.parametrize("text", ["0", "-1", "many", ""])
def test_world_size_must_be_a_number_of_gpus(text, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "64")
    assert world_size() == 64
    monkeypatch.setenv("WORLD_SIZE", text)
    with pytest.raises(ValueError, match=f"WORLD_SIZE is '{text}'"):
        world_size()
