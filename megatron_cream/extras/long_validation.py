# SPDX-License-Identifier: Apache-2.0
"""Validation at long lengths while a run trains: its flags, and when it is done.

Megatron's own validation has samples of the trained length at drawn positions. Here held-out
documents stand whole, at plain positions, at the lengths that the run is for;
``evaluation.while_training`` asks and measures.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_cream.errors import UserError
from megatron_cream.mcore import trainer
from megatron_cream.mcore.argument_table import flag_of
from megatron_cream.mcore.hooks import Extra
from megatron_cream.mcore.validation import validate_left_out
from megatron_cream.options import parse_length

_ONLY_WITH = ("validate_data", "validate_key_tokens", "keep_best")
_FEWEST = {"validate_interval": 1, "validate_documents": 1, "validate_cases": 0}


class LongValidation(Extra):
    """``--validate-lengths`` and what goes with it."""

    def add_flags(self, add: Callable[..., Any]) -> None:
        add(
            "--validate-lengths", nargs="+", type=parse_length, metavar="LENGTH",
            help="validate at these lengths in tokens (4K is 4096), plain positions",
        )  # fmt: skip
        add("--validate-interval", type=int, default=50, help="iterations from one to the next")
        add("--validate-data", help="held-out indexed dataset, without .bin and .idx")
        add("--validate-documents", type=int, default=4, help="whose first tokens are scored")
        add("--validate-task", default="niah-multikey", help="retrieval task of evaluate")
        add("--validate-cases", type=int, default=4, help="cases per length; 0 for no retrieval")
        add("--validate-key-tokens", help="file of evaluate longppl: LongPPL on the same documents")
        add(
            "--keep-best", metavar="METRIC",
            help="save the best checkpoint so far in SAVE/best: perplexity-32K for instance",
        )  # fmt: skip

    def validate_flags(self, args: Namespace, extension: Any) -> None:
        if args.validate_lengths is None:
            for name in _ONLY_WITH:
                if (value := getattr(args, name)) is not None:
                    raise UserError(
                        f"{flag_of(name)} is {value}: it needs --validate-lengths as well"
                    )
            return
        for name, fewest in _FEWEST.items():
            if (value := getattr(args, name)) < fewest:
                raise UserError(f"{flag_of(name)} is {value}: it must be at least {fewest}")
        if (shortest := min(args.validate_lengths)) < 2:
            raise UserError(f"--validate-lengths has {shortest}: it must be at least 2 tokens")
        if args.validate_data is None:
            raise UserError("--validate-data is missing: --validate-lengths needs held-out text")
        if extension.draws_scales:
            raise UserError(
                f"--validate-lengths is given with --rope-interpolation "
                f"{extension.rope_interpolation}: it is not possible with trained frequencies; "
                "leave it out, and evaluate checkpoints"
            )
        validate_left_out(args, "with_lengths", " with --validate-lengths")
        from megatron_cream.evaluation.while_training import metric_names

        names = metric_names(args)
        if args.keep_best is not None and args.keep_best not in names:
            raise UserError(
                f"--keep-best is {args.keep_best}: it must be one of {', '.join(names)}"
            )
        if args.keep_best is not None:
            _validate_best(args)

    def validate_machine(self, args: Namespace) -> None:
        if args.validate_lengths is not None:
            from megatron_cream.evaluation.while_training import validate_inputs

            validate_inputs(args)

    def configure(self, config: Any, args: Namespace, extension: Any) -> None:
        if getattr(args, "validate_lengths", None) is None:
            return
        from megatron_cream.evaluation.while_training import Validation

        validation = Validation(args)
        trainer.patch_checkpoint_and_decide_exit.apply(validation.after_iteration)
        trainer.patch_save_checkpoint_and_time.apply(validation.has_saved)


def _validate_best(args: Namespace) -> None:
    from megatron_cream.evaluation.while_training import BEST, BEST_FILE

    if not args.save:
        raise UserError(f"--keep-best is {args.keep_best}: it needs --save as well")
    folder = Path(args.save) / BEST
    if folder.exists() and any(folder.iterdir()) and not (folder / BEST_FILE).is_file():
        raise UserError(
            f"--keep-best is {args.keep_best}: {folder} has files of something else; it must be a "
            "new folder, or that of an earlier start of this run"
        )


EXTRA = LongValidation()
