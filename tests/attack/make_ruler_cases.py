# SPDX-License-Identifier: Apache-2.0
"""Run NVIDIA/RULER's own scripts and write the hashes that tests/evaluation/test_ruler.py holds.

    python tests/attack/make_ruler_cases.py RULER tests/evaluation/data/ruler.json

RULER is a clone of its repository; wonderwords, scipy, numpy, tqdm and yaml must be installed. Its
scripts get the tokenizer, the sentences and the material of tests/support/ruler.py, and of the six
million keys every 900th, for time.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from support import ruler as ours  # noqa: E402

STUBS = {
    "tokenizer.py": """
from types import SimpleNamespace
from support.ruler import tokens
def select_tokenizer(*args):
    return SimpleNamespace(text_to_tokens=tokens)
""",
    "nltk/__init__.py": "",
    "nltk/tokenize.py": "from support.ruler import cut as sent_tokenize",
    "manifest_utils.py": """
import json
def write_manifest(path, cases):
    with open(path, "w") as file:
        json.dump(cases, file)
""",
}
LENGTHS = {"base": (3072, 4096), "meta-chat": (3072,)}
CASES = 3
ALL, SOME = "for noun in nouns]", "for noun in nouns[::30]]"


def main(ruler: Path, output: Path) -> None:
    import yaml

    found: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as name:
        scripts = Path(name) / "scripts"
        shutil.copytree(ruler / "scripts", scripts)
        data = scripts / "data" / "synthetic" / "json"
        (data / "PaulGrahamEssays.json").write_text(json.dumps({"text": ours.essay()}))
        (data / "squad.json").write_text(json.dumps(ours.squad()))
        (data / "hotpotqa.json").write_text(json.dumps(ours.hotpot()))
        # Not read by cases of these lengths.
        (data / "english_words.json").write_text(json.dumps({str(i): f"w{i}" for i in range(9)}))
        niah = scripts / "data" / "synthetic" / "niah.py"
        whole = niah.read_text()
        niah.write_text(whole.replace("in adjs for", "in adjs[::30] for").replace(ALL, SOME))
        assert SOME in niah.read_text()
        for file, text in STUBS.items():
            (scripts / file).parent.mkdir(exist_ok=True)
            (scripts / file).write_text(text)
        tasks = yaml.safe_load((scripts / "synthetic.yaml").read_text())
        for task, config in tasks.items():
            for style, lengths in LENGTHS.items():
                for length in lengths:
                    cases = run(scripts, config, style, length)
                    found.setdefault(task, {})[f"{style} {length}"] = cases
                    print(task, style, length, cases, flush=True)
    output.write_text(json.dumps(found, indent=1) + "\n")


def run(scripts: Path, config: dict, style: str, length: int) -> list[str]:
    """Return the hashes of one task's cases."""
    sys.path[:0] = [str(scripts / "data"), str(scripts / "data" / "synthetic")]
    from constants import TASKS
    from template import Templates

    task = TASKS[config["task"]]
    template = Templates[style].format(task_template=task["template"]) + task["answer_prefix"]
    words = {"save_dir": scripts / "out", "save_name": "x", "tokenizer_path": "x"}
    words |= {"max_seq_length": length, "tokens_to_generate": task["tokens_to_generate"]}
    words |= {"num_samples": CASES, "template": template, **config["args"]}
    command = [sys.executable, scripts / "data" / "synthetic" / f"{config['task']}.py"]
    for key, value in words.items():
        command += [f"--{key}", str(value)]
    path = f"{scripts}:{ROOT / 'tests'}:{ROOT}"
    subprocess.run(
        command, check=True, env={"PYTHONPATH": path}, stderr=subprocess.DEVNULL, timeout=99
    )
    cases = json.loads((scripts / "out" / "x" / "validation.jsonl").read_text())
    keys = ("input", "answer_prefix", "outputs", "length")
    return [ours.fingerprint(*(case[key] for key in keys)) for case in cases]


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
