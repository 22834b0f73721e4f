# SPDX-License-Identifier: Apache-2.0
"""The command ``megatron-cream evaluate``, and ``evaluate()``, which it runs.

Modules that need torch are imported where they are used: ``--help`` and wrong flags need none.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import closing, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_cream.attention.methods import attention_choice
from megatron_cream.errors import UserError
from megatron_cream.evaluation.evaluation_settings import EvaluationSettings
from megatron_cream.evaluation.other_rope import changed_extension, changed_fields
from megatron_cream.evaluation.results import PER_DOCUMENT, format_results, suite_table
from megatron_cream.evaluation.ruler import TASKS as RULER_TASKS
from megatron_cream.options import add_flags
from megatron_cream.rope.flags import add_rope_flags

if TYPE_CHECKING:
    from megatron_cream.evaluation.forward import ScoringModel

EXAMPLES = """
    megatron-cream evaluate perplexity --checkpoint runs/cream --data data/validation \\
        --lengths 1K 2K 4K --documents 16 --output runs/eval/cream-perplexity
    megatron-cream evaluate needle --hf model/ --lengths 4K 8K 16K --output runs/eval/needle
    megatron-cream evaluate ruler --hf model/ --lengths 4K 8K 16K --haystack essays.json \\
        --qa squad.json hotpotqa.json --output runs/eval/ruler
    megatron-cream evaluate longppl --hf model/ --judge longer/ --judge-short model/ \\
        --data books/ --lengths 8K 16K 32K --save-key-tokens key.json --output runs/eval/longppl
    torchrun --nproc-per-node 4 -m megatron_cream evaluate kv-retrieval --checkpoint runs/cream \\
        --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --lengths 32K
    megatron-cream evaluate all --hf model/ --data books/ --lengths 1K 4K 16K --documents 4 \\
        --most-tokens 32K --output runs/eval/all
    megatron-cream evaluate compare runs/eval/base runs/eval/cream --output runs/eval/both

    megatron-cream evaluate report runs/eval/* --output report.html

OUTPUT gets result.json, table.md and picture.png; a killed run continues when it is started again.
"""

HELP = {
    "perplexity": "by context length and position, sliding window",
    "longppl": "perplexity of the tokens that only a long context tells, and of all",
    "passkey": "five digits in a repeated phrase, by depth",
    "needle": "a sentence in prose, by depth",
    "longchat-lines": "the number of one of many lines",
    "kv-retrieval": "the value of one of many keys, by place",
    "niah-multikey": "the number of one of several keys in prose",
    "variable-tracking": "variables that a value reaches over four hops",
    "common-words": "ten most common words of a list",
    "frequent-words": "three most frequent invented words",
    "ruler": "RULER's own thirteen tasks, by generation: scores, averages, effective length",
    "all": "every task but ruler and longppl; perplexity with --data",
}
# Fields that are flags of ruler alone, of longppl alone, of all that scores documents, and of what
# has cases.
_RULER = frozenset(("haystack", "qa", "words", "samples", "threshold"))
_LONGPPL = frozenset(("judge", "judge_short", "key_tokens", "save_key_tokens"))
_WINDOWS = frozenset(("stride", "truncate"))
_DOCUMENTS = frozenset(("data", "documents", "skip_documents", "document_tokens"))
_CASES = frozenset(
    ("cases", "seeds", "first_seed", "most_tokens", "cases_file", "shots", "query_aware")
)
_WITHOUT = {
    "ruler": _CASES | _DOCUMENTS | _WINDOWS | _LONGPPL | {"batch_tokens"},
    "longppl": _RULER | _CASES | _WINDOWS | {"prompt", "bos"},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add a sub-command for each task, and one that compares runs."""
    commands = parser.add_subparsers(dest="task", required=True)
    for task, help_ in HELP.items():
        command = commands.add_parser(task, help=help_)
        add_flags(command, EvaluationSettings, _WITHOUT.get(task, _RULER | _LONGPPL))
        add_rope_flags(command.add_argument)
        if task in ("all", "ruler"):
            names = _in_all() if task == "all" else RULER_TASKS
            command.add_argument(
                "--tasks", nargs="+", choices=names, metavar="TASK", help="only these of them"
            )
    command = commands.add_parser("compare", help="several runs of one task in one picture")
    command.add_argument("runs", nargs="+", metavar="RUN", help="--output of a finished run")
    command.add_argument("--output", help="folder for the table and the picture")
    command = commands.add_parser("report", help="finished runs in one page, or in a model card")
    command.add_argument("runs", nargs="+", metavar="RUN", help="--output of a finished run")
    command.add_argument("--output", help="the page, a file that ends in .html")
    command.add_argument("--title", help="of the page (default: the models' names)")
    command.add_argument("--card", help="README.md of the model that the figures are put into")


def _in_all() -> list[str]:
    """Return the tasks that ``all`` runs; ruler has tasks of its own, longppl lengths."""
    return [name for name in HELP if name not in ("all", "ruler", "longppl")]


def settings_of(args: argparse.Namespace) -> EvaluationSettings:
    """Return the settings of a parsed command line."""
    given = dict(vars(args))
    task = given.pop("task")
    if task == "ruler":
        return EvaluationSettings(["ruler"], ruler_tasks=given.pop("tasks"), **given)
    return EvaluationSettings(tasks=_tasks(task, given.pop("tasks", None), args.data), **given)


def _tasks(task: str, named: list[str] | None, data: str | None) -> list[str]:
    if task != "all":
        return [task]
    if named is not None:
        return list(dict.fromkeys(named))
    return [name for name in _in_all() if name != "perplexity" or data is not None]


def run(args: argparse.Namespace) -> None:
    """Run a parsed command line and print its tables."""
    if args.task == "compare":
        from megatron_cream.evaluation.results_page import compare

        print(compare(args.runs, args.output))
        return
    if args.task == "report":
        from megatron_cream.evaluation.results_page import run_report

        print(run_report(args))
        return
    if getattr(args, "cases_file", None) is not None and args.lengths:
        print(
            "note: --lengths is not used: the cases of --cases-file have their own", file=sys.stderr
        )
    if results := evaluate(settings_of(args)):
        print(format_results(results))


def evaluate(
    settings: EvaluationSettings, model: ScoringModel | None = None
) -> list[dict[str, Any]]:
    """Evaluate a checkpoint or a Hugging Face folder on long text.

        evaluate(EvaluationSettings(["passkey", "needle"], hf="model/", lengths=[4096, 16384]))

    With ``output`` every task has a folder: OUTPUT itself for one task, OUTPUT/TASK for several.
    It gets result.json, table.md, picture.png and every finished case at once, so that a run that
    was killed goes on where it was.

    Args:
        settings: tasks, the model, lengths in tokens, and where results go.
        model: of ``open_model``, where several calls share it; loaded for this one unless given.

    Returns:
        one result per task, in order, as in result.json: ``lengths`` has a row per context length
        in tokens. Of perplexity that is ``perplexity``, and ``nll`` in nats per token with
        ``document_nll`` ``[documents]``, and of longppl ``longppl`` too; of other tasks shares from
        0 to 1, of exact answers (``hit``), parts of answers (``items``) and tokens, with 95 %
        intervals (``hit_low``, ``hit_high``), and the log-likelihood of the answer in nats
        (``logprob_per_token``); of ruler ``scores`` by task and metric and their ``average``, from
        0 to 100. Only the first rank has them; others return no result.

    Raises:
        UserError: settings that do not go together, or a model, tokenizer or data that do not.
        OSError: a file that is missing, or a folder that another run writes to.
        ImportError: transformers is not installed, or what a tokenizer needs.
    """
    if settings.cpu and settings.checkpoint is not None:
        from megatron_cream.mcore import cpu

        cpu.install()
    settings.validate()
    from megatron_cream.evaluation.evaluation_tasks import TASKS
    from megatron_cream.evaluation.longppl import score_longppl
    from megatron_cream.evaluation.perplexity import open_documents, score_perplexity
    from megatron_cream.evaluation.prompts import open_prompt, validate_vocabulary
    from megatron_cream.evaluation.ruler.answers import open_cases, score_ruler
    from megatron_cream.evaluation.scoring import make_haystacks, score_cases
    from megatron_cream.evaluation.store import note_missing_matplotlib, write_table

    # What can be refused without a model is refused before one is loaded.
    tasks = settings.tasks
    prompt = None if set(tasks) <= set(PER_DOCUMENT) else open_prompt(settings)
    haystacks = {
        task: make_haystacks(settings, prompt, task) for task in tasks if prompt and task in TASKS
    }
    of_ruler = open_cases(settings, prompt) if prompt and "ruler" in tasks else None
    lengths = {*settings.lengths, *(one.length for made in haystacks.values() for one in made)}
    with closing(of_ruler) if of_ruler else nullcontext():
        model = model or open_model(settings, max(lengths))
        if prompt:
            validate_vocabulary(prompt.tokenizer, model)
        flag = "--lengths" if settings.cases_file is None else "--cases-file"
        _note_longer_than_window(flag, lengths, model)
        documents = open_documents(settings, model) if "perplexity" in tasks else []
        results = []
        for task in tasks:
            if task == "longppl":
                results.append(score_longppl(settings, model))
            elif prompt is None or task == "perplexity":
                results.append(score_perplexity(settings, model, documents))
            elif of_ruler is not None:
                results.append(score_ruler(settings, model, prompt, of_ruler))
            else:
                results.append(score_cases(settings, model, prompt, task, haystacks[task]))
    if not model.primary:
        return []
    if settings.output:
        if len(results) > 1:
            write_table(Path(settings.output), suite_table(results), results)
        note_missing_matplotlib()
    return results


def open_model(settings: EvaluationSettings, longest: int | None = None) -> ScoringModel:
    """Load the model of --checkpoint or --hf, with another RoPE or attention if flags ask for it.

    Args:
        longest: tokens of the longest text, which sizes of attention follow from; by default the
            longest of --lengths, or the model's window.

    Raises:
        UserError, FileNotFoundError, ImportError: a model that cannot be scored.
    """
    if settings.hf is not None:
        from megatron_cream.evaluation.hf_model import HuggingFaceModel

        model: Any = HuggingFaceModel(settings.hf, settings.dtype, rope=changed_fields(settings))
    else:
        validate_gpu()
        from megatron_cream.evaluation.megatron_model import MegatronModel

        path = str(settings.checkpoint)
        model = MegatronModel(path, changed_extension(settings), settings.layout)
    if choice := attention_choice(settings) or model.trained_attention:
        longest = longest or max(settings.lengths or [model.window])
        own = model.dual_chunk if choice.name == "dual_chunk" else None
        sizes = choice.sizes(model.window, longest, own)
        model.attend_beyond_window(choice.bands(sizes), choice.flag)
        model.settings["attention"] = {"name": choice.name, **sizes}
    return model


def validate_gpu(flag: str = "--cpu") -> None:
    """Refuse a checkpoint on a machine with no GPU, unless the CPU stands in for it.

    Raises:
        UserError: naming the flag.
    """
    import torch

    if not torch.cuda.is_available():
        raise UserError(
            f"{flag} is not given, and this machine has no GPU that PyTorch sees: a Megatron "
            f"checkpoint needs one, or {flag}"
        )


def _note_longer_than_window(flag: str, lengths: set[int], model: ScoringModel) -> None:
    longer = sorted(length for length in lengths if length > model.window)
    if longer and model.primary:
        print(
            f"note: {flag} has {' '.join(map(str, longer))}: {model.name} has a window of "
            f"{model.window} tokens",
            file=sys.stderr,
        )
