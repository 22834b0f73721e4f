# SPDX-License-Identifier: Apache-2.0
"""Validation while training measures what evaluation of the checkpoint does, at any layout."""

import json
from argparse import Namespace

import numpy as np
import pytest
import torch
from support import ranks, recorder
from support.arguments import arguments
from support.evaluation import VOCABULARY, write_small_hf
from support.runs import ITERATIONS

from megatron_cream.checkpoint.doctor import validate_iteration
from megatron_cream.errors import UserError
from megatron_cream.evaluation.evaluate import evaluate, open_model
from megatron_cream.evaluation.forward import PassScores
from megatron_cream.evaluation.perplexity import open_documents, score_perplexity
from megatron_cream.evaluation.while_training import Validation, _ask_document
from megatron_cream.extras.long_validation import _validate_best

pytestmark = pytest.mark.usefixtures("cpu_megatron")

LENGTHS = (96, 400)
ASKED = ("--validate-lengths", "96", "--validate-data", "held-out")


def train(folder, words):
    """Train on two ranks; returns the figures of each validation, and the log of the last rank."""
    board = ["--tensorboard-dir", str(folder / "board")]
    ranks.call(folder, recorder.train, 2, [*words, *board], str(folder / "scalars"))
    found = {}
    for line in (folder / "scalars").read_text().splitlines():
        _, name, value, iteration = json.loads(line)
        if name.startswith("validation/"):
            found.setdefault(iteration, {})[name.removeprefix("validation/")] = value
    return found, (folder / "rank1.log").read_text()


def asked(dataset, *more):
    return [
        *("--validate-lengths", *map(str, LENGTHS), "--validate-data", dataset),
        *("--validate-interval", "2", "--validate-documents", "3", *more),
    ]


def perplexities(checkpoint, dataset):
    settings = arguments(
        checkpoint=str(checkpoint), data=dataset, lengths=LENGTHS, documents=3, truncate=True
    )
    model = open_model(settings)
    documents = open_documents(settings, model)
    rows = score_perplexity(settings, model, documents)["lengths"]
    return {f"perplexity-{row['length']}": row["perplexity"] for row in rows}


