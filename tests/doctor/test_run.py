"""The command: rows, exit codes, the JSON file, interruptions. Other files test the checks."""

import json
from pathlib import Path

import pytest
import torch

from gpt2.config import DoctorRun
from gpt2.doctor import run
from gpt2.doctor.report import MISSING, OK, SLOW, WRONG, Machine, Row, as_lines, run_checks, summary
from tests.conftest import Workspace

CPU = torch.device("cpu")
GOOD = {"a": lambda _: Row("1 GB"), "b": lambda _: Row("9 s", SLOW, "wait"), "c": lambda _: Row("no", MISSING, "buy")}


def fails(_machine: Machine) -> Row:
    raise RuntimeError("no such kernel\nat line 5, see http://user:secret@host/x")


def examined(tmp_path: Path, checks: dict) -> tuple[int, dict]:
    code = run.examine(DoctorRun("cpu", str(tmp_path / "found.json")), {"Part": checks})
    return code, json.loads((tmp_path / "found.json").read_text())


def test_slow_and_missing_are_not_wrong(tmp_path, capsys):
    code, found = examined(tmp_path, {**GOOD, "of another device": lambda _: None})
    assert code == 0
    assert [(row["part"], row["name"], row["status"], row["advice"]) for row in found["rows"]] == [
        ("Part", "a", "OK", ""),
        ("Part", "b", "slow", "wait"),
        ("Part", "c", "missing", "buy"),
    ]
    assert found["complete"]
    assert {"device", "hardware", "versions", "repository", "seconds"} <= found.keys()
    printed = capsys.readouterr().out
    assert printed.startswith("Part\n  OK      a ")
    assert "3 checks: 1 OK, 1 slow, 1 missing, 0 WRONG, in 0 s" in printed


def test_exception_of_a_check_is_a_wrong_row_and_the_others_run(tmp_path, capsys):
    code, found = examined(tmp_path, {"bad": fails, **GOOD})
    assert code == 1
    first, *others = found["rows"]
    assert first["status"] == WRONG
    assert first["value"] == "RuntimeError: no such kernel at line 5, see http://***@host/x"
    assert first["advice"]
    assert [row["status"] for row in others] == [OK, SLOW, MISSING]
    assert "Traceback" not in capsys.readouterr().err


def test_interruption_prints_and_writes_the_rows_so_far(tmp_path, capsys):
    def interrupted(_machine: Machine) -> Row:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        examined(tmp_path, {**GOOD, "d": interrupted, "e": fails})
    found = json.loads((tmp_path / "found.json").read_text())
    assert [row["name"] for row in found["rows"]] == ["a", "b", "c"]
    assert not found["complete"]
    assert "interrupted after 3 checks" in capsys.readouterr().out


def test_rows_are_short_lines_with_advice():
    row = Row("word " * 40, MISSING, "pip install " * 12, name="shared memory")
    lines = as_lines(row).splitlines()
    assert lines[0].startswith("  missing shared memory       ")
    assert sum("-> " in line for line in lines) == 1
    assert max(map(len, lines)) <= 110
    assert "->" not in as_lines(Row("word", advice="pip", name="x"))


def test_warnings_do_not_interrupt_the_table(tmp_path, capsys, recwarn):
    import logging
    import warnings

    def noisy(_machine: Machine) -> Row:
        logging.getLogger("gpt2.train").warning("a line")
        warnings.warn("another", stacklevel=1)
        return Row("done")

    rows = list(run_checks(Machine(CPU, tmp_path), {"Part": {"noisy": noisy}}))
    assert summary(rows) == "1 check: 1 OK, 0 slow, 0 missing, 0 WRONG"
    assert capsys.readouterr().err == ""
    assert not recwarn.list


def test_help_names_keys_and_exit_codes(workspace: Workspace):
    done = workspace.module("gpt2.main", "doctor", "--help")
    assert done.returncode == 0
    assert "  json=null " in done.stdout and "  device=auto " in done.stdout and "WRONG" in done.stdout


@pytest.mark.slow
def test_this_machine(workspace: Workspace):
    """Without a C++ compiler: Inductor takes most of a minute. tests/test_train.py compiles by `aot_eager`."""
    workspace.environment["CXX"] = "false"
    done = workspace.module_anew("gpt2.main", "doctor", "json=found.json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    found = json.loads((workspace.folder / "found.json").read_text())
    assert found["complete"]
    rows = {row["name"]: row["status"] for row in found["rows"]}
    assert rows.keys() >= {"packages", "fp32", "model=gpt2"}
    assert rows["torch.compile"] == SLOW
    assert all(row["status"] == "OK" or row["advice"] for row in found["rows"])
    assert not (workspace.folder / "outputs").exists()
