# SPDX-License-Identifier: Apache-2.0
"""An evaluation as the command runs it, here or on ranks, and a small model to evaluate."""

import json
from pathlib import Path

VOCABULARY = 384
TEXT = "The pass key is 12345. line amber-lantern: REGISTER_CONTENT is <67890>\n What is the? "


def run(settings) -> str:
    """Evaluate and return what the command prints."""
    from megatron_cream.evaluation.evaluate import evaluate, format_results

    results = evaluate(settings)
    return format_results(results) if results else ""


def scored_lines(checkpoint: str, task: str, settings: dict, layout: tuple[int, int]) -> None:
    """Run tools/evaluate.py's run on this rank."""
    from megatron_cream.mcore import cpu

    cpu.install()
    from support.arguments import arguments

    tensor, pipeline = layout
    args = arguments(
        tasks=[task],
        checkpoint=checkpoint,
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        **settings,
    )
    print(json.dumps(run(args)))


def write_small_hf(folder: Path) -> str:
    """Write a random model of two layers whose vocabulary is larger than its tokenizer's."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from megatron_cream.corpus.tokenizers import train_bpe

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
