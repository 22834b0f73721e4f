# SPDX-License-Identifier: Apache-2.0
"""A small model and a small dataset for runs of the real trainer."""

import numpy as np

# Small, and large enough for two checkpoints: half of them is a whole number.
ITERATIONS = 6
FLAGS = [
    *("--num-layers", "4", "--hidden-size", "64", "--num-attention-heads", "4"),
    *("--seq-length", "96", "--max-position-embeddings", "96", "--target-length", "768"),
    *("--position-embedding-type", "rope", "--no-create-attention-mask-in-dataloader"),
    *("--micro-batch-size", "1", "--global-batch-size", "4"),
    *("--train-iters", str(ITERATIONS)),
    *("--lr", "1e-3", "--min-lr", "1e-4", "--eval-iters", "1", "--eval-interval", "100"),
    *("--split", "80,20,0", "--tokenizer-type", "NullTokenizer", "--vocab-size", "120"),
    *("--make-vocab-size-divisible-by", "32", "--num-workers", "0", "--log-interval", "1"),
    *("--attention-dropout", "0", "--hidden-dropout", "0", "--init-method-std", "0.1"),
]


def write_dataset(prefix, lengths, seed=0, vocabulary=120):
    """Write documents of the given lengths: a first token, then each the last one plus a step."""
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    rng = np.random.default_rng(seed)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for length in lengths:
        first, step = rng.integers(vocabulary), rng.integers(1, 7)
        document = (first + step * np.arange(length)) % vocabulary
        builder.add_document(torch.from_numpy(document), [length])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)
