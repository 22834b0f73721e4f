# SPDX-License-Identifier: Apache-2.0
"""Patches of Megatron's trainer (how it parses, starts, logs and saves), its restart, and what is
asked of it between two iterations: passes without gradients, a save, a line of its log."""

from __future__ import annotations

import copy
import functools
import inspect
import queue
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from megatron_cream.errors import one_line_errors
from megatron_cream.mcore.patches import patch

ScalarsAt = Callable[[int], dict[str, float]]
"""Values by name after so many samples of a run."""


@patch(
    "megatron.training.arguments:parse_and_validate_args",
    needs=("extra_args_provider", "ignore_unknown_args", "args_defaults"),
    why="A script hands its parsed arguments on to its model config: our flags and settings must "
    "be among them by then.",
)
def patch_parse_and_validate_args(
    own: Callable[..., Namespace], parse: Callable[..., Namespace]
) -> Callable[..., Namespace]:
    """Have a script's flags parsed by ``parse``, which is given Megatron's own function first."""

    @functools.wraps(own)
    def parse_and_validate_args(
        extra_args_provider: Callable[..., Any] | None = None,
        ignore_unknown_args: bool = False,
        args_defaults: dict[str, Any] | None = None,
    ) -> Namespace:
        with one_line_errors():
            return parse(own, extra_args_provider, ignore_unknown_args, args_defaults)

    return parse_and_validate_args


@patch(
    "megatron.training.training:pretrain",
    "megatron.training:pretrain",
    needs=("cfg_container", "train_valid_test_dataset_provider", "forward_step_func"),
    why="A script hands its datasets, forward step and model config to the trainer here and "
    "nowhere else.",
)
def patch_pretrain(
    own: Callable[..., Any], swap: Callable[[Namespace, dict[str, Any]], None]
) -> Callable[..., Any]:
    """Have ``swap`` change the arguments of a script's call, by name; it gets Megatron's too."""
    from megatron.training import get_args

    @functools.wraps(own)
    def pretrain(*args: Any, **kwargs: Any) -> Any:
        call = inspect.signature(own).bind(*args, **kwargs)
        with one_line_errors():
            swap(get_args(), call.arguments)
        return own(*call.args, **call.kwargs)

    return pretrain


@patch(
    "megatron.training.training:training_log",
    needs=("iteration", "is_first_iteration"),
    why="An iteration is over here and its number of samples known, which our scalars and the "
    "report of a step's time need; and "
    "the loss of a start's first iteration would be counted in the next line, too.",
)
def patch_training_log(
    own: Callable[..., Any], scalars: ScalarsAt | None, report: Callable[[], str | None] | None
) -> Callable[..., Any]:
    """Have ``scalars`` written and lines of ``report`` printed, and the first loss counted once.

    Megatron prints the first iteration after every start besides those that --log-interval asks
    for, and keeps that one's loss for the next line. Where the two fall together (at
    --log-interval 1 always) the next line would be the mean of its own interval and of an
    iteration that was printed before: a resume that is right to the last bit would look broken.
    """
    from megatron.training import get_args

    @functools.wraps(own)
    def training_log(
        loss_dict: Any, total: Any, rate: Any, iteration: int, *rest: Any, **more: Any
    ) -> Any:
        if iteration % get_args().log_interval == 0:
            more["is_first_iteration"] = False
        answer = own(loss_dict, total, rate, iteration, *rest, **more)
        if scalars is not None:
            _write(scalars, iteration)
        line = report() if report is not None else None
        if line:
            print(line, flush=True)
        return answer

    return training_log


def _write(scalars: ScalarsAt, iteration: int) -> None:
    from megatron.training import get_args, get_tensorboard_writer, get_wandb_writer

    args, writer, wandb = get_args(), get_tensorboard_writer(), get_wandb_writer()
    if (writer is None and wandb is None) or iteration % args.tensorboard_log_interval:
        return
    write_scalars(scalars(args.consumed_train_samples), iteration)


def write_scalars(values: dict[str, float], iteration: int) -> None:
    """Write to TensorBoard and Weights & Biases, on the rank that has them."""
    from megatron.training import get_tensorboard_writer, get_wandb_writer

    writer, wandb = get_tensorboard_writer(), get_wandb_writer()
    for name, value in values.items():
        if writer is not None:
            writer.add_scalar(name, value, iteration)
    if wandb is not None:
        wandb.log(values, iteration)


