# SPDX-License-Identifier: Apache-2.0
"""What a launch script asks of its machine and sets for it, and how nodes wait for an import."""

import os
import re
import subprocess
import sys

import pytest
from support import launch

from megatron_cream.parallel_layout import ParallelLayout
from megatron_cream.planning.script import environment

SEVEN = launch.ROOT / "examples" / "llama-2-7b" / "32k.sh"
SEVENTY = launch.ROOT / "examples" / "llama-2-70b" / "128k.sh"


def train(folder, script=SEVEN, **variables):
    """Words of the training command, and what the script said."""
    done, calls = launch.run(script, folder, DATA="d", STEPS="train", **variables)
    assert done.returncode == 0, done.stderr
    return calls[-1][0], done.stderr


@pytest.mark.parametrize("has", ["", "apex", "te", "apex te"])
def test_kernels_that_are_there_decide_flags(has, tmp_path):
    words, said = train(tmp_path, STUB_HAS=f"share {has}")
    assert ("--no-gradient-accumulation-fusion" in words) == ("apex" not in has)
    assert ("Apex's fused_weight_gradient_mlp_cuda" in said) == ("apex" not in has)
    assert ("--te-cross-entropy" in words) == ("te" in has)
    assert ("--cross-entropy-loss-fusion" in words) == ("te" not in has)


def exported(script, folder, **variables):
    """The environment that training gets, by a python that prints it."""
    given = launch.environment(folder, DATA="d", STEPS="train", **variables)
    python = folder / "printing"
    python.write_text('#!/bin/sh\n[ "$1" = -c ] && exec "$REAL" "$@"\nenv\nexit 3\n')
    python.chmod(0o755)
    done = subprocess.run(
        ["bash", str(script)],
        env={**given, "REAL": given["PYTHON"], "PYTHON": str(python)},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 3, done.stderr
    return dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)


@pytest.mark.parametrize(
    ("script", "layout"),
    [(SEVEN, ParallelLayout(data=8)), (SEVENTY, ParallelLayout(4, 4, 1, 2, virtual=5))],
)
def test_a_script_exports_the_environment_of_its_layout(script, layout, tmp_path):
    found = exported(script, tmp_path, STUB_HAS="share")
    assert environment(layout).items() <= found.items()
    assert found["CUDA_DEVICE_MAX_CONNECTIONS"] == ("1" if layout.tensor > 1 else "8")
    own = exported(script, tmp_path, NVTE_FWD_LAYERNORM_SM_MARGIN="8", STUB_HAS="share")
    assert own["NVTE_FWD_LAYERNORM_SM_MARGIN"] == "8", "what is set already is kept"


def test_segments_do_not_expand_where_an_async_save_could_not_share_them(tmp_path):
    assert "PYTORCH_CUDA_ALLOC_CONF" in exported(SEVEN, tmp_path, STUB_HAS="share")
    assert "PYTORCH_CUDA_ALLOC_CONF" not in exported(SEVEN, tmp_path, STUB_HAS="")
    assert "PYTORCH_CUDA_ALLOC_CONF" in exported(SEVEN, tmp_path, STUB_HAS="", ASYNC_SAVE="0")


def test_the_question_whether_processes_may_share_is_answered():
    """Status 0 or 1, and 1 where the system call is refused."""
    text = (launch.ROOT / "examples" / "steps.sh").read_text()
    code = re.search(r"^MAY_SHARE='(.*?)'$", text, re.M | re.S)[1]
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert asked.returncode in (0, 1) and not asked.stderr
    refused = code.replace("call(438", "call(-1")
    assert subprocess.run([sys.executable, "-c", refused]).returncode == 1


def test_one_gpu_and_no_sending():
    assert list(environment(ParallelLayout())) == ["PYTORCH_CUDA_ALLOC_CONF"]


def test_fp8_is_one_variable(tmp_path):
    words, _ = train(tmp_path, FP8="1")
    flags = launch.flags(words)
    assert flags["--fp8-format"] == ("hybrid",) and flags["--fp8-recipe"] == ("tensorwise",)
    assert "--fp8-param-gather" not in flags, "the optimizer would start from rounded weights"
    assert "--fp8-format" not in launch.flags(train(tmp_path, OUT=str(tmp_path / "b"))[0])
    words, _ = train(tmp_path, SEVENTY, FP8="1", OUT=str(tmp_path / "c"))
    assert "--grad-reduce-in-bf16" in words, "or 70B would not fit with FP8's copies"


