# SPDX-License-Identifier: Apache-2.0
"""The settings of an evaluation, each a flag, validated before a model is loaded."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from megatron_cream.attention.methods import attention_choice, method_flag
from megatron_cream.errors import UserError
from megatron_cream.options import flag_field, flag_name, parse_length
from megatron_cream.parallel_layout import ParallelLayout
from megatron_cream.rope import SCALINGS

_RANKS = "ranks that torchrun started for it"
_LONGEST = 2**27  # tokens of a case or document
_MOST = 2**31 - 1


@dataclass
class EvaluationSettings:
    """What is evaluated, and on what; every field but ``tasks`` is a flag of the command.

    Lengths, strides and limits are in tokens. ``lengths`` are put in order, each once; cases of
    ``cases_file`` have their own. ``ruler_tasks``, the flag ``--tasks`` of ruler, are by default
    those of its thirteen whose files are given.
    """

    tasks: Sequence[str]
    checkpoint: str | None = flag_field(
        "folder given to --save, or one iteration in it", default=None
    )
    hf: str | None = flag_field("Hugging Face folder instead", default=None)
    name: str | None = flag_field(
        "what tables and pictures call the model (default: its folder's name)", default=None
    )
    lengths: Sequence[int] = flag_field(
        "in tokens, 4K is 4096; needed, except with --cases-file, whose cases have their own",
        default=None,
        type=parse_length,
        many=True,
        most=_LONGEST,
    )
    output: str | None = flag_field(
        "folder for results (default: the table is printed, nothing is written)", default=None
    )
    batch_tokens: int = flag_field(
        "most tokens in a pass of several samples", default=8192, most=_MOST
    )
    dtype: str | None = flag_field(
        "of the weights, with --hf (default: as saved)",
        default=None,
        choices=("float32", "bfloat16", "float16"),
    )
    tensor_model_parallel_size: int = flag_field(_RANKS, default=1, most=2**20)
    pipeline_model_parallel_size: int = flag_field(_RANKS, default=1, most=2**20)
    context_parallel_size: int = flag_field(f"{_RANKS}, on GPUs", default=1, most=2**20)
    rope_interpolation: str | None = flag_field(
        "evaluate with another one than the model's own: "
        f"{', '.join(name for name, one in SCALINGS.items() if not one.trained_by)} "
        "(default: its own)",
        default=None,
    )
    rope_factor: float | None = flag_field(
        "its factor, from the original window (default: its own)", default=None, type=float
    )
    rope_theta: float | None = None
    rope_options: list[str] | None = None
    rope_factors_file: str | None = None
    dual_chunk: Sequence[str] | None = method_flag(
        "dual_chunk", "dual chunk attention, in place of the model's"
    )
    string: Sequence[str] | None = method_flag("string", "STRING likewise")
    self_extend: Sequence[str] | None = method_flag("self_extend", "SelfExtend likewise")
    cpu: bool = flag_field("a checkpoint on a machine with no GPU", default=False)
    cases: int = flag_field("cases per seed: depths, places, or questions", default=5, most=1000)
    seeds: int = flag_field("haystacks, or cases of --cases-file", default=3, most=100_000)
    first_seed: int = flag_field("seeds count up from it", default=0, fewest=0, most=_MOST)
    most_tokens: int | None = flag_field(
        "of a task's haystacks at one length; fewer seeds if need be, at least one (default: no "
        "limit)",
        default=None,
        type=parse_length,
        most=2**40,
    )
    records_of: int | None = flag_field(
        "longchat-lines, kv-retrieval: longer cases have the records of one of so many tokens, and "
        "prose between them (default: as many records as fit)",
        default=None,
        type=parse_length,
        most=_LONGEST,
    )
    query_aware: bool = flag_field(
        "kv-retrieval: the key is named in front of the pairs as well", default=False
    )
    cases_file: str | None = flag_field(
        "published cases of longchat-lines or kv-retrieval (JSONL, .xz, .gz)", default=None
    )
    prompt: str = flag_field(
        "base, or chat for the tokenizer's chat template; ruler also has its own, meta-llama3 for "
        "instance",
        default="base",
    )
    shots: int = flag_field("worked examples in front", default=0, fewest=0, most=1000)
    bos: bool | None = flag_field(
        "begin cases with the token that begins a text, or do not (default: as the tokenizer)",
        default=None,
        action=argparse.BooleanOptionalAction,
    )
    tokenizer_type: str | None = flag_field(
        "as in megatron-cream preprocess (default: the model's own)", default=None
    )
    tokenizer_model: str | None = flag_field("its file or folder", default=None)
    data: str | None = flag_field(
        "documents to score: indexed dataset without .bin and .idx, or text files", default=None
    )
    documents: int = flag_field("documents to score", default=16, most=1_000_000)
    skip_documents: int = flag_field(
        "documents at the start of an indexed dataset that training read: not scored",
        default=0,
        fewest=0,
        most=_MOST,
    )
    document_tokens: int | None = flag_field(
        "tokens of each; shorter documents are passed over (default: twice the longest of "
        "--lengths, and one; of one window per document the longest)",
        default=None,
        type=int,
        most=_LONGEST,
    )
    stride: int | None = flag_field(
        "tokens between windows (default: half of each length)",
        default=None,
        type=int,
        most=_LONGEST,
    )

    truncate: bool = flag_field(
        "score the first L tokens of each document in one window, for each L of --lengths, as "
        "papers' tables do",
        default=False,
    )
    judge: str | None = flag_field(
        "Hugging Face folder of the model that says which tokens are key tokens", default=None
    )
    judge_short: str | None = flag_field(
        "of another model for its short contexts: the base model, for instance (default: --judge)",
        default=None,
    )
    key_tokens: str | None = flag_field(
        "file of --save-key-tokens, in place of --judge", default=None
    )
    save_key_tokens: str | None = flag_field(
        "file to keep the key tokens in, so that other models are measured on the same",
        default=None,
    )

    haystack: str | None = flag_field(
        "text of the essays, or RULER's PaulGrahamEssays.json", default=None
    )
    qa: Sequence[str] | None = flag_field(
        "questions in SQuAD's form for qa_1, in HotpotQA's for qa_2", default=None, many=True
    )
    words: str | None = flag_field("RULER's english_words.json, for cwe from 128K on", default=None)
    samples: int = flag_field("cases per task and length; RULER has 500", default=20, most=100_000)
    threshold: float = flag_field(
        "average that a length of effective use has", default=85.6, type=float, most=100
    )
    ruler_tasks: Sequence[str] | None = None

    def __post_init__(self) -> None:
        self.lengths = sorted(set(self.lengths or ())) if self.cases_file is None else []

    def validate(self) -> None:
        """Check what can be checked without a model.

        Raises:
            UserError, FileNotFoundError: naming the flag.
        """
        for one in fields(self):
            if getattr(self, one.name) == "":
                raise UserError(f"{flag_name(one.name)} is empty: leave it out, or give it a value")
        if (self.checkpoint is None) == (self.hf is None):
            raise UserError("--checkpoint or --hf: exactly one of them must be given")
        if not self.lengths and self.cases_file is None:
            raise UserError(
                "--lengths is missing: name context lengths in tokens, 4K 8K for instance"
            )
        self._validate_numbers()
        if self.records_of is not None:
            self._validate_records()
        if self.query_aware and list(self.tasks) != ["kv-retrieval"]:
            raise UserError(
                f"--query-aware is given for {', '.join(self.tasks)}: it is for kv-retrieval alone"
            )
        if self.query_aware and self.shots:
            raise UserError(f"--query-aware with --shots {self.shots}: it must be 0")
        if self.cases_file is not None:
            self._validate_cases_file(self.cases_file)
        if {"perplexity", "longppl"} & set(self.tasks):
            self._validate_windows()
        if "longppl" in self.tasks:
            self._validate_longppl()
        if "ruler" in self.tasks:
            self._validate_ruler()
        self._validate_attention()
        self._validate_model()
        self._validate_output()

    def _validate_numbers(self) -> None:
        for one in fields(self):
            if one.metadata.get("type") not in (int, parse_length):
                continue
            value = getattr(self, one.name)
            least, most = one.metadata["fewest"], one.metadata["most"]
            for number in value if one.name == "lengths" else [] if value is None else [value]:
                if not least <= number <= most:
                    raise UserError(
                        f"{flag_name(one.name)} has {number}: it must be at least {least}, at "
                        f"most {most}"
                    )

    def _validate_records(self) -> None:
        from megatron_cream.evaluation.evaluation_tasks import TASKS

        able = [name for name, task in TASKS.items() if task.records]
        if self.cases_file is not None or not set(self.tasks) <= set(able):
            given = "with --cases-file" if self.cases_file else f"for {', '.join(self.tasks)}"
            raise UserError(
                f"--records-of is {self.records_of} {given}: it is for {' and '.join(able)}, drawn"
            )

    def _validate_cases_file(self, path: str) -> None:
        from megatron_cream.evaluation.evaluation_tasks import read_cases, validate_has_published

        if self.most_tokens is not None:
            raise UserError(
                f"--most-tokens is {self.most_tokens} with --cases-file: it must be left out, "
                "--seeds says how many of the file's cases are taken"
            )
        for task in self.tasks:
            validate_has_published(task)
        read_cases(path)

    def _validate_windows(self) -> None:
        if self.data is None:
            raise UserError(f"--data is missing: {self.tasks[0]} needs an indexed dataset or text")
        if self.stride is not None and self.truncates:
            raise UserError(
                f"--stride is {self.stride} with --truncate: it must be left out, there is one "
                "window per document"
            )
        if self.stride is not None and self.stride > self.lengths[0]:
            raise UserError(
                f"--stride is {self.stride}: it must be at most the shortest of --lengths, "
                f"{self.lengths[0]}, so that every token is scored"
            )
        if self.truncates and self.tokens_per_document < self.lengths[-1]:
            raise UserError(
                f"--document-tokens is {self.document_tokens}: it must be at least the longest of "
                f"--lengths, {self.lengths[-1]}"
            )
        if not self.truncates and self.tokens_per_document <= self.lengths[-1]:
            raise UserError(
                f"--document-tokens is {self.document_tokens}: it must be more than the longest "
                f"of --lengths, {self.lengths[-1]}: the token after a window is its last target"
            )

    def _validate_ruler(self) -> None:
        from megatron_cream.evaluation.ruler import MODEL_TEMPLATES

        if list(self.tasks) != ["ruler"]:
            raise UserError(f"--tasks has {', '.join(self.tasks)}: ruler must be the only one")
        styles = [*MODEL_TEMPLATES, "chat"]
        if self.prompt not in styles:
            raise UserError(f"--prompt is {self.prompt!r}: it must be one of {', '.join(styles)}")
        if not 0 <= self.threshold <= 100:
            raise UserError(f"--threshold has {self.threshold}: it must be from 0 to 100")

    def folder(self, task: str) -> Path | None:
        """Return where a task's results go: OUTPUT itself for one task, OUTPUT/TASK for several."""
        if self.output is None:
            return None
        return Path(self.output) / task if len(self.tasks) > 1 else Path(self.output)

    @property
    def layout(self) -> ParallelLayout:
        """The ranks that a checkpoint is spread over."""
        return ParallelLayout(
            self.tensor_model_parallel_size,
            self.pipeline_model_parallel_size,
            self.context_parallel_size,
        )

    @property
    def tokens_per_document(self) -> int:
        """Tokens of each document that perplexity scores."""
        longest = self.lengths[-1]
        return self.document_tokens or (longest if self.truncates else 2 * longest + 1)

    @property
    def truncates(self) -> bool:
        """Whether there is one window per document; LongPPL is so defined."""
        return self.truncate or "longppl" in self.tasks

    def _validate_longppl(self) -> None:
        from megatron_cream.evaluation.longppl import validate_flags

        validate_flags(self)

    def _validate_attention(self) -> None:
        choice = attention_choice(self)
        if choice and choice.name != "dual_chunk" and self.context_parallel_size > 1:
            raise UserError(
                f"{choice.flag} with --context-parallel-size {self.context_parallel_size}: it must "
                "be 1; only --dual-chunk goes over several context-parallel ranks"
            )

    def _validate_model(self) -> None:
        from megatron_cream.checkpoint.iterations import require_checkpoint

        if self.hf is not None and not (Path(self.hf) / "config.json").is_file():
            raise FileNotFoundError(f"--hf is {self.hf}: it must be a folder with a config.json")
        if self.checkpoint is not None:
            require_checkpoint(self.checkpoint)

    def _validate_output(self) -> None:
        """Check that several tasks do not write into another folder; for one the store does."""
        from megatron_cream.evaluation.store import SETTINGS_FILE

        if self.output is None or len(self.tasks) == 1:
            return
        folder = Path(self.output)
        ours = any((folder / task / SETTINGS_FILE).is_file() for task in self.tasks)
        empty = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
        if not (ours or empty) or (folder / SETTINGS_FILE).exists():
            raise UserError(
                f"--output is {folder}: it must be a new folder, or that of a run of several tasks"
            )
