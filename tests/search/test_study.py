"""Handing trials out: exactly so many, whoever asks, whatever became of those who had them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
from optuna.distributions import FloatDistribution

from gpt2.config import OptunaConfig
from gpt2.errors import UserError
from gpt2.search.algorithms import make_sampler
from gpt2.search.lease import DEAD_AFTER_SECONDS, HEARTBEAT, WORKER, Status, Worker
from gpt2.search.study import MAX_DEATHS, MAX_JOB_DEATHS, Study, StudyFailure
from gpt2.search.trial import quiet_optuna
from tests.conftest import ROOT

SPACE = {"train.beta2": FloatDistribution(0.9, 0.999)}


def study_in(folder: Path, n_trials: int = 3, timeout: int | None = None, **fixed: int) -> Study:
    config = OptunaConfig(n_trials=n_trials, storage=f"sqlite:///{folder}/study.db", timeout=timeout)
    return Study(
        config,
        SPACE,
        lambda number: make_sampler(OptunaConfig(sampler="random"), 1, number, SPACE),
        optuna.pruners.NopPruner(),
        folder,
        lambda number: folder / str(number),
        fixed=fixed,
    )


def states(study: Study) -> list[str]:
    return [trial.state.name for trial in study.optuna.trials]


def test_no_more_are_handed_out_than_there_are_left(tmp_path):
    with study_in(tmp_path) as one, study_in(tmp_path) as other:
        first, second = one.claim(), other.claim(5)
        assert [trial.number for trial in [*first, *second]] == [0, 1, 2]
        assert one.claim() == other.claim() == []
        for trial in [*first, *second]:
            one.optuna.tell(trial.number, 1.0)
        assert one.claim() == []
    with study_in(tmp_path, n_trials=4) as more:
        assert [trial.number for trial in more.claim(2)] == [3]


def test_no_trial_is_handed_out_after_the_time_is_up(tmp_path):
    with study_in(tmp_path, timeout=1) as study:
        study.deadline = time.time()
        assert study.claim() == []


def test_what_a_study_is_about_may_be_mended_until_something_came_of_it(tmp_path):
    with study_in(tmp_path, steps=1) as study:
        study.claim()  # and no more
    assert states(study) == ["WAITING"]
    with study_in(tmp_path, steps=2) as study:
        (trial,) = study.claim()
        study.optuna.tell(trial.number, 1.0)
    with pytest.raises(UserError, match="steps: 1 was requested, the study has 2"):
        study_in(tmp_path, steps=1)
    assert states(study_in(tmp_path, steps=2)) == ["COMPLETE"]


CLAIM_AND_DIE = """
import os, signal, sys
from pathlib import Path
from tests.search.test_study import study_in
study = study_in(Path(sys.argv[1])).__enter__()
study.claim(int(sys.argv[2]))
os.kill(os.getpid(), signal.SIGKILL)
"""


def claim_and_die(folder: Path, most: int = 1) -> None:
    died = subprocess.run(
        [sys.executable, "-c", CLAIM_AND_DIE, str(folder), str(most)], env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert died.returncode == -signal.SIGKILL


def test_a_trial_whose_process_died_is_taken_again_as_it_was(tmp_path):
    claim_and_die(tmp_path, most=2)
    with study_in(tmp_path) as study:
        before = [trial.params for trial in study.optuna.trials]
        assert states(study) == ["RUNNING", "RUNNING"]
        (first,) = study.claim(3)  # alone: it may be what kills
        assert (first.number, first.params) == (0, before[0])
        study.optuna.tell(first.number, 1.0)
        (second,) = study.claim(3)
        assert (second.number, second.params) == (1, before[1])


def test_a_trial_that_kills_every_process_is_given_up(tmp_path):
    for _ in range(MAX_DEATHS):
        claim_and_die(tmp_path)
    with study_in(tmp_path) as study:
        assert [trial.number for trial in study.claim()] == [1]
        assert states(study) == ["FAIL", "RUNNING"]
        assert study.optuna.trials[0].user_attrs["reason"] == f"its process died {MAX_DEATHS} times"


@pytest.mark.slow
def test_news_of_a_trial_gives_it_more_lives(tmp_path):
    for number in range(MAX_DEATHS + 2):
        claim_and_die(tmp_path)
        study = study_in(tmp_path)
        study.storage.set_trial_intermediate_value(study._id(0), number, 1.0)
    with study_in(tmp_path) as study:
        assert [trial.number for trial in study.claim()] == [0]


def test_a_job_that_did_not_end_its_trial_is_tried_once_more(tmp_path, caplog):
    with study_in(tmp_path, n_trials=1) as study:
        for attempt in range(MAX_JOB_DEATHS):
            trials = study.claim()
            study.settle(trials, "TerminatedWorkerError: of loky")
            assert states(study) == (["WAITING"] if attempt < MAX_JOB_DEATHS - 1 else ["FAIL"])
        assert study.claim() == []
        with pytest.raises(StudyFailure, match="its process died 2 times, TerminatedWorkerError: of loky"):
            study.best_or_failure()


def test_a_draw_depends_on_the_number_of_its_trial_not_on_who_draws_it(tmp_path):
    def draws(folder: Path, *counts: int) -> list[dict]:
        folder.mkdir()
        for n_trials in counts:
            with study_in(folder, n_trials) as study:
                while trials := study.claim():
                    study.optuna.tell(trials[0].number, 1.0)
        return [trial.params for trial in study.optuna.trials]

    straight = draws(tmp_path / "straight", 6)
    assert straight == draws(tmp_path / "in parts", 1, 2, 5, 6)
    assert len({params["train.beta2"] for params in straight}) == 6


@pytest.mark.parametrize("sampler", ["TPE", "Random", "CmaEs"])
def test_a_draw_that_was_cut_short_is_completed_as_it_would_have_been(tmp_path, sampler):
    space = {f"train.x{n}": FloatDistribution(0, 1) for n in range(4)}

    def draws(folder: Path, cut: bool) -> list[dict]:
        config = OptunaConfig(n_trials=4, sampler=sampler, n_startup_trials=2, storage=f"sqlite:///{folder}.db")
        samplers = lambda number: make_sampler(config, 1, number, space)  # noqa: E731
        nop = optuna.pruners.NopPruner()
        study = Study(config, space, samplers, nop, folder, lambda number: folder / str(number), fixed={})
        with study:
            for number in range(4):
                if cut:
                    study.optuna.sampler = samplers(number)
                    begun = study.optuna.ask()
                    for key in list(space)[:2]:
                        begun.suggest_float(key, 0, 1)
                (trial,) = study.claim()
                assert trial.number == number
                study.optuna.tell(number, sum(trial.params.values()))
        return [trial.params for trial in study.optuna.trials]

    with quiet_optuna():
        assert draws(tmp_path / "cut", cut=True) == draws(tmp_path / "straight", cut=False)


# ---------------------------------------------------------------------------------------------------------------------
# Who is alive


@pytest.fixture
def storage() -> optuna.storages.BaseStorage:
    return optuna.storages.InMemoryStorage()


def signed_by(folder: Path, storage) -> dict:
    """The attributes of a trial that another process signed, which was killed."""
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


def test_a_process_on_this_machine_is_known_to_be_dead_at_once(tmp_path, storage):
    attributes = signed_by(tmp_path, storage)
    with Worker(tmp_path, storage) as worker:
        assert worker.status(attributes, tmp_path / "0") == Status.DEAD
        assert worker.status({}, tmp_path / "0") == Status.DEAD


def test_one_on_another_machine_is_alive_while_it_gives_signs(tmp_path, storage):
    attributes = signed_by(tmp_path, storage)
    attributes[WORKER]["host"] = "elsewhere"
    with Worker(tmp_path, storage) as worker:
        assert worker.status(attributes, tmp_path / "0") == Status.ALIVE
        attributes[HEARTBEAT] = time.time() - DEAD_AFTER_SECONDS - 1
        assert worker.status(attributes, tmp_path / "0") == Status.DEAD


def test_a_process_sees_itself_and_its_neighbours_alive_and_leaves_nothing(tmp_path, storage):
    study = optuna.create_study(storage=storage)
    with Worker(tmp_path, storage) as one:
        one.acquire(study.ask()._trial_id)
        attributes = study.trials[0].user_attrs
        assert one.status(attributes, tmp_path / "0") == Status.ALIVE
        script = (
            "import sys, json, gpt2.search.lease as w; from pathlib import Path; t = w.Worker(Path(sys.argv[1]), None)"
        )
        script += "; print(t.status(json.loads(sys.argv[2]), Path('none')))"
        told = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path), json.dumps(attributes)],
            capture_output=True,
            text=True,
            cwd=ROOT,
        )
        assert told.stdout.strip() == "Status.ALIVE", told.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_job_that_has_outlived_its_sweeper_is_waited_for(tmp_path, storage):
    attributes = signed_by(tmp_path, storage)
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
