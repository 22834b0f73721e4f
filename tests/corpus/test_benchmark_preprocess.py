# SPDX-License-Identifier: Apache-2.0
"""The benchmark's two sides on a small text: the same bytes, and ten times fewer CPU seconds."""

import importlib.util
import json
import sys
import sysconfig
import time
from pathlib import Path

import numpy as np
import pytest
from support.commands import exit_status

from megatron_cream.corpus.preprocess import PreprocessConfig, preprocess
from megatron_cream.corpus.storage import write_index
from megatron_cream.corpus.tokenizers import train_bpe
from megatron_cream.errors import UserError

ROOT = Path(__file__).parents[2]
LEAST = 10.0


@pytest.fixture
def benchmark():
    spec = importlib.util.spec_from_file_location(
        "benchmark_preprocess", ROOT / "tools" / "benchmark_preprocess.py"
    )
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded  # its dataclass looks itself up there
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture
def text(tmp_path):
    """Two megabytes of Python in long documents, and a tokenizer trained on a part of it."""
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    whole = "\n".join(path.read_text("utf-8", errors="replace") for path in sources)[:2_000_000]
    documents = [whole[start : start + 50_000] for start in range(0, len(whole), 50_000)]
    train_bpe(documents[::10], 2000, tmp_path / "tokenizer")
    lines = (json.dumps({"text": text}) + "\n" for text in documents)
    (tmp_path / "text.jsonl").write_text("".join(lines))
    return tmp_path


def seconds(work):
    """CPU seconds of this process, so that other work on the machine does not matter."""
    began = time.process_time()
    work()
    return time.process_time() - began


def test_ten_times_the_loop_of_one_call_a_document(benchmark, text, monkeypatch):
    pytest.importorskip("gigatoken")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    model = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model"]
    model.append(str(text / "tokenizer"))
    source = str(text / "text.jsonl")
    loop = benchmark.parse_args(["--input", source, *model, "--stand-in", str(text / "loop")])
    ours = PreprocessConfig(
        (source,), model[1], str(text / "ours"), model[3], append_eod=True, overwrite=True
    )
    slow = seconds(lambda: benchmark.stand_in(loop))
    fast = min(seconds(lambda: preprocess(ours, progress=False)) for _ in range(2))
    for suffix in (".bin", ".idx"):
        assert (text / f"ours{suffix}").read_bytes() == (text / f"loop{suffix}").read_bytes()
    assert slow / fast >= LEAST, f"{slow:.2f} s against {fast:.2f} s"


def test_documents_without_text_may_be_counted(benchmark, tmp_path):
    """Megatron's script adds a document of no sequence for each, as these indices have."""
    ours, theirs, other = (str(tmp_path / name) for name in ("ours", "theirs", "other"))
    for prefix, counts in ((ours, [1, 1]), (theirs, [1, 0, 0, 1]), (other, [2, 0])):
        Path(prefix + ".bin").write_bytes(bytes(10))
        block = (np.array([2, 3]), np.array(counts))
        write_index(prefix + ".idx", np.dtype(np.uint16), [block], 2, len(counts))
    benchmark._compare(ours, theirs)
    with pytest.raises(UserError, match="differ in documents"):
        benchmark._compare(ours, other)
    Path(theirs + ".bin").write_bytes(bytes(9) + b"x")
    with pytest.raises(UserError, match="bin differ"):
        benchmark._compare(ours, theirs)


def test_table_and_failures(benchmark, tmp_path, capsys):
    sides = {
        name: benchmark.Side(None, "", 1, wall=[w], cpu=[c], start=[s], start_wall=[v], peak=10**9)
        for name, w, c, s, v in (
            (benchmark.OURS, 2.0, 3.0, 1.0, 0.5),
            (benchmark.STOCK, 90.0, 180.0, 20.0, 15.0),
            (benchmark.FAST, 6.0, 9.0, 8.5, 5.0),
        )
    }
    rows = benchmark.table(sides, size=180_000_000).splitlines()
    assert rows[-2] == "| Megatron | 180.00 | 1.00 | 90.00 | 60.0 | 45.0 | 80.00 | 50.00 | 1.00 |"
    assert rows[-1].endswith("| 3.0 | 3.0 | too little | 0.67 | 1.00 |")
    arguments = ["--input", str(tmp_path / "no"), "--tokenizer-type", "x", "--tokenizer-model", "y"]
    assert exit_status(benchmark.main, arguments) == 2
    assert "no: not found" in capsys.readouterr().err
