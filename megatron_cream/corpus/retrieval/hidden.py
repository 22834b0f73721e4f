# SPDX-License-Identifier: Apache-2.0
"""The wordings of facts that are hidden in other text; as in ``formats``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Needle:
    """One way to hide facts in other text.

    Attributes:
        intros: what may stand before; may be empty.
        needle: the fact, with a space before it.
        questions: as in ``Format``.
    """

    intros: tuple[str, ...]
    needle: str
    questions: tuple[str, ...]


NEEDLES: tuple[Needle, ...] = (
    Needle(
        ("Somewhere in this text codes are given. Note each of them.\n", ""),
        " The secret {t} of {k} is: {v}.",
        (
            "\nWhich secret {t} does {k} have? The secret {t} of {k} is: {v}\n",
            "\nWhat is the secret {t} of {k}?\nIt is: {v}\n",
        ),
    ),
    Needle(
        ("Facts are hidden in the following pages.\n", ""),
        " One thing to note: {k} was given the {t} {v}.",
        (
            "\nWhat was {k} given? {k} was given the {t} {v}\n",
            "\nName the {t} that {k} was given: {v}\n",
        ),
    ),
    Needle(
        ("Read on, and note what is said about each {t}.\n", ""),
        " (Note: {k} -> {v})",
        ("\nNote about {k}? {k} -> {v}\n", "\n{k} ->  {v}\n".replace("  ", " ")),
    ),
    Needle(
        ("You will be asked about single sentences of this text.\n", ""),
        " The {t} that one should use for {k} is {v}.",
        (
            "\nWhich {t} should one use for {k}? One should use {v}\n",
            "\nFor {k} use: {v}\n",
        ),
    ),
    Needle(
        ("", "Text with remarks.\n"),
        " It is worth remembering that {k} stands for {v}.",
        (
            "\nWhat does {k} stand for? {k} stands for {v}\n",
            "\nRemember: {k} stands for {v}\n",
        ),
    ),
)

PASSKEYS: tuple[Needle, ...] = (
    Needle(
        ("A password is given once in what follows. Keep it in mind.\n", ""),
        " The password is {v}. Do not forget {v}, it is the password.",
        ("\nWhat is the password? The password is {v}\n", "\nThe password was {v}\n"),
    ),
    Needle(
        ("Only one line of this matters.\n", "Look for the number of the vault.\n"),
        " The vault opens with {v}. Keep it in mind: {v} opens the vault.",
        (
            "\nWith which number does the vault open? It opens with {v}\n",
            "\nThe number of the vault: {v}\n",
        ),
    ),
    Needle(
        ("An entry code is hidden among sentences that do not matter.\n", ""),
        " Note that the entry code is {v}.",
        ("\nTell me the entry code. The entry code is {v}\n", "\nentry code: {v}\n"),
    ),
)

REFRAINS = (
    " Rain falls on the roof. Cars go by. The clock ticks. Nothing happens here.",
    " One two three four. Round and round it goes. Nobody knows why.",
    " This sentence says nothing. Neither does this one. The next is no better.",
    " The river flows on. The wind comes and goes. Another day has passed.",
)
