# SPDX-License-Identifier: Apache-2.0
"""Validates a model at long lengths while it trains; ``extras.long_validation`` has the flags.

At each length, the first tokens of held-out documents in one window (perplexity, LongPPL where key
tokens are given), and a few cases of a retrieval task, all at plain positions. Figures go to the
log, TensorBoard and Weights & Biases.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_cream.corpus.tokenizers import load_tokenizer
from megatron_cream.errors import UserError
from megatron_cream.evaluation.evaluation_tasks import TASKS
from megatron_cream.evaluation.forward import ForwardPass, PassScores
from megatron_cream.evaluation.longppl import SHORT, KeyTokens, read_key_tokens
from megatron_cream.evaluation.megatron_model import ContextShard, output_input, score_kept
from megatron_cream.evaluation.perplexity import hash_documents, read_first_tokens
from megatron_cream.evaluation.prompts import HaystackBuilder, Prompt
from megatron_cream.evaluation.results import perplexity_of, short
from megatron_cream.evaluation.scoring import make_batches, make_pass, read_scores
from megatron_cream.evaluation.store import write_whole
from megatron_cream.mcore import trainer
from megatron_cream.mcore.argument_table import vocabulary
from megatron_cream.mcore.build_model import PipelineStage

BEST, BEST_FILE = "best", "best.json"
"""Folder in --save of the best checkpoint, and the file in it that says which and why."""


@dataclass(frozen=True)
class Question:
    """One pass, and what its answer adds to the figures of its length.

    Attributes:
        one: the pass, ``[1, n]``.
        of_document: whether it is of a document; else of a case.
        read: returns four sums: of a document nats and targets, nats and number of key tokens; of
            a case exact answers, cases, nats and tokens of the gold answer.
    """

    one: ForwardPass
    of_document: bool
    read: Callable[[PassScores], list[float]]


def metric_names(args: Namespace) -> list[str]:
    """Return the names of all figures of a run, as --keep-best has them."""
    names = []
    for length in sorted(set(args.validate_lengths)):
        kinds = ["perplexity"]
        kinds += ["longppl"] if args.validate_key_tokens and length > SHORT else []
        if args.validate_cases:
            kinds += [args.validate_task, f"{args.validate_task}-log-likelihood"]
        names += [f"{kind}-{short(length)}" for kind in kinds]
    return names


def validate_inputs(args: Namespace) -> None:
    """Check dataset, tokenizer, task and key tokens before a GPU is asked for.

    Raises:
        UserError, OSError: naming the flag or the file.
    """
    for length, questions in _make_questions(args).items():
        highest = max(int(question.one.tokens.max()) for question in questions)
        known = vocabulary(args)
        if known is not None and highest >= known:
            raise UserError(
                f"--validate-data is {args.validate_data}: at {length} tokens it has token "
                f"{highest}, --vocab-size is {known}"
            )


def _make_questions(args: Namespace) -> dict[int, list[Question]]:
    """Return all passes by length."""
    lengths = sorted(set(args.validate_lengths))
    kept = None
    if args.validate_key_tokens is not None:
        kept = read_key_tokens(Path(args.validate_key_tokens), "--validate-key-tokens")
    documents = _documents(args, kept, lengths[-1])
    masks = kept.masks() if kept is not None else [None] * len(documents)
    made: dict[int, list[Question]] = {}
    for length in lengths:
        made[length] = [
            _ask_document(document[:length], None if mask is None else mask[:length])
            for document, mask in zip(documents, masks, strict=True)
        ]
    if args.validate_cases:
        for length, questions in _cases(args, lengths).items():
            made[length] += questions
    return made


def _documents(args: Namespace, kept: KeyTokens | None, longest: int) -> list[np.ndarray]:
    tokens = longest if kept is None else kept.document_tokens
    if tokens < longest:
        raise UserError(
            f"--validate-lengths has {longest}: --validate-key-tokens is of documents of {tokens} "
            "tokens; it must be at most that"
        )
    try:
        documents = read_first_tokens(args.validate_data, args.validate_documents, tokens)
    except UserError as error:
        words = str(error).replace("--document-tokens", "--validate-lengths")
        raise UserError(
            words.replace("--data is", "--validate-data is").replace(
                "--documents asks", "--validate-documents asks"
            )
        ) from None
    if kept is not None and hash_documents(documents) != kept.data_content:
        raise UserError(
            f"--validate-key-tokens is {args.validate_key_tokens}: it is of other documents than "
            f"the {len(documents)} of --validate-data"
        )
    return documents


def _ask_document(tokens: np.ndarray, key: np.ndarray | None) -> Question:
    ids = torch.from_numpy(tokens.astype(np.int64))[None]

    def read(scores: PassScores) -> list[float]:
        nats = -scores.logprobs[0].numpy()
        chosen = np.zeros(len(nats), dtype=bool) if key is None else key[1:]
        return [nats.sum(), len(nats), nats[chosen].sum(), chosen.sum()]

    rows = torch.arange(len(tokens) - 1)
    return Question(ForwardPass(ids[:, :-1], rows, ids[:, 1:]), True, read)


def _cases(args: Namespace, lengths: list[int]) -> dict[int, list[Question]]:
    if args.validate_task not in TASKS:
        raise UserError(
            f"--validate-task is {args.validate_task}: it must be one of {', '.join(TASKS)}"
        )
    if args.tokenizer_type not in ("HuggingFaceTokenizer", "SentencePieceTokenizer"):
        raise UserError(
            f"--validate-cases is {args.validate_cases} with --tokenizer-type "
            f"{args.tokenizer_type}: cases are text; it must be 0, or the tokenizer one of text"
        )
    tokenizer = load_tokenizer(args.tokenizer_type, args.tokenizer_model)
    prompt = Prompt(tokenizer, folder=args.tokenizer_model)
    task, builder = TASKS[args.validate_task], HaystackBuilder(prompt, [])
    made = {}
    for length in lengths:
        haystacks = builder.make(task, length, 0, args.validate_cases)
        batches = make_batches(haystacks, 1, share=False)  # one case per pass
        made[length] = [_ask_case(batch) for batch in batches]
    return made


def _ask_case(batch: Any) -> Question:
    def read(scores: PassScores) -> list[float]:
        (case,) = read_scores(batch, scores)
        return [float(case.hit), 1.0, case.logprob, case.answer_tokens]

    return Question(make_pass(batch), False, read)


def ask(
    model: list[Any], questions: Sequence[Question], length: int, vocabulary: int
) -> np.ndarray:
    """Return the sums of every question ``[questions, 4]``, on every rank.

    ``MegatronModel`` has a model to itself; here the passes go through the trainer's own schedule,
    at any layout.

    Args:
        model: chunks of the model as the trainer has them.
        length: tokens of each question, before they are padded.
        vocabulary: tokens that count, without padding rows of the output layer.
    """
    stage = PipelineStage(model[0])
    own = list(range(stage.data_rank, len(questions), stage.data_ranks))
    # Every rank takes part in as many passes; what one has too few of is asked once more.
    most = -(-len(questions) // stage.data_ranks)
    most = -(-most // stage.stages) * stage.stages
    asked = own + [0] * (most - len(own))
    step = length_step(stage)
    tokens = -(-length // step) * step
    passes = [pad_pass(questions[index].one, step) for index in asked]
    assert all(one.tokens.shape[1] == tokens for one in passes)
    answers = trainer.run_schedule(
        model, partial(_forward_step, vocabulary=vocabulary), passes, tokens
    )
    sums = torch.zeros(len(questions), 4, dtype=torch.float64, device=stage.device)
    if answers and stage.tensor_rank == stage.context_rank == 0:
        for index, scores in zip(own, answers, strict=False):
            sums[index] = torch.tensor(questions[index].read(scores), dtype=torch.float64)
    torch.distributed.all_reduce(sums)
    return sums.cpu().numpy()


def length_step(stage: PipelineStage) -> int:
    """Return what the number of tokens of a pass must be a multiple of.

    Sequence parallelism cuts it by tensor ranks, context parallelism twice by its own, and FP8
    needs multiples of 16.
    """
    tensor_ranks = 1 if stage.tensor_group is None else stage.tensor_group.size()
    return 32 * tensor_ranks * stage.context_group.size()


def pad_pass(one: ForwardPass, step: int) -> ForwardPass:
    """Return a pass with tokens at the end, which no other token sees, up to a multiple of step."""
    missing = -one.tokens.shape[1] % step
    padding = one.tokens.new_zeros(len(one.tokens), missing)
    return ForwardPass(torch.cat([one.tokens, padding], dim=1), one.rows, one.targets)


def _forward_step(passes: Iterator[ForwardPass], model: Any, vocabulary: int) -> tuple[Tensor, Any]:
    stage = PipelineStage(model)
    own = ContextShard(next(passes), stage.context_rank, stage.context_group.size())
    seen: list[tuple[Tensor, Tensor | None]] = []
    with output_input(stage.module, seen):
        output = model(
            input_ids=own.tokens.to(stage.device),
            position_ids=own.positions.to(stage.device),
            attention_mask=None,
        )
    return output, partial(_read, stage=stage, own=own, seen=seen, vocabulary=vocabulary)


def _read(
    output: Tensor,
    *,
    stage: PipelineStage,
    own: ContextShard,
    seen: list[Any],
    vocabulary: int,
    **_: Any,
) -> PassScores:
    """Return the scores of a pass, on every tensor and context rank of the last stage."""
    ((hidden, weight),) = seen
    hidden = stage.gather_tokens(hidden)
    kept = hidden[own.kept.to(hidden.device)].transpose(0, 1)  # [1, rows here, h]
    with _whole_input(stage.module.output_layer):
        found = score_kept(stage, kept, weight, own.targets.to(kept.device), vocabulary)
    logprobs, best = own.gather(*found, group=stage.context_group)
    return PassScores(logprobs.cpu(), best.cpu())


@contextmanager
def _whole_input(layer: Any) -> Iterator[None]:
    """Have an output layer take rows as they are, which are whole on every tensor rank."""
    before, layer.sequence_parallel = layer.sequence_parallel, False
    try:
        yield
    finally:
        layer.sequence_parallel = before


class Validation:
    """What a run does every --validate-interval iterations, and at its end.

    Args:
        args: Megatron's, with our flags.
    """

    def __init__(self, args: Namespace) -> None:
        self.args = args
        self._questions: dict[int, list[Question]] | None = None
        self._saved: tuple[str, int] | None = None

    def has_saved(self, iteration: int) -> bool:
        """Return whether the run's own checkpoint of an iteration was saved here already."""
        return self._saved == (self.args.save, iteration)

    def after_iteration(
        self,
        model: list[Any],
        optimizer: Any,
        opt_param_scheduler: Any,
        iteration: int,
        operations: float,
        context: Any,
        data: Any,
    ) -> None:
        """Validate if it is time; the arguments are those of ``checkpoint_and_decide_exit``."""
        if iteration % self.args.validate_interval and iteration != self.args.train_iters:
            return
        if trainer.must_stop(self.args):
            return
        state = iteration, model, optimizer, opt_param_scheduler, operations
        # A pass may run out of memory: what is to be saved of this iteration is whole before.
        last = iteration == self.args.train_iters and self.args.save
        if last and iteration % self.args.save_interval:  # Megatron would after its loop
            trainer.save_checkpoint(*state, context, train_data_iterator=data)
            self._saved = self.args.save, iteration
        with trainer.untimed():
            begin = time.perf_counter()
            values = self._measure(model)
            trainer.tell(values, iteration, time.perf_counter() - begin)
        if self.args.keep_best is not None and self._is_best(values):
            with _weights_alone_to(self.args, self._folder):
                trainer.save_checkpoint(*state, {})
            self._note_best(values, iteration)

    def _measure(self, model: list[Any]) -> dict[str, float]:
        """Return all figures by name, on every rank."""
        if self._questions is None:
            self._questions = _make_questions(self.args)
        found: dict[str, float] = {}
        with trainer.as_served(self.args, model) as rotaries:
            for length, questions in self._questions.items():
                for rotary in rotaries:
                    rotary.set_length(length)
                sums = ask(model, questions, length, vocabulary(self.args))
                found |= self._figures(length, questions, sums)
        return found

    def _figures(
        self, length: int, questions: list[Question], sums: np.ndarray
    ) -> dict[str, float]:
        of_document = np.array([question.of_document for question in questions])
        nats, targets, key_nats, keys = sums[of_document].sum(0)
        name, task = short(length), self.args.validate_task
        found = {f"perplexity-{name}": perplexity_of(nats / targets)}
        if self.args.validate_key_tokens is not None and length > SHORT:
            found[f"longppl-{name}"] = perplexity_of(key_nats / keys) if keys else math.nan
        if not of_document.all():
            hits, cases, logprob, tokens = sums[~of_document].sum(0)
            found[f"{task}-{name}"] = hits / cases
            found[f"{task}-log-likelihood-{name}"] = logprob / tokens
        return {name: float(value) for name, value in found.items()}

    @property
    def _folder(self) -> Path:
        return Path(self.args.save) / BEST

    def _is_best(self, values: dict[str, float]) -> bool:
        """Return whether the metric is better than before, also before an earlier stop.

        The first rank says so: others may see an older file on a shared disk. It marks the folder
        as ours, because a run may be stopped before its first checkpoint there is whole.
        """
        answer = [False]
        if torch.distributed.get_rank() == 0:
            answer = [self._beats(values, _read_best(self._folder))]
            if not (self._folder / BEST_FILE).is_file():
                self._folder.mkdir(parents=True, exist_ok=True)
                write_whole(self._folder / BEST_FILE, b"{}\n")
        torch.distributed.broadcast_object_list(answer, 0)
        return answer[0]

    def _beats(self, values: dict[str, float], before: dict[str, Any] | None) -> bool:
        metric = self.args.keep_best
        if before is None or before["metric"] != metric:
            return not math.isnan(values[metric])
        if metric.startswith(("perplexity", "longppl")):
            return values[metric] < before["value"]
        return values[metric] > before["value"]

    def _note_best(self, values: dict[str, float], iteration: int) -> None:
        """Write which checkpoint is the best, and remove the one that was."""
        if torch.distributed.get_rank() == 0:
            before = _read_best(self._folder)
            metric = self.args.keep_best
            kept = {"metric": metric, "value": values[metric], "iteration": iteration}
            text = json.dumps(kept | {"figures": values}, indent=2) + "\n"
            write_whole(self._folder / BEST_FILE, text.encode())
            # The one that the file named, and nothing else: the rest may be a user's.
            if before is not None and before["iteration"] != iteration:
                shutil.rmtree(self._folder / f"iter_{before['iteration']:07d}", ignore_errors=True)
        torch.distributed.barrier()


def _read_best(folder: Path) -> dict[str, Any] | None:
    """Return what is known of the best checkpoint; None where there was none yet."""
    path = folder / BEST_FILE
    return (json.loads(path.read_text("utf-8")) if path.is_file() else None) or None


@contextmanager
def _weights_alone_to(args: Namespace, folder: Path) -> Iterator[None]:
    """Have checkpoints saved in ``folder`` without the optimizer: to export, not to go on from."""
    changes = {"save": str(folder), "no_save_optim": True, "no_save_rng": True, "async_save": False}
    before = {name: getattr(args, name) for name in changes}
    vars(args).update(changes)
    try:
        yield
    finally:
        vars(args).update(before)
