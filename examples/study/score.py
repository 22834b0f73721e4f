# SPDX-License-Identifier: Apache-2.0
"""Score one model of the study on every task: perplexity and retrieval by length.

    python examples/study/score.py --hf MODEL --data HELD_OUT --output OUT [--smoke] [RoPE's flags]

One process loads the model once. What was scored is not scored again. LongPPL needs --key-tokens: a
file of ``megatron-cream evaluate longppl --save-key-tokens``, made of HELD_OUT with --documents 8
--document-tokens 32768.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(HERE))

# ruff: noqa: E402
from megatron_cream.cli import make_parser
from megatron_cream.errors import one_line_errors

LENGTHS = ("4K", "8K", "16K", "32K")
CONTROL = "-of-8K"
"""Ends the name of a task whose longer cases have the records of one of 8K, and prose between."""
_CASES = ("--cases", "10", "--seeds", "10")
_OF_8K = ("--lengths", "16K", "32K", *_CASES, "--records-of", "8K")
FLAGS = {
    "perplexity": (
        *("--lengths", "1K", "2K", "4K", "8K", "16K", "32K"),
        *("--documents", "8", "--document-tokens", "65536"),
    ),
    "longppl": ("--lengths", "8K", "16K", "32K", "--documents", "8"),
    "longchat-lines": ("--lengths", *LENGTHS, *_CASES),
    "kv-retrieval": ("--lengths", *LENGTHS, *_CASES),
    "niah-multikey": ("--lengths", *LENGTHS, *_CASES),
    "needle": ("--lengths", *LENGTHS, "--cases", "10", "--seeds", "4"),
    "passkey": ("--lengths", *LENGTHS, "--cases", "10", "--seeds", "4"),
    f"longchat-lines{CONTROL}": _OF_8K,
    f"kv-retrieval{CONTROL}": _OF_8K,
}
SMOKE = {
    "perplexity": ("--lengths", "256", "512", "--documents", "1", "--document-tokens", "1024"),
    **{
        task: (
            *("--lengths", "768", "1024", "--cases", "2", "--seeds", "1"),
            *(("--records-of", "768") if task.endswith(CONTROL) else ()),
        )
        for task in FLAGS
        if task not in ("perplexity", "longppl")
    },
}


def flags_beyond(targets: int) -> dict[str, tuple[str, ...]]:
    """The flags of each task where the target is ``targets`` times 32K, 2 or 4: fewer cases."""
    lengths = ("8K", "16K", "32K", "64K") if targets == 2 else ("16K", "32K", "64K", "128K")
    cases = ("--lengths", *lengths, "--cases", "10", "--seeds", "4" if targets == 2 else "2")
    retrieval = [task for task in FLAGS if task not in ("perplexity", "longppl")]
    return {
        "perplexity": ("--lengths", *lengths, "--documents", "4", "--document-tokens", "131073"),
        "longppl": FLAGS["longppl"],
        **{task: cases for task in retrieval if not task.endswith(CONTROL)},
    }


def score(
    hf: str,
    data: str,
    output: str,
    smoke: bool,
    tasks: list[str],
    rope: list[str],
    key_tokens: str | None = None,
    targets: int = 1,
) -> None:
    """Write the results of every task to ``output/TASK``; those of longppl need key tokens."""
    from megatron_cream.evaluation.evaluate import evaluate, open_model, settings_of

    tables = SMOKE if smoke else FLAGS if targets == 1 else flags_beyond(targets)
    common = ["--hf", hf, "--name", Path(output).parent.name, "--data", data, *rope]
    common += [] if smoke else ["--dtype", "bfloat16", "--batch-tokens", "65536"]
    model = None
    for name in tasks:
        task, folder = name.removesuffix(CONTROL), Path(output) / name
        flags = [*tables[name], "--output", str(folder)]
        flags += ["--key-tokens", str(key_tokens)] if task == "longppl" else []
        if (folder / "result.json").is_file():
            continue
        settings = settings_of(make_parser("evaluate").parse_args([task, *common, *flags]))
        model = model or open_model(settings)
        evaluate(settings, model)


def main() -> int:
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__)
    for flag in ("--hf", "--data", "--output"):
        parser.add_argument(flag, required=True)
    parser.add_argument("--smoke", action="store_true", help="a few short cases")
    parser.add_argument("--tasks", nargs="+", choices=FLAGS)
    parser.add_argument("--key-tokens", help="file of key tokens, for longppl")
    parser.add_argument("--targets", type=int, default=1, choices=(1, 2, 4), help="of 32K each")
    args, rope = parser.parse_known_args()
    tasks = args.tasks or [task for task in FLAGS if args.key_tokens or task != "longppl"]
    with one_line_errors():
        score(
            *(args.hf, args.data, args.output, args.smoke, tasks, rope),
            args.key_tokens,
            args.targets,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
