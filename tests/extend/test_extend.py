# SPDX-License-Identifier: Apache-2.0
"""megatron-cream extend: recipe, commands, what is done already, errors, report."""

import json
import os
import re
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from megatron_cream.cli import main, make_parser
from megatron_cream.errors import UserError
from megatron_cream.evaluation.evaluate import settings_of
from megatron_cream.evaluation.perplexity import read_first_tokens
from megatron_cream.extend import extend as module
from megatron_cream.extend.commands import Commands
from megatron_cream.extend.extend import extend
from megatron_cream.extend.html_report import write_report
from megatron_cream.extend.recipe import ExtendSettings, make_recipe
from megatron_cream.extend.steps import RecipeStep, run_step
from megatron_cream.planning.models import MODELS


def settings(**changes):
    given = {"hf": "m", "text": ("t",), "target_length": 32768, "output": "o", "gpus": 1}
    return ExtendSettings(**(given | {"gpu": "h100", "dry_run": True} | changes))


def test_the_recipe_is_that_of_the_study_for_a_small_model():
    recipe = make_recipe(settings(), MODELS["smollm2-135m"])
    assert (recipe.window, recipe.target, recipe.strategy) == (8192, 32768, "scatter")
    assert recipe.steps * recipe.global_batch * recipe.window == 130 * 131072
    assert (recipe.micro_batch, recipe.learning_rate) == (8, 4e-4)
    assert recipe.lengths == [4096, 8192, 16384, 32768]


def test_a_large_model_takes_the_paper_s_recipe_and_a_layout_that_fits():
    recipe = make_recipe(settings(gpus=8, target_length=65536), MODELS["llama-2-7b"])
    assert (recipe.window, recipe.steps, recipe.learning_rate) == (4096, 1000, 2e-5)
    assert recipe.strategy == "cream"
    assert recipe.global_batch == 32 and recipe.layout.gpus == 8
    assert recipe.global_batch % (recipe.micro_batch * recipe.layout.data) == 0


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"target_length": 8192}, "has a window of 8192 tokens, the target must be above"),
        ({"window": 16384}, "--window is 16384"),
        ({"gpus": 99, "dry_run": False}, "--gpus is 99: this machine has"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        make_recipe(settings(**changes), MODELS["smollm2-135m"])


def begin(given):
    """Make the work folder; returns that of its logs."""
    with module._begun(given, lambda: None):
        logs = given.work_folder / "logs"
        logs.mkdir()
    return logs


def commands_of(given, model=None):
    return Commands(given, make_recipe(given, model or module.find_model(given.hf)), Path(given.hf))


@pytest.fixture
def command(small_hf, tmp_path):
    """The settings for a small model on the CPU, and texts to extend it on."""
    text = tmp_path / "text"
    text.mkdir()
    for i in range(40):
        (text / f"{i:02}.txt").write_text(f"document {i}: " + "all the words of a text " * 200)
    return {
        **{"hf": str(small_hf), "text": (str(text),), "output": str(tmp_path / "out")},
        **{"cpu": True, "steps": 4, "global_batch_size": 4, "retrieval_share": 0.0},
        **{"gpus": None, "gpu": None, "dry_run": False, "workers": 1, "tasks": ("passkey",)},
    }


@pytest.fixture
def window(small_hf):
    return json.loads((Path(small_hf) / "config.json").read_text())["max_position_embeddings"]


def test_every_printed_command_is_one_that_its_own_parser_takes(command, window, capsys):
    target = 4 * window
    extend(settings(**command | {"dry_run": True, "target_length": target, "retrieval_share": 0.3}))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("python")]
    import shlex

    words = [shlex.split(line)[1:] for line in lines]
    tools = [line[2:] for line in words if line[:2] == ["-m", "megatron_cream"]]
    names = ["preprocess", "import", "retrieval-data", "evaluate", "export", "evaluate"]
    assert [line[0] for line in tools] == names
    parsed = [make_parser(name).parse_args(rest) for name, *rest in tools]
    assert settings_of(parsed[3]).tasks == ["perplexity", "passkey"]
    training = next(line for line in words if "megatron_cream.pretrain" in line)
    flags = training[training.index("megatron_cream.pretrain") + 1 :]
    assert flags[flags.index("--target-length") + 1] == str(target)


