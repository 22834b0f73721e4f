# SPDX-License-Identifier: Apache-2.0
"""Loads tokenizers (Hugging Face, SentencePiece, plain bytes) and trains a byte-level BPE."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megatron_cream.errors import UserError


class Tokenizer(Protocol):
    """What the rest of the package asks of a tokenizer.

    Attributes:
        name: the tokenizer type, as `load_tokenizer` takes it.
        vocab_size: one more than the largest id.
        eod: id that ends a document, None where the vocabulary has none.
        bos: id that begins a document, None where the vocabulary has none.
    """

    name: str
    vocab_size: int
    eod: int | None
    bos: int | None

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Ids of each text: int32 arrays of shape (tokens,), no bos or eod added."""
        ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of one sequence of ids, special tokens included."""
        ...

    def locate(self, text: str) -> LocatedTokens:
        """The tokens of a text, as ``encode`` gives them, and the characters of each."""
        ...


@dataclass(frozen=True)
class LocatedTokens:
    """Tokens, and where in their text they stand; together they cover all of it.

    Attributes:
        ids: int32 ``[tokens]``.
        starts, ends: int64 ``[tokens]``: token i has characters ``starts[i]`` up to ``ends[i]``, at
            least one. Tokens that are bytes of one character all have that character.
    """

    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray

    @classmethod
    def of(cls, ids: Sequence[int], spans: Sequence[tuple[int, int]]) -> LocatedTokens:
        """Give each token what lies between it and the one before, and one character at least.

        Libraries leave the white space in front of a word out of its span.
        """
        starts, ends = np.array(spans, dtype=np.int64).reshape(-1, 2).T
        ends = np.maximum.accumulate(ends)
        starts = np.minimum(starts, np.concatenate([[0], ends])[: len(ends)])
        return cls(np.array(ids, dtype=np.int32), starts, np.maximum(ends, starts + 1))

    def overlapping(self, stretches: Sequence[tuple[int, int]]) -> np.ndarray:
        """Return bool ``[tokens]``: which have a character of any of the stretches of the text.

        Args:
            stretches: first character and the one behind the last, in order and apart.
        """
        borders = np.array(stretches, dtype=np.int64).reshape(-1, 2)
        following = np.searchsorted(borders[:, 1], self.starts, side="right")
        begins = np.append(borders[:, 0], np.iinfo(np.int64).max)
        return begins[following] < self.ends


def _validate_model_file(path: Path, needed: str) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"--tokenizer-model {path}: not found, needs {needed}")


def _read_tokenizer_json(path: Path) -> Any:
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


def _read_special_token(path: Path, key: str) -> str | None:
    """Return the token under `key`, spelled as a string or as {"content": string}, or None."""
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


class ByteLevelTokenizer:
    """Ids 0 to 255 are the UTF-8 bytes, 256 ends a document. Needs no model file."""

    name = "ByteLevelTokenizer"
    vocab_size = 257
    eod: int | None = 256
    bos: int | None = None

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Bytes of each text as int32 arrays of shape (bytes,)."""
        return [np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32) for text in texts]

    def locate(self, text: str) -> LocatedTokens:
        """The bytes of a text, and the character that each is of."""
        (ids,) = self.encode([text])
        at = np.cumsum((ids & 0xC0) != 0x80) - 1  # a byte 10xxxxxx goes on with a character
        return LocatedTokens(ids, at, at + 1)

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
        _validate_model_file(path, "a tokenizer.json or a folder that holds one")
        self._tokenizer = _read_tokenizer_json(path)
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
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def locate(self, text: str) -> LocatedTokens:
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return LocatedTokens.of(encoding.ids, encoding.offsets)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of one sequence of ids, special tokens included."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

    @property
    def begins_with_bos(self) -> bool:
        """Whether a text begins with bos where special tokens are added to it."""
        return self.bos is not None and self._tokenizer.encode("").ids[:1] == [self.bos]

    def _special_id(self, folder: Path, key: str) -> int | None:
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            token = _read_special_token(folder / name, key)
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
        _validate_model_file(Path(model), "a SentencePiece .model file")
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
        # One thread, since by default each worker would start one for every core.
        rows = self._processor.encode(
            texts, out_type=int, add_bos=False, add_eos=False, num_threads=1
        )
        return [np.array(row, dtype=np.int32) for row in rows]

    def locate(self, text: str) -> LocatedTokens:
        processor: Any = self._processor
        if hasattr(processor, "EncodeAsOffsetMapping"):
            found = processor.EncodeAsOffsetMapping(text)
            return LocatedTokens.of(found["ids"], found["offsets"])
        pieces = processor.EncodeAsImmutableProto(text).pieces  # of earlier versions
        spans = [(piece.begin, piece.end) for piece in pieces]
        return LocatedTokens.of([piece.id for piece in pieces], spans)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of one sequence of ids."""
        return self._processor.decode([int(i) for i in ids])


def _present(token_id: int) -> int | None:
    """SentencePiece says -1 for a special token that the model does not have."""
    return token_id if token_id >= 0 else None


TOKENIZERS: dict[str, Any] = {
    cls.name: cls for cls in (HuggingFaceTokenizer, SentencePieceTokenizer, ByteLevelTokenizer)
}


def load_tokenizer(
    tokenizer_type: str,
    tokenizer_model: str | Path | None = None,
    append_eod: bool = False,
    prepend_bos: bool = False,
) -> Tokenizer:
    """Load a tokenizer by the name of its type.

    Args:
        tokenizer_type: a key of ``TOKENIZERS``.
        tokenizer_model: path of its file or folder, None for plain bytes.
        append_eod, prepend_bos: whether it must have those tokens.

    Raises:
        UserError: an unknown type, a model that is not given, not wanted or broken, or one without
            a token that is asked for.
        FileNotFoundError: a model file that does not exist.
    """
    if tokenizer_type not in TOKENIZERS:
        raise UserError(f"--tokenizer-type {tokenizer_type}: needs one of {', '.join(TOKENIZERS)}")
    loads = tokenizer_type != ByteLevelTokenizer.name
    if loads and not tokenizer_model:
        raise UserError(f"--tokenizer-model (not given): {tokenizer_type} needs a path")
    if tokenizer_model is not None and not loads:
        raise UserError(f"--tokenizer-model {tokenizer_model}: {tokenizer_type} needs it left out")
    tokenizer = TOKENIZERS[tokenizer_type](*([tokenizer_model] if loads else []))
    wanted = (
        ("--append-eod", append_eod, "an end of document", tokenizer.eod),
        ("--prepend-bos", prepend_bos, "a beginning of sequence", tokenizer.bos),
    )
    for flag, asked, kind, token in wanted:
        if asked and token is None:
            model = tokenizer_model or tokenizer_type
            raise UserError(f"{flag}: {model} has none, needs a tokenizer with {kind} token")
    return tokenizer


def digest(tokenizer: Tokenizer) -> str:
    """Return a name for the content of a tokenizer, wherever its files are."""
    content = getattr(tokenizer, "serialized", b"")
    content += json.dumps([tokenizer.name, tokenizer.eod, tokenizer.bos]).encode()
    return hashlib.blake2b(content, digest_size=16).hexdigest()


END_OF_TEXT = "<|endoftext|>"
# Every byte value needs an id, or some text would have none, and so does END_OF_TEXT.
MIN_BPE_VOCAB_SIZE = 257


def train_bpe(
    texts: Iterable[str], vocab_size: int, output_dir: str | Path
) -> HuggingFaceTokenizer:
    """Train a byte-level BPE with `<|endoftext|>` as eos and write a Hugging Face folder.

    Args:
        texts: documents to learn from.
        vocab_size: size to stop at, 257 or more. Little text gives a smaller vocabulary.
        output_dir: made if missing; gets `tokenizer.json` and `tokenizer_config.json`.

    Returns:
        The tokenizer, loaded from `output_dir`.

    Raises:
        UserError: a `vocab_size` that cannot hold every byte and the special token.
    """
    from tokenizers import Tokenizer as Model
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if vocab_size < MIN_BPE_VOCAB_SIZE:
        raise UserError(f"vocab_size {vocab_size}: needs {MIN_BPE_VOCAB_SIZE} or more")
    model = Model(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(texts, trainer)
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    model.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
    return HuggingFaceTokenizer(folder)
