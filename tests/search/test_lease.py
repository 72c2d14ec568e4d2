"""Which process works on a trial, and whether it is alive."""

import json
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest

from gpt2.search.lease import DEAD_AFTER_SECONDS, HEARTBEAT, WORKER, Status, Worker
from tests.conftest import ROOT


@pytest.fixture
def storage() -> optuna.storages.BaseStorage:
    return optuna.storages.InMemoryStorage()


def claimed_by_a_killed_process(folder: Path) -> dict:
    """The attributes of a trial that another process claimed before it was killed."""
    script = """
import os, signal, sys, json, optuna
from pathlib import Path
from gpt2.search.lease import Worker
storage = optuna.storages.InMemoryStorage()
study = optuna.create_study(storage=storage)
worker = Worker(Path(sys.argv[1]), storage).__enter__()
worker.acquire(study.ask()._trial_id)
print(json.dumps(study.trials[0].user_attrs), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", script, str(folder)], capture_output=True, text=True, cwd=ROOT)
    return json.loads(done.stdout)


def test_killed_process_on_this_machine_is_dead_at_once(tmp_path, storage):
    attributes = claimed_by_a_killed_process(tmp_path)
    with Worker(tmp_path, storage) as worker:
        assert worker.status(attributes, tmp_path / "0") == Status.DEAD
        assert worker.status({}, tmp_path / "0") == Status.DEAD
        attributes[WORKER]["host"] = "elsewhere"  # whose locks are not visible here, only its heartbeats
        assert worker.status(attributes, tmp_path / "0") == Status.ALIVE
        attributes[HEARTBEAT] = time.time() - DEAD_AFTER_SECONDS - 1
        assert worker.status(attributes, tmp_path / "0") == Status.DEAD


def test_live_process_is_alive_for_itself_and_others_and_leaves_no_file(tmp_path, storage):
    study = optuna.create_study(storage=storage)
    with Worker(tmp_path, storage) as one:
        one.acquire(study.ask()._trial_id)
        attributes = study.trials[0].user_attrs
        assert one.status(attributes, tmp_path / "0") == Status.ALIVE
        script = """
import sys, json
from pathlib import Path
from gpt2.search.lease import Worker
print(Worker(Path(sys.argv[1]), None).status(json.loads(sys.argv[2]), Path("none")))
"""
        command = [sys.executable, "-c", script, str(tmp_path), json.dumps(attributes)]
        other = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert other.stdout.strip() == "Status.ALIVE", other.stderr
    assert list(tmp_path.iterdir()) == []


def test_job_that_outlives_its_sweeper_is_orphaned_and_then_dead(tmp_path, storage):
    study = optuna.create_study(storage=storage)
    with Worker(tmp_path, storage) as sweeper:
        sweeper.acquire(study.ask()._trial_id)
    attributes = study.trials[0].user_attrs
    sweeper.lock.parent.mkdir()
    sweeper.lock.touch()  # as a killed process leaves it
    (tmp_path / "0").mkdir()
    script = "import sys, time; from pathlib import Path; from gpt2.runtime.files import run_lock\n"
    script += "with run_lock(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    orphan = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "0")], stdout=subprocess.PIPE, cwd=ROOT)
    assert orphan.stdout.readline() == b"held\n"
    with Worker(tmp_path, storage) as worker:
        assert worker.status(attributes, tmp_path / "0") == Status.ORPHANED
        orphan.kill()
        orphan.wait()
        assert worker.status(attributes, tmp_path / "0") == Status.DEAD
