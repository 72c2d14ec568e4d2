"""The command that runs a recorded study."""

import csv
import os
import re
import signal
import tempfile
import time
from pathlib import Path

import pytest

from gpt2.errors import UserError
from gpt2.experiments import runner
from gpt2.experiments.plan import PlannedRun
from gpt2.experiments.runner import RecordedStudy, RunProcess, default_jobs, default_threads, print_plan, run_study
from gpt2.runtime import device
from tests.analysis.test_compare import make_run
from tests.conftest import Workspace
from tests.experiments.studies import PLAN, write_study


def test_variant_is_found_from_any_folder(workspace: Workspace):
    done = workspace.run("train.py", "+learning_rate=width_64", "train.learning_rate=4e-3", "--cfg", "job")
    assert "d_model: 64" in done.stdout


@pytest.mark.slow
def test_interrupted_study_resumes_and_writes_its_results(workspace: Workspace):
    """The study is stopped by Ctrl-C and by SIGTERM. A second process is refused while it runs."""
    folder = write_study(workspace.folder, PLAN.replace("seeds: [1, 2]", "seeds: [1]"))
    command = ("gpt2.main", "study", "outputs/sweeps/tiny")
    for number, (sent, rate) in enumerate([(signal.SIGINT, "0.003"), (signal.SIGTERM, "0.001")]):
        running = workspace.start("-m", *command, "jobs=1", "threads=1", errors_in_output=True)
        name = f"{('narrow', 'wide')[number]},learning_rate={rate},seed=1"
        lock = workspace.folder / "outputs" / "studies" / "tiny" / name / ".lock"
        # Wait until this process has printed its plan. An earlier process may have started the run.
        while not ("1 thread each" in running.printed(1) and lock.exists() and lock.read_text()):
            time.sleep(0.05)
            assert running.poll() is None
        if sent == signal.SIGINT:
            second = workspace.module(*command)
            assert second.returncode == 2
            assert second.stderr.startswith("error: outputs/studies/tiny is being written by process ")
            assert len(second.stderr.splitlines()) == 1
        running.send_signal(sent)
        output, _ = running.communicate(timeout=120)
        assert running.returncode == 128 + sent, output
        assert "Resume with the same command." in output
        assert "1 thread each" in output
        assert "Traceback" not in output
        assert "\x1b" not in output
        assert not (folder / "results.csv").exists()

    collected = workspace.module(*command, "jobs=0")
    assert collected.returncode == 2
    assert re.fullmatch(r"error: jobs=0: \d of 4 runs are missing, so no results are written\n", collected.stderr)
    output = workspace.on_terminal("-m", *command)
    assert "of them done" in output
    assert re.search(r"of 4 runs, \d running.*%  \S+ left", output)
    rows = list(csv.DictReader((folder / "results.csv").read_text().splitlines()))
    assert len(rows) == 4
    assert {row["state"] for row in rows} == {"finished"}
    assert (folder / "results.png").exists()
    again = workspace.module(*command)
    assert re.search(r"4 of them done\n.*\n\n\| ", again.stdout)  # the header, then the table
    assert "Compared with" not in again.stdout


def test_run_has_a_low_priority_and_its_threads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lower = min(19, os.getpriority(os.PRIO_PROCESS, 0) + 1)
    monkeypatch.setattr(runner, "NICE", lower)
    run = RunProcess(PlannedRun("tiny", "narrow", {}), threads=3)
    try:
        assert os.getpriority(os.PRIO_PROCESS, run.process.pid) == lower
        while not (environment := Path(f"/proc/{run.process.pid}/environ").read_bytes()):  # while the run starts
            assert not run.has_ended()
        assert b"\0OMP_NUM_THREADS=3\0" in b"\0" + environment
    finally:
        run.process.kill()
        run.process.wait()


