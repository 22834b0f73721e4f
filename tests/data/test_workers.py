# SPDX-License-Identifier: Apache-2.0
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import pytest

from megatron_cream.data import workers as module
from megatron_cream.data.tokenizers import ByteLevelTokenizer, train_bpe


def end_process(texts):
    os._exit(1)


def test_same_bytes_for_every_number_of_workers(job, tmp_path, monkeypatch, run, outputs, kept):
    train_bpe(kept, 300, tmp_path / "tokenizer")
    job = replace(
        job,
        tokenizer_type="HuggingFaceTokenizer",
        tokenizer_model=str(tmp_path / "tokenizer"),
        append_eod=True,
    )
    run(job)
    monkeypatch.setattr(module, "_BATCH_DOCUMENTS", 2)
    run(job, workers=2, output_prefix=job.output_prefix + "2")
    assert outputs(job.output_prefix) == outputs(job.output_prefix + "2")


def test_workers_do_not_import_megatron():
    look = "[m for m in ('megatron.core', 'torch') if m in __import__('sys').modules]"
    with ProcessPoolExecutor(
        1,
        mp_context=get_context("spawn"),
        initializer=module._start_worker,
        initargs=("ByteLevelTokenizer", None),
    ) as pool:
        assert pool.submit(module._encode_in_worker, ["a"]).result()[0].tolist() == [97]
        assert pool.submit(eval, look).result() == []
        setting = pool.submit(os.getenv, "TOKENIZERS_PARALLELISM").result()
    assert setting == "false"


def test_pool_reads_only_a_little_ahead(monkeypatch):
    monkeypatch.setattr(module, "_BATCH_DOCUMENTS", 1)
    taken = 0

    def documents():
        nonlocal taken
        for _ in range(1000):
            taken += 1
            yield "text"

    rows = module.tokenized(
        documents(), ByteLevelTokenizer(), ("ByteLevelTokenizer", None), workers=2
    )
    assert next(rows).tolist() == list(b"text")
    rows.close()
    assert taken <= 4


def test_dead_worker_is_an_error_and_not_a_hang(job, monkeypatch, run, left_in):
    monkeypatch.setattr(module, "_encode_in_worker", end_process)
    with pytest.raises(ChildProcessError, match="--workers 2: a worker died, needs"):
        run(job, workers=2)
    assert left_in(job) == []
