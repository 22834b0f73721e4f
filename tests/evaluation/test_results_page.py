# SPDX-License-Identifier: Apache-2.0
"""A page of finished runs: one file with every figure; figures in a model card."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from support.launch import ROOT
from support.results import perplexities_of, result_of

from megatron_cream.cli import main
from megatron_cream.errors import UserError
from megatron_cream.evaluation import result_files
from megatron_cream.evaluation.results_page import add_to_card, write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture
def runs(tmp_path):
    """Folders of two models' perplexity, and of a run of several tasks of one of them."""
    results = {
        "a": perplexities_of("base <1>", [2.0, 2.1, 2.2]),
        "b": perplexities_of("longer", [1.0, 1.1, 1.2]),
        "all/needle": result_of("needle", "longer"),
        "all/kv-retrieval": result_of("kv-retrieval", "longer"),
    }
    for folder, result in results.items():
        (tmp_path / folder).mkdir(parents=True)
        result |= {"most_tokens": None, "versions": {"torch": "2.0"}}
        (tmp_path / folder / "result.json").write_text(json.dumps(result))
    return [str(tmp_path / name) for name in ("a", "b", "all")]


def read(run):
    return json.loads((Path(run) / "result.json").read_text())


def test_page_has_every_figure_and_asks_for_no_other_file(runs, tmp_path):
    page = write_report(runs, str(tmp_path / "new" / "page.html")).read_text()
    assert re.findall("<h2>(.*?)</h2>", page) == ["perplexity", "kv-retrieval", "needle"]
    for run in runs[:2]:
        for row in read(run)["lengths"]:
            assert page.count(f"<td>{row['perplexity']:.2f}</td>") == 1  # of all models
            assert f"<td>{row['perplexity']:.3f}</td>" in page  # of this one
    assert "base &lt;1&gt;" in page and "base <1>" not in page
    assert page.count("&quot;torch&quot;: &quot;2.0&quot;") == 4
    assert page.count("data:image/png;base64,") == 3
    assert not re.findall(r'(?:src|href)="(?!data:)', page)


def test_runs_of_other_cases_are_kept_apart(runs, tmp_path):
    (Path(runs[1]) / "result.json").write_text(json.dumps(read(runs[1]) | {"stride": 64}))
    page = write_report(runs[:2], str(tmp_path / "page.html")).read_text()
    assert page.count("<h2>perplexity</h2>") == 2


def test_only_an_earlier_page_is_overwritten(runs, tmp_path):
    page = tmp_path / "page.html"
    write_report(runs[:1], str(page))
    write_report(runs[1:2], str(page), title="another")
    assert "<h1>another</h1>" in page.read_text()
    page.write_text("<!doctype html><p>mine")
    with pytest.raises(UserError, match="--output is .*page.html: it must be a new file"):
        write_report(runs, str(page))
    assert page.read_text() == "<!doctype html><p>mine"


def test_what_is_no_run_is_refused(runs, tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match="RUN is .*nowhere: it must be the --output"):
        write_report([*runs, str(tmp_path / "nowhere")], str(tmp_path / "page.html"))
    with pytest.raises(SystemExit, match="2"):
        main(["evaluate", "report", *runs])
    assert capsys.readouterr().err.startswith("error: --output or --card is missing")


def test_card_keeps_what_it_has(runs, tmp_path):
    """Called twice it has each figure once, and the card's own words and results as before."""
    card = tmp_path / "README.md"
    own = {
        "license": "apache-2.0",
        "model-index": [
            {
                "name": "mine",
                "results": [
                    {
                        "task": {"type": "text-generation"},
                        "dataset": {"type": "piqa", "name": "PIQA"},
                        "metrics": [{"type": "accuracy", "value": 70.5}],
                    }
                ],
            }
        ],
    }
    card.write_text(f"---\n{yaml.safe_dump(own)}---\n\n# My model\n\nWords.\n")
    for _ in range(2):
        assert add_to_card(runs[1:], str(card)) == 9
    _, front, words = card.read_text().split("---\n", 2)
    found = yaml.safe_load(front)
    assert found["license"] == "apache-2.0" and words.strip() == "# My model\n\nWords."
    (index,) = found["model-index"]
    assert index["name"] == "mine"
    metrics = {
        (one["dataset"]["name"], one["dataset"].get("config"), metric["type"]): metric["value"]
        for one in index["results"]
        for metric in one["metrics"]
    }
    assert len(metrics) == 10 and metrics["PIQA", None, "accuracy"] == 70.5
    rows = read(runs[1])["lengths"]
    assert metrics["perplexity", "4K tokens", "perplexity"] == round(rows[2]["perplexity"], 4)


def test_a_card_is_of_one_model(runs, tmp_path):
    (tmp_path / "README.md").write_text("# My model\n")
    with pytest.raises(UserError, match="a card is of one model, these are of base <1>, longer"):
        add_to_card(runs, str(tmp_path / "README.md"))


def test_every_field_of_a_result_is_documented():
    page = (ROOT / "docs" / "evaluation.md").read_text()
    fields = {
        field
        for name, table in vars(result_files).items()
        if name == "_RESULT" or name.endswith(("_ROW", "_RULER_RESULT"))
        for field in table
    }
    assert "longppl_low" in fields
    assert [field for field in sorted(fields) if f"`{field}`" not in page] == []


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_tables_sort_in_a_browser(runs, tmp_path):
    """The browser runs the page's script: a click sorts by number, a second one turns it round."""
    page = write_report(runs[:2], str(tmp_path / "page.html"))
    click, names = "document.querySelectorAll('th button')[1].click();", []
    for clicks in (1, 2):
        script = f"<script>{click * clicks}</script></body>"
        clicked = tmp_path / f"clicked{clicks}.html"
        clicked.write_text(page.read_text().replace("</body>", script))
        words = ["--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", f"file://{clicked}"]
        found = subprocess.run([CHROMIUM, *words], capture_output=True, timeout=60, check=True)
        names.append(re.findall(r"<tbody><tr><td>(.*?)</td>", found.stdout.decode())[0])
    assert names == ["longer", "base &lt;1&gt;"]
