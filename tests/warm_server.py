"""A server that has imported the modules of the scripts, and forks itself to run a script for each request.

A script takes a second, but starting Python and importing torch takes three. `tests/warm.py` starts one server for all
test processes. Except for the imports, a forked script behaves like a new process: it has its own working directory,
environment, streams, arguments, exit code, signals, threads and exit handlers.

The libraries of Hugging Face are not imported, because they read the environment during their import, nor is pyarrow,
because it starts a thread.
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
import weakref
from base64 import b64decode
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Request(NamedTuple):
    arguments: list[str]  # a script with its arguments, or -m with a module and its own
    folder: str
    environment: dict[str, str]
    new_session: bool
    files: list[int]  # the file descriptors of the script for the files that are sent with the request
    blocked: list[int]  # signals


def imports() -> None:
    import matplotlib.figure
    import torch._dynamo  # imported by the first optimizer
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
    check_run("train", parse_arguments([*usual, "wandb=off"]))  # fills the caches of the parsers and of types
    RDBStorage("sqlite://")  # imports alembic
    import_wandb()
    matplotlib.figure.Figure.savefig = without_rendering(matplotlib.figure.Figure.savefig)


def import_wandb() -> None:
    """Import wandb. Its folder for media is made beside the socket, and is not removed when a script exits."""
    tempfile.tempdir = str(Path(sys.argv[1]).parent)
    from wandb.sdk.data_types._private import MEDIA_TMP

    import gpt2.tracking.wandb_service  # noqa: F401

    tempfile.tempdir = None
    atexit.unregister(MEDIA_TMP.cleanup)
    MEDIA_TMP._finalizer.detach()


def without_rendering(savefig: Callable[..., None]) -> Callable[..., None]:
    """Return a `Figure.savefig` that writes a PNG of one pixel, because rendering takes a fifth of a small run's time.

    The figures are still made, and tests of pictures render them in their own process.
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


def serve(listening: socket.socket) -> Request:
    """Fork a process for each request, and send its id and, after its end, its exit code.

    Returns only in the forked processes. If standard input is closed, or the client of a process ends first, such as a
    killed `warm_python`, the process is killed.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C on a terminal ends the scripts, not the server
    running: dict[int, tuple[int, socket.socket]] = {}  # descriptor of a process: its id, and its client
    while True:
        clients = [client for _, client in running.values()]
        ready, _, _ = select.select([listening, sys.stdin, *running, *clients], [], [])
        if listening in ready:
            connection, _ = listening.accept()
            message, files, _, _ = socket.recv_fds(connection, 2**20, 100)
            request = Request(*json.loads(message))
            process = os.fork()
            if process == 0:
                for descriptor in (listening.detach(), connection.detach(), *running):
                    os.close(descriptor)
                for client in clients:
                    client.close()
                become(request, files)
                return request
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


def become(request: Request, files: list[int]) -> None:
    """Turn this process into one that looks newly started. What it starts with `sys.executable` is forked too."""
    if request.new_session:
        os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, request.blocked)
    os.chdir(request.folder)
    os.environ.clear()
    os.environ.update(request.environment, WARM_SERVER=sys.argv[1], WARM_PYTHON=sys.executable)
    sys.executable = str(Path(__file__).with_name("warm_python"))
    copies = [fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, 500) for file in files]  # numbers that no wanted descriptor has
    for file in files:
        os.close(file)
    for copy, number in zip(copies, request.files, strict=True):
        os.dup2(copy, number)
        os.close(copy)
    is_unbuffered = "PYTHONUNBUFFERED" in os.environ
    sys.stdin = sys.__stdin__ = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(2, "w", closefd=False, errors="backslashreplace")  # noqa: SIM115
    sys.stdout.reconfigure(write_through=is_unbuffered)
    sys.stderr.reconfigure(line_buffering=True, write_through=is_unbuffered)
    sys.modules["numpy"].random.seed()  # `random` reseeds itself after a fork
    tempfile.gettempdir()  # now, because a thread that computes it while a loader forks leaves the workers a held lock


def leave(codes: list[int]) -> None:
    """End the process at once, so that the interpreter does not tear down all imported modules. Called last at exit."""
    if codes:
        with suppress(OSError):  # the interpreter reports it
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(codes[0])


def main() -> None:
    codes: list[int] = []
    atexit.register(leave, codes)  # the first that is registered is called last
    sys.path[0] = str(ROOT)
    gc.disable()
    imports()
    for finalizer in list(weakref.finalize._registry):  # those of torch take a tenth of the time of a small run
        finalizer.atexit = False
    gc.enable()
    gc.freeze()  # a collection would write to, and so copy, the pages shared with all children
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(sys.argv[1])
        listening.listen()
        print("ready", flush=True)
        request = serve(listening)
    first, *rest = request.arguments
    try:
        if first == "-m":
            sys.path[0] = request.folder
            sys.argv = rest
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = request.arguments
            runpy.run_path(first, run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, int):
            codes.append(end.code)
        raise
    codes.append(0)


if __name__ == "__main__":
    main()
