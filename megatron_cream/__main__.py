# SPDX-License-Identifier: Apache-2.0
"""The tools of an installed package: ``megatron-cream TOOL ...``, or ``python -m megatron_cream``.

    megatron-cream plan llama-2-70b --gpus 64 --target-length 262144
    megatron-cream plot-positions --strategy cream --train-length 4096 --target-length 32768

In a checkout ``python tools/plan.py ...`` is the same. What runs on several ranks is started by
torchrun instead: ``torchrun -m megatron_cream.pretrain``, ``-m megatron_cream.tools.evaluate``.
"""

from __future__ import annotations

import ast
import importlib.util
import runpy
import sys
from pathlib import Path

import megatron_cream

_USAGE = "usage: megatron-cream [--version] TOOL [its flags, or --help]"


def tools() -> dict[str, str]:
    """Return each tool's name with the first line of its docstring; nothing is imported.

    Raises:
        FileNotFoundError: the package is used from a folder that pip has not installed.
    """
    spec = importlib.util.find_spec("megatron_cream.tools")
    if spec is None:
        raise FileNotFoundError(
            "megatron_cream.tools is missing: install the package (pip install -e .), or run the "
            "scripts of tools/ themselves"
        )
    folder = Path(next(iter(spec.submodule_search_locations)))
    paths = sorted(path for path in folder.glob("*.py") if path.stem != "__init__")
    return {path.stem.replace("_", "-"): _summary(path) for path in paths}


def _summary(path: Path) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0]


def _overview(known: dict[str, str]) -> str:
    width = max(map(len, known))
    lines = [f"  {name:{width}}  {summary}" for name, summary in known.items()]
    return "\n".join([_USAGE, "", "tools:", *lines])


def main(argv: list[str] | None = None) -> int:
    """Run the tool that the command line names; an unknown one ends in one line and status 2."""
    words = sys.argv[1:] if argv is None else argv
    if words[:1] == ["--version"]:
        print(f"megatron_cream {megatron_cream.__version__}")
        return 0
    try:
        known = tools()
    except FileNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not words or words[0] in ("-h", "--help"):
        print(_overview(known))
        return 0
    if words[0] not in known:
        print(f"error: TOOL is {words[0]}: it must be one of {', '.join(known)}", file=sys.stderr)
        return 2
    sys.argv[1:] = words[1:]
    # As ``python -m``: a tool's worker processes find it again by its name.
    name = f"megatron_cream.tools.{words[0].replace('-', '_')}"
    runpy.run_module(name, run_name="__main__", alter_sys=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
