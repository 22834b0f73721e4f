# SPDX-License-Identifier: Apache-2.0
import os
import sys
from dataclasses import replace
from multiprocessing import get_context

import pytest

from megatron_cream.data import workers as module
from megatron_cream.data.checks import check
from megatron_cream.data.tokenizers import train_bpe

PARTS = {"part_bytes": 400}  # of the test's input of about 1200 bytes


@pytest.fixture
def bpe_job(job, tmp_path, kept):
    train_bpe(kept, 300, tmp_path / "tokenizer")
    model = str(tmp_path / "tokenizer")
    return replace(
        job, tokenizer_type="HuggingFaceTokenizer", tokenizer_model=model, append_eod=True
    )


@pytest.mark.parametrize("engine", ["fast", "reference"])
def test_same_bytes_for_every_number_of_workers(bpe_job, run, outputs, engine):
    pytest.importorskip("gigatoken")
    run(bpe_job, engine="reference")
    for workers in (1, 2, 3):
        prefix = f"{bpe_job.output_prefix}-{workers}"
        run(bpe_job, output_prefix=prefix, engine=engine, workers=workers, **PARTS)
        assert outputs(prefix) == outputs(bpe_job.output_prefix)


def _imported(pipe):
    from megatron_cream.data import preprocess  # noqa: F401

    pipe.send("megatron" in sys.modules or "torch" in sys.modules)


def test_workers_do_not_import_megatron():
    context = get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_imported, args=(theirs,))
    process.start()
    assert ours.recv() is False
    process.join()


def _die_in_worker(job, units, next_unit, read, pipe):
    os._exit(1)


def test_dead_worker_is_an_error_and_not_a_hang(job, monkeypatch):
    config = replace(job, workers=2, **PARTS)
    planned, tokenizer, _ = check(config)
    planned.folder.mkdir()
    monkeypatch.setattr(module, "_work", _die_in_worker)
    with pytest.raises(ChildProcessError, match="a worker died, needs more memory or fewer"):
        module.run_units(planned, planned.own_units(), 2, lambda count: None, tokenizer)


def test_bytes_read_add_up_to_the_input(job):
    config = replace(job, **PARTS)
    planned, tokenizer, inputs = check(config)
    planned.folder.mkdir()
    assert len(planned.units) > 2
    for _ in range(2):  # the second time every part is finished already
        counts = []
        module.run_units(planned, planned.own_units(), 2, counts.append, tokenizer)
        assert sum(counts) >= inputs.total_bytes
