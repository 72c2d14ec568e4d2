"""The environment variables of torchrun."""

import json
import os
import subprocess
import sys

import pytest

from gpt2.errors import UserError
from gpt2.runtime.dist_env import dist_env, report_to_torchrun


def test_missing_variables_are_named(monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="but not LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_PORT"):
        dist_env.__wrapped__()


def test_report_to_torchrun_is_without_passwords(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    try:
        raise OSError('"https://user:t0k3n@host" is down, password="t0k3n"')
    except OSError as error:
        report_to_torchrun(error)
    report = json.loads((tmp_path / "error.json").read_text())["message"]
    assert report["message"] == 'OSError: "https://***@host" is down, password=***'
    assert report["message"] in report["extraInfo"]["py_callstack"]
    assert "t0k3n" not in str(report)


RANK = """
import atexit, builtins, sys, threading
from gpt2.runtime.dist_env import exit_without_finalization

class Last:
    def __del__(self):
        print("finalized")

with exit_without_finalization():
    atexit.register(print, "exit handler")
    builtins.last = Last()
    threading.Thread(target=print, args=["thread"]).start()
    {end}
"""


@pytest.mark.parametrize(
    ("end", "code", "error"),
    [
        ("pass", 0, ""),
        ("sys.exit()", 0, ""),
        ("sys.exit(138)", 138, ""),
        ("sys.exit('no')", 1, "no\n"),
        ("1 / 0", 1, "ZeroDivisionError: division by zero\n"),
    ],
)
def test_rank_exits_before_finalization_with_its_code_and_output(end, code, error):
    def run(**variables: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", RANK.format(end=end)]
        return subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True)

    alone, rank = run(), run(RANK="0")
    assert alone.stdout == "thread\nexit handler\nfinalized\n"
    assert rank.stdout == "thread\nexit handler\n"
    assert alone.returncode == rank.returncode == code
    assert rank.stderr == alone.stderr and rank.stderr.endswith(error)
