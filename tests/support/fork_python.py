# SPDX-License-Identifier: Apache-2.0
"""A ``python`` for commands of tests that starts with megatron in memory.

Importing megatron takes nine seconds a process. The stand-in is a small program that hands its
arguments, environment, folder and open files to a server, a fork of the fork server of
``support.ranks``; the server forks, and the fork runs the command as python would. Signals are
passed on. As a script this file is that program.
"""

import array
import json
import os
import signal
import socket
import sys

_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def ask(address, words):
    """Have the server run ``python WORDS...``; returns the exit status."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(f"\0{address}")  # of Linux: no file to remove
        message = json.dumps([words, os.getcwd(), dict(os.environ)]).encode()
        files = array.array("i", [0, 1, 2])
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, files)]
        connection.sendmsg([len(message).to_bytes(8, "little")], rights)
        connection.sendall(message)
        with connection.makefile("r") as answers:
            child = int(answers.readline())
            for number in _FORWARDED:
                signal.signal(number, lambda number, frame: os.kill(child, number))
            return int(answers.readline())


def serve(address):
    """Answer stand-ins, each in a fork, until this process is killed."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"\0{address}")
        listener.listen(64)
        while True:
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                _answer(connection)
            connection.close()


def _answer(connection):
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    head, files, _, _ = socket.recv_fds(connection, 8, 3)
    with connection.makefile("r") as stream:
        words, folder, environment = json.loads(stream.read(int.from_bytes(head, "little")))
    child = os.fork()
    if child == 0:
        connection.close()
        _become(files, folder, environment)
        _run(words)
    for file in files:
        os.close(file)
    connection.sendall(b"%d\n" % child)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    connection.sendall(b"%d\n" % (code if code >= 0 else 128 - code))
    os._exit(0)


def _become(files, folder, environment):
    """Take over open files, folder and environment; forget being a child of multiprocessing."""
    import multiprocessing.process
    from multiprocessing import forkserver

    import torch

    for target, file in enumerate(files):
        os.dup2(file, target)
        os.close(file)
    # The files stay open when others take these names.
    sys.stdin, sys.stdout, sys.stderr = (
        open(number, mode, buffering=1, closefd=False)  # noqa: SIM115
        for number, mode in ((0, "r"), (1, "w"), (2, "w"))
    )
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    multiprocessing.process.current_process()._config["daemon"] = False
    multiprocessing.process._parent_process = None
    multiprocessing.process._children = set()
    multiprocessing.set_start_method("fork", force=True)
    # Its forks, too, are of the server that it is one of.
    forkserver._forkserver.ensure_running = lambda: None
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", os.cpu_count())))
    if "TRITON_INTERPRET" in environment:
        forget_triton()
    # torchrun starts its workers with this.
    sys.executable = environment.get("PYTHON", sys.executable)


def forget_triton():
    """Have the next import of triton read TRITON_INTERPRET: Megatron has imported it."""
    for name in list(sys.modules):
        if name.partition(".")[0] == "triton" and not name.startswith("triton._C"):
            del sys.modules[name]


def _run(words):
    """Run ``python WORDS...`` as the main module of this process, and end it."""
    import atexit
    import runpy
    import threading
    import traceback

    words = [word for word in words if word not in ("-u", "-B")]
    status = 0
    try:
        if words[0] == "-m":
            sys.path.insert(0, os.getcwd())
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        elif words[0] == "-c":
            sys.path.insert(0, "")
            sys.argv = ["-c", *words[2:]]
            exec(words[1], {"__name__": "__main__"})
        else:
            sys.path.insert(0, os.path.dirname(os.path.abspath(words[0])))
            sys.argv = words
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status & 0xFF)


if __name__ == "__main__":
    sys.exit(ask(sys.argv[1], sys.argv[2:]))
