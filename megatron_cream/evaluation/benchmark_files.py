# SPDX-License-Identifier: Apache-2.0
"""Makes lm-eval tasks of local files of LongBench, InfiniteBench, SCROLLS, L-Eval and HELMET.

    python -m megatron_cream.evaluation.benchmark_files data/ tasks/

writes one task for each JSONL file in ``data/`` (its name is the file's, with ``long_`` before it)
and prints the command that runs them all. Files of LongBench and InfiniteBench keep the prompts and
scores of lm-eval's own tasks of that name, which must be installed; the others have those below.
"""

from __future__ import annotations

import argparse
import json
import re
import string
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megatron_cream.errors import MissingPackageError, UserError, one_line_errors

Row = dict[str, Any]
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def words_of(text: str) -> list[str]:
    """Return the words of an answer as SQuAD's score compares them."""
    kept = "".join(c for c in text.lower() if c not in string.punctuation)
    return _ARTICLES.sub(" ", kept).split()


def f1(written: str, answer: str) -> float:
    """Return the F1 of words, 0 to 1."""
    one, other = words_of(written), words_of(answer)
    same = sum((Counter(one) & Counter(other)).values())
    return 2 * same / (len(one) + len(other)) if same else 0.0


def rouge_l(written: str, answer: str) -> float:
    """Return ROUGE-L's F1, 0 to 1, by Google's package, which lm-eval needs as well."""
    from rouge_score.rouge_scorer import RougeScorer

    found = RougeScorer(["rougeL"], use_stemmer=True).score(answer, written)
    return float(found["rougeL"].fmeasure)


def contains(written: str, answer: str) -> float:
    """Return whether the words of the answer stand together in what is written."""
    return float(f" {' '.join(words_of(answer))} " in f" {' '.join(words_of(written))} ")


def choice(written: str, answer: str) -> float:
    """Return whether the first letter A to D that stands alone is the answer's."""
    found = [re.search(r"\b[A-D]\b", text) for text in (written, answer)]
    return float(None not in found and found[0].group() == found[1].group())  # type: ignore[union-attr]


SCORES: dict[str, Callable[[str, str], float]] = {
    "f1": f1, "rouge_l": rouge_l, "contains": contains, "choice": choice
}  # fmt: skip


def process_results(row: Row, results: list[str]) -> dict[str, float]:
    """Return the score of what was written for a row, 0 to 100: that of its best answer."""
    score = SCORES[row["score"]]
    return {"score": 100 * max(score(results[0], answer) for answer in row["answers"])}


def _texts(found: Any) -> list[str]:
    """Return one or several answers as a list of texts."""
    found = found if isinstance(found, list) else [found]
    flat = [text for one in found for text in (one if isinstance(one, list) else [one])]
    return [str(text) for text in flat]


def _row(prompt: str, answers: Any, score: str) -> Row:
    return {"prompt": prompt, "answers": _texts(answers), "score": score}


def _longbench(row: Row) -> Iterator[Row]:
    asked = {"question": row["input"], "all_classes": row.get("all_classes") or []}
    yield {"context": row["context"], "answers": _texts(row["answers"]), **asked}


def _infinitebench(row: Row) -> Iterator[Row]:
    kept = {name: row[name] for name in ("id", "context", "input")}
    options = [str(text) for text in row.get("options") or []]
    yield {**kept, "answer": _texts(row["answer"]), "options": options}


def _scrolls(row: Row) -> Iterator[Row]:
    score = {
        "qasper": "f1",
        "narrative_qa": "f1",
        "quality": "contains",
        "contract_nli": "contains",
    }
    name = str(row["dataset"]).lower()
    yield _row(f"{row['input'].strip()}\n\nAnswer:", row["output"], score.get(name, "rouge_l"))


def _leval(row: Row) -> Iterator[Row]:
    score = {"exam": "choice", "f1": "f1"}.get(row.get("evaluation", ""), "rouge_l")
    for asked, answer in zip(row["instructions"], row["outputs"], strict=True):
        yield _row(f"{row['input'].strip()}\n\n{asked.strip()}\n\nAnswer:", answer, score)


def _helmet(row: Row) -> Iterator[Row]:
    answers = row["answers"] if "answers" in row else row["answer"]
    context = row.get("context")
    if context is None:
        parts = enumerate(row["ctxs"], 1)
        context = "\n\n".join(
            f"Document {i} (Title: {one['title']}): {one['text']}" for i, one in parts
        )
    yield _row(f"{context}\n\nQuestion: {row['question']}\nAnswer:", answers, "contains")


