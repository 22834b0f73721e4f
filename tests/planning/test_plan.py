# SPDX-License-Identifier: Apache-2.0
"""The tool: its table, file and errors, and the script that it prints."""

import json
import os
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from support.commands import load_file

from megatron_cream.parallel_layout import ParallelLayout, Tuning, Workload
from megatron_cream.planning import stages
from megatron_cream.planning.models import GIB, MODELS, stage_memory
from megatron_cream.planning.report import duration
from megatron_cream.planning.script import argv, rope_flags, run_flags, script
from megatron_cream.planning.stages import tuning_from_args
from megatron_cream.torchrun import ONE_NODE

TOOL = Path(__file__).parents[2] / "tools" / "plan.py"
LAYOUT = ParallelLayout(8, 8, 1, 16)


@pytest.fixture(scope="module")
def tool():
    return load_file(TOOL)


@pytest.fixture
def planned(tool, capsys):
    def call(*arguments):
        status = tool.main(list(arguments))
        captured = capsys.readouterr()
        assert status == 0, captured.err
        return captured.out

    return call


def test_table_and_file_say_the_same(planned, tmp_path):
    file = tmp_path / "plan.json"
    out = planned("llama-2-70b", "--gpus", "64", "--target-length", "262144", "--json", str(file))
    record = json.loads(file.read_text())
    assert "68,976,648,192 parameters" in out
    assert record["model"]["parameters"] == 68_976_648_192
    assert record["cream"]["tokens"] == 1000 * 32 * 4096
    assert "131.1 M tokens" in out
    full = record["full_length"]
    assert full["same_samples"]["tokens"] == 1000 * 32 * 262144
    assert full["same_samples"]["seconds"] == pytest.approx(1000 * full["step"]["total"])
    assert full["same_tokens"]["seconds"] == pytest.approx(
        full["same_samples"]["seconds"] * 4096 / 262144
    )
    for plan in (record["cream"], full):
        assert f"{plan['memory']['total'] / 2**30:.1f}" in out
        assert duration(plan["step"]["total"]) in out
        parts = dict(plan["memory"])
        assert parts.pop("total") == pytest.approx(sum(parts.values()))
    assert record["command"] in out


def test_options_change_the_plan(planned):
    base = ["llama-2-7b", "--gpus", "8", "--target-length", "32768"]
    step = re.compile(r"^step +([\d.]+) s", re.M)
    fast, slow = (
        float(step.search(planned(*base, *more))[1])
        for more in (["--peak-tflops", "1000"], ["--peak-tflops", "500"])
    )
    assert 1.5 < slow / fast < 2.1
    split = ["--tensor-model-parallel-size", "4", "--pipeline-model-parallel-size", "2"]
    virtual = "--num-virtual-stages-per-pipeline-rank"
    assert "TP4 PP2 DP1" in planned(*base, *split, virtual, "1")
    four = planned(*base, *split, virtual, "4")
    assert "TP4 PP2 VP4 DP1" in four and f"{virtual} 4" in four
    fused = "--no-gradient-accumulation-fusion"
    assert fused not in four and fused in planned(*base, fused)
    assert "--tp-comm-overlap" in planned(*base, *split, "--tp-comm-overlap")
    assert "--fp8-format hybrid --fp8-recipe tensorwise" in planned(*base, "--fp8")
    two = ["--seq-length", "512", "--global-batch-size", "512"]
    assert re.search(r"^micro-batches per step +\d+ of [248]\b", planned(*base, *two), re.M)
    assert "--micro-batch-size 1" not in planned(*base, *two)
    assert "--micro-batch-size 2" in planned(*base, *two, "--micro-batch-size", "2")
    whole = ["--tensor-model-parallel-size", "1", "--pipeline-model-parallel-size", "1"]
    layout = re.compile(r"^layout +(.*?)  ", re.M)
    assert layout.search(planned(*base, *whole))[1] == "TP1 PP1 DP8"
    less = planned(*base, *whole, "--gpu-memory", "60")
    assert re.fullmatch(r"TP1 PP1 DP8, recompute \d+", layout.search(less)[1])
    assert "--recompute-method block --recompute-num-layers" in less
    bytes_less = planned(*base, "--grad-reduce-in-bf16", "--use-precision-aware-optimizer")
    for flag in ("--grad-reduce-in-bf16", "--use-precision-aware-optimizer --exp-avg-dtype bf16"):
        assert flag in bytes_less


