# SPDX-License-Identifier: Apache-2.0
"""The rotation kernels, run by Triton's interpreter in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def test_rotations_and_gradients_equal_float64():
    program = Path(__file__).with_name("rotation_interpreted.py")
    done = subprocess.run(
        [sys.executable, str(program)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": right") == 10
