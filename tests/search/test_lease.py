"""Which process works on a trial, and whether it is alive."""

import os
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest

from gpt2.search import lease
from gpt2.search.lease import DEAD_AFTER_SECONDS, HEARTBEAT, WORKER, Status, Worker, status
from tests.conftest import ROOT


def pid_of_a_dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.fixture
def attributes() -> dict:
    """The attributes of a trial that this process has claimed."""
    storage = optuna.storages.InMemoryStorage()
    study = optuna.create_study(storage=storage)
    with Worker(storage) as worker:
        worker.acquire(study.ask()._trial_id)
    return study.trials[0].user_attrs


def test_live_process_is_alive(tmp_path, attributes):
    assert attributes[WORKER]["pid"] == os.getpid()
    assert status(attributes, tmp_path / "0") == Status.ALIVE
    attributes[HEARTBEAT] = time.time() - DEAD_AFTER_SECONDS - 1  # a later process has the same id
    assert status(attributes, tmp_path / "0") == Status.DEAD


def test_ended_process_on_this_machine_is_dead_at_once(tmp_path, attributes):
    attributes[WORKER]["pid"] = pid_of_a_dead_process()
    assert status(attributes, tmp_path / "0") == Status.DEAD
    assert status({}, tmp_path / "0") == Status.DEAD


def test_process_on_another_machine_is_dead_without_a_heartbeat(tmp_path, attributes):
    attributes[WORKER] |= {"host": "elsewhere", "pid": pid_of_a_dead_process()}
    assert status(attributes, tmp_path / "0") == Status.ALIVE
    attributes[HEARTBEAT] = time.time() - DEAD_AFTER_SECONDS - 1
    assert status(attributes, tmp_path / "0") == Status.DEAD


def test_job_that_outlives_its_sweeper_is_orphaned_and_then_dead(tmp_path, attributes):
    attributes[WORKER]["pid"] = pid_of_a_dead_process()
    (tmp_path / "0").mkdir()
    script = "import sys, time; from pathlib import Path; from gpt2.runtime.files import run_lock\n"
    script += "with run_lock(Path(sys.argv[1])): print('locked', flush=True); time.sleep(600)"
    orphan = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "0")], stdout=subprocess.PIPE, cwd=ROOT)
    assert orphan.stdout.readline() == b"locked\n"
    assert status(attributes, tmp_path / "0") == Status.ORPHANED
    orphan.kill()
    orphan.wait()
    assert status(attributes, tmp_path / "0") == Status.DEAD


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="only Linux shows uncollected processes")
def test_killed_process_that_is_not_collected_is_not_running():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert lease._is_running(process.pid)
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # a zombie: it has ended and is not collected
    assert not lease._is_running(process.pid)
    process.wait()
    assert not lease._is_running(process.pid)
