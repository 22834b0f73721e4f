# SPDX-License-Identifier: Apache-2.0
"""The methods by name, as commands ask for them, and their sizes where none are given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_cream.errors import UserError
from megatron_cream.options import flag_field, flag_name

if TYPE_CHECKING:
    from megatron_cream.attention.bands import Bands

# By the name of the function in ``attention.bands``: its sizes, of the window and the longest text.
METHODS: dict[str, Callable[[int, int], dict[str, int]]] = {
    # ChunkLlama's own (github.com/HKUNLP/ChunkLlama).
    "dual_chunk": lambda window, _: {
        "chunk_size": 3 * window // 4,
        "local_size": window // 8,
        "original_max_position_embeddings": 0,  # no factor on logits
    },
    # arXiv:2410.18745, section 4.
    "string": lambda window, _: {"shift": window // 3, "local_size": min(128, window // 3)},
    # The group that brings the longest text within the window (arXiv:2401.01325, section 4).
    "self_extend": lambda window, longest: {
        "group_size": max(1, -(-(longest - window // 4) // (window - window // 4))),
        "window": window // 4,
    },
}


@dataclass(frozen=True)
class AttentionChoice:
    """One method, and the sizes that were given."""

    name: str
    given: tuple[tuple[str, int], ...] = ()

    @staticmethod
    def read(name: str, words: Sequence[str]) -> AttentionChoice:
        """Return the choice of a method with sizes ``KEY=N``.

        Raises:
            UserError: a size of another form.
        """
        return AttentionChoice(name, tuple(_sizes(name, words)))

    @property
    def flag(self) -> str:
        """The flag that asks for it."""
        return flag_name(self.name)

    def sizes(self, window: int, longest: int, own: dict[str, Any] | None = None) -> dict[str, int]:
        """Return the sizes in tokens.

        Args:
            window: of the model, tokens.
            longest: text that is asked for, tokens.
            own: ``dual_chunk_attention_config`` of the model, which goes before the defaults.
        """
        defaults = METHODS[self.name](window, longest)
        found = {key: own[key] for key in defaults if own and key in own}
        return defaults | found | dict(self.given)

    def bands(self, sizes: dict[str, int]) -> Bands:
        """Return the bands of these sizes.

        Raises:
            UserError: sizes that do not go together.
        """
        from megatron_cream.attention import bands

        try:
            found: Bands = getattr(bands, self.name)(**sizes)
        except UserError as error:
            raise UserError(f"{self.flag}: {error}") from None
        return found


def saved_attention(args: Any) -> AttentionChoice | None:
    """Return the dual chunk attention that a run trained with, by its saved arguments."""
    words = getattr(args, "dual_chunk", None)
    return None if words is None else AttentionChoice.read("dual_chunk", words)


def method_flag(name: str, what: str) -> Any:
    """Declare the field of a command's settings that asks for a method."""
    keys = " ".join(f"{key}=N" for key in METHODS[name](8, 8))
    help_ = f"{what}; sizes in tokens may follow: {keys} (docs/attention.md)"
    return flag_field(help_, default=None, many="*", metavar="KEY=N")


def attention_choice(settings: Any) -> AttentionChoice | None:
    """Return the method that settings with the fields of ``METHODS`` ask for.

    Raises:
        UserError: two of them, or a size of another form.
    """
    given = {
        name: words for name in METHODS if (words := getattr(settings, name, None)) is not None
    }
    if len(given) > 1:
        raise UserError(f"{' and '.join(map(flag_name, given))} are given: at most one can be")
    for name, words in given.items():
        return AttentionChoice.read(name, words)
    return None


def _sizes(name: str, words: Sequence[str]) -> list[tuple[str, int]]:
    known = METHODS[name](8, 8)
    found = []
    for word in words:
        key, _, number = word.partition("=")
        if key not in known or not (number.isascii() and number.isdigit() and len(number) < 10):
            raise UserError(
                f"{flag_name(name)} has {word!r}: it must be KEY=N in tokens, with KEY one of "
                f"{', '.join(known)}"
            )
        found.append((key, int(number)))
    return found
