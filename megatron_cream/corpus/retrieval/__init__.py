# SPDX-License-Identifier: Apache-2.0
"""Documents that train a model to find what it read: facts, and questions about them.

    maker = DocumentMaker(tokenizer, length=8192, seed=1234)
    maker.make(7)        # int64 [8192], a pure function of seed and number

make_dataset writes them as an indexed dataset (megatron-cream retrieval-data).
"""

from megatron_cream.corpus.retrieval.documents import (
    DocumentMaker,
    RetrievalConfig,
    make_dataset,
)
from megatron_cream.corpus.retrieval.words import Haystack, read_haystack

__all__ = ["DocumentMaker", "Haystack", "RetrievalConfig", "make_dataset", "read_haystack"]
