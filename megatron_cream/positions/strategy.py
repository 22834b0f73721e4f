# SPDX-License-Identifier: Apache-2.0
"""Strategy and SampleLayout: where training tokens pretend to stand, and which tokens they read.

A new strategy is one class: it names itself, declares its options, and makes layouts. Its flags,
their help, checkpoint settings and checks of choices and numbers follow from the declarations.

    @dataclass(frozen=True)
    class Shifted(Strategy, name="shifted"):
        most: int = option("largest shift in tokens", default=64, type=int)

        def layout(self, seed: int, index: int) -> SampleLayout: ...

Here are the interface, the registry by name, and the two that read one span of text: plain
positions and RandPos.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, ClassVar, Self

import numpy as np

from megatron_cream.errors import UserError
from megatron_cream.options import Option
from megatron_cream.positions import philox

Span = tuple[int, int]
"""(offset, length) in tokens."""


@dataclass(frozen=True)
class SampleLayout(ABC):
    """One sample of ``train_length`` tokens that pretends to span ``target_length``."""

    train_length: int
    target_length: int

    @property
    @abstractmethod
    def position_ids(self) -> np.ndarray:
        """int64 ``[train_length]``, strictly increasing, within ``[0, target_length)``.

        A new array at every call, the caller's own.
        """

    @abstractmethod
    def runs(self) -> list[Span] | None:
        """Maximal pieces of consecutive positions as (first position, length).

        None where there are about as many pieces as tokens.
        """

    def spans(self, document_length: int) -> list[Span]:
        """Return the tokens of the document to read, as (offset, length), in reading order.

        The lengths sum to ``train_length``, the spans lie inside the document and do not overlap.

        Raises:
            UserError: the document has fewer than ``train_length`` tokens.
        """
        if document_length < self.train_length:
            raise UserError(
                f"document_length is {document_length}: a sample takes train_length "
                f"(--seq-length) = {self.train_length} tokens of one document; drop shorter ones "
                "(--min-tokens of tools/preprocess_data.py) or train on --sample-unit packed"
            )
        return self._spans(int(document_length))  # numpy's integers would overflow in a draw

    @abstractmethod
    def _spans(self, document_length: int) -> list[Span]: ...


@dataclass(frozen=True)
class ChunkLayout(SampleLayout):
    """A layout made of a few chunks of consecutive positions.

    ``chunks`` are (first position, length), in increasing order; some may be adjacent.
    """

    chunks: tuple[Span, ...]

    @property
    def position_ids(self) -> np.ndarray:
        table = _all_positions(self.target_length)
        return np.concatenate([table[start : start + length] for start, length in self.chunks])

    def runs(self) -> list[Span]:
        joined: list[Span] = []
        for start, length in self.chunks:
            if joined and sum(joined[-1]) == start:
                joined[-1] = (joined[-1][0], joined[-1][1] + length)
            elif length:
                joined.append((start, length))
        return joined


@lru_cache(maxsize=4)
def _all_positions(target_length: int) -> np.ndarray:
    """0 .. T-1, kept: copying pieces of it is three times as fast as counting them out anew."""
    table = np.arange(target_length, dtype=np.int64)
    table.flags.writeable = False
    return table


STRATEGIES: dict[str, type[Strategy]] = {}
"""Every strategy by its name, the value of --position-strategy."""


def option(help: str, default: Any = None, **facts: Any) -> Any:
    """Declare a setting of a strategy: a field of its dataclass, with an ``Option``."""
    return field(default=default, metadata={"option": Option(help, default, **facts)})


@dataclass(frozen=True)
class Strategy(ABC):
    """Where training tokens pretend to stand. Immutable; a layout depends on nothing else.

    Attributes:
        train_length: N, tokens in a sample (--seq-length).
        target_length: T, the window the positions reach (--target-length).
    """

    train_length: int
    target_length: int

    method: ClassVar[str] = ""
    """Name of the strategy, which a class is registered by."""

    def __init_subclass__(cls, name: str = "", **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if name in STRATEGIES:
            raise ValueError(f"strategy {name!r} is registered twice")
        if name:
            cls.method = name
            STRATEGIES[name] = cls

    @classmethod
    def declared(cls) -> dict[str, Option]:
        """Return the declared settings by the names of their fields."""
        fields = dataclasses.fields(cls)
        return {one.name: one.metadata["option"] for one in fields if "option" in one.metadata}

    @classmethod
    def setting(cls, option: str) -> str:
        """Return an option's name in a checkpoint; with dashes in place of ``_`` it is its flag."""
        return f"{cls.method}_{option}".replace("-", "_")

    @classmethod
    def flag(cls, option: str) -> str:
        """Return an option's flag."""
        return "--" + cls.setting(option).replace("_", "-")

    @classmethod
    def recommended(
        cls, train_length: int, target_length: int, given: dict[str, Any]
    ) -> dict[str, Any]:
        """Return the options of a run that names ``given`` alone, where lengths (tokens) decide."""
        return given

    @property
    def name(self) -> str:
        """Value of --position-strategy."""
        return self.method

    def __post_init__(self) -> None:
        for name in ("train_length", "target_length"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | np.integer):
                raise TypeError(f"{name} is {value!r}: it must be a whole number of tokens")
            object.__setattr__(self, name, int(value))
        if self.train_length < 1:
            raise UserError(
                f"train_length (--seq-length) is {self.train_length}: it must be at least 1 token"
            )
        if self.target_length < self.train_length:
            raise UserError(
                f"target_length (--target-length) is {self.target_length}: it must be at least "
                f"train_length (--seq-length) = {self.train_length}"
            )
        for name, one in self.declared().items():
            self._check_option(name, one)

    def _check_option(self, name: str, declared: Option) -> None:
        """Check what the declaration alone says; whole numbers depend on lengths."""
        value = getattr(self, name)
        if value is None or declared.many or declared.type is int:
            return
        if needed := declared.needed(value):
            shown = repr(value) if declared.choices else value
            raise UserError(f"{name} ({self.flag(name)}) is {shown}: it must be {needed}")

    @property
    def factor(self) -> float:
        """f = T / N, any real number of at least 1."""
        return self.target_length / self.train_length

    @property
    def content_length(self) -> int:
        """Tokens of text a sample is chosen from: T where content follows positions."""
        return self.target_length

    @property
    def shortest_length(self) -> int:
        """Fewest tokens a sample can have with these options and T; see ``for_length``."""
        return 1

    def for_length(self, train_length: int) -> Self:
        """Return this strategy for samples of another length that reach the same T.

        Raises:
            UserError: ``train_length`` is below ``shortest_length`` or above T.
        """
        return replace(self, train_length=train_length)

    def scale(self, seed: int, index: int) -> float | None:
        """Return the scale of sample ``index`` where each has one; pure, as its layout."""
        return None

    @abstractmethod
    def layout(self, seed: int, index: int) -> SampleLayout:
        """Return the layout of sample ``index``; pure, no state, any order."""


