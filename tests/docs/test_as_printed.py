# SPDX-License-Identifier: Apache-2.0
"""The commands of README.md and docs/ that two CPU cores can run, as printed, page by page.

``make test-docs`` runs these. Each page starts in a fresh folder that has the files of a checkout
and what the pages take for granted: a model, a tokenizer, text, a trained checkpoint.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import documented
from support.launch import ROOT

CHECKOUT = ("Makefile", "README.md", "docs", "examples", "megatron_cream", "tests", "tools")
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
RUN = "extended.work/run"  # the trained checkpoint that smoke.sh leaves behind
SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}


def run(command, folder, **variables):
    """Run a command line of a page in ``folder`` with this Python first on the path."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    kept = {name: value for name, value in os.environ.items() if not name.startswith("COV_")}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=folder,
        env={**kept, "PATH": path, "HF_HUB_OFFLINE": "1", **variables},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


@pytest.fixture(scope="session")
def trained(tmp_path_factory, quick_python):
    """What the quickstart leaves behind: a model, its import, a trained checkpoint, an export."""
    work = tmp_path_factory.mktemp("trained")
    run("examples/quickstart/smoke.sh", ROOT, WORK=str(work), PYTHON=quick_python)
    return work


@pytest.fixture(scope="session")
def books():
    """24 texts of 60,000 characters."""
    paths = [*ROOT.glob("docs/*.md"), *ROOT.glob("megatron_cream/**/*.py")]
    text = "\n\n".join(path.read_text() for path in sorted(paths))
    starts = range(0, len(text) - 60_000, (len(text) - 60_000) // 24)
    return [text[start : start + 60_000] for start in starts][:24]


@pytest.fixture
def folder(tmp_path, trained, books):
    """A checkout beside what the pages take for granted."""
    for name in CHECKOUT:
        (tmp_path / name).symlink_to(ROOT / name)
    for name in ("texts", "corpus", "books", "web/2026"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("texts", "corpus", "books"):
        for number, text in enumerate(books):
            (tmp_path / name / f"{number:02}.txt").write_text(text)
    for name, target in {"MODEL": "tiny", "tokenizer": "tiny", "OUT": RUN, "run": RUN}.items():
        (tmp_path / name).symlink_to(trained / target)
    held_out = (json.dumps({"text": text}) + "\n" for text in books[:10])
    (tmp_path / "held-out.jsonl").write_text("".join(held_out))
    write_records(tmp_path, books[0][:4000])
    write_models(tmp_path, trained / "tiny")
    return tmp_path


def write_records(folder, text):
    """Records in JSONL and Parquet, and conversations."""
    import pyarrow
    import pyarrow.parquet
    import zstandard

    records = "".join(json.dumps({"text": text}) + "\n" for _ in range(3))
    (folder / "more.jsonl.zst").write_bytes(zstandard.compress(records.encode()))
    pyarrow.parquet.write_table(pyarrow.table({"text": [text]}), folder / "web/2026/a.parquet")
    said = [{"from": who, "value": text} for who in ("human", "gpt") * 3]
    (folder / "sharegpt.jsonl").write_text(json.dumps({"conversations": said}) + "\n")


def write_models(folder, tiny):
    """Folders of models under the names that pages use."""
    (folder / "path/to/hf-model").mkdir(parents=True)
    (folder / "path/to/hf-model/config.json").write_text(json.dumps(SHAPE))
    for name in ("Llama-2-7b-hf", "Llama-2-7b-chat-hf"):
        shutil.copytree(tiny, folder / name)
    path = folder / "Llama-2-7b-chat-hf/tokenizer_config.json"
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": CHAT}
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


PAGES = [page for page in documented.pages() if any(c.runs for c in documented.commands(page))]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", PAGES)
def test_commands_of_the_page_run(page, folder):
    for command in documented.commands(page):
        if not command.runs:
            continue
        if command.language == "python":
            run(f"python - <<'END'\n{command.text}\nEND", folder)
            continue
        name, values = command.each or ("", [""])
        for value in values:
            run(command.as_run(), folder, **({name: value} if name else {}))


def test_a_failing_command_is_not_passed_over(tmp_path):
    with pytest.raises(AssertionError, match="no such thing"):
        run("echo a | cat; echo no such thing >&2; false | cat", tmp_path)