def test_full_length_that_does_not_fit_leaves_the_rest(planned):
    out = planned("llama-2-7b", "--gpus", "2", "--target-length", "262144")
    assert "full length: llama-2-7b at 262144 tokens does not fit on --gpus 2" in out
    assert "4 such GPUs would do" in out
    assert "torchrun" in out


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["llama-9", "--gpus", "8"], ["MODEL", "llama-9", "llama-2-7b"]),
        (["llama-2-7b", "--gpus", "0"], ["--gpus", "0", "at least 1"]),
        (["llama-2-7b", "--gpus", "many"], ["--gpus", "many", "whole number"]),
        (["llama-2-7b", "--gpus", "12"], ["--gpus", "12", "--gpus-per-node 8"]),
        (["llama-2-7b", "--gpus", "8", "--mfu", "1.5"], ["--mfu", "1.5", "at most 1"]),
        (["llama-2-7b", "--gpus", "8", "--mfu", "-1"], ["--mfu", "-1", "positive"]),
        (["llama-2-7b", "--gpus", "8", "--seq-length", "65536"], ["--target-length", "65536"]),
        (["llama-2-7b", "--gpus", "8", "--reserve", "90"], ["--reserve", "90", "--gpu-memory"]),
        (["llama-2-70b", "--gpus", "8"], ["does not fit", "--gpus 8", "16 such GPUs"]),
        (["llama-2-7b", "--gpus", "8", "--json", "no/such/f"], ["--json", "no/such"]),
        (
            ["llama-2-7b", "--gpus", "8", "--tensor-model-parallel-size", "3"],
            ["tensor parallel size 3", "32 heads"],
        ),
        (["llama-2-7b", "--gpus", "8", "--gpu", "v100"], ["--gpu", "v100", "h100"]),
        (["llama-2-7b", "--gpus", "8", "--gpu", "a100", "--fp8"], ["a100", "no FP8", "--fp8"]),
    ],
)
def test_bad_input_is_one_line_and_status_2(tool, capsys, arguments, parts):
    try:
        status = tool.main([*arguments, "--target-length", "32768"])
    except SystemExit as exit_:
        status = exit_.code
    captured = capsys.readouterr()
    assert status == 2
    assert captured.out == ""
    assert re.fullmatch(r"error: .*\n", captured.err)
    for part in parts:
        assert part in captured.err


@pytest.mark.parametrize("gpus", [8, 1024])
def test_the_printed_script_gives_torchrun_the_planned_flags(tmp_path, gpus):
    flags = run_flags(MODELS["llama-2-70b"], LAYOUT, Workload(4096, 32), 262144, 1000)
    text = script(flags, LAYOUT if gpus == 1024 else ParallelLayout(8), 8)
    stub = 'torchrun() { printf "%s\\n" "$@"; }\n'
    paths = {"DATA": "/with space/data", "BASE": "/base", "OUT": "/out"}
    done = subprocess.run(
        ["bash", "-euc", stub + text],
        capture_output=True,
        text=True,
        env={**os.environ, **paths, "NODE": "3", "HEAD": "node0"},
    )
    assert done.returncode == 0, done.stderr
    got = done.stdout.splitlines()
    start = got.index("megatron_cream.pretrain") + 1
    assert got[start:] == [paths.get(flag.removeprefix("$"), flag) for flag in argv(flags)]
    one = " ".join([*ONE_NODE, "--nproc-per-node", "8"])
    many = "--nnodes 128 --node-rank 3 --nproc-per-node 8 --master-addr node0 --master-port 29500"
    assert " ".join(got[: start - 2]) == (one if gpus == 8 else many)
    shellcheck = shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    if shellcheck:
        (tmp_path / "run.sh").write_text("#!/bin/bash\n" + text + "\n")
        subprocess.run([shellcheck, tmp_path / "run.sh"], check=True)


LLAMA3 = "--rope-interpolation llama3 --rope-factor"


@pytest.mark.parametrize(
    ("name", "target", "expected"),
    [
        ("llama-2-7b", 32768, "--original-length 4096"),
        ("llama-3-8b", 8192, "--rope-interpolation none --original-length 8192"),
        ("llama-3.1-8b", 131072, f"{LLAMA3} 8 --original-length 8192"),
        ("llama-3.1-8b", 262144, f"{LLAMA3} 16 --original-length 8192"),
    ],
)
def test_rope_goes_on_from_the_base_models(name, target, expected):
    assert " ".join(rope_flags(MODELS[name], target)) == expected


def test_flags_at_their_edges():
    def flags(layout, target=32768, iterations=1000):
        return argv(run_flags(MODELS["llama-2-7b"], layout, Workload(4096, 32), target, iterations))

    one, context = ParallelLayout(1, 1, 1, 1), ParallelLayout(1, 1, 2, 1)
    assert "--overlap-grad-reduce" not in flags(one)
    assert "--overlap-grad-reduce" in flags(context)  # the optimizer is shared over them as well
    assert "--cream-sigma-relative" not in flags(one, 8 * 4096 + 1), "the trainer's default"
    assert "full" in flags(one, 4096) and "cream" in flags(one, 4097)
    for iterations, warmup in ((1000, "10"), (8, "4"), (1, "0")):
        given = flags(one, iterations=iterations)
        assert given[given.index("--lr-warmup-iters") + 1] == warmup


