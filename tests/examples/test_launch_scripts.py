# SPDX-License-Identifier: Apache-2.0
"""Every launch script against the plan that it quotes, and what it does step by step."""

import functools
import os
import re
import signal
import subprocess
import time

import pytest
from support import forks, launch
from support.commands import exit_status, load_file

from megatron_cream import cli
from megatron_cream.cli import make_parser
from megatron_cream.planning.models import GIB
from megatron_cream.planning.plan import compare
from megatron_cream.planning.report import duration
from megatron_cream.planning.script import argv, found_flags

SEVEN = launch.ROOT / "examples" / "llama-2-7b" / "32k.sh"
QUOTE = re.compile(r"^# megatron-cream plan (.+)$", re.M)
NAMES = [f"{path.parent.name}/{path.stem}" for path in launch.SCRIPTS]

# What is a user's own, or not a plan's business: how a run is logged, saved and made fast.
PLACES = {"--data-path", "--pretrained-checkpoint", "--save", "--load", "--save-interval"}
BESIDE_THE_PLAN = {
    *("--exit-signal-handler", "--async-save", "--use-persistent-ckpt-worker", "--async-strategy"),
    *("--log-interval", "--log-throughput", "--tensorboard-dir", "--tensorboard-log-interval"),
    *("--cross-entropy-loss-fusion", "--cross-entropy-fusion-impl"),
    *("--manual-gc", "--manual-gc-interval", "--distributed-timeout-minutes"),
}


def load_table():
    """examples/launch_scripts.py, which says how each script is planned."""
    path = launch.ROOT / "examples" / "launch_scripts.py"
    return load_file(path)


@functools.cache
def planned(script):
    """Arguments of the command that a script quotes, its plan and the flags of that."""
    args = make_parser("plan").parse_args(QUOTE.search(script.read_text())[1].split())
    found = compare(args)
    return args, found, found_flags(found)


def dry_command(script, folder, **variables):
    """Flags and world size that a script hands to the dry run."""
    done, calls = launch.run(script, folder, "--dry-run", **variables)
    assert done.returncode == 0, done.stderr
    [(words, world)] = [call for call in calls if call[0][0] != "-c"]  # the asking for Apex
    assert words[:2] == ["-m", "megatron_cream.dry_run"]
    return words[2:], int(world)


def test_scripts_are_what_the_planner_writes():
    """``make launch-scripts`` changes nothing."""
    texts = load_table().texts()
    assert set(texts) == set(launch.SCRIPTS)
    for path, text in texts.items():
        assert path.read_text() == text, f"{path} is another: make launch-scripts"


def test_all_models_of_the_list_have_a_script():
    assert set(NAMES) >= {
        *("llama-2-7b/32k", "llama-2-7b/256k", "llama-2-7b/chat-32k", "llama-2-13b/32k"),
        "llama-2-7b/chunkllama-16k",
        *("llama-2-70b/32k", "llama-2-70b/128k", "llama-3-70b/128k", "llama-3.1-70b/256k"),
        *("llama-3.1-8b/256k", "mistral-7b/128k", "qwen2.5-7b/128k", "qwen2.5-32b/128k"),
    }


@pytest.mark.parametrize("script", launch.SCRIPTS, ids=NAMES)
def test_a_script_trains_with_the_planned_flags(script, tmp_path):
    args, _, flags = planned(script)
    words, world = dry_command(script, tmp_path)
    assert world == args.gpus
    mine, theirs = launch.flags(words), launch.flags(argv(flags))
    if "chat" in script.stem:
        theirs["--lr-warmup-iters"] = ("0",)  # the recipe for chat models has none
    if "chunkllama" in script.stem:
        theirs |= {"--lr-warmup-iters": ("48",), "--lr-decay-style": ("cosine",)}
        theirs |= {"--rope-interpolation": ("none",), "--dual-chunk": ()}
        theirs |= {"--sample-unit": ("packed-documents",)}
    for flag in theirs.keys() - PLACES:
        assert mine.get(flag) == theirs[flag], flag
    retained = {"--save-retain-interval"} & mine.keys()
    assert mine.keys() - theirs.keys() == BESIDE_THE_PLAN | retained


@pytest.fixture
def examples(tmp_path):
    """A folder with what launch scripts source."""
    folder = tmp_path / "examples"
    (folder / "mine").mkdir(parents=True)
    for name in ("common.sh", "steps.sh", "torchrun.sh"):
        (folder / name).write_text((launch.ROOT / "examples" / name).read_text())
    return folder


