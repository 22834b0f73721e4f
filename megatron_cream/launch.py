# SPDX-License-Identifier: Apache-2.0
"""Start an unmodified training script of Megatron's with our flags, positions, angles and data.

    torchrun --nproc-per-node 8 -m megatron_cream.launch pretrain_gpt.py <its flags> \\
        --target-length 32768 --position-strategy cream --rope-interpolation linear

Two functions of Megatron are replaced in this process before the script runs, and nothing else:
the one it parses its flags with and the one it trains with. Its model config, its own flags and
what it passes to the trainer besides data and forward step stay.
"""

from __future__ import annotations

import functools
import runpy
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from megatron_cream import pretrain
from megatron_cream.config import SETTINGS_KEY
from megatron_cream.errors import UserError, one_line_errors
from megatron_cream.mcore import trainer
from megatron_cream.mcore.patches import RELEASE, validate_release


def main() -> None:
    """Run the script that the command line names; bad input ends in one line and status 2."""
    with one_line_errors():
        script = find_script(sys.argv[1:])
        del sys.argv[1]
        if "--inprocess-restart" in sys.argv:  # of the trainer alone, whose arguments are gone then
            raise UserError(
                f"--inprocess-restart is given: in a script of Megatron {RELEASE} it fails to "
                "restart for ever; leave it out, or train with megatron_cream.pretrain"
            )
        pretrain.prepare_process(f"megatron_cream.launch {script.name}")
        # As python itself does, and before megatron's import: the script finds what stands beside
        # it, in a clone of Megatron-LM also the megatron it belongs to.
        sys.path.insert(0, str(script.parent))
        validate_release("use the script of that release of Megatron-LM")
    calls: list[dict[str, Any]] = []
    trainer.patch_parse_and_validate_args.apply(pretrain.parse)
    trainer.patch_pretrain.apply(functools.partial(swap, calls))
    sys.argv[0] = str(script)
    runpy.run_path(str(script), run_name="__main__")
    with one_line_errors():
        if not calls:
            raise UserError(
                f"script {script}: it ended without a call of megatron.training.pretrain, so "
                "nothing was trained; it must call that function under __name__ == '__main__'"
            )


def find_script(words: list[str]) -> Path:
    """Return the script that the first word of the command line names.

    Raises:
        UserError: there is none.
        FileNotFoundError: it is not a file.
    """
    if not words or words[0].startswith("-"):
        raise UserError(
            "the first argument must be the script to start: torchrun ... -m megatron_cream.launch "
            "pretrain_gpt.py <its flags>"
        )
    script = Path(words[0])
    if not script.is_file():
        raise FileNotFoundError(f"script {script}: it must be an existing Python file")
    return script.resolve()


def swap(calls: list[dict[str, Any]], args: Namespace, call: dict[str, Any]) -> None:
    """Swap datasets and forward step of a call of ``pretrain``, and hook into its model config.

    Args:
        calls: it is added to these.
        args: Megatron's.
        call: the arguments of the call by name; changed in place.

    Raises:
        UserError: the script parsed its flags past us, or has no model config to hook into.
    """
    from megatron_cream.training.datasets import datasets_provider
    from megatron_cream.training.step import forward_step

    calls.append(call)
    if not hasattr(args, SETTINGS_KEY):
        raise UserError(
            f"script {sys.argv[0]}: it must parse its flags with megatron.training.arguments"
            ".parse_and_validate_args, through which ours are added and checked"
        )
    if call.get("model_provider") is not None or call["cfg_container"].model is None:
        raise UserError(
            f"script {sys.argv[0]}: it must give pretrain a model config (gpt_config_from_args or "
            "hybrid_config_from_args) and no model_provider, or positions would not reach the model"
        )
    pretrain.get_ready(args, call["cfg_container"].model)
    call["train_valid_test_dataset_provider"] = datasets_provider
    call["forward_step_func"] = forward_step


if __name__ == "__main__":
    main()
