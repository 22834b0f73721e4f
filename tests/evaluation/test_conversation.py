# SPDX-License-Identifier: Apache-2.0
"""chat: what is streamed is what greedy decoding of the whole conversation writes."""

import builtins
import io
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_cream import cli
from megatron_cream.errors import UserError
from megatron_cream.evaluation.conversation import read_text

TEXT = "The old captain sailed north and his map was torn. " * 4


def chat(*words):
    return cli.main(["chat", *words])


def greedy(folder, text, new_tokens):
    """What a model that reads all of it anew writes, and its words."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokens = tokenizer(text, return_tensors="pt")["input_ids"]
    made = model.generate(tokens, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
    return tokenizer.decode(made[0, tokens.shape[1] :], skip_special_tokens=True)


def test_two_questions_about_a_book(small_hf, tmp_path, capsys):
    book = tmp_path / "book.txt"
    book.write_text(TEXT)
    words = ("--hf", small_hf, "--file", str(book), "--answer-tokens", "6")
    assert chat(*words, "--question", "Who?", "Where?") == 0
    first = greedy(small_hf, f"{TEXT}\n\nQuestion: Who?\nAnswer:", 6)
    said = f"{TEXT}\n\nQuestion: Who?\nAnswer: {first.strip()}\n\nQuestion: Where?\nAnswer:"
    assert capsys.readouterr().out == f"{first}\n{greedy(small_hf, said, 6)}\n"


def test_questions_are_read_line_by_line(small_hf, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Who?\n\n"))
    assert chat("--hf", small_hf, "--answer-tokens", "4") == 0
    assert capsys.readouterr().out == greedy(small_hf, "Question: Who?\nAnswer:", 4) + "\n"


def test_beyond_the_window_answers_are_those_of_evaluation(small_hf, capsys):
    """Decoding by transformers' cache and by ours, both with dual chunk attention."""
    from support.arguments import arguments

    from megatron_cream.evaluation.evaluate import open_model

    sizes = ["chunk_size=48", "local_size=8"]
    question = TEXT[:90]
    given = ("--hf", small_hf, "--answer-tokens", "5", "--question", question)
    assert chat(*given, "--dual-chunk", *sizes) == 0
    tokenizer = AutoTokenizer.from_pretrained(small_hf)
    prompt = tokenizer(f"Question: {question}\nAnswer:", return_tensors="np")["input_ids"][0]
    assert len(prompt) > 48
    model = open_model(arguments(hf=small_hf, dual_chunk=sizes))
    (answer,) = model.generate([prompt], [5], model.stop_tokens)
    answer = tokenizer.decode(torch.from_numpy(answer), skip_special_tokens=True)
    assert capsys.readouterr().out == answer + "\n"


def test_mistakes_are_one_line(small_hf, tmp_path, capsys, monkeypatch):
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\x81")
    for words, match in [
        ([], "--hf is missing"),
        (["--hf", small_hf, "--file", "none.txt"], "none.txt"),
        (["--hf", small_hf, "--file", str(tmp_path / "empty.txt")], "has no text"),
        (["--hf", small_hf, "--file", str(tmp_path / "binary.txt")], "text in UTF-8"),
        (["--hf", small_hf, "--answer-tokens", "0"], "--answer-tokens 0: needs 1"),
    ]:
        with pytest.raises(SystemExit, match="2"):
            chat(*words)
        error = capsys.readouterr().err.strip()
        assert match in error and error.count("\n") == 0
    own = builtins.__import__
    monkeypatch.setattr(
        builtins, "__import__",
        lambda name, *a, **k: own("no_such_package" if name == "pypdf" else name, *a, **k),
    )  # fmt: skip
    with pytest.raises(UserError, match=r"paper\.pdf: to read it needs pypdf: pip install"):
        read_text("paper.pdf")


def test_a_pdf(tmp_path):
    pytest.importorskip("pypdf", reason="needs pypdf, of the extra pdf")
    path = tmp_path / "paper.pdf"
    objects = [
        b"<</Type/Catalog/Pages 2 0 R>>",
        b"<</Type/Pages/Kids[3 0 R]/Count 1>>",
        b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 300 300]/Contents 4 0 R"
        b"/Resources<</Font<</F 5 0 R>>>>>>",
        b"<</Length 41>>stream\nBT /F 12 Tf 20 200 Td (Chunks reach) Tj ET\nendstream",
        b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
    ]
    body, table = b"%PDF-1.4\n", b"xref\n0 6\n0000000000 65535 f \n"
    for i, one in enumerate(objects, 1):
        table += b"%010d 00000 n \n" % len(body)
        body += b"%d 0 obj\n%s\nendobj\n" % (i, one)
    end = b"trailer\n<</Root 1 0 R/Size 6>>\nstartxref\n%d\n%%%%EOF\n" % len(body)
    path.write_bytes(body + table + end)
    assert "Chunks reach" in read_text(str(path))
    path.write_bytes(b"no PDF")
    with pytest.raises(UserError, match="pypdf cannot read it"):
        read_text(str(path))
