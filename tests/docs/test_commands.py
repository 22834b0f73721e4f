# SPDX-License-Identifier: Apache-2.0
"""Every command, flag, path and variable that README.md and docs/ name is there."""

import re

import pytest
from support import commandlines, documented, parsers
from support.documented import Command
from support.launch import ROOT
from support.parsers import WrongCommandError

PAGES = documented.pages()
# Flags of other programs that the pages speak of.
FOREIGN = {
    **dict.fromkeys(["--max-model-len"], "vLLM"),
    **dict.fromkeys(["--context-length"], "SGLang"),
    **dict.fromkeys(["--secret"], "sky"),
    **dict.fromkeys(["--model_args"], "lm-eval"),
    **dict.fromkeys(["--signal", "--time", "--array", "--nodes"], "Slurm"),
    **dict.fromkeys(["--kill-on-bad-exit", "--wait"], "srun"),
    **dict.fromkeys(
        ["--nproc-per-node", "--master-port", "--standalone", "--local-addr"], "torchrun"
    ),
    **dict.fromkeys(["--rm", "--target", "--gpus", "--ipc"], "docker"),
    **dict.fromkeys(["--mock-data", "--find-optimal-num-workers"], "Megatron's own scripts"),
    **dict.fromkeys(["--dry-run", "--smoke"], "the scripts of examples/"),
    **dict.fromkeys(["--help", "--version"], "all"),
}


@pytest.fixture(scope="module", autouse=True)
def megatron(cpu_megatron):
    """Megatron's parser, imported once."""


def test_all_pages_are_read():
    assert {*PAGES} == {"README.md", *(f"docs/{path.name}" for path in ROOT.glob("docs/*.md"))}
    found = [command for page in PAGES for command in documented.commands(page)]
    assert len(found) > 60
    assert len([command for command in found if command.runs]) > 20


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_run_or_parsed_for_a_reason(page):
    for command in documented.commands(page):
        if command.runs:
            assert not commandlines.PLACEHOLDER.search(command.as_run()), command
            assert re.fullmatch(r"run( (with .+ as .*|each \w+ in [^;]+)(; |$))*", command.note), (
                command
            )
        else:
            assert command.note.startswith("parse:") and len(command.reason.split()) > 1, command


@pytest.mark.parametrize("page", PAGES)
def test_commands_name_what_is_there(page):
    wrong = []
    for command in documented.commands(page):
        try:
            if command.language == "python":
                commandlines.check_code(command.text)
            else:
                commandlines.check(command.text, elided=command.in_sentence)
        except WrongCommandError as error:
            wrong.append(f"{command}: {error}")
    assert wrong == []


