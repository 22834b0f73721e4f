# SPDX-License-Identifier: Apache-2.0
"""Validates what a run starts from: settings, model, optimizer, schedule against the checkpoint."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from megatron_cream.checkpoint.doctor import validate_iteration as check_whole
from megatron_cream.checkpoint.iterations import read_arguments
from megatron_cream.checkpoint.loading import (
    RunStart,
    find_start,
    validate_same_model,
    validate_start,
)
from megatron_cream.config import ExtensionConfig, saved_extension
from megatron_cream.errors import UserError
from megatron_cream.mcore.argument_table import flag_of

# What Megatron compares with the checkpoint: (its name, the flags that decide it).
_KEPT = {
    "max_lr": "--lr",
    "min_lr": "--min-lr",
    "lr_warmup_steps": "--lr-warmup-iters or --lr-warmup-fraction",
    "lr_decay_steps": "--train-iters or --lr-decay-iters",
    "lr_decay_style": "--lr-decay-style",
    "start_wd": "--weight-decay or --start-weight-decay",
    "end_wd": "--weight-decay or --end-weight-decay",
    "wd_incr_steps": "--train-iters",
    "wd_incr_style": "--weight-decay-incr-style",
}


def resumed_extension(args: Namespace) -> ExtensionConfig | None:
    """Return the settings of the run that is resumed, None where none is."""
    start = _resumed_start(args)
    if start is None:
        return None
    check_whole(start.folder, f"{start.flag} is {start.root}", objects=False)
    return saved_extension(_saved(start))


def _resumed_start(args: Namespace) -> RunStart | None:
    start = find_start(args)
    return start if start and start.flag == "--load" and not args.finetune else None


def _saved(start: RunStart) -> Namespace:
    return read_arguments(start.folder) or Namespace()


def validate_checkpoint(args: Namespace, extension: ExtensionConfig) -> None:
    """Validate the checkpoint that a run starts from, and compare our settings with its.

    Starting a new run from the weights of another (--finetune, --pretrained-checkpoint) may
    change them; that is what extending a model is.

    Raises:
        UserError: naming each setting that differs, with both values; or what ``validate_start``
            finds.
        FileNotFoundError: the run is to start from weights that are not there.
    """
    validate_start(args)
    start = find_start(args)
    if start is None:
        return
    saved = _saved(start)
    if _resumed_start(args):
        _validate_same_settings(args.load, saved, extension)
        _validate_optimizer_layout(args, saved)
    else:
        validate_same_model(str(start.root), saved, args)
        _validate_base_scaling(str(start.root), saved, extension)


def _validate_base_scaling(path: str, saved: Namespace, extension: ExtensionConfig) -> None:
    """Refuse to interpolate from a window that the weights know with a scaling of their own."""
    before = saved_extension(saved)
    if before is None or before.rope_interpolation == "none" or extension.rope_base is not None:
        return
    if before.original_length < extension.original_length <= before.target_length:
        raise UserError(
            f"--original-length is {extension.original_length}: the model in {path} reaches that "
            f"with {before.rope_interpolation} over {before.original_length} tokens, which would "
            f"be dropped; give its config.json as --rope-base-config, or interpolate anew with "
            f"--original-length {before.original_length}"
        )


def _validate_same_settings(path: str, saved: Namespace, extension: ExtensionConfig) -> None:
    before = saved_extension(saved)
    if before is None:
        raise UserError(
            f"--load is {path}: that checkpoint was not trained by megatron_cream, so the run "
            "cannot be resumed; start a new one from its weights with --finetune"
        )
    differences = before.differences(extension)
    if differences:
        raise UserError(
            f"--load is {path}: that checkpoint was trained with other settings (checkpoint != "
            f"now): {'; '.join(differences)}. Resume with the same, or start a new run from its "
            "weights with --finetune"
        )


def _validate_optimizer_layout(args: Namespace, saved: Namespace) -> None:
    """Refuse a resume whose optimizer state Megatron would find unreadable after its start."""
    if args.no_load_optim or saved.no_save_optim:
        return
    if args.use_distributed_optimizer != saved.use_distributed_optimizer:
        needs = "given" if saved.use_distributed_optimizer else "left out"
        raise UserError(
            f"--use-distributed-optimizer is {args.use_distributed_optimizer}: checkpoint "
            f"{args.load} was saved with {saved.use_distributed_optimizer}, so it must be {needs}; "
            "or start the optimizer anew with --no-load-optim"
        )
    if args.use_distributed_optimizer and args.cpu:
        raise UserError(
            f"--use-distributed-optimizer is given with --cpu, and --load is {args.load}: Megatron "
            "resumes it with a GPU's optimizers only; leave it out from the start, or start the "
            "optimizer anew with --no-load-optim"
        )
    if not saved.use_distributed_optimizer or saved.dist_ckpt_optim_fully_reshardable:
        return
    for size in ("tensor_model_parallel_size", "pipeline_model_parallel_size"):
        if getattr(args, size) != getattr(saved, size):
            raise UserError(
                f"{flag_of(size)} is {getattr(args, size)}: checkpoint {args.load} was "
                f"saved with {getattr(saved, size)}, and its distributed optimizer reads at that "
                "only, because it was saved without --dist-ckpt-optim-fully-reshardable; resume "
                "with the same, or start the optimizer anew with --no-load-optim"
            )


def schedule(args: Namespace) -> dict[str, Any]:
    """Return the schedule that Megatron makes of validated arguments, its lengths in samples.

    As ``megatron.training.training.get_optimizer_param_scheduler`` does, from the globals.
    """
    if args.train_iters and not args.train_samples:
        batch = args.global_batch_size
        total, decay = args.train_iters * batch, args.lr_decay_iters
        decay = total if decay is None else decay * batch
        warmup = args.lr_warmup_iters * batch
    else:
        total, decay = args.train_samples, args.lr_decay_samples
        decay = total if decay is None else decay
        warmup = args.lr_warmup_samples
    if args.lr_warmup_fraction is not None:
        warmup = args.lr_warmup_fraction * decay
    return {
        "max_lr": args.lr,
        "min_lr": args.min_lr,
        "lr_warmup_steps": warmup,
        "lr_decay_steps": decay,
        "lr_decay_style": args.lr_decay_style,
        "start_wd": args.start_weight_decay,
        "end_wd": args.end_weight_decay,
        "wd_incr_steps": total,
        "wd_incr_style": args.weight_decay_incr_style,
    }


def validate_schedule(args: Namespace) -> None:
    """Refuse a schedule that Megatron would refuse once the model is built.

    Args:
        args: validated by Megatron.

    Raises:
        UserError: naming the flags and their values.
    """
    if args.skip_train:
        return
    made = schedule(args)
    if made["max_lr"] < made["min_lr"]:
        raise UserError(f"--min-lr is {args.min_lr}: it must be at most --lr, {args.lr}")
    if made["lr_warmup_steps"] >= made["lr_decay_steps"]:
        raise UserError(
            f"{_KEPT['lr_warmup_steps']} makes a warm-up of {made['lr_warmup_steps']:g} samples: "
            f"it must be below the {made['lr_decay_steps']} of the whole decay "
            f"({_KEPT['lr_decay_steps']})"
        )
    if args.lr_decay_style == "WSD" and args.lr_wsd_decay_iters is args.lr_wsd_decay_samples:
        raise UserError("--lr-wsd-decay-iters is missing: --lr-decay-style is 'WSD'")
    if args.lr_warmup_init > args.lr:
        raise UserError(f"--lr-warmup-init is {args.lr_warmup_init}: it must be at most --lr")
    if made["end_wd"] < made["start_wd"]:
        raise UserError(
            f"--end-weight-decay is {args.end_weight_decay}: it must be at least "
            f"--start-weight-decay, {args.start_weight_decay}"
        )
    if args.override_opt_param_scheduler and args.use_checkpoint_opt_param_scheduler:
        raise UserError(
            "--override-opt_param-scheduler and --use-checkpoint-opt_param-scheduler are given: it "
            "must be one of them"
        )


def validate_same_schedule(args: Namespace) -> None:
    """Refuse to resume with another schedule unless the flags say which of the two counts.

    Args:
        args: validated by Megatron.

    Raises:
        UserError: naming the flags, both values and the two flags that settle it.
    """
    settled = args.override_opt_param_scheduler or args.use_checkpoint_opt_param_scheduler
    start = _resumed_start(args)
    if start is None or settled or args.skip_train or args.no_load_optim:
        return
    saved = _saved(start)
    if saved.no_save_optim:
        return
    before, now = schedule(saved), schedule(args)
    differences = [
        f"{flags}: {_shown(name, before, saved)} != {_shown(name, now, args)}"
        for name, flags in _KEPT.items()
        if before[name] != now[name]
    ]
    if differences:
        raise UserError(
            f"--load is {args.load}: that checkpoint has another learning-rate schedule "
            f"(checkpoint != now): {'; '.join(differences)}. Add --override-opt_param-scheduler to "
            "go on by that of the flags (to train longer, say), or "
            "--use-checkpoint-opt_param-scheduler by that of the checkpoint"
        )


def _shown(name: str, made: dict[str, Any], args: Namespace) -> Any:
    value = made[name]
    if not name.endswith("_steps"):
        return value
    return f"{value / args.global_batch_size:g} iterations" if args.train_iters else value