@patch(
    "megatron.training.training:checkpoint_and_decide_exit",
    needs=("model", "iteration"),
    why="The one function that has the model and the optimizer after every iteration; Megatron's "
    "own validation is tied to the trained length.",
)
def patch_checkpoint_and_decide_exit(
    own: Callable[..., bool], after_iteration: Callable[..., None]
) -> Callable[..., bool]:
    """Have ``after_iteration`` called with the same arguments behind a checkpoint that is due."""

    @functools.wraps(own)
    def checkpoint_and_decide_exit(*args: Any, **kwargs: Any) -> bool:
        must_exit = own(*args, **kwargs)
        after_iteration(*args, **kwargs)
        return must_exit

    return checkpoint_and_decide_exit


@patch(
    "megatron.training.training:save_checkpoint_and_time",
    needs=("iteration",),
    why="Megatron saves the last iteration when its loop is over. Our validation comes before that "
    "and may run out of memory, so it saves first, and that iteration is not saved again.",
)
def patch_save_checkpoint_and_time(
    own: Callable[..., None], is_saved: Callable[[int], bool]
) -> Callable[..., None]:
    """Save nothing where ``is_saved(iteration)``."""

    @functools.wraps(own)
    def save_checkpoint_and_time(iteration: int, *args: Any, **kwargs: Any) -> None:
        if not is_saved(iteration):
            own(iteration, *args, **kwargs)

    return save_checkpoint_and_time


@contextmanager
def as_served(args: Namespace, model: list[Any]) -> Iterator[list[Any]]:
    """Gather weights that an overlapped optimizer has not yet; yield the chunks' rotaries.

    Their lengths may be set: afterwards they turn as in training again.
    """
    from megatron.core.utils import unwrap_model
    from megatron.training import training

    overlaps = training.should_disable_forward_pre_hook(args)
    if overlaps:
        training.disable_forward_pre_hook(model)
    try:
        with ExitStack() as stack:
            rotaries = [unwrap_model(chunk).rotary_pos_emb for chunk in model]
            for rotary in rotaries:
                stack.enter_context(rotary.as_served())
            yield rotaries
    finally:
        if overlaps:
            training.enable_forward_pre_hook(model)


def run_schedule(
    model: Sequence[Any], forward_step: Callable[..., Any], passes: Sequence[Any], tokens: int
) -> list[Any]:
    """Have Megatron's own schedule run passes of ``tokens`` tokens through a model, as it stands.

    Wrappers, virtual stages and sequence parallelism stay as training has them. All ranks call it.

    Args:
        model: chunks of the model as the trainer has them.
        forward_step: as Megatron's; what the function that it returns reads is collected.
        passes: as many on each data-parallel rank, a multiple of the pipeline stages.

    Returns:
        what was read, in order; nothing on a rank that is not of the last pipeline stage.
    """
    import torch
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.rerun_state_machine import RerunMode, get_rerun_state_machine
    from megatron.core.utils import get_model_config

    config = get_model_config(model[0])
    iterators = [iter(passes) for _ in model]
    timers, config.timers = config.timers, None
    machine = get_rerun_state_machine()
    mode = machine.get_mode()
    machine.set_mode(RerunMode.DISABLED)
    for chunk in model:
        chunk.eval()
    try:
        with torch.no_grad():
            return get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=iterators if len(model) > 1 else iterators[0],
                model=list(model),
                num_microbatches=len(passes),
                seq_length=tokens,
                micro_batch_size=1,
                decoder_seq_length=tokens,
                forward_only=True,
                collect_non_loss_data=True,
            )
    finally:
        for chunk in model:
            chunk.train()
        machine.set_mode(mode)
        config.timers = timers


def must_stop(args: Namespace) -> bool:
    """Return whether a rank was told to stop: time is short then, and a checkpoint comes first."""
    from megatron.training import get_signal_handler

    return bool(args.exit_signal_handler and any(get_signal_handler().signals_received()))