@pytest.mark.parametrize(
    ("script", "variables", "free", "needed"),
    [
        (SEVEN, {}, 942, 940),  # 10 of 94 GB
        (SEVEN, {"SAVE_INTERVAL": "500"}, 200, 188),
        (SEVENTY, {}, 1932, 1932),  # the newest and the one that is written
        (SEVENTY, {"ITERATIONS": "900"}, 1932, 1932),
        (SEVENTY, {"SAVE_RETAIN_INTERVAL": "0"}, 4830, 4830),
        (SEVENTY, {"SAVE_RETAIN_INTERVAL": "200"}, 4830, 4830),
        (SEVENTY, {"SAVE_RETAIN_INTERVAL": "600"}, 2898, 2898),  # 600 and 800, and 1000 is written
        (SEVENTY, {"SAVE_RETAIN_INTERVAL": "400"}, 2898, 2898),
    ],
)
def test_too_little_space_is_said_before_the_start(script, variables, free, needed, tmp_path):
    variables = {**variables, "DATA": "d", "STEPS": "train"}
    done, calls = launch.run(script, tmp_path, STUB_FREE_GB=str(needed - 1), **variables)
    assert done.returncode == 2 and not calls
    assert f"{needed - 1} GB are free there, it must have {needed} for" in done.stderr
    done, _ = launch.run(script, tmp_path, STUB_FREE_GB=str(free), **variables)
    assert done.returncode == 0, done.stderr


def test_a_run_that_goes_on_needs_space_for_what_is_left(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "latest_checkpointed_iteration.txt").write_text("900")
    train(tmp_path, STUB_FREE_GB="95")


def test_space_can_be_left_unasked(tmp_path):
    train(tmp_path, SEVENTY, STUB_FREE_GB="1", CHECKPOINT_GB="0")


def crashing(folder, *iterations, **variables):
    """A run whose trainer crashes, its newest checkpoint at each of these, and then ends well."""
    (folder / "out").mkdir(exist_ok=True)
    (folder / "crashes").write_text("".join(f"{number}\n" for number in iterations))
    variables = {
        "STUB_CRASHES": str(folder / "crashes"),
        "DATA": "d",
        "STEPS": "train",
        **variables,
    }
    done, calls = launch.run(SEVEN, folder, **variables)
    return done, sum("megatron_cream.pretrain" in words for words, _ in calls)


def test_a_run_that_crashes_goes_on_from_its_newest_checkpoint(tmp_path):
    done, starts = crashing(tmp_path, 100, 300)
    assert done.returncode == 0, done.stderr
    assert starts == 3
    assert "crash 1, exit status 1: going on from iteration 100, 2 more starts" in done.stderr
    assert "crash 2, exit status 1: going on from iteration 300, 1 more starts" in done.stderr


@pytest.mark.parametrize(
    ("crashes", "retries", "starts", "said"),
    [
        ((0, 0), "3", 2, "crashed twice since the checkpoint of iteration 0"),
        ((100, 200, 200), "9", 3, "crashed twice since the checkpoint of iteration 200"),
        ((100, 200, 300), "2", 3, "crash 3, exit status 1: no start is left (RETRIES=2)"),
        ((100,), "0", 1, "crash 1, exit status 1: no start is left (RETRIES=0)"),
    ],
)
def test_starts_after_crashes_are_bounded(crashes, retries, starts, said, tmp_path):
    done, started = crashing(tmp_path, *crashes, RETRIES=retries)
    assert done.returncode == 1 and started == starts, done.stderr
    assert said in done.stderr


def test_what_the_user_has_to_mend_is_no_crash(tmp_path):
    done, starts = crashing(tmp_path, 0, STUB_USER_ERROR="1")
    assert done.returncode == 2 and starts == 1, done.stderr


def test_a_preflight_comes_before_each_start(tmp_path):
    done, starts = crashing(tmp_path, 100, PREFLIGHT="1")
    assert done.returncode == 0 and starts == 2
    started = [
        words[words.index("-m", 2) + 1] for words, _ in launch.calls(tmp_path) if "-m" in words
    ]
    assert started == ["megatron_cream", "megatron_cream.pretrain"] * 2


