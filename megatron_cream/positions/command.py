# SPDX-License-Identifier: Apache-2.0
"""The command ``megatron-cream positions``: which relative distances a strategy trains."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from megatron_cream.errors import UserError
from megatron_cream.positions import STRATEGIES, Strategy, coverage, make_strategy
from megatron_cream.positions.mixtures import PlainShare
from megatron_cream.positions.plots import describe, draw, validate_picture_path
from megatron_cream.positions.strategy import strategy_class

EXAMPLES = """
    megatron-cream positions --strategy cream --train-length 4096 --target-length 262144

Prints the report and writes a picture.
"""

MOST = {"--train-length": 2**22, "--target-length": 2**26, "--samples": 10**7}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    add = parser.add_argument
    add(
        "--train-length",
        "--seq-length",
        type=int,
        required=True,
        metavar="N",
        help="tokens of a sample",
    )
    add("--target-length", type=int, required=True, metavar="T", help="window to reach")
    strategies = tuple(STRATEGIES)
    add("--strategy", "--position-strategy", choices=strategies, required=True, help="of positions")
    # Each option has the name that it has in training as well: flags can be copied from a script.
    for cls in STRATEGIES.values():
        for name, option in cls.declared().items():
            flags = (f"--{name.replace('_', '-')}", cls.flag(name))
            add(*flags, dest=name, **option.argument())
    add("--plain-share", type=float, default=0.0, help="share of samples at plain positions")
    add("--samples", type=int, help="samples to count (default: 32000, fewer where that is slow)")
    add("--seed", "--position-seed", type=int, default=1234, help="of positions (default: 1234)")
    add("--layouts", type=int, default=24, help="samples to draw (default: 24)")
    add("--output", type=Path, metavar="FILE", help="default: positions-STRATEGY.png")


def _validate(args: argparse.Namespace) -> None:
    for flag, value in (("--train-length", args.train_length), ("--samples", args.samples)):
        if value is not None and value > MOST[flag]:
            raise UserError(f"{flag} is {value}: it must be at most {MOST[flag]}")
    if args.target_length > MOST["--target-length"]:
        raise UserError(
            f"--target-length is {args.target_length}: it must be at most "
            f"{MOST['--target-length']}, every distance is counted"
        )
    if not 1 <= args.layouts <= 200:
        raise UserError(
            f"--layouts is {args.layouts}: it must be from 1 to 200 rows of the picture"
        )


def default_samples(strategy: Strategy) -> int:
    """Return a number of samples that ``coverage`` counts in seconds: 32000, a run of 1000 x 32.

    Fewer where a sample has many pieces, because each pair of pieces is counted, and far fewer
    where it has as many pieces as tokens (RandPos), because then a sample costs O(T log T).
    """
    runs = strategy.layout(seed=0, index=0).runs()
    if runs is None:
        return min(4096, max(64, 2**25 // strategy.target_length))
    pairs = len(runs) * (len(runs) + 1) // 2
    return min(32_000, max(256, 1_000_000 // pairs))


def _strategy(args: argparse.Namespace, given: dict[str, Any]) -> Strategy:
    if not args.plain_share:
        return make_strategy(args.strategy, args.train_length, args.target_length, **given)
    return PlainShare(
        args.train_length,
        args.target_length,
        plain_share=args.plain_share,
        inner=args.strategy,
        options=tuple(given.items()),
    )


def run(args: argparse.Namespace) -> None:
    """Print the report, write the picture and print its path."""
    _validate(args)
    output = args.output or Path(f"positions-{args.strategy}.png")
    validate_picture_path(output)
    names = [name for cls in STRATEGIES.values() for name in cls.declared()]
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    own = strategy_class(args.strategy)
    strategy = _strategy(args, own.recommended(args.train_length, args.target_length, given))
    samples = default_samples(strategy) if args.samples is None else args.samples
    result = coverage(strategy, samples, args.seed)
    print(describe(strategy, result))
    layouts = [strategy.layout(args.seed, index) for index in range(args.layouts)]
    draw(strategy, result, layouts, output)
    print(f"picture: {output}")
