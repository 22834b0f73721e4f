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
from pathlib import Path
from typing import Any

from megatron_cream.errors import UserError, one_line_errors
from megatron_cream.mcore import trainer
from megatron_cream.mcore.patches import RELEASE
from megatron_cream.training import startup


def main() -> None:
    """Run the script that the command line names; bad input ends in one line and status 2."""
    with one_line_errors():
        script = find_script(sys.argv[1:])
        del sys.argv[1]
        validate_no_restart(sys.argv[1:])
        startup.prepare_process(f"megatron_cream.launch {script.name}")
        # As python itself does, and before megatron's import: the script finds what stands beside
        # it, in a clone of Megatron-LM also the megatron it belongs to.
        sys.path.insert(0, str(script.parent))
        validate_megatron_release()
    calls: list[dict[str, Any]] = []
    trainer.patch_parse_and_validate_args.apply(startup.parse)
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


def validate_no_restart(flags: list[str]) -> None:
    """Refuse --inprocess-restart: a script has the trainer alone called again, without arguments.

    Raises:
        UserError: it is among the script's flags.
    """
    if "--inprocess-restart" in flags:
        raise UserError(
            f"--inprocess-restart is given: in a script of Megatron {RELEASE} it fails to restart "
            "for ever; leave it out, or train with megatron_cream.pretrain"
        )


def validate_megatron_release() -> None:
    """Refuse a megatron of another release than this package is made for.

    pip sees to it for an installed one; a clone beside the script comes before that.

    Raises:
        UserError: naming where it was found.
    """
    from megatron.core import package_info

    wanted = RELEASE.rpartition(".")[0]
    if f"{package_info.MAJOR}.{package_info.MINOR}" != wanted:
        raise UserError(
            f"megatron-core is {package_info.__shortversion__}, from {package_info.__file__}: it "
            f"must be {wanted}; use the script of that release of Megatron-LM"
        )


def swap(calls: list[dict[str, Any]], call: dict[str, Any]) -> None:
    """Swap datasets and forward step of a call of ``pretrain``, and hook into its model config.

    Args:
        calls: it is added to these.
        call: the arguments of the call by name; changed in place.

    Raises:
        UserError: the script parsed its flags past us, or has no model config to hook into.
    """
    from megatron.training import get_args

    from megatron_cream.config import SETTINGS_KEY
    from megatron_cream.training.datasets import datasets_provider
    from megatron_cream.training.step import forward_step

    calls.append(call)
    args = get_args()
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
    startup.ready(args, call["cfg_container"].model)
    call["train_valid_test_dataset_provider"] = datasets_provider
    call["forward_step_func"] = forward_step


if __name__ == "__main__":
    main()