@pytest.mark.parametrize(
    "words",
    [
        "llama-2-7b --gpus 4 --target-length 65536 --seq-length 8192 --micro-batch-size 2",
        "qwen2.5-14b --gpus 16 --target-length 65536 --train-iters 12 --global-batch-size 64",
        "llama-3-8b --gpus 8 --target-length 4096 --seq-length 4096 --inside-window",
    ],
)
def test_a_script_of_ones_own_trains_with_the_planned_flags(words, examples, tmp_path, capsys):
    path = examples / "mine" / "run.sh"
    words = words.split()
    assert cli.main(["plan", *words, "--script", str(path)]) == 0
    assert f"# megatron-cream plan {words[0]} --gpus" in path.read_text()
    assert os.access(path, os.X_OK)
    args, _, flags = planned(path)
    assert vars(args) == vars(make_parser("plan").parse_args(words))
    given, world = dry_command(path, tmp_path)
    mine, theirs = launch.flags(given), launch.flags(argv(flags))
    assert world == args.gpus
    assert {flag: mine.get(flag) for flag in theirs.keys() - PLACES} == {
        flag: theirs[flag] for flag in theirs.keys() - PLACES
    }


def test_a_script_replaces_no_file_and_stands_below_examples(examples, capsys):
    words = ["plan", "llama-2-7b", "--gpus", "8", "--target-length", "32768", "--script"]
    (examples / "mine" / "there.sh").write_text("mine\n")
    for path, said in (
        (examples / "mine" / "there.sh", "it exists"),
        (examples.parent / "a.sh", "be below"),
    ):
        assert exit_status(cli.main, [*words, str(path)]) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith(f"error: --script is {path}: ") and said in captured.err
        assert captured.out == ""
    assert (examples / "mine" / "there.sh").read_text() == "mine\n"


@pytest.mark.parametrize("script", launch.SCRIPTS, ids=NAMES)
def test_every_script_passes_its_dry_run(script, tmp_path):
    args, found, _ = planned(script)
    plan = found.short
    lines = forks.call(launch.dry_run, *dry_command(script, tmp_path))
    batch = args.global_batch_size
    assert lines[0].startswith(f"{args.gpus} GPUs: {plan.layout}; a step of {batch} samples")
    stages = [line for line in lines if line.startswith("stage ")]
    assert "embedding" in stages[0] and "output layer" in stages[-1]
    assert len(stages) == min(plan.layout.pipeline, 3)
    most = max(float(re.search(r"([\d.]+) GiB$", line)[1]) for line in stages)
    assert most == pytest.approx(plan.memory.total / GIB, abs=0.06)
    text = "\n".join(lines)
    step, mfu = duration(plan.step.total), 100 * plan.mfu(found.shape, found.cluster)
    assert f"on h100 as planned: {step} per step, MFU {mfu:.1f} %, {args.train_iters}" in text
    size = re.search(r"^CHECKPOINT_GB=.*-(\d+)}$", script.read_text(), re.M)[1]
    padded = re.search(r"a checkpoint has ([\d,]+) GB", text)[1].replace(",", "")
    assert int(padded) == pytest.approx(int(size), rel=0.01)
    method = re.search(r"^METHOD=.*-(\w+)}$", script.read_text(), re.M)
    assert f"{method[1] if method else 'cream'} within {args.target_length}" in text
    assert f"..{args.target_length - 1}" in text, "samples reach the last position"
    assert lines[-1].startswith("dry run: flags, stages and positions are right")


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"METHOD": "pose"}, "pose within 32768"),
        ({"METHOD": "randpos", "ROPE": "ntk"}, "RoPE by positions: ntk, factor 8"),
        ({}, "RoPE by positions: yarn, factor 8"),
        ({"ROPE": "linear"}, "RoPE by positions: linear, factor 8"),
        ({"METHOD": "randpos", "ROPE": "clex"}, "RoPE by positions: clex"),
        ({"GLOBAL_BATCH": "64", "NODES": "2"}, "16 GPUs: TP1 PP1 DP16; a step of 64 samples"),
    ],
    ids=lambda value: " ".join(value.values()) if isinstance(value, dict) else "",
)
def test_variants_by_one_variable(variables, expected, tmp_path):
    lines = forks.call(launch.dry_run, *dry_command(SEVEN, tmp_path, **variables))
    assert expected in "\n".join(lines)


@pytest.mark.parametrize(
    ("there", "variables", "folder"),
    [
        ([], {}, "yarn"),
        ([], {"ROPE": "linear"}, "linear"),
        (["linear"], {}, "linear"),
        (["linear"], {"ROPE": "yarn"}, "yarn"),
        (["linear", "yarn"], {}, "yarn"),
    ],
)
def test_a_run_is_found_that_began_with_the_default_of_then(there, variables, folder, tmp_path):
    runs = tmp_path / "runs"
    for rope in there:
        (runs / f"llama-2-7b-32768-cream-{rope}").mkdir(parents=True)
    words, _ = dry_command(SEVEN, tmp_path, OUT="", **variables)
    assert launch.flags(words)["--save"] == (f"runs/llama-2-7b-32768-cream-{folder}",)
    assert ("--rope-interpolation" in words) == bool(variables), "or the trainer decides"


