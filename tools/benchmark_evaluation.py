# SPDX-License-Identifier: Apache-2.0
"""Cases per second of our scoring and of generation, on the same model, machine and cases.

    python tools/benchmark_evaluation.py --hf model/ --lengths 1K 4K --cases 25

Both sides in one run. Generation is what published scripts do: transformers' generate with a
key-value cache, one case at a time, as many new tokens as they allow, stopping at the end of the
answer's turn. Some of the cases are generated (--generated), all are scored. On a machine that
others use as well, --clock cpu with --threads 1 counts the seconds that this process computed.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import numpy as np
import torch

from megatron_cream.errors import one_line_errors
from megatron_cream.evaluation.evaluation_settings import EvaluationSettings
from megatron_cream.evaluation.evaluation_tasks import TASKS
from megatron_cream.evaluation.forward import ForwardPass
from megatron_cream.evaluation.generation import generate_tokens
from megatron_cream.evaluation.hf_model import HuggingFaceModel
from megatron_cream.evaluation.prompts import (
    HaystackBuilder,
    HaystackCases,
    Prompt,
    open_prompt,
    validate_vocabulary,
)
from megatron_cream.evaluation.results import markdown, short
from megatron_cream.evaluation.scoring import CaseScore, make_batches, make_pass, read_scores
from megatron_cream.options import parse_length

# Most new tokens in the published scripts.
NEW_TOKENS = {"longchat-lines": 35, "kv-retrieval": 50, "passkey": 20}

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--hf", required=True, help="Hugging Face folder")
    add("--dtype", choices=("float32", "bfloat16"), help="of the weights (default: as saved)")
    names = list(NEW_TOKENS)
    add("--tasks", nargs="+", choices=names, default=names, help="to score (default: all)")
    lengths = "of a case, in tokens (default: 1K 4K)"
    add("--lengths", type=parse_length, nargs="+", default=[1024, 4096], help=lengths)
    add("--cases", type=int, default=25, help="cases per task and length (default: 25)")
    add("--generated", type=int, default=5, help="how many of them are generated too (default: 5)")
    add("--prompt", default="base", help="base or chat (default: base)")
    add("--batch-tokens", type=int, default=8192, help="most tokens in a pass (default: 8192)")
    add("--threads", type=int, help="of torch (default: its own choice)")
    add("--clock", choices=tuple(CLOCKS), default="wall", help="what counts (default: wall)")
    return parser.parse_args(argv)


def score_all(
    model: HuggingFaceModel, haystacks: list[HaystackCases], args: argparse.Namespace
) -> tuple[dict[tuple[int, int], CaseScore], float]:
    """Return the scores by haystack and question, and seconds."""
    clock = CLOCKS[args.clock]
    started = clock()
    found = {}
    batches = list(make_batches(haystacks, args.batch_tokens, model.shares_context))
    for batch, scores in zip(batches, model.run(map(make_pass, batches)), strict=True):
        found |= {(s.seed, s.index): s for s in read_scores(batch, scores)}
    return found, clock() - started


def generated_hit(
    module: Any, haystack: HaystackCases, index: int, new_tokens: int, eos: int | None = None
) -> bool:
    """Return whether greedy decoding writes the gold answer of one case: the published way.

    As many tokens as the answer has are read at least.
    """
    tail = haystack.tails[index]
    whole = np.concatenate([haystack.context, tail.tokens])
    size = len(tail.answer)
    written = generate_tokens(module, whole[: len(whole) - size], max(new_tokens, size), eos)
    return np.array_equal(written[:size], tail.answer)


def warm_up(model: HuggingFaceModel) -> None:
    """Run something short through both sides' kernels."""
    tokens = torch.zeros(1, 64, dtype=torch.int64)
    next(
        model.run(iter([ForwardPass(tokens, torch.tensor([63]), torch.zeros(1, 1).long(), 2, 16)]))
    )
    ours = model.module.config._attn_implementation
    model.module.set_attn_implementation("sdpa")
    model.module.generate(
        tokens.to(model.device), max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0
    )
    model.module.set_attn_implementation(ours)


def measure(
    args: argparse.Namespace, model: HuggingFaceModel, prompt: Prompt, task: str, length: int
) -> list[str]:
    """Return one row of the table.

    Raises:
        RuntimeError: generation and scoring in float32 disagree about a case.
    """
    made = HaystackBuilder(prompt).make(TASKS[task], length, 0, args.cases)
    haystacks = [HaystackCases(h.context, h.tails, h.length, i) for i, h in enumerate(made)]
    ours = model.module.config._attn_implementation
    scores, seconds = score_all(model, haystacks, args)
    chosen = sorted(scores)[:: max(1, len(scores) // args.generated)][: args.generated]
    model.module.set_attn_implementation("sdpa")
    clock = CLOCKS[args.clock]
    started = clock()
    eos = prompt.tokenizer.eod
    hits = [generated_hit(model.module, haystacks[i], j, NEW_TOKENS[task], eos) for i, j in chosen]
    generating = (clock() - started) / len(chosen)
    model.module.set_attn_implementation(ours)
    same = sum(hit == scores[key].hit for hit, key in zip(hits, chosen, strict=True))
    if same < len(chosen) and model.settings["dtype"] == "float32":
        raise RuntimeError(f"{task} at {length}: generation and scoring disagree about a case")
    rates = len(scores) / seconds, 1 / generating
    cells = [f"{rates[0]:.3f}", f"{rates[1]:.3f}", f"{rates[0] / rates[1]:.1f}"]
    return [task, short(length), str(len(scores)), *cells, f"{same} of {len(chosen)}"]


def main(argv: list[str]) -> int:
    """Run the benchmark; bad input ends in one line and exit status 2."""
    args = parse_args(argv)
    with one_line_errors():
        model = HuggingFaceModel(args.hf, args.dtype)
        if args.threads:
            torch.set_num_threads(args.threads)
        prompt = open_prompt(EvaluationSettings(args.tasks, hf=args.hf, prompt=args.prompt))
        validate_vocabulary(prompt.tokenizer, model)
        rows = [["task", "length", "cases", "ours, cases/s", "generate, cases/s", "ratio", "agree"]]
        warm_up(model)
        for task in args.tasks:
            for length in args.lengths:
                rows.append(measure(args, model, prompt, task, length))
                print(" ".join(rows[-1]), file=sys.stderr)
    print(markdown(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
