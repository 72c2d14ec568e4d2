"""A process that has imported what the scripts will ask for, and forks one of them for each request.

A script of ours takes a second, but starting Python and importing torch takes three. `tests/conftest.py` starts this
file once, and gets from it processes that are as they would be had they been started by themselves, but for the
imports: working directory, environment, streams, arguments, exit code, signals, threads and exit handlers are theirs.

Not among the imports are the libraries of Hugging Face, which look at the environment while they are imported, and
pyarrow, which starts a thread.
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
import tempfile
from base64 import b64decode
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Asked(NamedTuple):
    arguments: list[str]  # a script with its arguments, or -m with a module and its own
    folder: str
    environment: dict[str, str]
    new_session: bool
    files: list[int]  # the numbers that the files sent along are to have
    blocked: list[int]  # signals


def imports() -> None:
    import matplotlib.figure
    import torch._dynamo  # which the first optimizer imports
    import torch.distributed.run  # noqa: F401
    from optuna.storages import RDBStorage

    import gpt2.analysis.compare_html
    import gpt2.analysis.plotting
    import gpt2.cli.command
    import gpt2.cli.messages
    import gpt2.cli.sweeper
    import gpt2.data.corpus
    import gpt2.evaluate
    import gpt2.inference
    import gpt2.search.report
    import gpt2.tracking.wandb_logger
    import gpt2.train  # noqa: F401
    from gpt2.cli.compose import compose_defaults
    from gpt2.cli.hydra_private import parse_arguments
    from gpt2.cli.preflight import check_run

    for name in ("train", "evaluate", "generate"):
        compose_defaults(name, with_hydra=True), compose_defaults(name)
    usual = ["data=text", "data.files=[corpus.txt]", "data.tokenizer=bytes", "model=gpt2_nano", "train.max_steps=8"]
    check_run("train", parse_arguments([*usual, "wandb=off"]))  # fills the caches of the grammars' parsers and of types
    RDBStorage("sqlite://")  # imports alembic
    import_wandb()
    matplotlib.figure.Figure.savefig = without_painting(matplotlib.figure.Figure.savefig)


def import_wandb() -> None:
    """Import wandb. The folder for media that it makes then, and removes at exit, lies beside the socket instead."""
    tempfile.tempdir = str(Path(sys.argv[1]).parent)
    from wandb.sdk.data_types._private import MEDIA_TMP

    import gpt2.tracking.wandb_service  # noqa: F401

    tempfile.tempdir = None
    atexit.unregister(MEDIA_TMP.cleanup)
    MEDIA_TMP._finalizer.detach()


def without_painting(savefig: Callable[..., None]) -> Callable[..., None]:
    """`Figure.savefig` that writes one pixel of four channels as PNG: painting takes a fifth of a small run's time.

    The figures are made as always, and tests of pictures paint them in their own process.
    """
    pixel = b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAAC0lEQVR4nGP4DwQACfsD/fteaysAAAAASUVORK5CYII=")

    def save(figure: Any, place: Any, **options: Any) -> None:
        if options.get("format", "png") != "png" or (isinstance(place, Path) and place.suffix != ".png"):
            savefig(figure, place, **options)
        elif isinstance(place, Path):
            place.write_bytes(pixel)
        else:
            place.write(pixel)

    return save


def serve(listening: socket.socket) -> Asked:
    """Fork a process for each request, and answer with its id and, when it has ended, with its exit code.

    Returns in the processes that are to be scripts. When standard input is closed, or the client of a process ends
    before it, such as a `warm_python` that is killed, the process is killed.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C ends the scripts, and their exit codes are sent
    running: dict[int, tuple[int, socket.socket]] = {}  # by the descriptor of a process its id, and who waits for it
    while True:
        clients = [client for _, client in running.values()]
        ready, _, _ = select.select([listening, sys.stdin, *running, *clients], [], [])
        if listening in ready:
            connection, _ = listening.accept()
            message, files, _, _ = socket.recv_fds(connection, 2**20, 100)
            asked = Asked(*json.loads(message))
            process = os.fork()
            if process == 0:
                for descriptor in (listening.detach(), connection.detach(), *running):
                    os.close(descriptor)
                for client in clients:
                    client.close()
                become(asked, files)
                return asked
            for file in files:
                os.close(file)
            connection.sendall(f"{process}\n".encode())
            running[os.pidfd_open(process)] = process, connection
        for descriptor, (process, client) in list(running.items()):
            if descriptor in ready:
                answer(process, client)
                os.close(descriptor)
                del running[descriptor]
            elif client in ready or sys.stdin in ready:
                os.kill(process, signal.SIGKILL)
        if sys.stdin in ready:
            sys.exit()


def answer(process: int, client: socket.socket) -> None:
    """Send the exit code of a process that has ended and the seconds of CPU that it took."""
    _, status, usage = os.wait4(process, 0)
    with suppress(BrokenPipeError), client:
        client.sendall(f"{os.waitstatus_to_exitcode(status)} {usage.ru_utime + usage.ru_stime}\n".encode())


def become(asked: Asked, files: list[int]) -> None:
    """Make this process what a new one would be. What it starts with `sys.executable` is forked as well."""
    if asked.new_session:
        os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
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
    tempfile.gettempdir()  # or a thread finds it while a loader forks, whose workers then wait for the lock forever


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
    gc.disable()
    imports()
    gc.enable()
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
