# SPDX-License-Identifier: Apache-2.0
"""A run that fails goes on from its last checkpoint in the same process."""

import json

from support import ranks, restarter


def test_goes_on_as_if_it_had_not_failed(tmp_path, flags):
    whole = ranks.train(tmp_path / "whole", flags)
    saved = str(tmp_path / "saved")
    save = ["--save", saved, "--load", saved, "--save-interval", "3"]
    file = tmp_path / "losses"
    ranks.call(tmp_path / "broken", restarter.train, 1, [*flags, *save], str(file), 5)
    steps = [json.loads(line)[:2] for line in file.read_text().splitlines()]
    # Before the failure, and again from the checkpoint behind step 3.
    assert [step for step, _ in steps] == [1, 2, 3, 4, 4, 5, 6]
    assert dict(steps) == whole.losses
    assert dict(steps[:4]) == {step: whole.losses[step] for step in range(1, 5)}
