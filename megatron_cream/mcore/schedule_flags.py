# SPDX-License-Identifier: Apache-2.0
"""The learning rate over a run: what Megatron asserts of it after its start, asked before."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from megatron_cream.errors import UserError

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


def validate_same_schedule(path: str, args: Namespace, saved: Namespace) -> None:
    """Refuse to resume with another schedule unless the flags say which of the two counts.

    Args:
        args: validated by Megatron.
        saved: the arguments saved with the checkpoint in ``path``.

    Raises:
        UserError: naming the flags, both values and the two flags that settle it.
    """
    settled = args.override_opt_param_scheduler or args.use_checkpoint_opt_param_scheduler
    if settled or args.skip_train or args.no_load_optim or saved.no_save_optim:
        return
    before, now = schedule(saved), schedule(args)
    differences = [
        f"{flags}: {_shown(name, before, saved)} != {_shown(name, now, args)}"
        for name, flags in _KEPT.items()
        if before[name] != now[name]
    ]
    if differences:
        raise UserError(
            f"--load is {path}: that checkpoint has another learning-rate schedule (checkpoint != "
            f"now): {'; '.join(differences)}. Add --override-opt_param-scheduler to go on by that "
            "of the flags (to train longer, say), or --use-checkpoint-opt_param-scheduler by that "
            "of the checkpoint"
        )


def _shown(name: str, made: dict[str, Any], args: Namespace) -> Any:
    value = made[name]
    if not name.endswith("_steps"):
        return value
    return f"{value / args.global_batch_size:g} iterations" if args.train_iters else value