def test_a_dry_run_is_one_wherever_its_flag_stands(tmp_path):
    flags = ("--lr", "1e-5", "--dry-run", "--seed", "7")
    done, calls = launch.run(SEVEN, tmp_path, *flags, DATA="there")
    assert done.returncode == 0, done.stderr
    [(words, _)] = [call for call in calls if call[0][0] != "-c"]
    assert words[:2] == ["-m", "megatron_cream.dry_run"]
    assert words[-4:] == ["--lr", "1e-5", "--seed", "7"]


def test_the_dry_run_as_a_user_starts_it(quick_python):
    """No stub: bash, our module, Megatron; and what it says to a flag that is wrong."""
    done = subprocess.run(
        ["bash", str(SEVEN), "--dry-run", "--tensor-model-parallel-size", "3"],
        env={**os.environ, "PYTHON": quick_python},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch(r"error: .*world size \(8\).*\n", done.stderr.splitlines(True)[-1])


def started(calls):
    """What was started, in order: the asking for Apex aside."""
    words = [call[0] for call in calls if call[0][0] != "-c"]
    return [word[1] for word in words]  # after the tool, or after -m


def test_import_train_export_and_nothing_twice(tmp_path):
    done, calls = launch.run(SEVEN, tmp_path, "--lr", "1e-5", DATA="books")
    assert done.returncode == 0, done.stderr
    assert started(calls) == ["import", "torch.distributed.run", "export"]
    train, export = launch.flags(calls[-2][0]), launch.flags(calls[-1][0])
    assert train["--data-path"] == ("0.5", "books", "0.5", str(tmp_path / "retrieval"))
    assert train["--lr"] == ("1e-5",), "flags of the command line come last"
    assert train["--nproc-per-node"] == ("8",) and train["--local-addr"] == ("127.0.0.1",)
    assert launch.flags(calls[0][0])["--hf"] == ("meta-llama/Llama-2-7b-hf",)
    assert train["--pretrained-checkpoint"] == launch.flags(calls[0][0])["--output"]
    assert export["--checkpoint"] == train["--save"] == train["--load"]
    before = len(calls)
    done, calls = launch.run(SEVEN, tmp_path, DATA="books")
    assert done.returncode == 0 and len(calls) == before, "all three were there already"


@pytest.mark.parametrize("mark", ["latest_checkpointed_iteration.txt", "metadata.json"])
def test_a_base_that_is_there_is_not_imported_again(mark, tmp_path):
    """A folder of checkpoints, or one that is a single checkpoint."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / mark).touch()
    done, calls = launch.run(SEVEN, tmp_path, DATA="d", STEPS="import train")
    assert done.returncode == 0 and started(calls) == ["torch.distributed.run"]
    done, calls = launch.run(SEVEN, tmp_path, DATA="d", STEPS="import", NODE_RANK="1", NODES="2")
    assert done.returncode == 0, "other nodes find it as well, and wait for nothing"


def test_a_base_that_is_something_else_is_imported(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "notes.txt").touch()
    _, calls = launch.run(SEVEN, tmp_path, DATA="d", STEPS="import")
    assert started(calls) == ["import"]


def test_a_run_that_stops_early_says_how_to_go_on_and_exports_nothing(tmp_path):
    done, calls = launch.run(SEVEN, tmp_path, DATA="d", STUB_REACHES="300")
    assert done.returncode == 75
    assert "stopped at iteration 300 of 1000: the same command goes on" in done.stderr
    assert started(calls) == ["import", "torch.distributed.run"]
    done, _ = launch.run(SEVEN, tmp_path, DATA="d", STEPS="export")
    assert done.returncode == 2 and "it must reach 1000 to be exported" in done.stderr
    done, calls = launch.run(SEVEN, tmp_path, DATA="d")
    assert done.returncode == 0 and started(calls)[2:] == ["torch.distributed.run", "export"]


def wait_for(path, process):
    end = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM], ids=["USR1", "TERM"])
def test_a_signal_reaches_the_workers(number, tmp_path):
    """To the script's whole group, as Slurm sends USR1; or to it alone, as Kubernetes TERM."""
    environment = launch.environment(tmp_path, DATA="d", STUB_REACHES="signal")
    process = subprocess.Popen(
        ["bash", str(SEVEN)],
        env=environment,
        stderr=subprocess.PIPE,
        start_new_session=True,
        cwd=tmp_path,
    )
    wait_for(tmp_path / "out" / "ready", process)
    if number == signal.SIGUSR1:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75, said
    assert b"stopped at iteration 7 of 1000" in said


@pytest.mark.parametrize("seconds", ["20", "0.4"], ids=["finishes", "is stopped"])
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM], ids=["USR1", "TERM"])
def test_a_signal_during_an_import(number, seconds, tmp_path):
    """It finishes or is stopped in time; nothing new is begun, and node 0 says where it stopped."""
    said = tmp_path / "stopped"
    variables = {"DATA": "d", "STUB_IMPORT_SECONDS": "2", "SIGNAL_SECONDS": seconds}
    environment = launch.environment(tmp_path, STOPPED_FILE=str(said), **variables)
    process = subprocess.Popen(
        ["bash", str(SEVEN)],
        env=environment,
        stderr=subprocess.PIPE,
        start_new_session=True,
        cwd=tmp_path,
    )
    wait_for(tmp_path / "calls", process)
    if number == signal.SIGUSR1:
        os.killpg(process.pid, number)  # Slurm: to every process
    else:
        process.send_signal(number)
    errors = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 75, errors
    assert said.read_text().strip() == "0"
    assert (tmp_path / "base").exists() == (seconds == "20")
    done, calls = launch.run(SEVEN, tmp_path, DATA="d")
    imports = 1 if seconds == "20" else 2
    assert done.returncode == 0, done.stderr
    assert started(calls) == ["import"] * imports + ["torch.distributed.run", "export"]


