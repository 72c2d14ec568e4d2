"""A trial in the process that trains it: reports, pruning, time limits, outcome."""

import logging
import os
import shutil
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from math import inf, isfinite
from pathlib import Path
from signal import SIGALRM, SIGTERM
from typing import Any

import optuna
from optuna.trial import FrozenTrial, Trial, TrialState

from gpt2.config import OptunaConfig
from gpt2.errors import (
    DivergenceError,
    ResourceError,
    UserError,
    is_full_disk,
    is_out_of_memory,
    machine_error,
    one_line,
    without_password,
)
from gpt2.runtime.files import LOCK, is_locked
from gpt2.runtime.signals import Interrupted
from gpt2.search.lease import WORKER
from gpt2.search.storage import FAILURES, exclusive, storage_errors
from gpt2.tracking import tracker as tracking
from gpt2.tracking.tracker import Ended, Tracker
from gpt2.training.callbacks import Callback, Metrics, seconds_left

log = logging.getLogger(__name__)

REASON, SPENT, DEATHS = "reason", "spent", "deaths"  # user attributes of a trial
WITH_VALUE = (TrialState.COMPLETE, TrialState.PRUNED)
DONE = (*WITH_VALUE, TrialState.FAIL)


@contextmanager
def quiet_optuna() -> Iterator[None]:
    """Silence Optuna's own log lines and its warnings about experimental features."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(verbosity)


def best_of(study: optuna.Study) -> FrozenTrial | None:
    """Return the complete trial with the best value; None without a complete trial."""
    return study.best_trial if study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)) else None


class Ending(Enum):
    """How a trial ended: the state of its run, its state in Optuna, and the exit code that a single run would have.

    Endings caused by the parameters are PRUNED in Optuna, because samplers ignore trials in the state FAIL.
    """

    COMPLETE = tracking.FINISHED, TrialState.COMPLETE, 0
    PRUNED = tracking.PRUNED, TrialState.PRUNED, 0
    DIVERGED = tracking.DIVERGED, TrialState.PRUNED, DivergenceError.exit_code
    OUT_OF_MEMORY = tracking.OUT_OF_MEMORY, TrialState.PRUNED, 1
    TIMED_OUT = tracking.PAST_ITS_TIME, TrialState.PRUNED, 0
    FAILED = tracking.FAILED, TrialState.FAIL, 1
    INTERRUPTED = tracking.INTERRUPTED, TrialState.WAITING, 128

    def __init__(self, run_state: str, state: TrialState, exit_code: int):
        self.run_state, self.state, self.exit_code = run_state, state, exit_code


@dataclass
class Outcome:
    ending: Ending
    reason: str | None = None
    value: float | None = None
    stops_study: BaseException | None = None  # raised after this trial, so that no other starts
    traceback: str | None = None


class RunningTrial(Callback):
    """A trial that this process trains. As a callback of the Trainer, it reports evaluations and ends the training."""

    def __init__(
        self,
        number: int,
        storage: optuna.storages.BaseStorage,
        config: OptunaConfig,
        pruner: optuna.pruners.BasePruner,
        checkpoints: Callable[[int], Path],
        claim: str,
        deadline: float = inf,
        ends_with_parent: bool = False,
    ):
        """
        Args:
            checkpoints: The checkpoint folder of a trial, given its number.
            claim: The result of `Worker.acquire` when the trial was claimed for this process.
            deadline: The end of the study in seconds since 1970.
            ends_with_parent: Save and end when the parent process has ended.
        """
        self.number, self.config, self.checkpoints, self.deadline = number, config, checkpoints, deadline
        self.parent = os.getppid() if ends_with_parent else None
        self.storage, self.claim = storage, claim
        # Not used, because the parameters are sampled already. A GridSampler would reserve a grid point here.
        sampler = optuna.samplers.RandomSampler()
        self.study = optuna.load_study(study_name=config.study_name, storage=storage, sampler=sampler, pruner=pruner)
        study_id = storage.get_study_id_from_name(config.study_name)
        self.trial_id = storage.get_trial_id_from_study_id_trial_number(study_id, number)
        self.trial = Trial(self.study, self.trial_id)
        self.tracker: Tracker | None = None  # if it is set, it gets the outcome of the trial
        self._timed_out = False  # whether `trial_timeout` ended it, and not the deadline
        self._interrupted_by: int | None = None  # a signal; SIGALRM for both time limits
        self._spent: dict[str, float] = {}

    def is_ours(self) -> bool:
        """Whether the trial is running and no other process has claimed it."""
        trial = self.storage.get_trial(self.trial_id)
        worker = trial.user_attrs.get(WORKER)  # None: the claim was released, and this process may continue
        return trial.state == TrialState.RUNNING and (worker is None or worker["claim"] == self.claim)

    def was_interrupted(self) -> bool:
        """Whether an earlier process started this trial."""
        return not {REASON, DEATHS}.isdisjoint(self.storage.get_trial(self.trial_id).user_attrs)

    @property
    def label(self) -> str:
        """The beginning of each progress line."""
        return f"trial {self.number} of {self.config.n_trials}"

    def is_orphaned(self) -> bool:
        return self.parent not in (None, os.getppid())

    # ------------------------------------------------------------------------------------------------------------------
    # While it trains

    def on_train_start(self, trainer: Any) -> None:
        self._report(trainer)  # an earlier process may have died after its evaluation and before the report

    def on_step_end(self, trainer: Any) -> None:
        """Interrupt the training at a time limit, or when the parent process has ended."""
        if trainer.interrupted_by is not None:
            return
        if self.is_orphaned():
            trainer.interrupt(SIGTERM)
        elif time.time() >= self.deadline:
            trainer.interrupt(SIGALRM)
        elif trainer.throughput.seconds >= (self.config.trial_timeout or inf):
            self._timed_out = True
            trainer.interrupt(SIGALRM)

    def on_validation_batch(self, trainer: Any, batch: int, batches: int) -> None:
        self.on_step_end(trainer)

    def on_evaluation_end(self, trainer: Any, metrics: Metrics) -> None:
        """Report the evaluation, and prune the trial if it is worse than others, except at its last step.

        Raises:
            optuna.TrialPruned: The trial is pruned.
        """
        step = trainer.progress.step
        if self._report(trainer) and step < trainer.total_steps and self.trial.should_prune():
            raise optuna.TrialPruned(f"behind other trials at step {step:,}")

    def on_train_end(self, trainer: Any) -> None:
        self._end(trainer, self._outcome(trainer.progress.best_val_loss, trainer.interrupted_by))

    def on_exception(self, trainer: Any, error: BaseException) -> None:
        self._end(trainer, self._outcome_of_error(error))

    def _report(self, trainer: Any) -> bool:
        """Report the newest evaluation, counted from 0. Return False if it was reported before."""
        number = (trainer.progress.evaluated_at - 1) // trainer.config.eval_every
        loss = trainer.progress.val_loss
        if loss is None or number in self.storage.get_trial(self.trial_id).intermediate_values:
            return False
        self.trial.report(loss, number)
        return True

    def _end(self, trainer: Any, outcome: Outcome) -> None:
        progress = trainer.progress
        self._interrupted_by = trainer.interrupted_by
        self._spent = {"steps": progress.step, "tokens": progress.tokens, "seconds": round(progress.seconds, 3)}
        if outcome.ending == Ending.PRUNED:
            left = max(0.0, seconds_left(trainer)) / (progress.seconds or 1)  # relative to the time so far
            self._spent["tokens_saved"] = round(left * progress.tokens)
        code = outcome.ending.exit_code
        if outcome.ending == Ending.INTERRUPTED:
            code += trainer.interrupted_by or SIGTERM
        if self.tracker:
            self.tracker.outcome = Ended(outcome.ending.run_state, code, outcome.reason)

    # ------------------------------------------------------------------------------------------------------------------
    # When it ends

    def run(self, train: Callable[[], float | None]) -> Outcome:
        """Train, and report the outcome to the study.

        Args:
            train: Returns the lowest validation loss; its Trainer has this trial as a callback.
        """
        if not self.is_ours():  # this process was considered dead
            return Outcome(Ending.INTERRUPTED, "claimed by another process")
        try:
            outcome = self._outcome(train(), self._interrupted_by)
        except BaseException as error:  # noqa: BLE001  # one trial does not end the study
            outcome = self._outcome_of_error(error)
            if outcome.ending == Ending.FAILED:
                outcome.traceback = without_password(traceback.format_exc())
        if self._interrupted_by not in (None, SIGALRM):  # even if the trial was complete when the signal came
            outcome.stops_study = Interrupted.by(self._interrupted_by)
        from gpt2.runtime.device import free_memory  # here, because it imports torch

        free_memory()
        try:
            with storage_errors(self.config.storage):
                self._tell(outcome)
        except ResourceError as error:
            outcome = Outcome(Ending.INTERRUPTED, "the storage is out of reach", stops_study=error)
        return outcome

    def _outcome(self, value: float | None, interrupted_by: int | None) -> Outcome:
        if interrupted_by:
            return self._outcome_of_error(Interrupted.by(interrupted_by))
        if value is None or not isfinite(value):
            return Outcome(Ending.FAILED, f"its validation loss is {value}")
        return Outcome(Ending.COMPLETE, value=value)

    def _outcome_of_error(self, error: BaseException) -> Outcome:
        """The outcome of a training that an exception ended."""
        text = one_line(error)
        if isinstance(error, optuna.TrialPruned):
            return Outcome(Ending.PRUNED, text)
        if isinstance(error, DivergenceError):
            return Outcome(Ending.DIVERGED, text.partition(";")[0])  # without the advice, which is for a single run
        if isinstance(error, Interrupted) and error.code == Interrupted.by(SIGALRM).code:
            if self._timed_out:
                return Outcome(Ending.TIMED_OUT, f"longer than trial_timeout={self.config.trial_timeout} seconds")
            return Outcome(Ending.INTERRUPTED, "the timeout of the study is over")
        if isinstance(error, Interrupted | KeyboardInterrupt):
            return Outcome(Ending.INTERRUPTED, "interrupted", stops_study=error)
        if is_full_disk(error):  # other trials would fail as well
            full = ResourceError(f"{machine_error(error)}; make room and resume with the same command")
            return Outcome(Ending.INTERRUPTED, "the disk is full", stops_study=full)
        if isinstance(error, FAILURES):
            return Outcome(Ending.INTERRUPTED, "the storage is out of reach")
        if is_out_of_memory(error):
            return Outcome(Ending.OUT_OF_MEMORY, machine_error(error))
        if isinstance(error, UserError) and not self.study.get_trials(deepcopy=False, states=WITH_VALUE):
            return Outcome(Ending.INTERRUPTED, text, stops_study=error)  # all trials need the same device, data, files
        return Outcome(Ending.FAILED, f"{type(error).__name__}: {text}")

    def _tell(self, outcome: Outcome) -> None:
        storage, state = self.storage, outcome.ending.state
        with exclusive(self.config.storage):
            if not self.is_ours():
                log.warning("Trial %s has been claimed by another process", self.number)
                return
            storage.set_trial_user_attr(self.trial_id, REASON, outcome.reason)  # None overwrites an earlier reason
            if outcome.traceback:
                storage.set_trial_user_attr(self.trial_id, "traceback", outcome.traceback)
            if self._spent:
                storage.set_trial_user_attr(self.trial_id, SPENT, self._spent)
            if state == TrialState.WAITING:
                storage.set_trial_state_values(self.trial_id, state)
                return
            self.study.tell(self.number, outcome.value, state)
            if self.config.keep == "best":
                self._remove_checkpoints()

    def _remove_checkpoints(self) -> None:
        """Remove the checkpoints of all trials that are done, except those of the best one."""
        best = best_of(self.study)
        for trial in self.study.get_trials(deepcopy=False, states=DONE):
            folder = self.checkpoints(trial.number)
            if (best is None or trial.number != best.number) and not is_locked(folder.parent / LOCK):
                shutil.rmtree(folder, ignore_errors=True)
