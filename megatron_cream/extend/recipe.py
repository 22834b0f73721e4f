# SPDX-License-Identifier: Apache-2.0
"""The settings of ``megatron-cream extend``, and the recipe that follows: what is trained, how."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from megatron_cream.errors import UserError
from megatron_cream.options import flag_field, parse_length
from megatron_cream.parallel_layout import ParallelLayout, Workload
from megatron_cream.planning.cost import GPUS, Gpu, product_share
from megatron_cream.planning.models import GIB, RESERVE_GIB, BaseModel, stage_parameters
from megatron_cream.planning.propose import Cluster, Plan, propose
from megatron_cream.planning.script import layout_flags, warm_up
from megatron_cream.positions import STRATEGIES
from megatron_cream.rope import SCALINGS

LONGEST_WINDOW = 8192
"""Tokens trained at, unless told otherwise: below that most time goes to matrix products."""

STEP_TOKENS = 131_072
"""Tokens per step, as in CREAM's paper: 32 samples of 4096."""


@dataclass(frozen=True)
class _Defaults:
    strategy: str
    steps: int
    learning_rate: float


_SMALL = 1e9  # parameters
_SHORT = _Defaults("scatter", 130, 4e-4)  # the best of docs/study.md, on SmolLM2-135M
_LONG = _Defaults("cream", 1000, 2e-5)  # of CREAM's paper, on Llama-2-7B: scatter is untried there


def _defaults(model: BaseModel) -> _Defaults:
    return _SHORT if stage_parameters(model, ParallelLayout(), 0) < _SMALL else _LONG


SAVE_STEPS = 200
"""Steps between two checkpoints."""

_LARGEST_MICRO_BATCH = 8
_TASKS = ("passkey", "needle", "longchat-lines", "niah-multikey")


@dataclass(frozen=True)
class ExtendSettings:
    """The settings of ``extend``; each is a flag of ``megatron-cream extend``.

    Lengths are in tokens. What is None follows from the model, the target and the machine.
    """

    hf: str = flag_field("Hugging Face folder, or a name on the hub", metavar="MODEL")
    text: tuple[str, ...] = flag_field("files or folders of text to train on", many=True)
    target_length: int = flag_field("tokens of the new window: 32K is 32768", type=parse_length)
    output: str = flag_field("new folder for the extended model")
    held_out: tuple[str, ...] = flag_field(
        "text to measure perplexity on (default: the last fiftieth of TEXT's documents, which is "
        "then kept from training)",
        default=(),
        many=True,
        metavar="TEXT",
    )
    work: str | None = flag_field("folder for everything else (default: OUTPUT.work)", default=None)
    window: int | None = flag_field(
        "tokens to train at (default: the model's window, at most 8192)",
        default=None,
        type=parse_length,
    )
    gpus: int | None = flag_field(
        "GPUs of this machine to train on (default: all); with --cpu processes",
        default=None,
        type=int,
    )
    gpu: str | None = flag_field(
        "kind of GPU to plan for (default: this machine's)", default=None, choices=tuple(GPUS)
    )
    cpu: bool = flag_field("train on the CPU: for trying things out", default=False)
    position_strategy: str | None = flag_field(
        "of the far samples (default: scatter, from a billion parameters on cream)",
        default=None,
        choices=tuple(STRATEGIES),
    )
    rope_interpolation: str = flag_field(
        "of the angles",
        default="yarn",
        choices=tuple(name for name, one in SCALINGS.items() if not one.evaluation_only),
    )
    retrieval_share: float = flag_field(
        "share of the samples that are retrieval documents", default=0.5, type=float
    )
    retrieval_loss: str = flag_field(
        "tokens of retrieval documents that have a loss",
        default="answers",
        choices=("answers", "all"),
    )
    steps: int | None = flag_field(
        "optimizer steps (default: 130, from a billion parameters on 1000)", default=None, type=int
    )
    global_batch_size: int | None = flag_field(
        "samples per step (default: 131072 tokens of them)", default=None, type=int
    )
    micro_batch_size: int | None = flag_field(
        "samples per forward pass (default: the most that fit)", default=None, type=int
    )
    lr: float | None = flag_field(
        "highest learning rate (default: 4e-4, from a billion parameters on 2e-5)",
        default=None,
        type=float,
    )
    seed: int = flag_field("of text, order and positions", default=1)
    lengths: tuple[int, ...] = flag_field(
        "to measure at (default: half the trained window, and doubled up to the target)",
        default=(),
        type=parse_length,
        many=True,
    )
    tasks: tuple[str, ...] = flag_field(
        "to measure beside perplexity", default=_TASKS, many=True, metavar="TASK"
    )
    cases: int = flag_field("cases per seed, task and length", default=5)
    workers: int = flag_field("processes that read text", default=os.cpu_count() or 1)
    reuse: str | None = flag_field(
        "working folder of another extension of the same model and text: its datasets, import and "
        "first scores are taken from there",
        default=None,
        metavar="WORK",
    )
    train_args: str = flag_field(
        "more flags for the trainer, in one string, as in --train-args='--plain-share 0.25'",
        default="",
        type=str,
        metavar="FLAGS",
    )
    dry_run: bool = flag_field("print recipe and commands, run nothing", default=False)

    @property
    def work_folder(self) -> Path:
        """The folder of datasets, checkpoints, logs and scores."""
        return Path(self.work or f"{self.output}.work")


