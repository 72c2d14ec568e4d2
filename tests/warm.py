"""The client of `tests/warm_server.py`, which starts scripts quickly."""

import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from functools import cache
from hashlib import sha256
from pathlib import Path

from filelock import FileLock

# Environment variables that may differ between a script and its server, because the server has not read them.
# For any other difference a new server is started.
READ_LATER = {
    *("HTTPS_PROXY", "ALL_PROXY", "http_proxy", "MY_SECRET"),
    *("HOME", "XDG_CACHE_HOME", "PYTHONUNBUFFERED", "GPT2_FAULT", "TERM", "COLUMNS"),
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("STARTED_BY", "STUDIES", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "PATH", "FAKE_SLURM"),
}
OF_LIBRARIES = ("HF_", "WANDB_", "HUGGING", "PYTEST_")  # libraries that the server has not imported or started


@cache
def server(environment: tuple[tuple[str, str], ...]) -> str:
    """The address of a server that all test processes share, and that ends with the last of them."""
    folder = Path(os.environ["GPT2_TESTS"]) / sha256(repr(environment).encode()).hexdigest()[:16]
    with FileLock(f"{folder}.lock"):
        lifeline = folder / "lifeline"  # a pipe: each test process holds its write end open, the server its read end
        try:
            os.open(lifeline, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:  # there is no server, or it has ended
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            os.mkfifo(lifeline)
            reading = os.open(lifeline, os.O_RDONLY | os.O_NONBLOCK)
            os.open(lifeline, os.O_WRONLY)
            command = [sys.executable, str(Path(__file__).with_name("warm_server.py")), str(folder / "socket")]
            process = subprocess.Popen(command, env=dict(environment), stdin=reading, stdout=subprocess.PIPE)
            os.close(reading)
            assert process.stdout.readline() == b"ready\n"
    return str(folder / "socket")


def server_for(environment: dict[str, str]) -> str:
    """The address of a server whose processes behave as if they had been started with this environment."""
    at_start = (
        (name, value)
        for name, value in sorted(environment.items())
        if name not in READ_LATER and not name.startswith(OF_LIBRARIES)
    )
    return server((*at_start, ("HOME", os.environ.get("HOME", "/"))))


class Process:
    """A running script, with the interface of `subprocess.Popen`. Its output is written to files."""

    def __init__(
        self,
        arguments: list[str],
        folder: Path,
        environment: dict[str, str],
        start_new_session: bool = False,
        errors_in_output: bool = False,
        terminal: int | None = None,
        given: bytes = b"",
    ):
        """
        Args:
            terminal: The file descriptor of a terminal for all streams of the script.
            given: The content of standard input.
        """
        self.args, self.returncode, self.cpu_seconds = arguments, None, 0.0
        self._files = [tempfile.TemporaryFile() for _ in range(3)]  # noqa: SIM115
        os.pwrite(self._files[0].fileno(), given, 0)
        streams = [*self._files[:2], self._files[1]] if errors_in_output else self._files
        numbers = [file.fileno() for file in streams] if terminal is None else [terminal] * 3
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(server_for(environment))
        message = json.dumps([arguments, str(folder), environment, start_new_session, [0, 1, 2], []]).encode()
        assert len(message) < 2**16  # the server reads it in one call
        socket.send_fds(self._connection, [message], numbers)
        self._answers = self._connection.makefile()
        self.pid = int(self._answers.readline())

    def wait(self, timeout: float | None = None) -> int:
        """Returns the exit code, or minus the number of the signal that ended it.

        Raises:
            subprocess.TimeoutExpired: The script did not end in time.
        """
        if self.returncode is None:
            if not select.select([self._connection], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout)
            code, seconds = self._answers.readline().split()
            self.returncode, self.cpu_seconds = int(code), float(seconds)
            self._connection.close()
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Returns standard output and standard error."""
        self.wait(timeout)
        return tuple(self.printed(stream) for stream in (1, 2))

    def poll(self) -> int | None:
        """Returns the exit code, or None while the script runs."""
        with suppress(subprocess.TimeoutExpired):
            return self.wait(timeout=0)
        return None

    def printed(self, stream: int) -> str:
        """The output so far."""
        file = self._files[stream]
        content = os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0)
        return content.decode().replace("\r\n", "\n").replace("\r", "\n")

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            self.send_signal(signal.SIGKILL)


def run(
    arguments: list[str], folder: Path, environment: dict[str, str], timeout: float
) -> subprocess.CompletedProcess[str]:
    process = Process(arguments, folder, environment)
    try:
        output, errors = process.communicate(timeout)
    except BaseException:
        process.kill()
        raise
    return subprocess.CompletedProcess(arguments, process.returncode, output, errors)
