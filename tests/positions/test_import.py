# SPDX-License-Identifier: Apache-2.0
"""What an import costs: a data worker or a plot must not load the trainer."""

import subprocess
import sys

import pytest


def top_level_modules_after(statement):
    code = f"{statement}\nimport sys\nprint(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("megatron_cream", {"numpy", "torch", "megatron", "matplotlib"}),
        ("megatron_cream.positions", {"torch", "megatron", "matplotlib"}),
    ],
)
def test_import_loads_no_more_than_it_needs(module, absent):
    loaded = top_level_modules_after(f"import {module}")
    assert "megatron_cream" in loaded
    assert not loaded & absent


def test_drawing_positions_needs_numpy_only():
    statement = (
        "from megatron_cream.positions import coverage, make_strategy\n"
        "coverage(make_strategy('cream', 64, 256), 3)"
    )
    assert not top_level_modules_after(statement) & {"torch", "megatron", "matplotlib"}
