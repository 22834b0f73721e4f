# SPDX-License-Identifier: Apache-2.0
"""Write a random Llama of 0.1 M parameters and a tokenizer of 512 tokens, for --smoke.

python examples/quickstart/tiny_model.py --text docs/ --output runs/smoke/tiny
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_cream.corpus.tokenizers import train_bpe

WINDOW = 64


def main() -> None:
    """Train the tokenizer, draw the model, save both as a Hugging Face folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, required=True, help="folder of .md files")
    parser.add_argument("--output", type=Path, required=True, help="new folder")
    args = parser.parse_args()
    texts = [path.read_text("utf-8") for path in sorted(args.text.glob("*.md"))]
    tokenizer = train_bpe(texts, 512, args.output)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=WINDOW,
        eos_token_id=tokenizer.eod,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(args.output)


if __name__ == "__main__":
    main()