def test_ctrl_c_ends_an_import(tmp_path):
    environment = launch.environment(tmp_path, DATA="d", STUB_IMPORT_SECONDS="60")
    # Tests that run in the background of a shell would hand on that SIGINT is ignored.
    process = subprocess.Popen(
        ["bash", str(SEVEN)],
        env=environment,
        cwd=tmp_path,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    wait_for(tmp_path / "calls", process)
    os.killpg(process.pid, signal.SIGINT)  # a terminal: to every process
    assert process.wait(60) in (130, -signal.SIGINT)
    end = time.monotonic() + 60
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < end:
            os.killpg(process.pid, 0)
            time.sleep(0.05)


def test_other_nodes_do_not_say_that_a_run_stopped(tmp_path):
    said = tmp_path / "stopped"
    for rank, expected in (("1", False), ("0", True)):
        variables = {"NODES": "2", "NODE_RANK": rank, "STUB_REACHES": "300"}
        done, _ = launch.run(
            SEVEN, tmp_path, DATA="d", STEPS="train", STOPPED_FILE=str(said), **variables
        )
        assert done.returncode == 75 and said.exists() == expected
    assert said.read_text().strip() == "300"


def test_what_fails_is_not_taken_for_stopped(tmp_path):
    said = tmp_path / "stopped"
    done, _ = launch.run(
        SEVEN, tmp_path, DATA="d", STUB_REACHES="300", STUB_FAILS="1", STOPPED_FILE=str(said)
    )
    assert done.returncode == 1 and not said.exists()


def test_other_nodes_neither_import_nor_export(tmp_path):
    script = launch.ROOT / "examples" / "llama-2-70b" / "32k.sh"
    base = tmp_path / "base"
    base.mkdir()
    (base / "latest_checkpointed_iteration.txt").write_text("release")
    done, calls = launch.run(script, tmp_path, DATA="d", NODE_RANK="3", HEAD="node0")
    assert done.returncode == 0, done.stderr
    assert started(calls) == ["torch.distributed.run"]
    train = launch.flags(calls[-1][0])
    rendezvous = ("--nnodes", "--node-rank", "--master-addr", "--master-port")
    assert [train[flag] for flag in rendezvous] == [("4",), ("3",), ("node0",), ("29500",)]


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"DATA": ""}, "DATA is not set"),
        ({"STEPS": "import trian"}, "STEPS is 'import trian'"),
        ({"DATA": "1 d 2 there"}, "DATA is 1 d 2 there: there is no d.idx; it must be an indexed"),
        ({"NODES": "many"}, "NODES is 'many': it must be a whole number of at least 1"),
        ({"SAVE_INTERVAL": "0"}, "SAVE_INTERVAL is '0': it must be a whole number of at least 1"),
        ({"NODES": "2", "NODE_RANK": "2"}, "NODE_RANK is 2: it must be below NODES, 2"),
        ({"PYTHON": "/none"}, "PYTHON is /none: there is no such program"),
        ({"OUT": "there.idx/run"}, "OUT is there.idx/run: there.idx must be a f"),
        ({"PROFILE": "nsys"}, "PROFILE is nsys: Nsight Systems must be installed on e"),
    ],
)
def test_what_is_wrong_ends_in_one_line_and_status_2(variables, said, tmp_path):
    done, calls = launch.run(SEVEN, tmp_path, STUB_DATA="there", **{"DATA": "there", **variables})
    assert done.returncode == 2 and not calls, done.stderr
    assert done.stderr.startswith(f"error: {said}") and done.stderr.count("\n") == 1
