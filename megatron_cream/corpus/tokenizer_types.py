# SPDX-License-Identifier: Apache-2.0
"""Tokenizers of each type: Hugging Face, SentencePiece and plain bytes."""

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cream.corpus.tokenizer_files import check_model, read_tokenizer_json, special_token
from megatron_cream.errors import UserError


class ByteLevelTokenizer:
    """Ids 0 to 255 are the UTF-8 bytes, 256 ends a document. Needs no model file."""

    name = "ByteLevelTokenizer"
    vocab_size = 257
    eod: int | None = 256
    bos: int | None = None

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Bytes of each text as int32 arrays of shape (bytes,)."""
        return [np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32) for text in texts]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of the bytes; eod is left out, and bytes that are not UTF-8 become U+FFFD.

        Raises:
            UserError: an id outside 0 to 256.
        """
        array = np.asarray(ids, dtype=np.int64)
        if array.size and not 0 <= array.min() <= array.max() < self.vocab_size:
            raise UserError(f"ids {array.min()} to {array.max()}: needs 0 to 256")
        return array[array != self.eod].astype(np.uint8).tobytes().decode("utf-8", "replace")


class HuggingFaceTokenizer:
    """A `tokenizer.json`, run by the `tokenizers` library itself.

    Special tokens written out in the text become their ids, as that library does by default;
    none are added around it. Truncation and padding saved in the file are turned off, since
    either would change documents in silence.

    Args:
        model: a folder that holds `tokenizer.json`, or the path of that file. `eos_token` and
            `bos_token` come from `tokenizer_config.json`, then `special_tokens_map.json`, beside.

    Raises:
        FileNotFoundError: no such file.
        UserError: a file that cannot be parsed, or a special token that is not in the vocabulary.
    """

    name = "HuggingFaceTokenizer"

    def __init__(self, model: str | Path) -> None:
        path = Path(model)
        path = path / "tokenizer.json" if path.is_dir() else path
        check_model(path, "a tokenizer.json or a folder that holds one")
        self._tokenizer = read_tokenizer_json(path)
        self.vocab_size = max(self._tokenizer.get_vocab().values()) + 1
        self.eod = self._special_id(path.parent, "eos_token")
        self.bos = self._special_id(path.parent, "bos_token")

    @cached_property
    def serialized(self) -> bytes:
        """The content of `tokenizer.json` as it is used: truncation and padding turned off."""
        return self._tokenizer.to_str().encode()

    @cached_property
    def description(self) -> dict[str, Any]:
        """`serialized`, parsed; not to be changed."""
        return json.loads(self.serialized)

    @property
    def template(self) -> str:
        """What the tokenizer puts around a text of its own accord, "" for nothing."""
        around = self._tokenizer.encode("").tokens
        return " ".join((*around[:1], "text", *around[1:])) if around else ""

    def words(self, text: str) -> list[str]:
        """What the pre-tokenizer splits a text into."""
        return [word for word, _ in self._tokenizer.pre_tokenizer.pre_tokenize_str(text)]

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Ids of each text: int32 arrays of shape (tokens,), no bos or eod added."""
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of one sequence of ids, special tokens included."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

    @property
    def begins_with_bos(self) -> bool:
        """Whether a text begins with bos where special tokens are added to it."""
        return self.bos is not None and self._tokenizer.encode("").ids[:1] == [self.bos]

    def _special_id(self, folder: Path, key: str) -> int | None:
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            token = special_token(folder / name, key)
            if token is not None:
                found = self._tokenizer.token_to_id(token)
                if found is None:
                    raise UserError(
                        f"--tokenizer-model {folder}: {name} has {key} {token!r}, "
                        "needs a token that tokenizer.json holds"
                    )
                return found
        return None


class SentencePieceTokenizer:
    """A SentencePiece `.model`; eod is its eos id.

    Raises:
        FileNotFoundError: no such file.
        UserError: a file that is not a SentencePiece model.
    """

    name = "SentencePieceTokenizer"

    def __init__(self, model: str | Path) -> None:
        check_model(Path(model), "a SentencePiece .model file")
        from sentencepiece import SentencePieceProcessor

        self._processor = SentencePieceProcessor()
        try:
            self._processor.Load(str(model))
        except (RuntimeError, OSError) as exc:
            raise UserError(
                f"--tokenizer-model {model}: not readable, needs a SentencePiece .model ({exc})"
            ) from exc
        self.vocab_size = self._processor.get_piece_size()
        self.eod = _present(self._processor.eos_id())
        self.bos = _present(self._processor.bos_id())

    @cached_property
    def pieces(self) -> list[str]:
        """The text of every piece, by id."""
        return [self._processor.id_to_piece(i) for i in range(self.vocab_size)]

    @cached_property
    def serialized(self) -> bytes:
        """The content of the `.model` file."""
        return self._processor.serialized_model_proto()

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Ids of each text: int32 arrays of shape (tokens,), no bos or eod added."""
        # One thread, since by default each worker would start one for every core.
        options = {"add_bos": False, "add_eos": False, "num_threads": 1}
        rows = self._processor.encode(texts, out_type=int, **options)
        return [np.array(row, dtype=np.int32) for row in rows]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of one sequence of ids."""
        return self._processor.decode([int(i) for i in ids])


def _present(token_id: int) -> int | None:
    """SentencePiece says -1 for a special token that the model does not have."""
    return token_id if token_id >= 0 else None