def strategy_class(name: str) -> type[Strategy]:
    """Return the class of a strategy.

    Raises:
        UserError: an unknown name.
    """
    if name not in STRATEGIES:
        raise UserError(
            f"strategy (--position-strategy) is {name!r}: it must be one of {tuple(STRATEGIES)}"
        )
    return STRATEGIES[name]


def make_strategy(name: str, train_length: int, target_length: int, **options: Any) -> Strategy:
    """Return the strategy ``name`` for samples of N tokens that reach T positions.

    Args:
        name: ``full``, ``cream``, ``pose``, ``randpos`` or ``scatter``.
        train_length: N, tokens in a sample.
        target_length: T, the window to reach in tokens, at least N.
        options: fields of the strategy's class, for instance ``sigma_relative=0.375``.

    Returns:
        The strategy: ``layout(seed, index)`` has ``position_ids``, int64 ``[train_length]``, and
        the ``spans`` of a document to read. Each class names the paper that it is from.

    Raises:
        UserError: an unknown name or option, or a value that cannot give a right layout.
    """
    cls = strategy_class(name)
    known = {one.name for one in dataclasses.fields(cls)}
    unknown = sorted(set(options) - known)
    if unknown:
        allowed = sorted(known - {"train_length", "target_length"})
        raise UserError(f"strategy {name!r} has no option {unknown[0]!r}: it takes {allowed}")
    return cls(train_length=train_length, target_length=target_length, **options)


@dataclass(frozen=True)
class FullLayout(ChunkLayout):
    """Positions 0 .. N-1 over the first N tokens."""

    def _spans(self, document_length: int) -> list[Span]:
        return [(0, self.train_length)]


@dataclass(frozen=True)
class Full(Strategy, name="full"):
    """Plain positions ``0 .. N-1``: ordinary training at N."""

    @property
    def content_length(self) -> int:
        return self.train_length

    def layout(self, seed: int, index: int) -> SampleLayout:
        return FullLayout(self.train_length, self.target_length, ((0, self.train_length),))


@dataclass(frozen=True, eq=False)  # arrays have no one truth value
class RandPosLayout(SampleLayout):
    """N sorted positions out of T over the first N tokens."""

    positions: np.ndarray = field(repr=False)

    @property
    def position_ids(self) -> np.ndarray:
        return self.positions.copy()

    def runs(self) -> None:
        return None

    def _spans(self, document_length: int) -> list[Span]:
        return [(0, self.train_length)]


@dataclass(frozen=True)
class RandPos(Strategy, name="randpos"):
    """Sorted uniform positions without replacement (Ruoss et al. 2023, arXiv:2305.16843)."""

    @property
    def content_length(self) -> int:
        return self.train_length

    def layout(self, seed: int, index: int) -> SampleLayout:
        rng = philox.generator(seed, index)
        positions = rng.choice(self.target_length, self.train_length, replace=False, shuffle=False)
        positions.sort()
        return RandPosLayout(self.train_length, self.target_length, positions)
