# SPDX-License-Identifier: Apache-2.0
"""Stands in for python in a launch script under a real Slurm, as real as signals go.

An iteration takes a tenth of a second. Import and export, torchrun and its workers do with USR1 and
TERM what the real ones do: nothing for USR1, so that it ends them; a worker saves at a TERM, and
node 0 needs three seconds for that, when the others have long ended. CRASHING=once ends node 1's
first worker badly, CRASHING=always every one.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

TRACKER = "latest_checkpointed_iteration.txt"


def main(words):
    if words[0] == "-c":
        sys.exit(1)
    if words[0].endswith("convert_checkpoint.py"):
        convert(words[1], Path(words[words.index("--output") + 1]))
    elif words[0] == "worker":
        work(Path(words[1]), int(words[2]), int(words[3]))
    else:
        torchrun(words)


def convert(action, output):
    seconds = float(os.environ.get(f"{action.upper()}_SECONDS", "0.2"))
    print(f"{action} begins", flush=True)
    time.sleep(seconds)
    output.mkdir(parents=True)
    (output / TRACKER).write_text("release")
    print(f"{action} ends", flush=True)


def torchrun(words):
    """Start a worker in a session of its own, and end badly if it does."""
    value = {flag: words[words.index(flag) + 1] for flag in ("--node-rank", "--save")}
    last = words[words.index("--train-iters") + 1]
    worker = [sys.executable, __file__, "worker", value["--save"], value["--node-rank"], last]
    sys.exit(1 if subprocess.run(worker, start_new_session=True).returncode else 0)


def work(save, node, last):
    save.mkdir(parents=True, exist_ok=True)
    tracker, stop = save / TRACKER, []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
    iteration = int(tracker.read_text()) if tracker.exists() else 0
    print(f"node {node} starts at iteration {iteration}", flush=True)
    crashed, crashes = save / f"crashed-{node}", os.environ.get("CRASHING")
    if crashes == "always" or (crashes == "once" and node == 1 and not crashed.exists()):
        crashed.touch()
        sys.exit(1)
    while iteration < last and not stop:
        time.sleep(0.1)
        iteration += 1
    if node == 0:
        time.sleep(3)
        tracker.with_suffix(".new").write_text(str(iteration))
        tracker.with_suffix(".new").replace(tracker)
    print(f"node {node} ends", flush=True)
    if node and not stop:  # a collective: all ranks know that the last checkpoint is whole
        while not tracker.exists() or int(tracker.read_text()) < last:
            time.sleep(0.1)


if __name__ == "__main__":
    main(sys.argv[1:])
