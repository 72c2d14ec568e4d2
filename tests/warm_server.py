"""A process that has imported what the scripts will ask for, and forks one of them for each request.

A script of ours takes a second, but starting Python and importing torch takes three. `tests/conftest.py` starts this
file once, and gets from it processes that are as they would be had they been started by themselves, but for the
imports: working directory, environment, streams, arguments, exit code, signals, threads and exit handlers are theirs.

Not among the imports are the libraries of Hugging Face, which look at the environment while they are imported, wandb,
which makes a temporary folder then, and pyarrow, which starts a thread.
"""

import atexit
import fcntl
import gc
import json
import os
import runpy
import select
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Asked(NamedTuple):
    arguments: list[str]  # a script with its arguments, or -m with a module and its own
    folder: str
    environment: dict[str, str]
    new_session: bool
    files: list[int]  # the numbers that the files sent along are to have
    blocked: list[int]  # signals


def imports() -> None:
    import torch._dynamo  # noqa: F401  # which the first optimizer imports
    from optuna.storages import RDBStorage

    import gpt2.analysis.plotting
    import gpt2.cli.script
    import gpt2.cli.sweeper
    import gpt2.data.corpus
    import gpt2.evaluate
    import gpt2.inference
    import gpt2.search.report
    import gpt2.tracking.wandb_logger
    import gpt2.train  # noqa: F401
    from gpt2.cli.compose import compose

    compose("train", ["train.max_steps=1"])  # fills the caches of the grammar's parser
    RDBStorage("sqlite://")  # imports alembic


def serve(listening: socket.socket) -> Asked:
    """Answer requests until standard input is closed. Returns in the processes that are to be scripts."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps the processes that `attend`
    while True:
        ready, _, _ = select.select([listening, sys.stdin], [], [])
        if listening not in ready:
            sys.exit()
        connection, _ = listening.accept()
        if os.fork() == 0:
            listening.close()
            return attend(connection)
        connection.close()


def attend(connection: socket.socket) -> Asked:
    """Fork a process, send its id, wait for its end and send its exit code. Returns in the forked process.

    If the client ends first, such as a `warm_python` that is killed, the process is killed too.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    message, files, _, _ = socket.recv_fds(connection, 2**20, 100)
    asked = Asked(*json.loads(message))
    process = os.fork()
    if process == 0:
        connection.close()
        become(asked, files)
        return asked
    for file in files:
        os.close(file)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C ends the script, and its exit code is sent
    connection.sendall(f"{process}\n".encode())
    if connection in select.select([connection, os.pidfd_open(process)], [], [])[0]:
        os.kill(process, signal.SIGKILL)
    _, status, usage = os.wait4(process, 0)
    seconds = usage.ru_utime + usage.ru_stime
    with suppress(BrokenPipeError):
        connection.sendall(f"{os.waitstatus_to_exitcode(status)} {seconds}\n".encode())
    os._exit(0)


def become(asked: Asked, files: list[int]) -> None:
    """Make this process what a new one would be. What it starts with `sys.executable` is forked as well."""
    if asked.new_session:
        os.setsid()
    signal.pthread_sigmask(signal.SIG_SETMASK, asked.blocked)
    os.chdir(asked.folder)
    os.environ.clear()
    os.environ.update(asked.environment, WARM_SERVER=sys.argv[1], WARM_PYTHON=sys.executable)
    sys.executable = str(Path(__file__).with_name("warm_python"))
    copies = [fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, 500) for file in files]  # out of the way of the numbers wanted
    for file in files:
        os.close(file)
    for copy, number in zip(copies, asked.files, strict=True):
        os.dup2(copy, number)
        os.close(copy)
    is_unbuffered = "PYTHONUNBUFFERED" in os.environ
    sys.stdin = sys.__stdin__ = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(2, "w", closefd=False, errors="backslashreplace")  # noqa: SIM115
    sys.stdout.reconfigure(write_through=is_unbuffered)
    sys.stderr.reconfigure(line_buffering=True, write_through=is_unbuffered)
    sys.modules["numpy"].random.seed()  # `random` sees to itself


def leave(codes: list[int]) -> None:
    """The last thing at exit: spare the interpreter the taking apart of all that was imported."""
    if codes:
        with suppress(OSError):  # which the interpreter reports itself
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(codes[0])


def main() -> None:
    codes: list[int] = []
    atexit.register(leave, codes)  # the first that is registered is called last
    sys.path[0] = str(ROOT)
    imports()
    gc.freeze()  # garbage collection would touch, and so copy, the pages that all children share
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(sys.argv[1])
        listening.listen()
        print("ready", flush=True)
        asked = serve(listening)
    first, *rest = asked.arguments
    try:
        if first == "-m":
            sys.path[0] = asked.folder
            sys.argv = rest
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = asked.arguments
            runpy.run_path(first, run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, int):
            codes.append(end.code)
        raise
    codes.append(0)


if __name__ == "__main__":
    main()
