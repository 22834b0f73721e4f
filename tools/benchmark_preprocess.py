# SPDX-License-Identifier: Apache-2.0
"""Measure preprocessing beside Megatron's own, on the same text with the same tokenizer.

    git clone --depth 1 https://github.com/NVIDIA/Megatron-LM
    python tools/benchmark_preprocess.py --input books.jsonl --workers 2 \\
        --tokenizer-type HuggingFaceTokenizer --tokenizer-model tokenizer/ \\
        --megatron Megatron-LM/tools/preprocess_data.py

The sides take turns, each in a fresh process, and their outputs are compared byte by byte. CPU
seconds count all processes of a side and do not depend on what else the machine does; wall seconds
do. preprocess_data_fast.py beside Megatron's script is measured too where it can load the
tokenizer. Without --megatron a stand-in takes its place: the same loop, one tokenizer call a
document through the same library, in one process.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megatron_cream.cli import Parser
from megatron_cream.data.indexed import read_index
from megatron_cream.errors import UserError, one_line_errors
from megatron_cream.options import validate_count

TOOL = Path(__file__).with_name("preprocess_data.py")
OURS, STAND_IN, STOCK, FAST = "megatron_cream", "stand-in", "Megatron", "Megatron, gigatoken"


@dataclass
class Side:
    """One way to make the dataset.

    Attributes:
        command: makes it from an input at a prefix.
        output: its files, without suffix, for a prefix.
        turns: how often it is run.
        wall, cpu: seconds of each turn.
        start, start_wall: CPU and wall seconds of each turn on one short line.
        peak: largest resident bytes of any process of it.
    """

    command: Callable[[str, str], list[str]]
    output: str
    turns: int
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    start: list[float] = field(default_factory=list)
    start_wall: list[float] = field(default_factory=list)
    peak: int = 0
    failed: str = ""


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--input", required=True, metavar="JSONL", help="text under the key `text`")
    add("--tokenizer-type", required=True, help="HuggingFaceTokenizer or SentencePieceTokenizer")
    add("--tokenizer-model", required=True, metavar="PATH", help="as preprocess_data.py takes it")
    add("--workers", type=int, default=2, help="processes of each side that can have several")
    add("--turns", type=int, default=3, help="of each side")
    loops = "of Megatron's own loop, 0 for none (default: as --turns)"
    add("--megatron-turns", type=int, metavar="TURNS", help=loops)
    checkout = "tools/preprocess_data.py of a Megatron-LM checkout (default: a stand-in)"
    add("--megatron", metavar="PATH", help=checkout)
    add("--at-least", type=float, default=0.0, help="fail below this ratio of CPU seconds")
    add("--stand-in", metavar="PREFIX", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Side]:
    """Run all sides in turn.

    Raises:
        UserError: a side whose output differs from the others'.
        ChildProcessError: a side that fails.
    """
    sides = _sides(args)
    short = folder / "short.jsonl"
    short.write_text('{"text": "a short line"}\n')
    for name, side in list(sides.items()):
        _run(side, str(short), str(folder / "short"))
        if side.failed:
            if name != FAST:
                raise ChildProcessError(f"{name} failed: {side.failed}")
            print(f"{name} leaves the table: {side.failed}")
            del sides[name]
    first = next(iter(sides))
    for turn in range(max(side.turns for side in sides.values())):
        for name, side in sides.items():
            if turn >= side.turns:
                continue
            wall, cpu = _run(side, str(short), str(folder / "short"))
            side.start_wall.append(wall)
            side.start.append(cpu)
            prefix = str(folder / name.replace(" ", "-"))
            wall, cpu = _run(side, args.input, prefix)
            if side.failed:
                raise ChildProcessError(f"{name} failed: {side.failed}")
            side.wall.append(wall)
            side.cpu.append(cpu)
            _compare(str(folder / first) + sides[first].output, prefix + side.output)
    return sides


def table(sides: dict[str, Side], size: int) -> str:
    """Return a row for each side; the ratios are of CPU and of wall seconds to ours.

    The last two ratios are without the seconds that a short line takes too.
    """
    ours = sides[OURS]
    lines = [
        "| side | CPU s | MB per CPU s | wall s | CPU ratio | wall ratio | CPU ratio without "
        "start-up | wall ratio without | peak GB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, side in sides.items():
        if not side.cpu:  # asked for no turn of it
            continue
        cpu, wall = _median(side.cpu), _median(side.wall)
        without = (
            _without(side.cpu, side.start, ours.cpu, ours.start),
            _without(side.wall, side.start_wall, ours.wall, ours.start_wall),
        )
        lines.append(
            f"| {name} | {cpu:.2f} | {size / 1e6 / cpu:.2f} | {wall:.2f} "
            f"| {cpu / _median(ours.cpu):.1f} | {wall / _median(ours.wall):.1f} "
            f"| {without[0]} | {without[1]} | {side.peak / 1e9:.2f} |"
        )
    return "\n".join(lines)


def _without(
    seconds: list[float], start: list[float], ours: list[float], our_start: list[float]
) -> str:
    """Return the ratio to ours of what is left without start-up, each turn less its own."""
    left = _median([whole - part for whole, part in zip(seconds, start, strict=True)])
    our_left = _median([whole - part for whole, part in zip(ours, our_start, strict=True)])
    # A difference of two long times that is far below both says nothing.
    if left < 0.1 * _median(start) or our_left < 0.1 * _median(our_start):
        return "too little"
    return f"{left / our_left:.2f}"


def stages(args: argparse.Namespace, ours: Side) -> str:
    """Return what reading and tokenizing take of our CPU seconds, each measured alone."""
    from megatron_cream.corpus.fast_encoder import choose_engine
    from megatron_cream.corpus.input_files import InputSpan
    from megatron_cream.corpus.readers import Fields, read_span
    from megatron_cream.corpus.tokenizers import load_tokenizer

    began = time.process_time()
    found = read_span(InputSpan(args.input, "jsonl"), Fields())
    texts = [r.text if isinstance(r.text, str) else "".join(r.text) for r in found]
    reading = time.process_time() - began
    reference = load_tokenizer(args.tokenizer_type, args.tokenizer_model)
    tokenizer = choose_engine("auto", reference, [])[0]
    began = time.process_time()
    for text in texts:
        tokenizer.encode([text])
    tokenizing = time.process_time() - began
    total = _median(ours.cpu)
    parts = {
        "start-up": _median(ours.start),
        "reading and JSON": reading,
        "tokenizing": tokenizing,
        "converting, writing, index": max(total - _median(ours.start) - reading - tokenizing, 0.0),
    }
    return ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in parts.items())


def stand_in(args: argparse.Namespace) -> None:
    """The loop of Megatron's script: json, one call a document, a list of ints, add_document."""
    import tokenizers

    from megatron_cream.corpus.tokenizers import load_tokenizer

    ours = load_tokenizer(args.tokenizer_type, args.tokenizer_model)
    if args.tokenizer_type == "HuggingFaceTokenizer":
        model = Path(args.tokenizer_model)
        model = model / "tokenizer.json" if model.is_dir() else model
        library = tokenizers.Tokenizer.from_file(str(model))

        def encode(text: str) -> list[int]:
            return library.encode(text, add_special_tokens=False).ids
    else:

        def encode(text: str) -> list[int]:
            return ours.encode([text])[0].tolist()

    dtype = np.uint16 if ours.vocab_size < 65500 else np.int32
    lengths = []
    with open(args.input, encoding="utf-8") as file, open(args.stand_in + ".bin", "wb") as out:
        for line in file:
            ids = encode(json.loads(line)["text"])
            if ids:
                ids.append(ours.eod)
                lengths.append(len(ids))
                out.write(np.array(ids, dtype=dtype).tobytes(order="C"))
    from megatron_cream.corpus.storage import write_index

    block = (np.array(lengths), np.ones(len(lengths), dtype=np.int64))
    write_index(args.stand_in + ".idx", np.dtype(dtype), [block], len(lengths), len(lengths))


