# SPDX-License-Identifier: Apache-2.0
"""Extend one model in many ways and score each: the runs behind docs/choosing.md.

    python examples/study/study.py --hf SmolLM2-135M --text books/train \\
        --held-out books/validation --work runs/study --results examples/study/results --gpus 2
    python examples/study/study.py --smoke --work runs/smoke-study --results runs/smoke-results

Trains and scores the variants of variants.py in their order, one per GPU, and writes one JSON file
each. What is finished is not done again: the same command goes on. With --minutes no step is begun
that would not end in time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from results import record
from variants import VARIANTS, Variant

from megatron_cream import torchrun

HERE = Path(__file__).resolve().parents[2]
TOOLS = HERE / "tools"
WINDOW, TARGET, STEPS, MICRO, GLOBAL = 8192, 32768, 130, 8, 16
RETRIEVAL_DOCUMENTS = 2000
SMOKE = {"WINDOW": 512, "TARGET": 1024, "STEPS": 4, "MICRO": 1, "GLOBAL": 2}


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--hf", help="folder of the Hugging Face model")
    add("--text", nargs="+", help="files or folders of text to train on")
    add("--held-out", nargs="+", help="text to score perplexity on")
    add("--key-tokens", help="of the held-out text, as score.py has it: LongPPL is scored as well")
    add("--work", type=Path, required=True, help="folder for data, checkpoints and logs")
    add("--results", type=Path, required=True, help="folder for the JSON files")
    titles = [variant.title for variant in VARIANTS]
    add("--only", nargs="+", choices=titles, help="these variants, in this order", metavar="NAME")
    add("--gpus", type=int, default=1, help="runs side by side, one per GPU")
    add("--lanes", type=int, default=1, help="2: score a model while the next one trains beside it")
    add("--workers", type=int, default=2, help="processes that prepare data")
    add("--minutes", type=float, help="begin nothing that would not end in so many")
    add("--train-seconds", type=float, default=150, help="what a run takes, until one was seen")
    add("--score-seconds", type=float, default=100, help="what scoring takes, until it was seen")
    add("--smoke", action="store_true", help="a random model, this repository's docs, two cores")
    args = parser.parse_args()
    if args.smoke:
        globals().update(SMOKE)
        args.hf, args.text = str(args.work / "tiny"), [str(HERE / "docs")]
        args.held_out = [str(HERE / "docs" / "data.md")]
    if not (args.hf and args.text and args.held_out):
        parser.error("--hf, --text and --held-out must be given")
    return args


class Study:
    """Runs variants on GPUs, each with a thread of its own."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.began = args, time.monotonic()
        self.work, self.results = args.work.resolve(), args.results.resolve()
        self.took = {"train": args.train_seconds, "score": args.score_seconds}
        self.lock = threading.Lock()
        self.training = [threading.Lock() for _ in range(args.gpus)]  # two would not fit
        known = {variant.title: variant for variant in VARIANTS}
        wanted = [known[title] for title in args.only or known]
        self.left = [v for v in wanted if not self.result(v).is_file()]

    def result(self, variant: Variant) -> Path:
        """Where a variant's JSON file is."""
        return self.results / f"{variant.title}.json"

    def run(self) -> int:
        """Run all; return how many could not be finished."""
        self.results.mkdir(parents=True, exist_ok=True)
        self.prepare()
        gpus = list(range(self.args.gpus)) * self.args.lanes
        at_once([(self.run_variants, gpu) for gpu in gpus])
        return len([v for v in VARIANTS if v in self.left])

    def prepare(self) -> None:
        """Make checkpoint and datasets, where they are not there."""
        args, work = self.args, self.work
        work.mkdir(parents=True, exist_ok=True)
        if args.smoke and not Path(args.hf).exists():
            maker = HERE / "examples/quickstart/tiny_model.py"
            call([maker, "--output", args.hf, "--text", *args.text], work / "prepare.log")
        tokenizer = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", args.hf]
        workers = ["--workers", str(args.workers)]
        steps: dict[str, list[Any]] = {
            "base": [
                *(TOOLS / "convert_checkpoint.py", "import", "--hf", args.hf),
                *("--output", work / "base"),
            ],
            "text.idx": [
                *(TOOLS / "preprocess_data.py", "--input", *args.text, *tokenizer, *workers),
                *("--min-tokens", str(WINDOW), "--output-prefix", work / "text"),
            ],
            "held-out.idx": [
                *(TOOLS / "preprocess_data.py", "--input", *args.held_out, *tokenizer, *workers),
                *("--output-prefix", work / "held-out"),
            ],
        }
        documents = 32 if args.smoke else RETRIEVAL_DOCUMENTS
        for variant in {v.documents: v for v in self.left if v.retrieval}.values():
            name = variant.documents
            steps[f"{name}.idx"] = [
                *(TOOLS / "make_retrieval_data.py", *tokenizer, *workers),
                *("--length", sample_length(variant)),
                # As many tokens, and as many questions in them, whatever the length.
                *("--documents", documents * WINDOW // sample_length(variant)),
                *("--questions", variant.questions * sample_length(variant) // WINDOW),
                *("--haystack", *args.text),
                *("--tasks", variant.tasks),
                *(["--answers-only"] if variant.answers_only else []),
                *("--output-prefix", work / name),
            ]
        todo = {name: step for name, step in steps.items() if not (work / name).exists()}
        # At once: importing the model keeps one core busy, and text the others.
        at_once([(call, step, work / f"prepare-{name}.log") for name, step in todo.items()])
        missing = [name for name in steps if not (work / name).exists()]
        if missing:
            sys.exit(f"error: {work} lacks {', '.join(missing)}: see prepare-*.log there")

    def run_variants(self, gpu: int) -> None:
        """Run variants on one GPU until there is none, or no time."""
        while True:
            with self.lock:
                if not self.left:
                    return
                variant = self.left.pop(0)
            if not self.finish(variant, gpu):
                with self.lock:
                    self.left.insert(0, variant)
                return

    def finish(self, variant: Variant, gpu: int) -> bool:
        """Do what is left of a variant; say whether it is finished."""
        folder = self.work / variant.title
        folder.mkdir(exist_ok=True)
        trained = variant.method is None
        with self.training[gpu]:
            if not (trained or self.step(variant, gpu, "train", folder / "extended", self.train)):
                return False
        if not self.step(variant, gpu, "score", folder / "scores" / "whole", self.score):
            return False
        found = record(variant, self.settings(variant, gpu), folder, GLOBAL * WINDOW)
        text = json.dumps(found, indent=1) + "\n"
        self.result(variant).write_text(text, "utf-8")
        print(f"{variant.title}: {summary(found)}", flush=True)
        return True

    def step(self, variant: Variant, gpu: int, name: str, made: Path, do: Any) -> bool:
        """Do one step of a variant, unless it is done or there is no time for it."""
        if made.exists():
            return True
        if self.seconds_left() < self.took[name]:
            print(f"{variant.title}: no time to {name}", flush=True)
            return False
        began = time.monotonic()
        if not do(variant, gpu):
            print(f"{variant.title}: {name} failed, see {self.work / variant.title}", flush=True)
            return True if made.exists() else self.give_up(variant, name)
        took = time.monotonic() - began
        path = self.work / variant.title / "seconds.json"
        seconds = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps(seconds | {name: round(took, 1)}))
        self.took[name] = 1.05 * took
        print(f"{variant.title}: {name} took {took:.0f} s on GPU {gpu}", flush=True)
        return True

    def give_up(self, variant: Variant, name: str) -> bool:
        """A step that failed ends the whole study: the next variant would fail alike."""
        for log in sorted((self.work / variant.title).glob(f"{name}*.log")):
            lines = log.read_text("utf-8", errors="replace").splitlines()[-30:]
            print("\n".join(line[-300:] for line in lines), flush=True)
        return False

    def seconds_left(self) -> float:
        """Until --minutes are over."""
        if self.args.minutes is None:
            return float("inf")
        return 60 * self.args.minutes - (time.monotonic() - self.began)

    def trained(self, variant: Variant) -> Path:
        """The Hugging Face folder of a variant, to be scored."""
        if variant.method is None:
            return Path(self.args.hf)
        return self.work / variant.title / "extended"

    def train(self, variant: Variant, gpu: int) -> bool:
        """Train and export."""
        folder = self.work / variant.title
        launch = torchrun.command(1, "-m", "megatron_cream.pretrain")[1:]
        flags = [*launch, *self.flags(variant)]
        if not call(flags, folder / "train.log", gpu):
            return False
        export = [TOOLS / "convert_checkpoint.py", "export", "--checkpoint", folder / "run"]
        return call([*export, "--output", folder / "extended"], folder / "export.log", gpu)

    def flags(self, variant: Variant) -> list[Any]:
        """The flags of ``megatron_cream.pretrain``."""
        work, run, length = self.work, self.work / variant.title / "run", sample_length(variant)
        data = [work / "text"]
        if variant.retrieval:
            share = variant.retrieval
            retrieval = work / variant.documents
            data = [f"{1 - share:g}", work / "text", f"{share:g}", retrieval]
        return [
            *("--use-checkpoint-args", "--position-embedding-type", "rope"),
            *("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", work / "base/hf"),
            *("--attention-dropout", "0", "--hidden-dropout", "0", "--seed", variant.seed),
            *("--seq-length", length, "--max-position-embeddings", length),
            *("--target-length", TARGET * variant.targets),
            *("--original-length", WINDOW, "--sample-unit", "window"),
            *("--position-strategy", variant.method, "--rope-interpolation", variant.rope),
            *variant.flags,
            *("--data-path", *data, "--split", "100,0,0"),
            "--no-create-attention-mask-in-dataloader",
            *("--pretrained-checkpoint", work / "base", "--save", run, "--load", run),
            *("--no-save-optim", "--save-interval", STEPS),
            *("--eval-iters", "0", "--eval-interval", STEPS),
            *("--micro-batch-size", max(1, MICRO * WINDOW // length)),
            *("--global-batch-size", GLOBAL * WINDOW // length, "--train-iters", STEPS),
            *("--lr", "4e-4", "--min-lr", "0", "--lr-decay-style", "linear"),
            *("--lr-warmup-iters", STEPS // 13, "--weight-decay", "0"),
            *("--log-interval", max(1, STEPS // 13), *self.machine()),
        ]

    def machine(self) -> list[str]:
        """The flags of ``megatron_cream.pretrain`` that a machine decides."""
        if self.args.smoke:
            return ["--cpu", "--num-workers", "0"]
        flags = [
            *("--bf16", "--use-distributed-optimizer", "--manual-gc", "--manual-gc-interval"),
            *("100", "--disable-jit-fuser", "--no-bias-swiglu-fusion", "--use-te-activation-func"),
            *("--te-cross-entropy", "--num-workers", "4"),
        ]
        absent = subprocess.run(
            [sys.executable, "-c", "import fused_weight_gradient_mlp_cuda"], capture_output=True
        ).returncode
        return [*flags, *(["--no-gradient-accumulation-fusion"] if absent else [])]

    def score(self, variant: Variant, gpu: int) -> bool:
        """Score the model of a variant."""
        folder = self.work / variant.title
        flags = [HERE / "examples/study/score.py", "--hf", self.trained(variant)]
        flags += ["--data", self.work / "held-out", "--output", folder / "scores"]
        if variant.method is None and variant.rope:
            factor = TARGET / WINDOW
            flags += ["--rope-interpolation", variant.rope, "--rope-factor", f"{factor:g}"]
        flags += ["--smoke"] if self.args.smoke else []
        scored = variant.scored_targets or variant.targets
        flags += ["--targets", scored]
        keys = self.args.key_tokens
        flags += ["--key-tokens", keys] if keys else []
        # Two processes: while one makes cases on the CPU, the other has the GPU.
        controls = ("longchat-lines-of-8K", "kv-retrieval-of-8K") if scored == 1 else ()
        halves = [
            ("perplexity", "longchat-lines", "kv-retrieval"),
            ("niah-multikey", "needle", "passkey", *controls),
            *([("longppl",)] if keys else []),
        ]
        done = at_once(
            [
                (call, [*flags, "--tasks", *tasks], folder / f"score-{tasks[0]}.log", gpu)
                for tasks in halves
            ]
        )
        if all(done):
            (folder / "scores" / "whole").touch()
        return all(done)

    def settings(self, variant: Variant, gpu: int) -> dict[str, Any]:
        """How a run was made, for the record."""
        return {
            "window": WINDOW,
            "target": TARGET * variant.targets,
            "sample_length": sample_length(variant),
            "steps": STEPS,
            "tokens_a_step": GLOBAL * WINDOW,
            "micro_batch": MICRO,
            "learning_rate": 4e-4,
            "commit": os.environ.get("COMMIT") or commit(),
            "device": device(gpu),
        }


def sample_length(variant: Variant) -> int:
    """Tokens in a sample of a variant."""
    return TARGET * variant.targets if variant.full_length else WINDOW


def at_once(calls: list[tuple[Any, ...]]) -> list[Any]:
    """Make calls, each a function and its arguments, in threads; return what they returned."""
    with ThreadPoolExecutor(max(1, len(calls))) as pool:
        return [future.result() for future in [pool.submit(*one) for one in calls]]


def call(arguments: list[Any], log: Path, gpu: int | None = None) -> bool:
    """Run Python with its output in ``log``; say whether it ended well."""
    paths = [str(HERE), os.environ.get("PYTHONPATH", "")]
    environment = torchrun.environment() | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "PYTHONUNBUFFERED": "1",
    }
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = str(gpu)
    command = [sys.executable, *map(str, arguments)]
    with open(log, "a", encoding="utf-8") as file:
        file.write(f"$ {' '.join(command)}\n")
        file.flush()
        return not subprocess.run(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment
        ).returncode


def commit() -> str | None:
    """The commit of this checkout, None outside one."""
    found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=HERE, capture_output=True, text=True)
    return found.stdout.strip() or None


def device(gpu: int) -> str:
    """The name of a GPU, or that there is none."""
    import torch

    return torch.cuda.get_device_name(gpu) if torch.cuda.is_available() else "cpu"


def summary(found: dict[str, Any]) -> str:
    """One line of a run's results."""
    parts = []
    for task, rows in found["tasks"].items():
        key = "perplexity" if task == "perplexity" else "hit"
        parts.append(f"{task} " + " ".join(f"{row[key]:.4g}" for row in rows.values()))
    return "; ".join(parts)


if __name__ == "__main__":
    left = Study(parse_args()).run()
    print(f"{left} left" if left else "all finished")
