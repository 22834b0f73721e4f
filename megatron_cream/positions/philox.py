# SPDX-License-Identifier: Apache-2.0
"""Random numbers that are a pure function of (seed, sample index).

A counter-based generator has no state worth saving: every worker, rank and restart that asks for
sample 7 of seed 1234 gets the same numbers, and a middle pipeline stage draws the positions of a
sample without a message from the stage that read its tokens.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

_MASK = (1 << 64) - 1
_BUFFER = 4  # Philox4x64 makes four 64-bit words per block


def words(seed: int, index: int, count: int, stream: int = 0) -> list[int]:
    """Return ``count`` uniform 64-bit words for one sample; ``stream`` as in ``generator``.

    Stream 0 equals ``numpy.random.Philox(key=[seed, index]).random_raw(count)``. Building that
    object costs 28 us, more than the rest of a sample; re-keying one that exists costs 2.
    """
    found: list[int] = _keyed(seed, index, stream).random_raw(count).tolist()
    return found


def generator(seed: int, index: int, stream: int = 0) -> np.random.Generator:
    """Return a numpy Generator of its own for draws that need a whole distribution.

    ``stream`` separates uses of the same (seed, index) that must not share numbers.
    """
    key = np.array([int(seed) & _MASK, int(index) & _MASK], dtype=np.uint64)
    counter = np.array([0, 0, 0, stream], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def below(word: int, bound: int) -> int:
    """Map a uniform 64-bit word to a uniform integer in ``[0, bound)``.

    Multiply-and-shift; its bias is at most bound / 2**64.
    """
    return (word * bound) >> 64


def unit(word: int) -> float:
    """Map a uniform 64-bit word to a float in ``[0, 1)`` with 53 random bits."""
    return (word >> 11) * 2.0**-53


class _Rekeyed(threading.local):
    """One Philox per thread, and the state that its setter copies from: key and counter in it."""

    def __init__(self) -> None:
        philox = np.random.Philox(key=np.zeros(2, dtype=np.uint64))
        key, counter = [0, 0], [0] * _BUFFER
        state: Any = {
            **philox.state,
            # Lists, not the arrays that are there: the setter reads them item by item.
            "state": {"counter": counter, "key": key},
            "buffer": [0] * _BUFFER,
            "buffer_pos": _BUFFER,  # nothing left over: the next word starts a block
        }
        self.parts = philox, state, key, counter


_rekeyed = _Rekeyed()


def _keyed(seed: int, index: int, stream: int) -> np.random.Philox:
    philox, state, key, counter = _rekeyed.parts
    key[0] = int(seed) & _MASK
    key[1] = int(index) & _MASK
    counter[-1] = stream
    philox.state = state
    return philox