def test_half_of_the_samples_are_retrieval_documents(tmp_path):
    """Made by the step import, on the CPU; one variable leaves them out."""
    (tmp_path / "retrieval.idx").touch()
    flags = launch.flags(train(tmp_path)[0])
    retrieval = str(tmp_path / "retrieval")
    assert flags["--data-path"] == ("0.5", "d", "0.5", retrieval)
    shares = {"RETRIEVAL_SHARE": "0.2", "OUT": str(tmp_path / "b")}
    done, calls = launch.run(SEVEN, tmp_path, DATA="3 a 1 b", STEPS="train", **shares)
    assert launch.flags(calls[-1][0])["--data-path"] == ("0.6", "a", "0.2", "b", "0.2", retrieval)
    words, _ = train(tmp_path, RETRIEVAL_SHARE="0", OUT=str(tmp_path / "c"))
    assert launch.flags(words)["--data-path"] == ("d",)
    for wrong in ("1", "half", "-0.5"):
        done, _ = launch.run(SEVEN, tmp_path, DATA="d", RETRIEVAL_SHARE=wrong)
        assert done.returncode == 2 and f"RETRIEVAL_SHARE is {wrong}: it must" in done.stderr


def test_retrieval_documents_are_made_once_before_training(tmp_path):
    variables = {"DATA": "d", "RETRIEVAL": str(tmp_path / "made"), "HAYSTACK": "books notes"}
    done, calls = launch.run(SEVEN, tmp_path, STEPS="train", **variables)
    assert done.returncode == 2 and "the step import makes it, RETRIEVAL_SHARE=0" in done.stderr
    done, calls = launch.run(SEVEN, tmp_path, STEPS="import", **variables)
    assert done.returncode == 0, done.stderr
    made = launch.flags(calls[-1][0])
    assert calls[-1][0][0].endswith("make_retrieval_data.py")
    assert made["--documents"] == ("17601",) and made["--length"] == ("4096",)
    assert made["--tokenizer-model"] == ("meta-llama/Llama-2-7b-hf",)
    assert made["--haystack"] == ("books", "notes") and "--answers-only" in made
    before = len(calls)
    assert len(launch.run(SEVEN, tmp_path, STEPS="import", **variables)[1]) == before


def test_retrieval_documents_begin_as_the_text_does(tmp_path):
    """With bos or without; by the tokenizer that the import has kept."""
    kept = tmp_path / "base" / "release" / "hf"
    kept.mkdir(parents=True)
    for name, bos in (("with", "true"), ("without", "false")):
        (tmp_path / f"{name}.json").write_text(f'{{\n  "prepended_bos": {bos}\n}}\n')
        where = {"DATA": str(tmp_path / name), "RETRIEVAL": str(tmp_path / f"of-{name}")}
        done, calls = launch.run(SEVEN, tmp_path, STEPS="import", **where)
        assert done.returncode == 0, done.stderr
        made = launch.flags(calls[-1][0])
        assert ("--prepend-bos" in made) == (name == "with")
        assert made["--tokenizer-model"] == (str(kept),)


def test_a_run_goes_on_with_the_data_that_it_began_with(tmp_path):
    tracker = tmp_path / "out" / "latest_checkpointed_iteration.txt"
    train(tmp_path, RETRIEVAL_SHARE="0.3")
    tracker.write_text("400")
    assert "0.3" in launch.flags(train(tmp_path)[0])["--data-path"]
    tracker.write_text("400")
    (tmp_path / "out" / "retrieval-share").unlink()  # it began when there were none
    assert launch.flags(train(tmp_path)[0])["--data-path"] == ("d",)


@pytest.mark.parametrize(
    ("flag", "variable"),
    [("--save", "OUT"), ("--train-iters=9", "ITERATIONS"), ("--data-path", "DATA")],
)
def test_what_the_script_reads_itself_is_said_by_a_variable(flag, variable, tmp_path):
    done, calls = launch.run(SEVEN, tmp_path, flag, "x", DATA="d")
    assert done.returncode == 2 and not calls
    assert f"{flag.partition('=')[0]} is given: it must be set by {variable}" in done.stderr


