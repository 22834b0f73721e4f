# SPDX-License-Identifier: Apache-2.0
"""Launch scripts run with a stand-in for python, which keeps its arguments and does little.

As a script it is that stand-in: ``STUB_LOG`` names the file for its calls, ``STUB_REACHES`` the
iteration that a training run gets to, ``STUB_FAILS`` its exit status, ``STUB_IMPORT_SECONDS`` how
long an import takes, ``STUB_HAS`` which of Apex (apex), Transformer Engine's cross entropy (te) and
processes that may share memory of a GPU (share) are there, ``STUB_FREE_GB`` what df says is free,
``STUB_IMPORT_FAILS`` the exit status of an import, ``STUB_CRASHES`` a file whose first line, the
newest checkpoint of a crash, each start of the trainer takes away; with ``STUB_USER_ERROR`` that is
a mistake of the user's; ``STUB_DATA`` which datasets are there, by default those of ``DATA``.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(
    path
    for path in (ROOT / "examples").glob("*/*.sh")
    if "common.sh" in path.read_text() and path.name != "tiny.sh"  # on CPUs, unplanned
)


def environment(folder, **variables):
    """Environment in which a script calls the stand-in; calls land in ``folder``/calls."""
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {__file__} "$@"\n')
    python.chmod(0o755)
    disk = folder / "df"
    disk.write_text('#!/bin/sh\necho\necho x 0 0 "$((${STUB_FREE_GB:-99999} * 976563))" 0% /\n')
    disk.chmod(0o755)
    kept = {"PATH": f"{folder}:{os.environ['PATH']}", "HOME": os.environ.get("HOME", "/")}
    places = {name: str(folder / name.lower()) for name in ("BASE", "OUT", "EXPORT", "RETRIEVAL")}
    (folder / "retrieval.idx").touch()  # or it is made before training
    for name in variables.get("STUB_DATA", variables.get("DATA", "")).split():
        (folder / f"{name}.idx").touch()
    stub = {"PYTHON": str(python), "STUB_LOG": str(folder / "calls")}
    return {**kept, **places, **stub, **variables}


def run(script, folder, *arguments, **variables):
    """Run a script to its end; returns the process and the calls so far, as (words, world size)."""
    done = subprocess.run(
        ["bash", str(script), *arguments],
        env=environment(folder, **variables),
        capture_output=True,
        text=True,
        timeout=120,
        cwd=folder,
    )
    return done, calls(folder)


def calls(folder):
    log = folder / "calls"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def flags(words):
    """Words of a command by flag; the last of a flag counts."""
    found, last = {}, ""
    for word in words:
        if re.match(r"--?[a-z]", word):
            found[last := word] = ()
        else:
            found[last] = (*found.get(last, ()), word)
    return found


def dry_run(argv, world_size):
    """What the dry run prints, in a process of its own."""
    from megatron_cream.dry_run import dry_run as look
    from megatron_cream.dry_run import lines

    return lines(look(argv, world_size))


def main(words):
    with open(os.environ["STUB_LOG"], "a") as log:
        log.write(json.dumps([words, os.environ.get("WORLD_SIZE")]) + "\n")
    if words[0] == "-c":
        asked = {"fused_weight": "apex", "te_cross_entropy": "te", "pidfd_open": "share"}
        [name] = [name for word, name in asked.items() if word in words[1]]
        return 0 if name in os.environ.get("STUB_HAS", "") else 1
    given = flags(words)
    if words[0].endswith("convert_checkpoint.py"):
        time.sleep(float(os.environ.get("STUB_IMPORT_SECONDS", "0")))
        if words[1] == "import" and "STUB_IMPORT_FAILS" in os.environ:
            return int(os.environ["STUB_IMPORT_FAILS"])
        output = Path(given["--output"][0])
        output.mkdir(parents=True, exist_ok=True)
        (output / "latest_checkpointed_iteration.txt").write_text("release")
    elif words[0].endswith("make_retrieval_data.py"):
        prefix = Path(given["--output-prefix"][0])
        prefix.parent.mkdir(parents=True, exist_ok=True)
        prefix.with_name(f"{prefix.name}.idx").touch()
    elif "megatron_cream" in words:
        return 0  # the preflight
    elif "torch.distributed.run" in words:
        crashes = Path(os.environ.get("STUB_CRASHES", os.devnull))
        if left := crashes.read_text().splitlines():
            crashes.write_text("".join(f"{line}\n" for line in left[1:]))
            (Path(given["--save"][0]) / "latest_checkpointed_iteration.txt").write_text(left[0])
            if "STUB_USER_ERROR" in os.environ:
                report = Path(given["--log-dir"][0], "run_x", "attempt_0", "0", "error.json")
                report.parent.mkdir(parents=True)
                report.write_text(json.dumps({"message": "error: --lr is wrong", "timestamp": 0}))
            return 1
        _train(Path(given["--save"][0]))
        return int(os.environ.get("STUB_FAILS", "0"))
    return 0


def _train(save):
    save.mkdir(parents=True, exist_ok=True)
    tracker = save / "latest_checkpointed_iteration.txt"
    reaches = os.environ.get("STUB_REACHES", "1000")
    if reaches != "signal":
        tracker.write_text(reaches)
        return
    # As torchrun's worker: a session of its own, which saves at a TERM.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun itself is not to get one
    worker = (
        "import signal, pathlib, sys\n"
        f"save = lambda *_: (pathlib.Path({str(tracker)!r}).write_text('7'), sys.exit(0))\n"
        "signal.signal(signal.SIGTERM, save)\n"
        f"pathlib.Path({str(save / 'ready')!r}).touch()\n"
        "signal.pause()\n"
    )
    subprocess.run([sys.executable, "-c", worker], start_new_session=True, check=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