# The first whose names a row has. Tokens to write are of the rows' own scores, see ``write_task``.
FORMATS: dict[str, tuple[set[str], Callable[[Row], Iterator[Row]]]] = {
    "longbench": ({"input", "context", "answers", "all_classes"}, _longbench),
    "infinitebench": ({"id", "context", "input", "answer"}, _infinitebench),
    "leval": ({"instructions", "input", "outputs"}, _leval),
    "scrolls": ({"pid", "input", "output"}, _scrolls),
    "helmet": ({"question"}, _helmet),
}
_NEW_TOKENS = {"f1": 64, "contains": 32, "choice": 8, "rouge_l": 512}


def read_file(path: Path) -> tuple[str, list[Row]]:
    """Return the format of a JSONL file, and its rows as a task reads them.

    Raises:
        UserError: no format has such rows, or a row lacks something.
    """
    kind, rows = "", list[Row]()
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            row.setdefault("dataset", path.stem)
            kind = kind or next(name for name, (own, _) in FORMATS.items() if own <= set(row))
            rows += FORMATS[kind][1](row)
        except (ValueError, KeyError, TypeError, AttributeError, StopIteration) as exc:
            what = f"not of {kind}" if kind else f"of none of {', '.join(FORMATS)}"
            reason = f"{type(exc).__name__} {exc}".strip()
            raise UserError(f"{path}: line {number} is {what} ({reason})") from None
    if not rows:
        raise UserError(f"{path}: it has no rows")
    return kind, rows


def write_task(path: Path, output: Path) -> str:
    """Write the rows of a file and their task to ``output``; return the task's name.

    Raises:
        UserError, MissingPackageError: see ``read_file``; lm-eval has no task for it.
    """
    kind, rows = read_file(path)
    name = f"long_{path.stem}"
    data = output / f"{name}.jsonl"
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    data.write_text("".join(lines), "utf-8")
    words = [f"task: {name}", "dataset_path: json", "dataset_name: null", "test_split: test"]
    words += [f"dataset_kwargs: {{data_files: {{test: {json.dumps(str(data.resolve()))}}}}}"]
    if kind in ("longbench", "infinitebench"):
        words.insert(0, f"include: {_own_task(kind, path)}")
    else:
        (output / "scores.py").write_text(
            "from megatron_cream.evaluation.benchmark_files import process_results\n", "utf-8"
        )
        most = max(_NEW_TOKENS[row["score"]] for row in rows)
        words += [
            "output_type: generate_until", 'doc_to_text: "{{prompt}}"',
            'doc_to_target: "{{answers[0]}}"', "process_results: !function scores.process_results",
            f"generation_kwargs: {{do_sample: false, max_gen_toks: {most}, until: []}}",
            "metric_list: [{metric: score, aggregation: mean, higher_is_better: true}]",
        ]  # fmt: skip
    (output / f"{name}.yaml").write_text("\n".join(words) + "\n", "utf-8")
    return name


def _own_task(kind: str, path: Path) -> Path:
    """Return lm-eval's own task of that name."""
    spec = find_spec("lm_eval")
    if spec is None or spec.origin is None:
        raise MissingPackageError(
            f"{path}: {kind} needs lm-eval: pip install -e '.[lm-eval]'", name="lm_eval"
        )
    names = {"longbench": path.stem, "infinitebench": f"infinitebench_{path.stem}"}
    own = Path(spec.origin).parent / "tasks" / kind / f"{names[kind]}.yaml"
    if not own.is_file():
        raise UserError(
            f"{path}: lm-eval has no task {own.stem} of {kind}; the file must have the name of its "
            "data set, as published"
        )
    return own


def main(argv: list[str] | None = None) -> int:
    """Run the script; bad input ends in one line and exit status 2."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="folder with JSONL files, also in folders in it")
    parser.add_argument("output", type=Path, help="folder for the tasks, new or empty")
    args = parser.parse_args(argv)
    with one_line_errors():
        files = sorted(args.data.rglob("*.jsonl"))
        if not files:
            raise UserError(f"{args.data}: there is no JSONL file in it")
        if args.output.exists() and any(args.output.iterdir()):
            raise UserError(f"{args.output}: it must be a new folder, or an empty one")
        if len({path.stem for path in files}) < len(files):
            raise UserError(f"{args.data}: two files have the same name: tasks are called by it")
        args.output.mkdir(parents=True, exist_ok=True)
        names = [write_task(path, args.output) for path in files]
        print(f"lm_eval run --include_path {args.output} --tasks {','.join(names)} ...")
    return 0


if __name__ == "__main__":
    sys.exit(main())