def test_profiles_of_chosen_ranks_and_steps(tmp_path):
    flags = launch.flags(train(tmp_path, PROFILE="torch", PROFILE_RANKS="0 9")[0])
    assert flags["--profile-ranks"] == ("0", "9") and "--use-pytorch-profiler" in flags
    assert (flags["--profile-step-start"], flags["--profile-step-end"]) == (("10",), ("12",))
    (tmp_path / "nsys").write_text(
        '#!/bin/sh\necho "$@" >"$STUB_LOG.nsys"\n'
        'until [ "$1" = "$PYTHON" ]; do shift; done\nexec "$@"\n'
    )
    (tmp_path / "nsys").chmod(0o755)
    words, _ = train(tmp_path, PROFILE="nsys", PROFILE_STEPS="20 21", OUT=str(tmp_path / "b"))
    assert launch.flags(words)["--profile-step-start"] == ("20",)
    assert "--use-pytorch-profiler" not in words
    assert f"--output {tmp_path}/b/nsys/node-0" in (tmp_path / "calls.nsys").read_text()
    done, _ = launch.run(SEVEN, tmp_path, DATA="d", PROFILE="perf")
    assert done.returncode == 2 and "PROFILE is perf: it must be torch or nsys" in done.stderr


def test_ranks_wait_longer_for_a_larger_checkpoint(tmp_path):
    flags = launch.flags(train(tmp_path, SEVENTY)[0])
    assert flags["--distributed-timeout-minutes"] == ("18",)
    flags = launch.flags(train(tmp_path, TIMEOUT_MINUTES="60", OUT=str(tmp_path / "b"))[0])
    assert flags["--distributed-timeout-minutes"] == ("60",)


def retained(folder, **variables):
    words, said = train(folder, SEVENTY, STUB_REACHES="1000", **variables)
    return launch.flags(words).get("--save-retain-interval"), said


def test_checkpoints_are_removed_where_a_run_began_so(tmp_path):
    """What a run has kept is not removed by a default; each start says what will be removed."""
    tracker = tmp_path / "out" / "latest_checkpointed_iteration.txt"
    interval, said = retained(tmp_path)
    assert interval == ("1000",)
    assert "is removed when the next one is whole, but for those of every 1000 iterations" in said
    tracker.write_text("400")
    assert retained(tmp_path)[0] == ("1000",), "it began so"
    tracker.write_text("400")
    assert retained(tmp_path, SAVE_RETAIN_INTERVAL="0")[0] is None
    tracker.write_text("400")
    interval, said = retained(tmp_path)
    assert interval is None, "it has kept its checkpoints"
    assert "all checkpoints are kept" in said
    tracker.write_text("400")
    assert retained(tmp_path, SAVE_RETAIN_INTERVAL="400")[0] == ("400",), "the user says so"


def test_scripts_do_not_share_a_run():
    """Scripts of one model and length would go on in each other's checkpoints."""
    texts = [script.read_text() for script in launch.SCRIPTS]
    runs = [tuple(re.findall(r"^(?:NAME|TARGET_LENGTH)=(.*)$", text, re.M)) for text in texts]
    assert len(set(runs)) == len(runs)


def test_retention_is_a_multiple_of_the_interval(tmp_path):
    flags = launch.flags(train(tmp_path, SEVENTY, SAVE_INTERVAL="150")[0])
    assert flags["--save-retain-interval"] == ("1050",)


def test_a_node_stops_waiting_for_an_import_that_failed(tmp_path):
    """Node 0 beats while it imports; nobody does after it failed."""
    variables = {"DATA": "d", "NODES": "4", "STEPS": "import", "BEAT_SECONDS": "0.1"}
    waiting = {**variables, "NODE_RANK": "1", "IMPORT_PATIENCE": "1"}
    environments = [
        launch.environment(tmp_path, STUB_IMPORT_SECONDS="0.2", STUB_IMPORT_FAILS="5", **variables),
        launch.environment(tmp_path, **waiting),
    ]
    nodes = [
        subprocess.Popen(["bash", str(SEVENTY)], env=env, stderr=subprocess.PIPE, text=True)
        for env in environments
    ]
    said = [node.communicate(timeout=60)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [5, 2]
    assert "node 0 makes nothing of it since 1 seconds" in said[1]


def test_a_node_waits_as_long_as_an_import_is_under_way(tmp_path):
    variables = {"DATA": "d", "NODES": "4", "STEPS": "import", "BEAT_SECONDS": "0.1"}
    first = launch.environment(tmp_path, STUB_IMPORT_SECONDS="3", **variables)
    node = subprocess.Popen(["bash", str(SEVENTY)], env=first, stderr=subprocess.DEVNULL)
    done, _ = launch.run(SEVENTY, tmp_path, NODE_RANK="1", IMPORT_PATIENCE="2", **variables)
    assert done.returncode == 0, done.stderr
    assert node.wait(30) == 0
    assert os.path.isdir(tmp_path / "base")