@dataclass(frozen=True)
class Recipe:
    """What is trained.

    Attributes:
        window: tokens of a sample, N.
        target: tokens of the window that the model gets, T.
        strategy: positions of the far samples.
        steps: optimizer steps.
        global_batch: samples per step.
        micro_batch: samples per forward pass.
        learning_rate: at its highest.
        processes: one per GPU, or on the CPU.
        plan: how the model is spread over the GPUs, with planned memory and time; None on the CPU,
            where every process has all of it.
    """

    window: int
    target: int
    strategy: str
    steps: int
    global_batch: int
    micro_batch: int
    learning_rate: float
    processes: int
    plan: Plan | None

    @property
    def layout(self) -> ParallelLayout:
        """How the model is spread; whole in every process on the CPU."""
        return self.plan.layout if self.plan else ParallelLayout(data=self.processes)

    @property
    def saves_optimizer(self) -> bool:
        """Whether training goes on from a checkpoint; a shorter run begins again."""
        return self.steps > SAVE_STEPS

    @property
    def samples(self) -> int:
        """Samples of the whole run."""
        return self.steps * self.global_batch

    @property
    def lengths(self) -> list[int]:
        """Lengths to score at, in tokens: half the window, and doubled up to the target."""
        count = math.ceil(math.log2(self.target / self.window))
        return [self.window // 2, *(self.window << i for i in range(count)), self.target]

    def describe(self) -> str:
        """Return the recipe in a line."""
        return (
            f"{self.window} to {self.target} tokens by {self.strategy}, {self.steps} steps of "
            f"{self.global_batch} x {self.window} tokens, learning rate {self.learning_rate:g}, "
            f"{self._where()}"
        )

    def _where(self) -> str:
        if self.plan is None:
            return f"{self.processes} process{'es' * (self.processes > 1)} on the CPU"
        minutes = self.steps * self.plan.step.total / 60
        where = "one GPU" if self.processes == 1 else f"{self.processes} GPUs, {self.layout}"
        return (
            f"on {where}; planned: {minutes:.1f} min of steps, "
            f"{self.plan.memory.total / GIB:.1f} GiB per GPU"
        )


def make_recipe(settings: ExtendSettings, model: BaseModel) -> Recipe:
    """Return the recipe for a model; what ``settings`` leave out follows from model and machine.

    Raises:
        UserError: a target that is no extension, a batch that cannot be split, or a model that
            does not fit.
    """
    window = settings.window or min(model.trained_length, LONGEST_WINDOW)
    _validate_lengths(settings.target_length, window, model)
    default = _defaults(model)
    batch = settings.global_batch_size or max(1, STEP_TOKENS // window)
    steps, rate = settings.steps or default.steps, settings.lr or default.learning_rate
    strategy = settings.position_strategy or default.strategy
    schedule = (window, settings.target_length, strategy, steps, batch)
    if settings.cpu:
        processes = settings.gpus or 1
        fitting = (n for n in range(_LARGEST_MICRO_BATCH, 1, -1) if batch % (processes * n) == 0)
        micro = settings.micro_batch_size or next(fitting, 1)
        if batch % (processes * micro):
            raise UserError(
                f"--global-batch-size is {batch}: it must be a multiple of {processes * micro}, "
                f"{micro} samples on each of {processes} processes"
            )
        return Recipe(*schedule, micro, rate, processes, None)
    gpus, gpu = _find_gpus(settings)
    plan = _choose_plan(settings, model, window, batch, gpus, gpu)
    return Recipe(*schedule, plan.work.micro_batch, rate, gpus, plan)


def _validate_lengths(target: int, window: int, model: BaseModel) -> None:
    if target <= model.trained_length:
        raise UserError(
            f"--target-length is {target}: {model.name} has a window of {model.trained_length} "
            "tokens, the target must be above"
        )
    if not 32 <= window <= model.trained_length:
        raise UserError(
            f"--window is {window}: it must be at least 32 and at most the model's own window of "
            f"{model.trained_length} tokens"
        )


def _find_gpus(settings: ExtendSettings) -> tuple[int, Gpu]:
    """Return how many GPUs there are and of what kind; for a dry run those that are named."""
    import torch

    there = torch.cuda.device_count()
    gpus = settings.gpus or there
    if not settings.dry_run and gpus > there:
        raise UserError(f"--gpus is {gpus}: this machine has {there}")
    if not gpus:
        raise UserError(
            "--gpus is missing and this machine has none: name a number for --dry-run, or train "
            "on the CPU with --cpu"
        )
    if settings.gpu:
        return gpus, GPUS[settings.gpu]
    if not there:
        return gpus, GPUS["h100"]
    name = torch.cuda.get_device_name(0).lower()
    return gpus, next((gpu for kind, gpu in GPUS.items() if kind in name), GPUS["a100"])


def _choose_plan(
    settings: ExtendSettings, model: BaseModel, window: int, batch: int, gpus: int, gpu: Gpu
) -> Plan:
    """Return the plan of the largest micro-batch that fits without recomputation."""
    cluster = Cluster(gpus, gpu, gpu.memory - RESERVE_GIB, product_share())
    given = settings.micro_batch_size
    failed: UserError | None = None
    found: list[Plan] = []
    for micro in [given] if given else (8, 4, 2, 1):
        try:
            found.append(propose(model, cluster, Workload(window, batch, micro)))
        except UserError as error:
            failed = error
    if not found:
        assert failed is not None
        raise failed
    # Ties of the size of the model's split go to the larger micro-batch, which comes first.
    return min(found, key=lambda plan: (plan.layout.recompute, _split_of(plan.layout)))


def _split_of(layout: ParallelLayout) -> int:
    return layout.tensor * layout.pipeline


def machine_flags(recipe: Recipe) -> list[str]:
    """Return the trainer's flags that the machine decides."""
    if recipe.plan is None:
        return ["--cpu", "--num-workers", "0"]
    flags = [
        *("--bf16", *layout_flags(recipe.layout)),
        *("--manual-gc", "--manual-gc-interval", "100", "--num-workers", "4"),
        # Compiling takes longer than it saves in a short run.
        *("--disable-jit-fuser", "--no-bias-swiglu-fusion", "--use-te-activation-func"),
    ]
    if find_spec("fused_weight_gradient_mlp_cuda") is None:  # of Apex
        flags.append("--no-gradient-accumulation-fusion")
    from megatron_cream.extras.te_cross_entropy import why_absent

    return flags if why_absent() else [*flags, "--te-cross-entropy"]


def schedule_flags(recipe: Recipe) -> list[str]:
    """Return the trainer's flags for batch, steps and learning rate."""
    retained = -(-recipe.steps // SAVE_STEPS) * SAVE_STEPS
    return [
        *("--micro-batch-size", str(recipe.micro_batch)),
        *("--global-batch-size", str(recipe.global_batch), "--train-iters", str(recipe.steps)),
        *("--lr", f"{recipe.learning_rate:g}", "--min-lr", "0", "--lr-decay-style", "linear"),
        *("--lr-warmup-iters", str(warm_up(recipe.steps)), "--weight-decay", "0"),
        *("--save-interval", str(min(recipe.steps, SAVE_STEPS))),
        # Of a long run the newest checkpoint is kept.
        *(("--save-retain-interval", str(retained)) if recipe.saves_optimizer else ()),
        *(() if recipe.saves_optimizer else ("--no-save-optim",)),
        *("--eval-iters", "0", "--eval-interval", str(recipe.steps)),
        *("--log-interval", str(max(1, recipe.steps // 65))),
    ]