LAYOUTS = {
    "tensor": ["--tensor-model-parallel-size", "2"],
    "virtual stages": [
        *("--pipeline-model-parallel-size", "2"),
        *("--num-layers-per-virtual-pipeline-stage", "1"),
    ],
    "data": [],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_measures_what_evaluation_does(tmp_path, dataset, flags, initial, layout):
    save = tmp_path / "out"
    words = [*flags, *LAYOUTS[layout], "--pretrained-checkpoint", initial, "--save", str(save)]
    words += ["--save-interval", str(ITERATIONS)]
    words += asked(dataset, "--validate-cases", "0", "--keep-best", "perplexity-400")
    found, log = train(tmp_path, words)
    assert sorted(found) == [2, 4, 6]
    assert found[ITERATIONS] == pytest.approx(perplexities(save, dataset), rel=1e-4)
    shown = f"{found[4]['perplexity-96']:.6g} | perplexity-400: {found[4]['perplexity-400']:.6g}"
    assert f" validation after iteration 4 | perplexity-96: {shown} | " in log
    # The best one is a checkpoint of its own, and the only one there.
    best = json.loads((save / "best" / "best.json").read_text())
    assert best["value"] == min(values["perplexity-400"] for values in found.values())
    assert best["figures"] == found[best["iteration"]]
    assert perplexities(save / "best", dataset) == pytest.approx(best["figures"], rel=1e-4)
    kept = [path.name for path in (save / "best").glob("iter_*")]
    assert kept == [f"iter_{best['iteration']:07d}"]


def test_training_goes_on_as_without_it(tmp_path, dataset, flags, initial):
    """No loss differs in a bit: weights, dropout's state and the angles of training stay."""
    words = [*flags, "--pretrained-checkpoint", initial, "--attention-dropout", "0.1"]
    plain = ranks.train(tmp_path / "plain", words)
    validated = ranks.train(tmp_path / "ours", [*words, *asked(dataset, "--validate-cases", "0")])
    assert validated.losses == plain.losses


def test_cases_are_those_of_evaluation(tmp_path, dataset, flags):
    tokenizer = write_small_hf(tmp_path / "hf")
    at = flags.index("NullTokenizer")
    words = [*flags[: at - 1], *flags[at + 3 :], "--tokenizer-type", "HuggingFaceTokenizer"]
    words += ["--tokenizer-model", tokenizer, "--padded-vocab-size", str(VOCABULARY)]
    words += ["--tensor-model-parallel-size", "2", "--save", str(tmp_path / "out")]
    words += ["--save-interval", str(ITERATIONS)]
    words += asked(dataset, "--validate-task", "passkey", "--validate-cases", "3")
    words[words.index("96", words.index("--validate-lengths"))] = "640"
    found, _ = train(tmp_path, words)
    settings = arguments(
        tasks=["passkey"], checkpoint=str(tmp_path / "out"), lengths=[640], cases=3, seeds=1
    )
    (result,) = evaluate(settings, open_model(settings))
    (row,) = result["lengths"]
    wanted = row["logprob_per_token"]
    assert found[ITERATIONS]["passkey-log-likelihood-640"] == pytest.approx(wanted, rel=1e-4)
    assert found[ITERATIONS]["passkey-640"] == row["hit"]


def test_the_best_one_survives_a_stop_at_any_place(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    for name in ("barrier", "broadcast_object_list"):
        monkeypatch.setattr(torch.distributed, name, lambda *_: None)
    args = Namespace(keep_best="perplexity-96", save=str(tmp_path))
    best = tmp_path / "best"
    assert Validation(args)._is_best({"perplexity-96": 5.0})
    (best / "iter_0000004").mkdir()  # and stopped before it was whole
    _validate_best(args)
    again = Validation(args)
    assert again._is_best({"perplexity-96": 9.0})
    again._note_best({"perplexity-96": 9.0}, 8)
    (best / "iter_0000008").mkdir()
    assert not again._is_best({"perplexity-96": 9.5})
    assert again._is_best({"perplexity-96": 8.0})
    again._note_best({"perplexity-96": 8.0}, 12)
    assert not (best / "iter_0000008").exists() and (best / "iter_0000004").is_dir()
    (best / "best.json").unlink()
    with pytest.raises(UserError, match="has files of something else"):
        _validate_best(args)


def test_a_run_that_is_told_to_stop_does_not_validate_first(monkeypatch):
    handler = Namespace(signals_received=lambda: [False, True])
    monkeypatch.setattr("megatron.training.get_signal_handler", lambda: handler)
    args = Namespace(validate_interval=4, train_iters=8, exit_signal_handler=True)
    monkeypatch.setattr(Validation, "_measure", lambda *_: pytest.fail("validated"))
    Validation(args).after_iteration([], None, None, 4, 0.0, {}, None)


def train_out_of_memory(flags, at, file):
    """Train, with no memory left for the validation after iteration ``at``."""
    own = Validation.after_iteration

    def after_iteration(self, model, optimizer, scheduler, iteration, *rest):
        if iteration == at:
            self._measure = lambda _: (_ for _ in ()).throw(torch.OutOfMemoryError("no memory"))
        own(self, model, optimizer, scheduler, iteration, *rest)

    Validation.after_iteration = after_iteration
    with pytest.raises(torch.OutOfMemoryError):
        recorder.train(flags, file)


@pytest.mark.parametrize("at", [4, 6])  # where a checkpoint is due, and after the last iteration
def test_a_checkpoint_is_whole_before_a_validation_that_fails(tmp_path, dataset, flags, at):
    save = tmp_path / "out"
    words = [*flags, "--save", str(save), "--save-interval", "4"]
    words += asked(dataset, "--validate-cases", "0")
    ranks.call(tmp_path, train_out_of_memory, 1, words, at, str(tmp_path / "scalars"))
    assert (save / "latest_checkpointed_iteration.txt").read_text() == str(at)
    validate_iteration(save / f"iter_{at:07d}", str(save))


def test_the_last_iteration_is_saved_once(tmp_path, dataset, flags):
    save = tmp_path / "out"
    words = [*flags, "--save", str(save), "--save-interval", "4"]
    words += asked(dataset, "--validate-cases", "0", "--keep-best", "perplexity-400")
    ranks.call(tmp_path, recorder.train, 1, words, str(tmp_path / "scalars"))
    log = (tmp_path / "rank0.log").read_text()
    assert log.count(f"saving checkpoint at iteration       6 to {save} ") == 1
    assert "Overwriting old" not in log
    validate_iteration(save / "iter_0000006", str(save))


def test_key_tokens_are_summed_apart():
    tokens, key = np.arange(10), np.zeros(10, dtype=bool)
    key[[4, 7]] = True
    question = _ask_document(tokens, key)
    scores = PassScores(-torch.arange(1, 10.0)[None].double(), None)
    assert question.read(scores) == [45, 9, 4 + 7, 2]


WITHOUT_CASES = ("--validate-cases", "0")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--keep-best", "perplexity-32K"], "--keep-best is perplexity-32K: it needs --validate-l"),
        (["--validate-lengths", "96"], "--validate-data is missing"),
        ([*ASKED, "--keep-best", "loss"], "--keep-best is loss: it must be one of perplexity-96,"),
        ([*ASKED, "--validate-interval", "0"], "--validate-interval is 0: it must be at least 1"),
        ([*ASKED, "--keep-best", "perplexity-96"], "--keep-best is perplexity-96: it needs --save"),
        ([*ASKED, *WITHOUT_CASES], "held-out"),
        ([*ASKED, "--validate-data", "DATA"], "--validate-cases is 4 with --tokenizer-type NullTo"),
        (
            [*ASKED, "--validate-data", "DATA", "--validate-task", "x"],
            "--validate-task is x: it must be one of passkey,",
        ),
        (
            [*ASKED, *WITHOUT_CASES, "--validate-data", "DATA", "--validate-lengths", "9000"],
            "of its documents have 9000 tokens",
        ),
        (
            [*ASKED, *WITHOUT_CASES, "--validate-data", "DATA", "--vocab-size", "50"],
            "token",
        ),
    ],
)
def test_wrong_flags(refused, dataset, more, message):
    assert message in refused(*(dataset if word == "DATA" else word for word in more))
