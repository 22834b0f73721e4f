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
import inspect
import runpy
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_cream.errors import MissingPackageError, UserError, one_line_errors
from megatron_cream.training import entry, machine

_RELEASE = (0, 19)  # of megatron-core, major and minor


def main() -> None:
    """Run the script that the command line names; bad input ends in one line and status 2."""
    with one_line_errors():
        script = find_script(sys.argv[1:])
        del sys.argv[1]
        validate_no_restart(sys.argv[1:])
        machine.require_launcher(f"megatron_cream.launch {script.name}", sys.argv[1:])
        entry.install_cpu_stand_in()
        # As python itself does, and before megatron's import: the script finds what stands beside
        # it, in a clone of Megatron-LM also the megatron it belongs to.
        sys.path.insert(0, str(script.parent))
        validate_megatron_release()
    patch_parser()
    trainer = patch_pretrain()
    sys.argv[0] = str(script)
    runpy.run_path(str(script), run_name="__main__")
    with one_line_errors():
        if not trainer.calls:
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
            "--inprocess-restart is given: in a script of Megatron 0.19.2 it fails to restart for "
            "ever; leave it out, or train with megatron_cream.pretrain"
        )


def validate_megatron_release() -> None:
    """Refuse a megatron of another release than this package is made for.

    pip sees to it for an installed one; a clone beside the script comes before that.

    Raises:
        UserError: naming where it was found.
    """
    from megatron.core import package_info

    found = (package_info.MAJOR, package_info.MINOR)
    if found != _RELEASE:
        raise UserError(
            f"megatron-core is {package_info.__shortversion__}, from {package_info.__file__}: it "
            f"must be {'.'.join(map(str, _RELEASE))}; use the script of that release of Megatron-LM"
        )


def patch_parser() -> None:
    """Have a script's parser know our flags, and check them. Idempotent.

    Symbol: ``megatron.training.arguments.parse_and_validate_args``. The script hands its arguments
    on to its model config; they must hold our settings by then.

    Raises:
        ImportError: the symbol moved in this version of Megatron.
    """
    from megatron.training import arguments

    own = _own(arguments, "parse_and_validate_args")
    if hasattr(own, "adds_our_flags"):
        return

    @functools.wraps(own)
    def parse_and_validate_args(
        extra_args_provider: entry.ArgumentsProvider | None = None,
        ignore_unknown_args: bool = False,
        args_defaults: dict[str, Any] | None = None,
    ) -> Namespace:
        with one_line_errors():
            return entry.parse(own, extra_args_provider, ignore_unknown_args, args_defaults)

    parse_and_validate_args.adds_our_flags = True
    arguments.parse_and_validate_args = parse_and_validate_args


def patch_pretrain() -> Callable[..., Any]:
    """Have a script's call of the trainer train on our data, positions and angles. Idempotent.

    Symbol: ``megatron.training.training.pretrain``, and its second name ``megatron.training
    .pretrain``, by which scripts import it. A script hands over its datasets and its forward step
    there and nowhere else. Returns the replacement, whose ``calls`` counts its calls.

    Raises:
        ImportError: the symbol moved in this version of Megatron.
    """
    import megatron.training
    from megatron.training import training

    own = _own(training, "pretrain")
    if hasattr(own, "calls"):
        return own

    @functools.wraps(own)
    def pretrain(*args: Any, **kwargs: Any) -> Any:
        pretrain.calls += 1
        call = inspect.signature(own).bind(*args, **kwargs)
        with one_line_errors():
            swap(call.arguments)
        return own(*call.args, **call.kwargs)

    pretrain.calls = 0
    training.pretrain = megatron.training.pretrain = pretrain
    return pretrain


def _own(module: Any, name: str) -> Callable[..., Any]:
    function = getattr(module, name, None)
    if function is None:
        raise MissingPackageError(
            f"{module.__name__}.{name} is gone: it may have changed in your version of "
            "megatron-core; megatron_cream is made for 0.19.2"
        )
    return function


def swap(call: dict[str, Any]) -> None:
    """Swap datasets and forward step of a call of ``pretrain``, and hook into its model config.

    Args:
        call: the arguments of the call by name; changed in place.

    Raises:
        UserError: the script parsed its flags past us, or has no model config to hook into.
    """
    from megatron.training import get_args

    from megatron_cream.config import SETTINGS_KEY
    from megatron_cream.training.datasets import datasets_provider
    from megatron_cream.training.step import forward_step

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
    entry.ready(args, call["cfg_container"].model)
    call["train_valid_test_dataset_provider"] = datasets_provider
    call["forward_step_func"] = forward_step


if __name__ == "__main__":
    main()
