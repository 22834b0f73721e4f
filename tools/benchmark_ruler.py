# SPDX-License-Identifier: Apache-2.0
"""Cases per second of ``evaluate ruler`` and of lm-eval's ``hf`` backend, on the same cases.

    python tools/benchmark_ruler.py --hf model/ --lengths 4K 16K --samples 2 --dtype bfloat16

Both sides in one run, one after the other: the same prompts, the same tokens to write, greedily.
Needs lm-eval (pip install -e '.[lm-eval]') and accelerate. --lm-eval-batch names its batch sizes
(its default is 1); RULER's files are given as to ``evaluate ruler``. The seconds of ours contain
reading the prompts and writing the answers, as theirs do; making cases and loading are in neither.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import fields

import torch

from megatron_cream.errors import MissingPackageError, one_line_errors
from megatron_cream.evaluation import ruler
from megatron_cream.evaluation.evaluation_settings import EvaluationSettings
from megatron_cream.evaluation.hf_model import HuggingFaceModel
from megatron_cream.evaluation.prompts import Prompt, open_prompt, validate_vocabulary
from megatron_cream.evaluation.results import markdown, short
from megatron_cream.evaluation.ruler.answers import EncodedCase, open_cases
from megatron_cream.options import add_flags

Asked = list[tuple[str, EncodedCase]]
FLAGS = {"hf", "lengths", "samples", "dtype", "haystack", "qa", "words"}


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    others = {one.name for one in fields(EvaluationSettings)} - FLAGS
    add_flags(parser, EvaluationSettings, frozenset(others))
    parser.add_argument("--tasks", nargs="+", choices=ruler.TASKS, metavar="TASK")
    parser.add_argument("--lm-eval-batch", nargs="+", type=int, default=[1], metavar="SIZE")
    return parser.parse_args(argv)


def write_ours(model: HuggingFaceModel, prompt: Prompt, asked: Asked) -> list[str]:
    """Return what our model writes after each case."""
    new_tokens = [ruler.new_tokens(task) for task, _ in asked]
    found = model.generate([one.tokens for _, one in asked], new_tokens, model.stop_tokens)
    return [prompt.tokenizer.decode(tokens) for tokens in found]


def open_lm_eval(settings: EvaluationSettings, batch: int) -> Callable[[Asked], list[str]]:
    """Return what has lm-eval's model write after each case.

    Raises:
        MissingPackageError: lm-eval is not installed, or what it needs.
    """
    try:
        from lm_eval.api.instance import Instance
        from lm_eval.models.huggingface import HFLM
    except ImportError as exc:
        raise MissingPackageError(
            f"this benchmark needs lm-eval and accelerate: pip install -e '.[lm-eval]' "
            f"accelerate ({exc})",
            name="lm_eval",
        ) from exc
    device = "cuda" if torch.cuda.is_available() else "cpu"
    longest = max(settings.lengths)
    dtype = settings.dtype or "auto"
    theirs = HFLM(
        pretrained=settings.hf, dtype=dtype, batch_size=batch, max_length=longest, device=device
    )

    def write(asked: Asked) -> list[str]:
        requests = []
        for i, (task, one) in enumerate(asked):
            how = {"until": [], "max_gen_toks": ruler.new_tokens(task), "do_sample": False}
            text = one.case.prompt + one.case.prefix
            requests.append(Instance("generate_until", {}, (text, how), i))
        found: list[str] = theirs.generate_until(requests, disable_tqdm=True)
        return found

    return write


def timed(write: Callable[[], list[str]]) -> tuple[list[str], float]:
    """Return what is written, and the seconds that it took."""
    began = time.perf_counter()
    written = write()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return written, time.perf_counter() - began


def average(asked: Asked, written: list[str]) -> float:
    """Return the mean score of cases, from 0 to 100."""
    pairs = zip(asked, written, strict=True)
    scores = [ruler.score_case(task, text, one.case.answers) for (task, one), text in pairs]
    return sum(scores) / len(scores) * 100


def main(argv: list[str]) -> int:
    """Run the benchmark; bad input ends in one line and exit status 2."""
    args = parse_args(argv)
    given = {name: getattr(args, name) for name in FLAGS}
    rows = [["length", "cases", "lm-eval's batch", "ours, s", "lm-eval, s", "ratio", "same text",
             "score, ours", "score, lm-eval"]]  # fmt: skip
    with one_line_errors():
        settings = EvaluationSettings(["ruler"], ruler_tasks=args.tasks, **given)
        settings.validate()
        prompt = open_prompt(settings)
        with closing(open_cases(settings, prompt)) as cases:
            sides = {size: open_lm_eval(settings, size) for size in args.lm_eval_batch}
            model = HuggingFaceModel(str(args.hf), args.dtype)
            validate_vocabulary(prompt.tokenizer, model)
            for length in settings.lengths:
                tasks = sorted(cases.tasks, key=ruler.new_tokens, reverse=True)
                asked = [(task, one) for task in tasks for one in cases[length, task]]
                write_ours(model, prompt, asked[:1])  # kernels are loaded
                ours, seconds = timed(lambda asked=asked: write_ours(model, prompt, asked))
                for size, write in sides.items():
                    write(asked[-1:])
                    theirs, others = timed(lambda asked=asked, write=write: write(asked))
                    same = sum(a.strip() == b.strip() for a, b in zip(ours, theirs, strict=True))
                    rows.append([
                        short(length), str(len(asked)), str(size), f"{seconds:.2f}",
                        f"{others:.2f}", f"{others / seconds:.1f}", f"{same} of {len(asked)}",
                        f"{average(asked, ours):.1f}", f"{average(asked, theirs):.1f}",
                    ])  # fmt: skip
                    print(" ".join(rows[-1]), file=sys.stderr, flush=True)
    print(markdown(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