@pytest.mark.slow
def test_failed_run_is_reported_and_the_others_continue(workspace: Workspace):
    folder = write_study(workspace.folder, "variants: [narrow, wide]")
    (folder / "wide.yaml").write_text("# @package _global_\ndefaults: [_base]\ndata: {tokenizer: gpt2}\n")
    done = workspace.module("gpt2.main", "study", "outputs/sweeps/tiny")
    assert done.returncode == 1
    failure, count = done.stderr.splitlines()
    assert failure.startswith("error: wide seed=1: exit code 2, gpt2: there is no such folder here")  # without the Hub
    assert count == "error: 1 of 2 runs failed; the same command tries them again"
    assert re.search(r"wide seed=1 +failed", done.stdout)
    assert "val loss" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "error: study: one folder"),
        (["experiments/nothing"], "error: study: experiments/nothing does not exist"),
        (
            ["experiments/learning_rate", "experiments/tokenizer"],
            "error: study: one folder is needed, such as experiments/learning_rate, not experiments/l",
        ),
        (["experiments/learning_rate", "jobs=-1"], "error: jobs: '-1' is not a whole number from 0"),
        (["experiments/learning_rate", "threads=0"], "error: threads: '0' is not a whole number from 1"),
        (["experiments/learning_rate", "--plan=false"], "error: --plan=false: there is no such option"),
        (["experiments/learning_rate", "--redraw", "--plan"], "error: --redraw: it runs nothing, so leave out plan"),
    ],
)
def test_invalid_arguments_are_a_one_line_error(workspace, arguments, message):
    done = workspace.module("gpt2.main", "study", *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(message)
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("act", [run_study, print_plan])
def test_unwritable_folder_of_runs_is_refused_before_any_work(tmp_path, monkeypatch, act):
    folder = write_study(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs" / "studies").mkdir()
    (tmp_path / "outputs" / "studies" / "tiny").touch()
    monkeypatch.setattr(runner, "RecordedStudy", None)  # the study is not even opened
    with pytest.raises(
        UserError, match=r"^study: cannot write to outputs/studies/tiny: not a folder; run the command in"
    ):
        act(folder, 1, 1)


def test_unwritable_folder_of_a_study_is_refused_with_an_alternative(tmp_path, monkeypatch):
    folder = write_study(tmp_path)
    monkeypatch.chdir(tmp_path)
    temporary = tempfile.TemporaryFile

    def refused(dir: Path):
        if dir == folder:
            raise PermissionError(1, "Operation not permitted")
        return temporary(dir=dir)

    monkeypatch.setattr(tempfile, "TemporaryFile", refused)
    with pytest.raises(UserError, match=r"Operation not permitted; make it writable, or copy the study to outputs/sw"):
        run_study(folder, 1)


@pytest.mark.parametrize("damage", ['{"config": {"train": 5}}', '{"state": 7}', '{"versions": []}', "[[", ""])
def test_damaged_run_is_named_and_counts_as_missing(tmp_path, monkeypatch, capsys, damage):
    folder = write_study(tmp_path)
    monkeypatch.chdir(tmp_path)
    run = RecordedStudy(folder).runs[0].folder
    make_run(run)
    (run / "run.json").write_text(damage)
    with pytest.raises(UserError, match=r"^jobs=0: 8 of 8 runs are missing, so no results are written$"):
        run_study(folder, jobs=0)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{run}/run.json: ")
    assert line.endswith("; this run counts as missing")
    assert "results.csv" not in {path.name for path in folder.iterdir()}


def test_default_jobs_and_threads_are_those_of_the_container(monkeypatch):
    monkeypatch.setattr(device.os, "sched_getaffinity", lambda _: range(64), raising=False)
    monkeypatch.setattr(device, "container_limit", lambda _: "400000 100000")
    monkeypatch.setattr(device.torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("OMP_NUM_THREADS", "0")
    assert (default_jobs(), default_threads(2)) == (4, 2)


def test_chosen_variants_do_not_change_the_folder(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    folder = write_study(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert {run.variant for run in RecordedStudy(folder, ["wide"]).runs} == {"wide"}
    monkeypatch.setattr(PlannedRun, "is_done", True)
    run_study(folder, jobs=0, variants=["wide"])
    (line,) = caplog.messages
    assert line == "All 4 runs of wide are done. Without variants= the study writes its results."
    assert "results.csv" not in {path.name for path in folder.iterdir()}
    with pytest.raises(UserError, match="variants: wider is none of narrow, wide"):
        RecordedStudy(folder, ["wide", "wider"])
