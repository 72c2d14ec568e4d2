"""Terminals, streams, folders and environments that are missing, full or odd. Each row is a separate process."""

import os
import pty
import signal
import subprocess
import sys
from contextlib import suppress

import pytest

from tests.bad_inputs.harness import changes, check_line, tree
from tests.conftest import ROOT, Workspace

WRONG = "{train} train.lrr=1"
LINE = "train.lrr=1: Key 'lrr'"

SHELL = [  # what, line of a shell, exit code, words of standard error
    ("standard input closed", "{generate} <&-", 2, "prompt: missing, and standard input is closed"),
    ("standard output closed", "{train} --help >&-", 0, ""),
    ("standard output full", "{train} --help > /dev/full", 1, "No space left on device"),
    ("a reader that has gone", "{train} --help | true", 0, ""),
    ("standard error closed", f"{WRONG} 2>&-", 2, ""),
    ("standard error full", f"{WRONG} 2> /dev/full", 1, ""),
    ("all streams closed", f"{WRONG} <&- >&- 2>&-", 2, ""),
    ("no home", f"unset HOME XDG_CACHE_HOME; {WRONG}", 2, LINE),
    ("a home that is not there", f"HOME=/nowhere {WRONG}", 2, LINE),
    ("ASCII alone", "LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 {train} 'name=\"é!\"'", 2, "name"),
    ("a strict encoding", "PYTHONIOENCODING=ascii:strict {train} 'name=\"é!\"'", 2, "name: ... must be letters"),
    ("another working folder", "cd folder && {generate} prompt=x", 2, "checkpoint: no run with a checkpoint in"),
    ("a working folder that is gone", "mkdir gone; cd gone; rmdir ../gone; {train} train.lrr=1", 2, "does not exist"),
    ("a linked script", "ln -s {root}/train.py x.py; {python} x.py train.lrr=1; code=$?; rm x.py; exit $code", 2, LINE),
    ("a proxy without a port", "HTTPS_PROXY=http://a:b:c {train} wandb=off", 2, "HTTPS_PROXY"),
    ("a rank that is a word", "RANK=first WORLD_SIZE=2 LOCAL_RANK=0 MASTER_ADDR=a MASTER_PORT=1 {train}", 2, "RANK"),
    ("a terminal of no width", f"COLUMNS=0 TERM=dumb {WRONG}", 2, LINE),
    ("columns in words", f"COLUMNS=many {WRONG}", 2, LINE),
]


@pytest.mark.parametrize(
    ("what", "line", "code", "expected"),
    [pytest.param(*row, id=row[0]) for row in SHELL],
)
def test_streams_and_environments(place: Workspace, what, line, code, expected):
    scripts = {name: f"{sys.executable} {ROOT / name}.py" for name in ("train", "generate")}
    before = tree(place.folder.parent)
    done = subprocess.run(
        ["bash", "-c", "set -o pipefail; " + line.format(**scripts, root=ROOT, python=sys.executable)],
        cwd=place.folder,
        env=place.environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=300,
    )
    errors = done.stderr.decode(errors="replace")
    assert done.returncode == code, errors
    assert "Traceback" not in errors
    if expected:
        (error,) = errors.splitlines()
        check_line(error, expected)
    assert changes(before, tree(place.folder.parent)) == []


def on_terminal(place: Workspace, columns: int, *arguments: str, **environment: str) -> str:
    """The output of a script on a terminal of a certain width."""
    import fcntl
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = subprocess.Popen(
        [sys.executable, str(ROOT / arguments[0]), *arguments[1:]],
        cwd=place.folder,
        env={**place.environment, "TERM": "xterm", **environment},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    shown = b""
    with suppress(OSError):  # at the end of the process
        while part := os.read(ours, 4096):
            shown += part
    os.close(ours)
    assert process.wait(timeout=60) == 2
    return shown.decode()


def test_narrow_terminal_without_colours(place):
    shown = on_terminal(place, 20, "train.py", "train.lrr=1", NO_COLOR="1")
    waiting, _, rest = shown.partition(f"\r{' ' * len('starting ...')}\r")
    assert waiting == "starting ..."  # printed before the imports
    assert rest.startswith("error: train.lrr=1: Key 'lrr'")
    assert "\x1b" not in shown


def test_ctrl_c_during_the_imports_of_the_command_line():
    code = "import gpt2.cli; raise KeyboardInterrupt"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "\nInterrupted.\n")  # a shell shows it as 130