def test_what_is_done_is_not_done_again_and_other_settings_are_refused(
    command, window, monkeypatch, capsys
):
    ran, given = [], settings(**command | {"target_length": 4 * window})

    def run(step, logs, place, held):
        ran.append(step.name)
        if step.name.startswith("tokenize"):
            return run_step(step, logs)
        if step.name == "train":
            raise UserError("train: the machine went away")
        return True

    monkeypatch.setattr(module, "run_step", run)
    with pytest.raises(UserError, match="went away"):
        extend(given)
    assert ran == ["tokenize-text", "import", "score-before", "train"]
    ran.clear()
    with pytest.raises(UserError, match="went away"):
        extend(given)
    assert "text.idx is there" in capsys.readouterr().err
    with pytest.raises(UserError, match="--steps is 9: .* was begun with 4"):
        extend(settings(**command | {"target_length": 4 * window, "steps": 9}))


def test_a_folder_of_the_users_is_not_written_to(command, window, tmp_path):
    for name in ("out", "out.work"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "thesis.txt").write_text("mine")
        with pytest.raises(UserError, match=name):
            extend(settings(**command | {"target_length": 4 * window}))
        assert [path.name for path in folder.iterdir()] == ["thesis.txt"]
        (folder / "thesis.txt").unlink()


def test_documents_kept_from_training_are_those_that_are_scored(command, window, tmp_path):
    given = settings(**command | {"target_length": 4 * window, "lengths": (2 * window,)})
    plan, logs = commands_of(given), begin(given)
    run_step(plan.text_steps()[0], logs)
    plan.hold_out()
    train = list(plan._train().command)
    count, trained = plan.counted
    assert train[train.index("--split") + 1] == f"{trained},{count - trained},0"
    assert (count, trained) == (40, 36)
    score = list(plan._score("after", tmp_path, tmp_path).command)
    assert score[score.index("--skip-documents") + 1] == "36"
    documents = int(score[score.index("--documents") + 1])
    tokens = int(score[score.index("--document-tokens") + 1])
    assert (documents, tokens) == (4, 2 * window + 1)
    # The last documents of all, and no other ones.
    last = read_first_tokens(str(given.work_folder / "text"), documents, tokens, skip=36)
    every = read_first_tokens(str(given.work_folder / "text"), 40, tokens)
    assert [list(d) for d in last] == [list(d) for d in every[36:]]
    with pytest.raises(UserError, match="4 of its documents have"):
        read_first_tokens(str(given.work_folder / "text"), 5, tokens, skip=36)


def test_a_single_task_is_scored_where_the_report_reads_it(command, window):
    given = settings(**command | {"target_length": 4 * window, "tasks": ("perplexity",)})
    plan = commands_of(given)
    step = plan.model_steps()[1]
    output = step.command[step.command.index("--output") + 1]
    assert plan.tasks == ("perplexity",)
    assert step.makes == Path(output) / "result.json" == plan.scores[0] / "perplexity/result.json"


def test_held_out_text_that_is_too_short_is_a_note_or_an_error(command, window, tmp_path, capsys):
    short = tmp_path / "short.txt"
    short.write_text("some words")
    changes = {"target_length": 4 * window, "held_out": (str(short),)}
    for tasks in (("passkey",), ("perplexity",)):
        given = settings(**command | changes | {"tasks": tasks, "output": str(tmp_path / tasks[0])})
        plan, logs = commands_of(given), begin(given)
        for step in plan.text_steps():
            run_step(step, logs)
        if tasks == ("passkey",):
            plan.hold_out()
            assert plan.tasks == tasks and "perplexity is not measured" in capsys.readouterr().err
        else:
            with pytest.raises(UserError, match="no held-out document has .* --lengths"):
                plan.hold_out()


def test_a_spread_model_is_scored_spread_from_its_checkpoints():
    plan = commands_of(settings(gpus=8, target_length=262144), MODELS["qwen2.5-32b"])
    layout = plan.recipe.layout
    assert layout.tensor * layout.pipeline > 1
    _, _, before, _, _, after = plan.model_steps()
    for step, folder in ((before, "base"), (after, "run")):
        words = list(step.command)
        assert words[words.index("--checkpoint") + 1] == str(plan.work / folder)
        assert words[words.index("--nproc-per-node") + 1] == str(layout.tensor * layout.pipeline)
        parsed = make_parser("evaluate").parse_args(words[words.index("evaluate") + 1 :])
        assert parsed.tensor_model_parallel_size == layout.tensor
        assert parsed.pipeline_model_parallel_size == layout.pipeline


