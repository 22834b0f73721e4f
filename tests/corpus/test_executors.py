# SPDX-License-Identifier: Apache-2.0
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import pytest

from megatron_cream.corpus import encode
from megatron_cream.corpus import executors as module
from megatron_cream.corpus.job import plan_job
from megatron_cream.corpus.tokenizers import train_bpe
from megatron_cream.errors import UserError

TOOL = Path(__file__).parents[2] / "tools" / "preprocess_data.py"
PARTS = {"part_bytes": 400}  # of the test's input of about 1200 bytes
# Runs the tool; its workers say how they were started and whether they hold the lock.
WATCHED = """
import importlib, importlib.util, multiprocessing, os, sys, threading, time
spec = importlib.util.spec_from_file_location("preprocess_data", sys.argv[1])
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)
if sys.argv[2] == "a thread":
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
methods, parent, true_import = [], os.getpid(), importlib.import_module

def import_module(name):
    global true_run
    module = true_import(name)  # what the tool sets before numpy is loaded is set now
    from megatron_cream.corpus import encode, executors
    if encode.UnitEncoder.run is not run:
        true_run, encode.UnitEncoder.run = encode.UnitEncoder.run, run
    executors.get_context = get_context
    return module

def run(encoder, unit):
    if os.getpid() != parent:
        links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
        held = [os.readlink(link) for link in links if os.path.exists(link)]
        locks = sum(path.endswith(".parts/.megatron_cream.json") for path in held)
        with open(sys.argv[3], "a") as file:
            file.write(f"{locks} locks\\n")
    true_run(encoder, unit)

def get_context(method):
    methods.append(method)
    return multiprocessing.get_context(method)

importlib.import_module = import_module
if __name__ == "__main__":
    status = tool.main(sys.argv[4:])
    print(*methods)
    sys.exit(status)
"""


@pytest.fixture
def bpe_job(job, tmp_path, kept):
    train_bpe(kept, 300, tmp_path / "tokenizer")
    model = str(tmp_path / "tokenizer")
    return replace(
        job, tokenizer_type="HuggingFaceTokenizer", tokenizer_model=model, append_eod=True
    )


@pytest.mark.parametrize("engine", ["fast", "reference"])
def test_same_bytes_for_every_number_of_workers(bpe_job, run, outputs, engine):
    pytest.importorskip("gigatoken")
    run(bpe_job, engine="reference")
    for workers in (1, 2, 3):
        prefix = f"{bpe_job.output_prefix}-{workers}"
        run(bpe_job, output_prefix=prefix, engine=engine, workers=workers, **PARTS)
        assert outputs(prefix) == outputs(bpe_job.output_prefix)


@pytest.mark.parametrize(("also", "method"), [("nothing", "fork"), ("a thread", "spawn")])
def test_the_tool_forks_only_without_threads(bpe_job, run, outputs, tmp_path, also, method):
    run(bpe_job)
    (tmp_path / "watched.py").write_text(WATCHED)
    command = [sys.executable, str(tmp_path / "watched.py"), str(TOOL), also, str(tmp_path / "log")]
    command += ["--input", *bpe_job.input, "--output-prefix", bpe_job.output_prefix + "-2"]
    command += ["--tokenizer-type", bpe_job.tokenizer_type, "--append-eod", "--workers", "2"]
    command += ["--tokenizer-model", bpe_job.tokenizer_model, "--part-bytes", "200"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == method
    assert outputs(bpe_job.output_prefix + "-2") == outputs(bpe_job.output_prefix)
    if method == "fork":  # a spawned one is a fresh interpreter that knows nothing of the patch
        assert set((tmp_path / "log").read_text().splitlines()) == {"0 locks"}


def test_a_forked_worker_can_let_go_of_the_lock(tmp_path):
    code = """
import os, sys, time
from megatron_cream.corpus.storage import WorkFolder
folder, (read, write) = WorkFolder(sys.argv[1], 'merging'), os.pipe()
worker = os.fork()
if not worker:
    sys.argv[2] == "lets go" and folder.release()
    os.write(write, b".")
    time.sleep(60)
try:
    os.read(read, 1)
    os.close(folder._lock)  # what the end of this process does
    WorkFolder(sys.argv[1], 'merging')
finally:
    os.kill(worker, 9)
"""
    arguments = [sys.executable, "-c", code, str(tmp_path / "data")]
    keeps = subprocess.run([*arguments, "keeps it"], capture_output=True, text=True)
    assert "another process is writing it" in keeps.stderr
    subprocess.run([*arguments, "lets go"], check=True)


def _imported(pipe):
    from megatron_cream.corpus import preprocess  # noqa: F401

    pipe.send("megatron" in sys.modules or "torch" in sys.modules)


def test_workers_do_not_import_megatron():
    context = get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_imported, args=(theirs,))
    process.start()
    assert ours.recv() is False
    process.join()


