"""Handing out trials: exactly `n_trials`, to any number of processes, also if processes are killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from optuna.distributions import FloatDistribution

from gpt2.config import OptunaConfig
from gpt2.errors import UserError
from gpt2.search.algorithms import Algorithms
from gpt2.search.lease import WORKER
from gpt2.search.study import MAX_DEATHS, Study, StudyFailure
from tests.conftest import ROOT
from tests.search.test_lease import pid_of_a_dead_process

SPACE = {"train.beta2": FloatDistribution(0.9, 0.999)}


def study_in(folder: Path, n_trials: int = 3, timeout: int | None = None, **fixed: int) -> Study:
    storage = f"sqlite:///{folder}/study.db"
    config = OptunaConfig(n_trials=n_trials, storage=storage, timeout=timeout, sampler="random", pruner="none")
    return Study(config, SPACE, Algorithms(config, seed=1), lambda number: folder / str(number), fixed)


def states(study: Study) -> list[str]:
    return [trial.state.name for trial in study.optuna.trials]


def test_no_more_trials_are_handed_out_than_are_left(tmp_path):
    with study_in(tmp_path) as one, study_in(tmp_path) as other:
        first, second = one.claim(), other.claim(5)
        assert [trial.number for trial in [*first, *second]] == [0, 1, 2]
        assert one.claim() == other.claim() == []
        for trial in [*first, *second]:
            one.optuna.tell(trial.number, 1.0)
        assert one.claim() == []
    with study_in(tmp_path, n_trials=4) as more:
        assert [trial.number for trial in more.claim(2)] == [3]


def test_no_trial_is_handed_out_after_the_timeout(tmp_path):
    with study_in(tmp_path, timeout=1) as study:
        study.deadline = time.time()
        assert study.claim() == []


def test_settings_may_change_until_there_is_a_result(tmp_path):
    with study_in(tmp_path, steps=1) as study:
        study.claim()  # no more than one
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


def test_trial_of_a_killed_process_is_handed_out_again_with_its_parameters(tmp_path):
    claim_and_die(tmp_path, most=2)
    with study_in(tmp_path) as study:
        before = [trial.params for trial in study.optuna.trials]
        assert states(study) == ["RUNNING", "RUNNING"]
        (first,) = study.claim(3)  # alone, because it may be the cause of the kill
        assert (first.number, first.params) == (0, before[0])
        study.optuna.tell(first.number, 1.0)
        (second,) = study.claim(3)
        assert (second.number, second.params) == (1, before[1])


def kill_process_of_trial(folder: Path, times: int) -> None:
    """Claim the next trial with a worker that ends without a release, as after SIGKILL."""
    for _ in range(times):
        with study_in(folder) as study:
            (trial,) = study.claim()
            study.worker.trials.clear()  # the context does not requeue it
            attributes = study.optuna.trials[trial.number].user_attrs
            gone = attributes[WORKER] | {"pid": pid_of_a_dead_process()}
            study.storage.set_trial_user_attr(study._id(trial.number), WORKER, gone)


def test_trial_whose_process_always_dies_fails(tmp_path):
    kill_process_of_trial(tmp_path, MAX_DEATHS)
    with study_in(tmp_path) as study:
        assert [trial.number for trial in study.claim()] == [1]
        assert states(study) == ["FAIL", "RUNNING"]
        assert study.optuna.trials[0].user_attrs["reason"] == f"its process died {MAX_DEATHS} times"


def test_progress_of_a_trial_resets_the_count_of_deaths(tmp_path):
    for number in range(MAX_DEATHS + 2):
        kill_process_of_trial(tmp_path, 1)
        study = study_in(tmp_path)
        study.storage.set_trial_intermediate_value(study._id(0), number, 1.0)
    with study_in(tmp_path) as study:
        assert [trial.number for trial in study.claim()] == [0]


def test_trial_that_its_job_does_not_end_is_repeated_and_then_fails(tmp_path):
    with study_in(tmp_path, n_trials=1) as study:
        for attempt in range(MAX_DEATHS):
            trials = study.claim()
            study.settle(trials, "TerminatedWorkerError: of loky")
            assert states(study) == (["WAITING"] if attempt < MAX_DEATHS - 1 else ["FAIL"])
        assert study.claim() == []
        with pytest.raises(StudyFailure, match="its process died 3 times, TerminatedWorkerError: of loky"):
            study.best_or_failure()


def test_samples_depend_on_the_number_of_a_trial_not_on_the_process(tmp_path):
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