def test_flags_for_the_trainer_are_its_last(command, window):
    given = settings(**command | {"target_length": 4 * window, "train_args": "--plain-share 0.25"})
    assert list(commands_of(given)._train().command)[-2:] == ["--plain-share", "0.25"]


def test_another_extension_s_import_data_and_scores_are_taken_over(command, window, tmp_path):
    first = settings(**command | {"target_length": 4 * window})
    begin(first)
    for name in ("text.bin", "text.idx", "retrieval.bin"):
        (first.work_folder / name).write_text(name)
    for name in ("base", "before/passkey", "before/perplexity"):
        (first.work_folder / name).mkdir(parents=True)
    for task in ("perplexity", "passkey"):
        (first.work_folder / f"before/{task}/result.json").write_text("{}")
    reuse = {"reuse": str(first.work_folder), "output": str(tmp_path / "pose")}
    second = settings(
        **command | reuse | {"target_length": 4 * window, "position_strategy": "pose", "lr": 1e-3}
    )
    begin(second)
    assert not (second.work_folder / "before").exists()  # it would be written on there
    (first.work_folder / "before/table.md").write_text("all")
    module._link_from(first.work_folder, second)
    found = {path.name for path in second.work_folder.iterdir() if path.is_symlink()}
    assert found == {"base", "before", "text.bin", "text.idx"}  # and no half of a dataset
    assert (second.work_folder / "text.idx").read_text() == "text.idx"
    module._link_from(first.work_folder, second)  # again, when it goes on
    other = settings(**command | reuse | {"target_length": 2 * window})
    with pytest.raises(UserError, match="--target-length is .* was begun with .*--reuse"):
        module._link_from(first.work_folder, other)
    with pytest.raises(UserError, match="must be the working folder of an extension"):
        module._link_from(tmp_path, second)


def test_a_failed_step_says_its_error_once_and_names_its_log(tmp_path, capfd):
    code = "import sys; print('out'); print('error: --x is 1: it must be 2', file=sys.stderr)"
    step = RecipeStep("score", tmp_path / "made", [sys.executable, "-c", f"{code}; sys.exit(2)"])
    with pytest.raises(UserError) as caught:
        run_step(step, tmp_path)
    log = tmp_path / "score.log"
    assert str(caught.value) == f"score: --x is 1: it must be 2 (log: {log})"
    assert "out" in log.read_text() and "error: --x is 1" in log.read_text()


def test_training_shows_its_start_block_and_its_losses_and_keeps_the_rest_in_the_log(
    tmp_path, capfd
):
    line = " iteration {0}/ 2 | elapsed time per iteration (ms): 9 | lm loss: 3.{0}E+00 |"
    shown = ["noise", "megatron_cream", "  positions  cream", "more noise"]
    lines = [*shown, line.format(1), line.format(2)]
    (tmp_path / "output").write_text("\n".join(lines))
    shell = f"cat {tmp_path}/output; echo 2 > {tmp_path}/newest"
    step = RecipeStep("train", tmp_path / "newest", ["sh", "-c", shell], trains=2)
    assert run_step(step, tmp_path) is True
    seen = capfd.readouterr().err
    assert "positions  cream" in seen and "loss=3.200" in seen and "2/2" in seen
    assert "noise" not in seen
    assert (tmp_path / "train.log").read_text().count("noise") == 2
    assert run_step(step, tmp_path) is False  # it is done


def result(task, values):
    rows = []
    for length, value in values.items():
        row = {"length": length, "cases": 15, "documents": 2, "targets": 9}
        if task == "perplexity":
            row |= {"perplexity": value, "nll": 1.0, "low": value, "high": value}
            row |= {"document_nll": [1.0, 1.1]}
        rows.append(row | {"hit": value} if task != "perplexity" else row)
    return {"task": task, "lengths": rows}


