# SPDX-License-Identifier: Apache-2.0
"""The rotation kernels, run by Triton's interpreter in a process of its own."""

import os
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("triton")


def test_rotations_and_gradients_equal_float64(quick_python):
    program = Path(__file__).with_name("rotation_interpreted.py")
    done = subprocess.run(
        [quick_python, str(program)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": right") == 10
