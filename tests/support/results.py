# SPDX-License-Identifier: Apache-2.0
"""Made-up results of evaluations."""

import itertools

import numpy as np

from megatron_cream.evaluation.evaluation_tasks import TASKS
from megatron_cream.evaluation.perplexity import perplexity_results
from megatron_cream.evaluation.results import buckets
from megatron_cream.evaluation.scoring import case_results

LENGTHS, WINDOW = (1024, 2048, 4096), 2048


def result_of(task, name="model", share=0.5, lengths=LENGTHS, places=5, seeds=3):
    """Results of made-up cases, ``share`` of which are hits."""
    rng, kind = np.random.default_rng([len(name), places]), TASKS[task]
    cases = [
        {
            **{"length": length, "seed": seed, "haystack": 0, "index": i},
            **{"where": i / (places - 1), "hit": bool(rng.random() < share), "number": False},
            **{"items": 0.0, "tokens": 0.0, "logprob": -1.0, "answer_tokens": 5},
        }
        for length, seed, i in itertools.product(lengths, range(seeds), range(places))
    ]
    found = case_results(cases, places, kind.number, kind.placed)
    return {"task": task, "name": name, "window": WINDOW} | found


def perplexities_of(name, nll, lengths=LENGTHS):
    """Results of documents with ``nll[d]`` nats a target, less a little at longer lengths."""
    documents = [
        {
            **{"length": length, "document": number},
            "nll": [100 * (value - i / 50) for i in range(len(buckets(length)) - 1)],
            "targets": [100] * (len(buckets(length)) - 1),
        }
        for length in lengths
        for number, value in enumerate(nll)
    ]
    return {"task": "perplexity", "name": name, "window": WINDOW} | perplexity_results(documents)