def test_the_report_has_every_figure_and_can_be_written_again(tmp_path, monkeypatch):
    scores = {
        ("before", "perplexity"): result("perplexity", {64: 20.5, 128: 900.0}),
        ("after", "perplexity"): result("perplexity", {64: 20.0, 128: 19.25}),
        ("before", "passkey"): result("passkey", {64: 1.0, 128: 0.0}),
        ("after", "passkey"): result("passkey", {64: 1.0, 128: 0.8}),
    }
    report = sys.modules["megatron_cream.extend.html_report"]
    monkeypatch.setattr(
        report, "read_result", lambda folder: scores[folder.parent.name, folder.name]
    )
    monkeypatch.setattr(report, "has_matplotlib", lambda: False)
    (tmp_path / "README.md").write_text("# a model card\n")
    given = settings(output=str(tmp_path), hf="<m>")
    recipe = make_recipe(given, MODELS["smollm2-135m"])
    plan = Commands(given, recipe, Path("model"))
    plan.tasks = ("perplexity", "passkey")
    for _ in range(2):
        path, table = write_report(given, recipe, plan)
    page, card = path.read_text(), (tmp_path / "README.md").read_text()
    assert "<h1>model: 8K to 32K tokens</h1>" in page
    for text in (page, card, table):
        assert text.count("900 → 19.25") == 1 == len(re.findall("[ >]0 → 80[ <]", text))
    assert "&lt;m&gt;" in page and "<m>" not in page
    assert card.startswith(
        "# a model card\n\n## Before and after\n\n8192 to 32768 tokens by scatter"
    )


def test_the_command_ends_in_one_line_where_text_is_missing(tmp_path, capsys):
    words = ["--hf", str(tmp_path), "--text", "nowhere", "--target-length", "32K"]
    with pytest.raises(SystemExit, match="2"):
        main(["extend", *words, "--output", str(tmp_path / "out")])
    assert capsys.readouterr().err == (
        "error: --text nowhere: not found, needs an existing file or folder\n"
    )


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"text": ("short.txt",)}, "short.txt: the largest file has 5 bytes, .* --window"),
        ({"text": ("-",)}, "--text -: standard input"),
        ({"held_out": ("nowhere",)}, "--held-out nowhere: not found"),
        ({"retrieval_share": 0.5}, "--window is .* have at least 256"),
        ({"lengths": (0,)}, "--lengths has 0"),
        ({"train_args": "'a"}, "--train-args is 'a: No closing quotation"),
        ({"global_batch_size": 5, "gpus": 2}, "--global-batch-size is 5: .* a multiple of 2"),
    ],
)
def test_what_cannot_work_is_told_before_any_work(
    command, window, changes, message, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("short.txt").write_text("short")
    given = settings(**command | {"target_length": 4 * window, "window": 64} | changes)
    with pytest.raises((UserError, FileNotFoundError), match=message):
        extend(given)
    assert not given.work_folder.exists()


def test_a_disk_without_room_is_told_before_any_work(command, window, monkeypatch):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: Namespace(free=1000))
    given = settings(**command | {"target_length": 4 * window, "steps": 1000})
    with pytest.raises(UserError, match="--output is .* has 0.0 GB free, .* GB are needed"):
        extend(given)
    assert not given.work_folder.exists()


def test_a_second_process_in_the_same_folder_is_refused(command, window):
    given = settings(**command | {"target_length": 4 * window})
    with module._begun(given, lambda: None) as held:
        assert os.get_inheritable(held) is False  # but for the steps
        with pytest.raises(BlockingIOError, match="another process is writing it"):
            extend(given)


def test_an_empty_output_folder_is_not_taken_for_a_model(command, window, tmp_path):
    (tmp_path / "out").mkdir()
    plan = commands_of(settings(**command | {"target_length": 4 * window}))
    export = next(step for step in plan.model_steps() if step.name == "export")
    assert not export.makes.exists() and export.makes.parent == tmp_path / "out"


def test_a_trainer_that_stops_early_or_fails_is_an_error_that_says_why(tmp_path, capfd):
    tried = {
        "echo 1 > newest": "train: it ended and has not made .*newest",
        "echo '[rank0]: torch.OutOfMemoryError: full'; echo noise; exit 1": "train: torch.OutOf",
    }
    for shell, message in tried.items():
        command = ["sh", "-c", f"cd {tmp_path}; {shell}"]
        with pytest.raises(UserError, match=message):
            run_step(RecipeStep("train", tmp_path / "newest", command, trains=2), tmp_path)