def _sides(args: argparse.Namespace) -> dict[str, Side]:
    model = ["--tokenizer-type", args.tokenizer_type, "--tokenizer-model", args.tokenizer_model]
    tail = ["--append-eod", *model]
    workers = ["--workers", str(args.workers)]

    def command(*script: str) -> Callable[[str, str], list[str]]:
        return lambda source, prefix: [
            *(sys.executable, *script, "--input", source, "--output-prefix", prefix, *tail)
        ]

    sides = {OURS: Side(command(str(TOOL), *workers, "--overwrite"), "", args.turns)}
    turns = args.turns if args.megatron_turns is None else args.megatron_turns
    if args.megatron is None:

        def stand(source: str, prefix: str) -> list[str]:
            return [sys.executable, __file__, "--input", source, "--stand-in", prefix, *model]

        sides[STAND_IN] = Side(stand, "", turns)
        return sides
    if turns:
        sides[STOCK] = Side(command(args.megatron, *workers), "_text_document", turns)
    fast = Path(args.megatron).with_name("preprocess_data_fast.py")
    if fast.exists():
        sides[FAST] = Side(command(str(fast), "--use-gigatoken"), "_text_document", args.turns)
    return sides


def _run(side: Side, source: str, prefix: str) -> tuple[float, float]:
    """Run a side once; returns wall and CPU seconds, those of its own processes included."""
    environment = dict(os.environ)
    script = Path(side.command(source, prefix)[1])
    if script.parent != TOOL.parent:
        environment["PYTHONPATH"] = str(script.resolve().parents[1])
    began = time.perf_counter()
    with tempfile.TemporaryFile() as log:
        command = side.command(source, prefix)
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        wall = time.perf_counter() - began
        log.seek(0)
        lines = log.read().decode(errors="replace").strip().splitlines() or [""]
    if process.returncode:
        errors = [line for line in lines if "Error" in line or line.startswith("error:")]
        side.failed = (errors or lines)[-1].strip()
    side.peak = max(side.peak, used.ru_maxrss * 1024)
    return wall, used.ru_utime + used.ru_stime