@contextmanager
def untimed() -> Iterator[None]:
    """Keep what is done out of the rate of the next line of the log; saves are whole before it."""
    from megatron.training import get_timers
    from megatron.training.async_utils import maybe_finalize_async_save

    get_timers()("interval-time").stop()
    maybe_finalize_async_save(blocking=True)
    yield
    get_timers()("interval-time", log_level=0).start(barrier=True)


def save_checkpoint(*state: Any, **more: Any) -> None:
    """Save as Megatron does in its loop; the arguments are those of its own function."""
    from megatron.training import training

    training.save_checkpoint_and_time(*state, **more)


def tell(values: dict[str, float], iteration: int, seconds: float) -> None:
    """Print figures on the last rank, and write them where Megatron writes its own."""
    from megatron.training.utils import print_rank_last

    words = " | ".join(f"{name}: {value:.6g}" for name, value in values.items())
    print_rank_last(f" validation after iteration {iteration} | {words} | {seconds:.1f} s")
    write_scalars({f"validation/{name}": value for name, value in values.items()}, iteration)


@patch(
    "megatron.core.datasets.utils:compile_helpers",
    why="It runs make in a folder in which the wheel has no Makefile, and exits; the wheel ships "
    "the helpers compiled.",
)
def patch_compile_helpers(own: Callable[[], None]) -> Callable[[], None]:
    """Compile nothing where the compiled module imports; a source checkout makes its own."""
    try:
        from megatron.core.datasets import helpers_cpp  # noqa: F401
    except ImportError:
        return own
    return lambda: None


@patch(
    "megatron.core.dist_checkpointing.strategies.filesystem_async:_results_queue",
    why="On a CPU the threads that save report through a queue of this process: for Megatron's a "
    "process is started that imports torch and megatron anew, eight seconds per rank.",
)
def patch_results_queue(own: Any) -> Any:
    """Only a process that saves asynchronously needs Megatron's, and --cpu refuses those."""
    return queue.Queue() if own is None else own


@patch(
    "megatron.core.dist_checkpointing:save",
    needs=("sharded_state_dict", "checkpoint_dir"),
    why="Checksums are written when a save is through, also an asynchronous one; no hook is "
    "called then on every rank.",
)
def patch_save(
    own: Callable[..., Any], before: Callable[[Path], None], after: Callable[[Path, int], None]
) -> Callable[..., Any]:
    """Have ``before(folder)`` called on rank 0, and ``after(folder, rank)`` when it is through.

    Megatron's trainer calls it by that name on every rank.
    """
    import torch

    @functools.wraps(own)
    def save(sharded_state_dict: Any, checkpoint_dir: Any, *args: Any, **kwargs: Any) -> Any:
        folder, rank = Path(str(checkpoint_dir)), torch.distributed.get_rank()
        if rank == 0 and folder.is_dir():
            before(folder)
        request = own(sharded_state_dict, checkpoint_dir, *args, **kwargs)
        if request is None:
            after(folder, rank)
        else:
            request.add_finalize_fn(functools.partial(after, folder, rank))
        return request

    return save


def restart_inside(start: Callable[..., None], args: Namespace) -> None:
    """Call ``start(args, store=..., inprocess_call_wrapper=...)``, and again after a failure.

    Megatron 0.19.2 wraps its ``pretrain`` for nvidia-resiliency-ext, which calls it again after a
    failure. By then the arguments are gone (``destroy_global_state``), the model's config has the
    failed attempt's functions in it, and all attempts share one store, because the parameter that
    the attempt's number should come by has a type that the package does not look for. So what is
    wrapped here is everything from the arguments on, and each attempt has its own copy of them.

    Args:
        start: takes the two on to ``pretrain``, which gives every attempt keys of its own in the
            store.
        args: validated, and set in Megatron's globals.
    """
    from megatron.training import inprocess_restart
    from megatron.training.global_vars import set_global_variables
    from nvidia_resiliency_ext.inprocess import CallWrapper

    untouched = copy.deepcopy(args)

    def attempt(call: Any = None) -> None:
        own = args
        if call.iteration:
            own = copy.deepcopy(untouched)
            set_global_variables(own)
        start(own, store=store, inprocess_call_wrapper=call)

    # The package hands its wrapper to the parameter that has its type, and not the type's name.
    attempt.__annotations__["call"] = CallWrapper
    wrapped, store = inprocess_restart.maybe_wrap_for_inprocess_restart(attempt)
    wrapped()