def test_bytes_per_parameter_follow_the_optimizer():
    """70B at TP8 PP4: 2 bytes less for each of the 2.16 G parameters of a GPU, 34.9 to 30.8 GiB."""
    args = Namespace(
        grad_reduce_in_bf16=False,
        use_precision_aware_optimizer=False,
        exp_avg_dtype=torch.float32,
        exp_avg_sq_dtype=torch.float32,
        fp8=None,
        tp_comm_overlap=False,
        gradient_accumulation_fusion=True,
    )
    assert tuning_from_args(args) == Tuning()
    args.grad_reduce_in_bf16 = True
    less = tuning_from_args(args)
    layout, work = ParallelLayout(8, 4, 1, 2), Workload(4096, 32)
    gib = [
        stage_memory(MODELS["llama-2-70b"], layout, work, 0, tuning=t).total / GIB
        for t in (Tuning(), less)
    ]
    assert gib == pytest.approx([34.9, 30.8], abs=0.06)
    args.use_precision_aware_optimizer = True
    assert tuning_from_args(args).optimizer_bytes == 2 + 4 + 4
    args.exp_avg_dtype, args.exp_avg_sq_dtype = torch.bfloat16, torch.uint8
    assert tuning_from_args(args) == Tuning(gradient_bytes=2, optimizer_bytes=2 + 2 + 1)


def test_a_stage_line_has_the_memory_of_its_own_flags(monkeypatch):
    monkeypatch.setattr(stages, "tuning_from_args", lambda args: Tuning(gradient_bytes=2))
    monkeypatch.setattr(stages, "shape_from_args", lambda args: MODELS["llama-2-70b"])
    monkeypatch.setattr(stages, "layout_from_args", lambda args: ParallelLayout(8, 4, 1, 2))
    monkeypatch.setattr(stages, "workload_from_args", lambda args: Workload(4096, 32))
    assert stages._stage_gib(None, 0, None) == pytest.approx(30.8, abs=0.06)


def test_a_window_that_the_model_has_is_refused_unless_asked_twice(tool, capsys):
    words = ["llama-3.1-8b", "--gpus", "8", "--target-length", "131072"]
    with pytest.raises(SystemExit) as stopped:
        tool.main(words)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert "--target-length is 131072" in error and "--inside-window" in error
    assert tool.main([*words, "--inside-window"]) == 0


def test_low_mfu_is_warned_of_with_the_gpus_that_would_do(planned):
    wasteful = planned("llama-2-7b", "--gpus", "256", "--target-length", "32768")
    found = re.search(
        r"warning: MFU is ([\d.]+) %, below 30 %: (\d+) GPUs would reach 40 %", wasteful
    )
    assert found and float(found[1]) < 30
    fewer = planned("llama-2-7b", "--gpus", found[2], "--target-length", "32768")
    assert float(re.search(r"MFU of the step +([\d.]+) %", fewer)[1]) >= 40
    assert "warning" not in fewer


def test_full_length_that_is_as_fast_is_said(planned):
    """Whatever the figures are: the note is there exactly where the table's factor is at most 1."""
    seen = set()
    for gpus in ("8", "256"):
        out = planned("llama-2-7b", "--gpus", gpus, "--target-length", "32768")
        factor = float(re.search(r"as many tokens: .* ([\d.]+) x", out)[1])
        assert ("note: full length" in out) == (factor < 1)
        seen.add(factor < 1)
    assert seen == {True, False}


def test_a_faster_layout_that_gradients_in_bf16_leave_room_for_is_said(planned):
    words = ["llama-3-8b", "--gpus", "8", "--target-length", "32768"]
    out = planned(*words)
    said = re.search(
        r"note: --grad-reduce-in-bf16 would leave room for (.+): (\S+ s) per step", out
    )
    lighter = planned(*words, "--grad-reduce-in-bf16")
    assert f"layout                  {said[1]} " in lighter and f" {said[2]} " in lighter
    assert "note: --grad-reduce-in-bf16" not in lighter
    assert "note: --grad-reduce-in-bf16" not in planned("llama-2-7b", *words[1:]), "no other layout"


@pytest.mark.parametrize("modules", [None, ["core_attn"], ["core_attn", "mlp"]])
def test_selective_recompute_of_other_modules_is_not_estimated(monkeypatch, modules):
    monkeypatch.setattr(stages, "values", lambda fact: {})
    args = Namespace(
        tensor_model_parallel_size=1,
        num_experts=None,
        recompute_granularity="selective",
        recompute_method=None,
        fp8=None,
        recompute_modules=modules,
        virtual_pipeline_model_parallel_size=None,
    )
    reason = stages.why_not_estimated(args)
    assert ("mlp" in reason) if modules and "mlp" in modules else reason is None