def _compare(one: str, other: str) -> None:
    if not filecmp.cmp(one + ".bin", other + ".bin", shallow=False):
        raise UserError(f"{one}.bin and {other}.bin differ: nothing to compare")
    ours, theirs = read_index(one), read_index(other)
    # Megatron's script counts a document without text that ours leaves out; it has no sequence.
    for name in ("dtype", "lengths", "pointers"):
        if not np.array_equal(getattr(ours, name), getattr(theirs, name)):
            raise UserError(f"{one}.idx and {other}.idx differ in {name}: nothing to compare")
    if not np.array_equal(np.unique(ours.documents), np.unique(theirs.documents)):
        raise UserError(f"{one}.idx and {other}.idx differ in documents: nothing to compare")


def _median(values: list[float]) -> float:
    return statistics.median(values)


def main(argv: list[str]) -> int:
    """Print the table; bad input, or less than --at-least, ends with exit status 2."""
    args = parse_args(argv)
    if args.stand_in is not None:
        stand_in(args)
        return 0
    with one_line_errors():
        validate_count("--workers", args.workers, fewest=1)
        validate_count("--turns", args.turns, fewest=1)
        validate_count("--megatron-turns", args.megatron_turns, fewest=0)
        for path in filter(None, (args.input, args.tokenizer_model, args.megatron)):
            if not os.path.exists(path):
                raise FileNotFoundError(f"{path}: not found")
        with tempfile.TemporaryDirectory(prefix="benchmark-", dir=".") as folder:
            sides = measure(args, Path(folder).resolve())
        size = os.path.getsize(args.input)
        print(f"{size / 1e6:.1f} MB, {args.workers} workers, medians of {args.turns} turns")
        print(table(sides, size))
        print("our CPU seconds:", stages(args, sides[OURS]))
        others = [_median(side.cpu) for name, side in sides.items() if name != OURS and side.cpu]
        slowest = others[0] / _median(sides[OURS].cpu) if others else args.at_least
        if slowest < args.at_least:
            raise UserError(f"{slowest:.1f} times as fast, needs --at-least {args.at_least}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
