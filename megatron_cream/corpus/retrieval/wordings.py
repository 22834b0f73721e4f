# SPDX-License-Identifier: Apache-2.0
"""Words retrieval documents: how a record, a needle and a question are written.

Templates have ``{k}`` and ``{v}`` for key and value, ``{t}`` for what the values are ("access
code"), ``{i}`` for the number of the record and ``{n}`` for a number that means nothing. A question
is asked and answered; what stands before ``{v}`` in it is all that a model sees when it answers.
None is a wording of ``megatron_cream.evaluation``, and some are near to each of its tasks.
"""

from __future__ import annotations

from dataclasses import dataclass

_THINGS = """
access code, account, balance, batch number, charge, checksum, contact, deposit, extension, file id,
index, label, license, locker, offset, order, password, price, reading, reference, registration,
room, score, secret, serial number, setting, signature, slot, tag, target, token
"""
THINGS = _THINGS.replace("\n", " ").strip().split(", ")


@dataclass(frozen=True)
class RecordFormat:
    """One way to write a list of records.

    Attributes:
        intros: what may stand before it; may be empty.
        opening, record, closing: the list; ``closing`` takes the place of ``cut`` at its end.
        cut: characters at the end of the last record that ``closing`` replaces.
        questions: each a question and its answer.
    """

    intros: tuple[str, ...]
    record: str
    questions: tuple[str, ...]
    opening: str = ""
    closing: str = ""
    cut: int = 0


_PLAIN = (
    "Question: what is the {t} of {k}?\nAnswer: {v}\n",
    "Q: Give the {t} of {k}.\nA: {v}\n",
    "What is the {t} of {k}? The {t} of {k} is {v}.\n",
    "Find the {t} that belongs to {k}: {v}\n",
    "The {t} recorded for {k} is {v}.\n",
)
_QUOTED = (
    'key "{k}" has the {t} "{v}"\n',
    'Look up "{k}".\nIts {t} is "{v}"\n',
    'Which {t} goes with "{k}"?\nAnswer: "{v}"\n',
    'lookup("{k}") -> "{v}"\n',
    'Wanted: "{k}"\nFound: "{v}"\n',
)
_CODE = (
    'print(table["{k}"])\n# prints {v}\n',
    'assert table["{k}"] == "{v}"\n',
    ">>> table[\"{k}\"]\n'{v}'\n",
    'The call get("{k}") returns "{v}"\n',
)

RECORDS: dict[str, RecordFormat] = {
    "prose": RecordFormat(
        (
            "Facts to keep in mind.\n",
            "Read these notes with care.\n",
            "Notes on the {t} of each.\n",
        ),
        "The {t} of {k} is {v}. ",
        (
            "\nWhat was the {t} of {k}? It was {v}.\n",
            "\nAccording to the notes, {k} has the {t} {v}.\n",
        ),
    ),
    "sentences": RecordFormat(
        ("Some statements follow, one a line.\n", "Here is what we know.\n"),
        "{k} has the {t} {v}.\n",
        _PLAIN,
    ),
    "register": RecordFormat(
        (
            "This register has an entry and its {t} on each row. Keep all of them in mind.\n\n",
            "Every row below gives a name and its {t}.\n\n",
            "List of entries. You will be asked for some of them at the end.\n",
        ),
        "row {k}: {t} is <{v}>\n",
        (
            "\nThe list ends here. Which {t} does row {k} have?\nThe {t} of row {k} is <{v}>\n",
            "\nTell me the {t} in row {k}.\nRow {k} has <{v}>\n",
            "\nrow {k} again: {t} is <{v}>\n",
        ),
    ),
    "brackets": RecordFormat(
        ("Entries and their contents:\n", ""),
        "entry {k} holds [{v}]\n",
        (
            "\nWhat does entry {k} hold?\nEntry {k} holds [{v}]\n",
            "\nRecall entry {k}: [{v}]\n",
        ),
    ),
    "json": RecordFormat(
        (
            "The object below maps names to values.\n",
            "JSON:\n",
            "Here is a dictionary; look up what is asked for.\n",
        ),
        '"{k}": "{v}",\n',
        _QUOTED,
        opening="{{\n",
        closing="\n}}\n\n",
        cut=2,
    ),
    "json-row": RecordFormat(
        ("Data as JSON:\n", "A single object:\n", ""),
        '"{k}": "{v}", ',
        _QUOTED,
        opening="{{",
        closing="}}\n\n",
        cut=2,
    ),
    "jsonl": RecordFormat(
        ("Lines of JSON:\n", ""),
        '{{"id": "{k}", "value": "{v}"}}\n',
        (
            '{{"query": "{k}", "answer": "{v}"}}\n',
            '\nThe value with id "{k}" is "{v}"\n',
            '\nselect value where id = "{k}"\n"{v}"\n',
        ),
    ),
    "csv": RecordFormat(
        ("A table with commas between its columns.\n", ""),
        "{i},{k},{v}\n",
        (
            "\nThe {t} column says of {k}: {v}\n",
            "\nlook up {k} in the table\nresult: {v}\n",
        ),
        opening="number,name,{t}\n",
    ),
    "table": RecordFormat(
        ("The table lists the {t} of every name.\n\n", ""),
        "| {k} | {n} | {v} |\n",
        (
            "\nIn the table, the {t} of {k} is {v}\n",
            "\nWhich {t} stands in the row of {k}? {v}\n",
        ),
        opening="| name | count | {t} |\n| --- | --- | --- |\n",
    ),
    "python": RecordFormat(
        ("A module with constants.\n\n", ""),
        'table["{k}"] = "{v}"\n',
        _CODE,
        opening="table = dict()\n",
    ),
    "log": RecordFormat(
        ("Log of the service:\n", ""),
        "[{i}] INFO stored {k} with {t} {v}\n",
        (
            "\nWith which {t} was {k} stored? With {v}\n",
            "\ngrep {k} service.log | cut -f 7\n{v}\n",
        ),
    ),
    "settings": RecordFormat(
        ("Configuration file:\n", ""),
        "{k} = {v}\n",
        ("\n$ get {k}\n{v}\n", "\nThe option {k} is set to {v}\n", "\necho ${k}\n{v}\n"),
    ),
    "numbered": RecordFormat(
        ("Numbered list.\n", "The {t} of each, in no order.\n"),
        "{i}. {k} - {v}\n",
        ("\nWhat stands beside {k}? {v}\n", "\nComplete the item: {k} - {v}\n"),
    ),
    "yaml": RecordFormat(
        ("items:\n", ""),
        "- name: {k}\n  {t}: {v}\n",
        ("\nitem with name {k}\n  {t}: {v}\n", "\nThe item {k} has {t}: {v}\n"),
    ),
    "markup": RecordFormat(
        ("<records>\n", ""),
        '<record name="{k}">{v}</record>\n',
        ('\n<answer name="{k}">{v}</answer>\n', '\nText of the record "{k}": {v}\n'),
    ),
    "sql": RecordFormat(
        ("Statements that were run:\n", ""),
        "INSERT INTO store VALUES ('{k}', '{v}');\n",
        (
            "\nSELECT value FROM store WHERE name = '{k}';\n'{v}'\n",
            "\nThe value inserted for '{k}' was '{v}'\n",
        ),
    ),
}


