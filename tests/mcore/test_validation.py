# SPDX-License-Identifier: Apache-2.0
"""What Megatron prints of its flags: help as it is, and no list of all arguments."""

import pytest

pytestmark = pytest.mark.usefixtures("cpu_megatron")


def test_help_is_printed(monkeypatch, capsys):
    from megatron_cream.mcore import fake_world

    with pytest.raises(SystemExit) as ended:
        fake_world.parse(["--help"], 1)
    assert not ended.value.code
    printed = capsys.readouterr().out
    assert "--target-length" in printed and "--moe-paged-stash-buffer-size-factor-cuda" in printed


def test_megatrons_list_of_arguments_is_left_out_and_the_rest_kept():
    from megatron_cream.mcore.validation import shortened

    text = "using 1 GPU\n--- arguments ---\n  lr ... 1\n--- end of arguments ---\nlast\n"
    assert shortened(text) == "using 1 GPU\nlast\n"
    text += "WARNING: one_logger package is required\nWARNING: TensorBoard writing requested x\nb"
    assert shortened(text) == "using 1 GPU\nlast\nb"


def test_a_run_prints_no_list_of_arguments(reference):
    assert not reference.lines("end of arguments")
    assert reference.lines("trained window N")
    assert len(reference.log.splitlines()) < 150, "with ten iterations"