@pytest.fixture
def forked(job, monkeypatch):
    """Runs a job of several units in two forked workers, which see what a test has patched."""
    monkeypatch.setattr(module, "choose_start_method", lambda: "fork")
    planned, tokenizer, _ = plan_job(replace(job, workers=2, **PARTS))
    planned.folder.mkdir()

    def call(times=1):
        units = list(planned.own_units()) * times
        module.run_in_pool(planned, units, 2, lambda count: None, tokenizer)

    return call


@pytest.mark.timeout(60)
def test_killed_worker_is_an_error_and_not_a_hang(forked, monkeypatch):
    killed = lambda encoder, unit: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
    monkeypatch.setattr(encode.UnitEncoder, "run", killed)
    with pytest.raises(ChildProcessError, match="a worker died, needs more memory or fewer"):
        forked()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("error", [UserError, ZeroDivisionError])
def test_what_a_unit_raises_ends_the_others_at_once(forked, monkeypatch, tmp_path, error):
    def run(encoder, unit):
        (tmp_path / f"{os.getpid()}.pid").touch()
        if unit:
            time.sleep(600)
        raise error("of the unit")

    monkeypatch.setattr(encode.UnitEncoder, "run", run)
    with pytest.raises(error, match="of the unit"):
        forked()
    for path in tmp_path.glob("*.pid"):
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.stem), 0)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("long", ["job", "command line"])
def test_fresh_worker_that_dies_while_it_starts_is_not_waited_for(job, tmp_path, monkeypatch, long):
    """It reads nothing of what it is to do, which is more than a pipe takes."""
    code = "import os, sys\nif 'spawn_main' in str(sys.orig_argv): os._exit(1)\n"
    (tmp_path / "sitecustomize.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(module, "choose_start_method", lambda: "spawn")
    planned, tokenizer, _ = plan_job(job)
    planned.folder.mkdir()
    units = list(planned.own_units()) * 2
    if long == "job":
        planned = replace(planned, units=planned.units * 100_000)
    else:
        monkeypatch.setattr(sys, "argv", ["tool", *map(str, range(50_000))])
    with pytest.raises(ChildProcessError, match="a worker died, needs more memory or fewer"):
        module.run_in_pool(planned, units, 2, lambda count: None, tokenizer)
    assert len(sys.argv) > 1 or long == "job"


@pytest.mark.timeout(60)
def test_worker_that_dies_with_a_lock_is_not_waited_for(forked, monkeypatch):
    def count(read, size):
        read.get_lock().acquire()
        time.sleep(1)  # until another process waits for it
        os._exit(1)

    monkeypatch.setattr(module, "_count", count)
    with pytest.raises(ChildProcessError, match="a worker died, needs more memory or fewer"):
        forked(times=500)


def test_bytes_read_add_up_to_the_input(job):
    config = replace(job, **PARTS)
    planned, tokenizer, inputs = plan_job(config)
    planned.folder.mkdir()
    assert len(planned.units) > 2
    for _ in range(2):  # the second time every part is finished already
        counts = []
        module.run_in_pool(planned, planned.own_units(), 2, counts.append, tokenizer)
        assert sum(counts) >= inputs.total_bytes


KILLED = """
import os, sys, time
from megatron_cream.corpus import encode, executors, preprocess
def run(encoder, unit):
    open(os.path.join(sys.argv[1], f"{os.getpid()}.pid"), "w").close()
    time.sleep(600)
encode.UnitEncoder.run, executors.choose_start_method = run, lambda: "fork"
config = preprocess.PreprocessConfig((sys.argv[2],), "ByteLevelTokenizer", sys.argv[1] + "/o")
planned, tokenizer, _ = preprocess.plan_job(config)
executors.run_in_pool(planned, [0, 0], 2, lambda count: None, tokenizer)
"""


def _is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.timeout(60)
def test_workers_end_with_a_parent_that_is_killed(job, tmp_path):
    """Otherwise they would go on writing parts of a job that somebody starts again."""
    with subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path), job.input[0]]) as process:
        while len(pids := [int(path.stem) for path in tmp_path.glob("*.pid")]) < 2:
            assert process.poll() is None
            time.sleep(0.05)
        process.kill()
    while any(map(_is_running, pids)):
        time.sleep(0.05)
