# SPDX-License-Identifier: Apache-2.0
"""Train with Megatron's own trainer, our positions, angles and data.

    torchrun --nproc-per-node 8 -m megatron_cream.pretrain <Megatron's flags> \\
        --seq-length 4096 --target-length 32768 \\
        --position-strategy cream --rope-interpolation linear

Takes every flag of Megatron's pretraining. ``--cpu`` runs it on a machine with no GPU. To start
an existing training script with our positions instead, see ``megatron_cream.launch``, which asks
``prepare_process``, ``parse`` and ``get_ready`` here.
"""

from __future__ import annotations

import itertools
import logging
import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from functools import partial
from typing import Any

from megatron_cream.config import SETTINGS_KEY, ExtensionConfig, extension_of
from megatron_cream.errors import UserError, one_line_errors
from megatron_cream.mcore import hooks, trainer

ArgumentsProvider = Callable[[ArgumentParser], ArgumentParser]

_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_NO_START = {"-h", "--help", "--fake-process-group"}


def main() -> None:
    """Parse, check and train; bad input ends in one line and exit status 2."""
    with one_line_errors():
        prepare_process("megatron_cream.pretrain")
        args = prepare()
    if args.inprocess_restart:
        trainer.restart_inside(train, args)
    else:
        train(args)


def prepare_process(command: str) -> None:
    """Look for a rank and a GPU, for which ``--cpu`` has the CPU; before megatron is imported.

    Args:
        command: what torchrun starts, for messages.

    Raises:
        UserError: naming the variables that tell a process its rank and that are missing; or there
            is no GPU, and no ``--cpu``.
    """
    flags = sys.argv[1:]
    starts = not _NO_START.intersection(flags)
    missing = [name for name in _LAUNCHER if name not in os.environ]
    if missing and starts:
        raise UserError(
            f"{', '.join(missing)} must be set, which torchrun does: torchrun --nproc-per-node "
            f"GPUS -m {command} <its flags>, with one process for one GPU too"
        )
    if "--cpu" in flags:
        from megatron_cream.mcore import cpu
        from megatron_cream.mcore.argument_table import cpu_flags

        cpu.install()
        sys.argv[1:1] = cpu_flags()
    elif starts:
        require_gpu()


def require_gpu() -> None:
    """Check that this machine has a GPU for each process that was started on it.

    Raises:
        UserError: saying what to do.
    """
    import torch

    if torch.cuda.is_available():
        started, there = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
        if started > there:
            raise UserError(
                f"--nproc-per-node is {started} (GPUS_PER_NODE of a launch script): it must be at "
                f"most {there}, the GPUs that torch finds here"
            )
        return
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    why = "" if hidden is None else f" (CUDA_VISIBLE_DEVICES is {hidden!r})"
    raise UserError(
        f"torch finds no GPU here{why}: add --cpu to train on the CPU, or look at flags, stages "
        "and memory without one by python -m megatron_cream.dry_run"
    )


def prepare() -> Namespace:
    """Parse ``sys.argv`` and check all of it before a GPU is asked for.

    Raises:
        UserError, OSError: naming the flag, the value it got and the value it needs.
    """
    from megatron.training.arguments import parse_and_validate_args

    return parse(parse_and_validate_args)


def parse(
    parse_and_validate_args: Callable[..., Namespace],
    extra_args_provider: ArgumentsProvider | None = None,
    ignore_unknown_args: bool = False,
    args_defaults: dict[str, Any] | None = None,
) -> Namespace:
    """Parse ``sys.argv`` with our flags and check all of it before a GPU is asked for.

    Args:
        parse_and_validate_args: Megatron's own function of that name.
        extra_args_provider: adds a script's own flags; it, and the rest, as Megatron's takes it.

    Raises:
        ValueError, FileNotFoundError: naming the flag, the value it got and the value it needs.
    """
    from megatron.training.arguments import parse_args

    from megatron_cream.checkpoint.loading import complete_arguments, validate_start
    from megatron_cream.mcore.validation import megatron_validation_errors
    from megatron_cream.training.arguments import add_arguments
    from megatron_cream.training.validate import validate_files, validate_flags, validate_our_flags

    def provider(parser: ArgumentParser) -> ArgumentParser:
        return add_arguments(extra_args_provider(parser) if extra_args_provider else parser)

    defaults = args_defaults or {}
    # Ours first: an error must come before all that Megatron prints at its start.
    args = parse_args(provider, ignore_unknown_args)
    for name, value in defaults.items():  # as Megatron's validation will
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    from_checkpoint = args.use_checkpoint_args or defaults.get("use_checkpoint_args", False)
    if from_checkpoint:
        validate_start(args)  # Megatron's validation reads it, without limits
    else:
        _take_over_settings(args)
        extension, validated = validate_flags(args, defaults)
        validate_files(args, validated, extension)
    with megatron_validation_errors(args, tell=True):
        args = parse_and_validate_args(provider, ignore_unknown_args, defaults)
    if from_checkpoint:
        complete_arguments(args)
        _take_over_settings(args)
        extension = validate_our_flags(args)
        validate_files(args, args, extension)
    _complete(args, extension)
    return args