@pytest.mark.parametrize("page", PAGES)
def test_flags_in_sentences_exist(page):
    inline = documented.INLINE.findall(documented.prose(documented.read(page)))
    flags = {flag for text in inline for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", text)}
    assert flags - parsers.known_flags() - FOREIGN.keys() == set()


@pytest.mark.parametrize("page", [page for page in PAGES if page != "docs/comparison.md"])
def test_paths_in_sentences_exist(page):
    inline = documented.INLINE.findall(documented.prose(documented.read(page)))
    words = {word for text in inline for word in text.split()}
    pattern = re.compile(r"(tools|tests|examples|megatron_cream|docs)/[\w./-]+")
    named = {word for word in words if pattern.fullmatch(word) and not word.endswith("...")}
    assert {name for name in named if not (ROOT / name).exists()} == set()


def test_messages_say_what_pip_can_install():
    code = [*ROOT.glob("megatron_cream/**/*.py"), *ROOT.glob("tools/*.py")]
    pattern = re.compile(r"pip install (?:-e )?(?:'[^'\n]+'|[\w.\[\],-]+)")
    named = {found for path in code for found in pattern.findall(path.read_text())}
    assert len(named) > 5
    for command in named:
        commandlines.check(command.rstrip("."))


def test_variables_of_the_table_are_read():
    table = documented.read("docs/examples.md").split("\n## Variables\n")[1].split("\n## ")[0]
    cells = [row.split("|")[1] for row in table.splitlines() if row.startswith("| `")]
    names = {name for cell in cells for name in re.findall(r"`([A-Z_]+)`", cell)}
    assert len(names) > 20
    for name in names:
        commandlines.check_variable(name)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (
            "python tools/plan.py llama-2-70b --gpus 8 --target-length 9000 --gpu-count 6",
            "unrecognized arguments",
        ),
        ("python tools/plan.py llama-2-70b --gpus many", "must be a whole number"),
        ("python tools/plans.py llama-2-70b --gpus 64", "there is no tools/plans.py"),
        ("python tools/evaluate.py needles --hf MODEL --lengths 4K", "invalid choice"),
        ("python tools/merge_datasets.py --input a", "required: --output-prefix"),
        ("megatron-cream plans --gpus 8", "there is no command plans"),
        (
            "torchrun --nproc-per-nodes 8 -m megatron_cream.pretrain",
            "required|unrecognized|ambiguous",
        ),
        ("torchrun --nproc-per-node 8 -m megatron_cream.pretrain --seq-len 4", "unrecognized"),
        ("torchrun --nproc-per-node 8 -m megatron_cream.launch s.py --rope 4", "unrecognized"),
        ("--rope-interpolation cubic <more>", "invalid choice"),
        ("examples/llama-2-7b/32k.sh --learning-rate 1", "unrecognized"),
        ("examples/llama-2-7b/33k.sh", "there is no"),
        ("TEXTS=b examples/quickstart/compare.sh", "nothing reads the variable TEXTS"),
        ("make demos", "no target demos"),
        ("make demo INPUTS=a", "nothing reads the variable INPUTS"),
        ("pip install -e '.[plots]'", "no extra"),
        ("pip install megatron_cream[plot]", "no requirement of ours"),
        ("docker build -t megatron_cream --target gpus .", "no stage gpus"),
        ("docker build -t megatron_cream . && docker run megatron-cream", r"\[\]"),
        ("sbatch examples/slurm/runs.sh", "there is no"),
        (
            "sky jobs launch examples/skypilot/run.yaml --env SCRIPTS=a",
            "reads the variable SCRIPTS",
        ),
        ("pytest tests/rotary", "there is no tests/rotary"),
        ("python tests/gpu/layouts.py --virtual", "has not all of"),
        ("python -m megatron_cream.trainer", "no module"),
    ],
)
def test_a_wrong_command_is_found(wrong, said):
    with pytest.raises(WrongCommandError, match=said):
        commandlines.check(wrong)


def test_python_of_a_page_must_import_what_is_there():
    with pytest.raises(WrongCommandError, match="has no make_strategies"):
        commandlines.check_code("from megatron_cream.positions import make_strategies")


TEXT = """
<!-- commands:
run with b as c
parse: too long
-->

```bash
# a comment
a b \\
  --d    # said
e
```

See `make demo` and `a`.
"""


def test_extraction():
    found = documented.extract("x.md", TEXT)
    assert [(command.line, command.text) for command in found] == [
        (9, "a b --d    # said"),
        (11, "e"),
        (14, "make demo"),
    ]
    assert found[0].as_run() == "a c --d    # said"
    assert [command.runs for command in found] == [True, False, False]
    assert found[1].reason == "too long"


@pytest.mark.parametrize("note", ["", "<!-- commands:\nrun\nrun\nrun\n-->\n"])
def test_each_block_needs_its_notes(note):
    with pytest.raises(AssertionError, match="notes for 2 commands"):
        documented.extract("x.md", f"{note}```bash\na\nb\n```\n")


def test_a_change_must_be_one_of_the_command():
    with pytest.raises(AssertionError, match="'z' is not in it"):
        Command("x.md", 1, "a b", note="run with z as y").as_run()
