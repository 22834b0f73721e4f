# SPDX-License-Identifier: Apache-2.0
"""The files of a tokenizer: found, read, and refused by name."""

import json
from pathlib import Path
from typing import Any

from megatron_cream.errors import UserError


def check_model(path: Path, needed: str) -> None:
    """Raise FileNotFoundError, naming what is ``needed``, where there is no file."""
    if not path.is_file():
        raise FileNotFoundError(f"--tokenizer-model {path}: not found, needs {needed}")


def read_tokenizer_json(path: Path) -> Any:
    """Return the library's tokenizer without the truncation and padding that the file may ask for.

    Raises:
        UserError: a file that cannot be parsed.
    """
    from tokenizers import Tokenizer as Model

    try:
        model = Model.from_file(str(path))
    except Exception as exc:  # the library raises bare Exception for everything it cannot parse
        raise UserError(
            f"--tokenizer-model {path}: not readable, needs a tokenizer.json ({exc})"
        ) from exc
    if not model.get_vocab():
        raise UserError(f"--tokenizer-model {path}: has no vocabulary, needs one")
    model.no_truncation()
    model.no_padding()
    return model


def special_token(path: Path, key: str) -> str | None:
    """The token under `key`, spelled as a string or as {"content": string}; None without one."""
    if not path.is_file():
        return None
    try:
        token = json.loads(path.read_text("utf-8")).get(key)
    except (ValueError, AttributeError, RecursionError) as exc:
        raise UserError(f"--tokenizer-model {path}: needs a JSON object ({exc})") from exc
    token = token.get("content") if isinstance(token, dict) else token
    if token is not None and not isinstance(token, str):
        raise UserError(f"--tokenizer-model {path}: has {key} {token!r}, needs a text")
    return token