def _complete(args: Namespace, extension: ExtensionConfig) -> None:
    """Set what every run of ours has, whatever its flags are."""
    from megatron_cream.checkpoint.loading import complete_vocabulary

    complete_vocabulary(args)
    # Micro-batches may hold different numbers of trained tokens (texts end, borders are masked);
    # averaging their averages would make the result depend on the layout.
    args.calculate_per_token_loss = True
    _shorten_log(args)
    setattr(args, SETTINGS_KEY, extension.to_dict())


# Settings whose default another release may have had; those of a group are given together.
_TAKEN_OVER = (("sample_unit",), ("rope_interpolation",), ("cream_sigma", "cream_sigma_relative"))


def _take_over_settings(args: Namespace) -> None:
    """Have a run that is resumed go on as it began where it is not told otherwise."""
    from megatron_cream.training import resume

    open_ones = [
        names for names in _TAKEN_OVER if all(getattr(args, name) is None for name in names)
    ]
    before = resume.resumed_extension(args) if open_ones else None
    if before is not None:
        for name in itertools.chain(*open_ones):
            setattr(args, name, before.to_dict()[name])


def _shorten_log(args: Namespace) -> None:
    """Leave out what Megatron logs for its developers: a line for every parameter and more.

    Its own switch, which --logging-level and MEGATRON_LOGGING_LEVEL decide where they are given.
    Timers are logged at that level too, so asking for them keeps it. Some warnings are of nothing:
    of a way to save asynchronously at a save that is not, of a state that validation sets back.
    """
    asked = "MEGATRON_LOGGING_LEVEL" in os.environ or args.timing_log_level
    if args.logging_level is None and not asked:
        args.logging_level = logging.WARNING
    left_out = {"megatron.core.rerun_state_machine": "Setting RerunStateMachine mode"}
    if not args.async_save:
        left_out["megatron.core.dist_checkpointing.strategies.torch"] = "async save is deprecated"
    for name, words in left_out.items():
        logging.getLogger(name).addFilter(partial(_lacks, words))


def _lacks(words: str, record: logging.LogRecord) -> bool:
    return words not in record.getMessage()


def train(args: Namespace, **more: Any) -> None:
    """Call Megatron's ``pretrain``, which takes ``more`` as it is."""
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    from megatron_cream.mcore.hooks import megatron_config
    from megatron_cream.training.datasets import datasets_provider
    from megatron_cream.training.step import forward_step

    config = megatron_config(args)
    get_ready(args, config)
    pretrain(
        pretrain_cfg_container_from_args(args, config),
        datasets_provider,
        ModelType.encoder_or_decoder,
        forward_step,
        **more,
    )


def get_ready(args: Namespace, config: Any) -> None:
    """Put our hooks, scalars and report into Megatron, and print on rank 0 what this run will do.

    The last thing before ``megatron.training.pretrain``.
    """
    from megatron_cream.checkpoint.iterations import remove_checksums, write_checksums_later
    from megatron_cream.checkpoint.loading import starts_without_trained_rope
    from megatron_cream.mcore.rotary import patch_apply_rotary_pos_emb
    from megatron_cream.training.progress import Scalars, step_report
    from megatron_cream.training.start_block import start_block

    extension = extension_of(args)
    trainer.patch_compile_helpers.apply()
    if args.cpu:
        trainer.patch_results_queue.apply()
    trainer.patch_save.apply(remove_checksums, write_checksums_later)
    patch_apply_rotary_pos_emb.apply()
    logs = args.tensorboard_dir or args.wandb_project
    scalars = Scalars(extension).at if logs else None
    report = step_report(args) if args.rank == args.world_size - 1 else None
    trainer.patch_training_log.apply(scalars, report.after_iteration if report else None)
    anew = starts_without_trained_rope(args)
    hooks.add_hooks(config, args, extension, trains_rope_anew=anew)
    if args.rank == 0:
        print(start_block(args, extension), flush=True)


if __name__ == "__main__":
    main()
