# SPDX-License-Identifier: Apache-2.0
"""What the scripts of all engines share; they run with the engine on the path and without ours."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np


class Refused(Exception):
    """The engine says itself that it does not read the folder."""


def main(logits: Callable[..., dict[str, np.ndarray]], version: str) -> None:
    """Write the logits ``[s, v]`` of each sequence to OUT/NAME.npz, or why not in OUT/NAME.json.

    The command line is OUT IDS.npz FOLDER..., IDS.npz has the sequences of token ids by name.
    """
    out, ids, *folders = sys.argv[1:]
    sequences = dict(np.load(ids))
    for folder in folders:
        work = Path(out) / Path(folder).name
        try:
            np.savez(f"{work}.npz", **logits(folder, str(work), sequences))
        except Refused as error:
            Path(f"{work}.json").write_text(json.dumps({"refused": str(error)}))
    (Path(out) / "version.txt").write_text(version)
