# SPDX-License-Identifier: Apache-2.0
"""Check the ways that compare.sh is given: METHOD:ROPE:LR, each a run of its own.

Prints the interpolations among them that can be evaluated without training.
"""

from __future__ import annotations

import sys

from megatron_cream.errors import UserError, one_line_errors
from megatron_cream.positions import STRATEGIES
from megatron_cream.rope import SCALINGS

_FORM = "METHOD:ROPE:LR, as cream:yarn:4e-4"


def check(ways: list[str]) -> None:
    """Check that every way can be trained.

    Raises:
        UserError: there is none, or one cannot be trained or is given twice.
    """
    if not ways:
        raise UserError(f"no way is given: each must be {_FORM}")
    ropes = [name for name, cls in SCALINGS.items() if cls.by_factor and not cls.evaluation_only]
    for way in ways:
        parts = way.split(":")
        if len(parts) != 3:
            raise UserError(f"a way is {way!r}: it must be {_FORM}")
        _check_one_of("METHOD", parts[0], way, list(STRATEGIES))
        _check_one_of("ROPE", parts[1], way, ropes)
        _check_rate(parts[2], way)
        if ways.count(way) > 1:
            raise UserError(f"the way {way} is given twice: each must be a run of its own")


def _check_one_of(part: str, found: str, way: str, known: list[str]) -> None:
    if found not in known:
        raise UserError(f"{part} of {way} is {found!r}: it must be one of {', '.join(known)}")


def _check_rate(found: str, way: str) -> None:
    try:
        usable = 0 < float(found) < 1
    except ValueError:
        usable = False
    if not usable:
        raise UserError(f"LR of {way} is {found!r}: it must be a number above 0 and below 1")


if __name__ == "__main__":
    with one_line_errors():
        check(sys.argv[1:])
    ropes = dict.fromkeys(way.split(":")[1] for way in sys.argv[1:])
    print(*(rope for rope in ropes if not SCALINGS[rope].trained_by))