@dataclass(frozen=True)
class NeedleWording:
    """One way to hide facts in other text.

    Attributes:
        intros: what may stand before; may be empty.
        needle: the fact, with a space before it.
        questions: as in ``RecordFormat``.
    """

    intros: tuple[str, ...]
    needle: str
    questions: tuple[str, ...]


NEEDLES: tuple[NeedleWording, ...] = (
    NeedleWording(
        ("Somewhere in this text codes are given. Note each of them.\n", ""),
        " The secret {t} of {k} is: {v}.",
        (
            "\nWhich secret {t} does {k} have? The secret {t} of {k} is: {v}\n",
            "\nWhat is the secret {t} of {k}?\nIt is: {v}\n",
        ),
    ),
    NeedleWording(
        ("Facts are hidden in the following pages.\n", ""),
        " One thing to note: {k} was given the {t} {v}.",
        (
            "\nWhat was {k} given? {k} was given the {t} {v}\n",
            "\nName the {t} that {k} was given: {v}\n",
        ),
    ),
    NeedleWording(
        ("Read on, and note what is said about each {t}.\n", ""),
        " (Note: {k} -> {v})",
        ("\nNote about {k}? {k} -> {v}\n", "\n{k} ->  {v}\n".replace("  ", " ")),
    ),
    NeedleWording(
        ("You will be asked about single sentences of this text.\n", ""),
        " The {t} that one should use for {k} is {v}.",
        (
            "\nWhich {t} should one use for {k}? One should use {v}\n",
            "\nFor {k} use: {v}\n",
        ),
    ),
    NeedleWording(
        ("", "Text with remarks.\n"),
        " It is worth remembering that {k} stands for {v}.",
        (
            "\nWhat does {k} stand for? {k} stands for {v}\n",
            "\nRemember: {k} stands for {v}\n",
        ),
    ),
)

PASSKEYS: tuple[NeedleWording, ...] = (
    NeedleWording(
        ("A password is given once in what follows. Keep it in mind.\n", ""),
        " The password is {v}. Do not forget {v}, it is the password.",
        ("\nWhat is the password? The password is {v}\n", "\nThe password was {v}\n"),
    ),
    NeedleWording(
        ("Only one line of this matters.\n", "Look for the number of the vault.\n"),
        " The vault opens with {v}. Keep it in mind: {v} opens the vault.",
        (
            "\nWith which number does the vault open? It opens with {v}\n",
            "\nThe number of the vault: {v}\n",
        ),
    ),
    NeedleWording(
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
