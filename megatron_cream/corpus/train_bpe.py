# SPDX-License-Identifier: Apache-2.0
"""A byte-level BPE of one's own texts."""

import json
from collections.abc import Iterable
from pathlib import Path

from megatron_cream.corpus.tokenizer_types import HuggingFaceTokenizer
from megatron_cream.errors import UserError

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
