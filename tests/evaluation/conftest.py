# SPDX-License-Identifier: Apache-2.0
"""A small Llama with a tokenizer, as a Hugging Face folder."""

import pytest

VOCABULARY = 384
TEXT = "The pass key is 12345. line amber-lantern: REGISTER_CONTENT is <67890>\n What is the? "


@pytest.fixture(scope="session")
def small_hf(tmp_path_factory):
    """Folder of a random model of two layers whose vocabulary is larger than its tokenizer's."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from megatron_cream.data.tokenizers import train_bpe

    folder = tmp_path_factory.mktemp("hf")
    train_bpe([TEXT * 50], VOCABULARY - 7, folder)
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)
