"""One trial of a study, in the process that trains it: what it tells the study, when it is cut short, how it ended."""

import logging
import os
import shutil
import threading
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
from typing import TYPE_CHECKING

import optuna
from optuna.trial import FrozenTrial, Trial, TrialState

from gpt2.config import OptunaConfig
from gpt2.errors import DivergenceError, ResourceError, UserError, is_full_disk, is_out_of_memory, machine_error
from gpt2.runtime.files import LOCK, is_locked
from gpt2.runtime.signals import Interrupted
from gpt2.search.lease import WORKER
from gpt2.search.storage import FAILURES, exclusive, failures_in_a_line
from gpt2.tracking import tracker as tracking
from gpt2.tracking.tracker import FINISHED, Ended

if TYPE_CHECKING:
    from gpt2.train import Trainer

log = logging.getLogger(__name__)

REASON, SPENT, DEATHS = "reason", "spent", "deaths"  # user attributes of a trial
JUDGED = (TrialState.COMPLETE, TrialState.PRUNED)
STOPPED = (*JUDGED, TrialState.FAIL)


@contextmanager
def optuna_is_quiet() -> Iterator[None]:
    """Leave it to us to tell what happens."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(verbosity)


def best_of(study: optuna.Study) -> FrozenTrial | None:
    """The complete trial with the best value; the first of them where there are several."""
    return study.best_trial if study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)) else None


class Ending(Enum):
    """How a trial ended, as a reader wants to know it."""

    COMPLETE = "complete"
    PRUNED = tracking.PRUNED
    DIVERGED = tracking.DIVERGED
    OUT_OF_MEMORY = tracking.OUT_OF_MEMORY
    PAST_ITS_TIME = tracking.PAST_ITS_TIME
    FAILED = tracking.FAILED
    INTERRUPTED = tracking.INTERRUPTED

    @property
    def state(self) -> TrialState:
        """What the sampler is told: PRUNED of all that the parameters are to blame for. Of a FAIL it learns nothing."""
        states = {
            Ending.COMPLETE: TrialState.COMPLETE,
            Ending.FAILED: TrialState.FAIL,
            Ending.INTERRUPTED: TrialState.WAITING,
        }
        return states.get(self, TrialState.PRUNED)


@dataclass
class Outcome:
    ending: Ending
    reason: str | None = None
    value: float | None = None
    stops_study: BaseException | None = None  # why no other trial should begin
    traceback: str | None = None

    def ended(self, signal: int) -> Ended:
        """The same as a run by itself has it."""
        codes = {Ending.DIVERGED: 3, Ending.OUT_OF_MEMORY: 1, Ending.FAILED: 1, Ending.INTERRUPTED: 128 + signal}
        state = FINISHED if self.ending == Ending.COMPLETE else self.ending.value
        return Ended(state, codes.get(self.ending, 0), self.reason)


class RunningTrial:
    """A trial, in the process that trains it."""

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
            checkpoints: The folder of a trial, given its number, that is needed no more when it has ended.
            claim: What `Worker.acquire` returned when the trial was taken for this process.
            deadline: When the study has to end, in seconds since 1970.
            ends_with_parent: Whether this process is to save and leave when the one that started it is gone.
        """
        self.number, self.config, self.checkpoints, self.deadline = number, config, checkpoints, deadline
        self.parent = os.getppid() if ends_with_parent else None
        self.storage = storage
        # The sampler is not asked; a GridSampler would take another cell.
        self.study = optuna.load_study(
            study_name=config.study_name, storage=self.storage, sampler=optuna.samplers.RandomSampler(), pruner=pruner
        )
        study_id = self.storage.get_study_id_from_name(config.study_name)
        self.trial_id = self.storage.get_trial_id_from_study_id_trial_number(study_id, number)
        self.trial = Trial(self.study, self.trial_id)
        self.claim = claim
        self._is_past_its_time = False
        self._signal: int | None = None  # by which somebody asked this process to end
        self._spent: dict[str, float] = {}

    def is_ours(self) -> bool:
        """Whether the trial is under way, and nobody has taken it again since."""
        trial = self.storage.get_trial(self.trial_id)
        who = trial.user_attrs.get(WORKER)  # None: left to whoever works on it
        return trial.state == TrialState.RUNNING and (who is None or who["claim"] == self.claim)

    def goes_on(self) -> bool:
        """Whether it began once, and was interrupted."""
        return not {REASON, DEATHS}.isdisjoint(self.storage.get_trial(self.trial_id).user_attrs)

    def is_orphaned(self) -> bool:
        return self.parent not in (None, os.getppid())

    # While it trains

    def train(self, trainer: "Trainer") -> float | None:
        """Have a trainer train, and its tracker know how the trial ended. Returns the lowest validation loss.

        Raises:
            optuna.TrialPruned: Other trials are better.
            Interrupted: It was asked to end, or its time is up.
            Exception: What else ended it.
        """
        outcome = Outcome(Ending.FAILED)
        try:
            with self._watched(trainer):
                trainer.train()
            if trainer.interrupted_by:
                raise Interrupted.by(trainer.interrupted_by)
            outcome = self._of_value(trainer.progress.best_val_loss)
            return outcome.value
        except BaseException as error:
            if trainer.interrupted_by not in (None, SIGALRM):
                self._signal = trainer.interrupted_by
            outcome = self._of_error(error)
            raise
        finally:
            trainer.tracker.ended(outcome.ended(trainer.interrupted_by or SIGTERM))

    @contextmanager
    def _watched(self, trainer: "Trainer") -> Iterator[None]:
        """Hear of a trainer's evaluations, and have it end in time."""
        trainer.on_evaluation = self._report
        trainer.label = f"trial {self.number} of {self.config.n_trials}"
        self._tell_evaluation(trainer)  # of one that goes on: its process may have died just before it could tell
        is_over = threading.Event()
        clock = threading.Thread(target=self._end_in_time, args=(trainer, is_over), daemon=True)
        clock.start()
        try:
            yield
        finally:
            is_over.set()
            clock.join()
            progress = trainer.progress
            self._spent = {"steps": progress.step, "tokens": progress.tokens, "seconds": round(progress.seconds, 3)}
            trainer.on_evaluation = None

    def _end_in_time(self, trainer: "Trainer", is_over: threading.Event) -> None:
        own = time.time() + (self.config.trial_timeout or inf) - trainer.progress.seconds
        end = min(own, self.deadline)
        while not is_over.wait(max(0.0, min(end - time.time(), 1.0))):
            if trainer.interrupted_by not in (None, SIGALRM):  # by somebody, which counts more
                continue
            if self.is_orphaned():
                trainer.interrupt(SIGTERM)
            elif time.time() >= end:
                self._is_past_its_time = own <= self.deadline
                trainer.interrupt(SIGALRM)
                end = time.time() + 0.2  # once more, should training only just begin

    def _report(self, trainer: "Trainer") -> None:
        """Tell the study of an evaluation, and end a trial that is behind; never at its last step."""
        step, is_news = trainer.progress.step, self._tell_evaluation(trainer)
        if is_news and step < trainer.total_steps and self.trial.should_prune():
            raise optuna.TrialPruned(f"behind other trials at step {step:,}")

    def _tell_evaluation(self, trainer: "Trainer") -> bool:
        """Numbered from 0, as Optuna's pruners want it. Whether it is news: a run that goes on repeats evaluations."""
        number = (trainer.progress.evaluated_at - 1) // trainer.config.eval_every
        loss = trainer.progress.val_loss
        if loss is None or number in self.storage.get_trial(self.trial_id).intermediate_values:
            return False
        self.trial.report(loss, number)
        return True

    # When it ends

    def run(self, train: Callable[[], float | None]) -> Outcome:
        """Train, and tell the study how it went."""
        if not self.is_ours():  # this process came late, and was taken to be dead
            return Outcome(Ending.INTERRUPTED, "taken by another process")
        try:
            outcome = self._of_value(train())
        except BaseException as error:  # noqa: BLE001  # whatever it is, the study goes on
            outcome = self._of_error(error)
            if outcome.ending == Ending.FAILED:
                outcome.traceback = traceback.format_exc()
        if self._signal is not None:  # however the trial ended in that moment
            outcome.stops_study = Interrupted.by(self._signal)
        from gpt2.runtime.device import free_memory  # here, for it brings torch

        free_memory()
        try:
            with failures_in_a_line(self.config.storage):
                self._tell(outcome)
        except ResourceError as error:
            outcome = Outcome(Ending.INTERRUPTED, "the study cannot be told", stops_study=error)
        return outcome

    def _of_value(self, value: float | None) -> Outcome:
        if value is None or not isfinite(value):
            return Outcome(Ending.FAILED, f"it gave {value}, which is no validation loss")
        return Outcome(Ending.COMPLETE, value=value)

    def _of_error(self, error: BaseException) -> Outcome:
        """What an exception that ended a training means to the study."""
        text = " ".join(str(error).split())
        if isinstance(error, optuna.TrialPruned):
            return Outcome(Ending.PRUNED, text)
        if isinstance(error, DivergenceError):
            return Outcome(Ending.DIVERGED, text.partition(";")[0])  # without its advice for a single run
        if isinstance(error, Interrupted) and error.code == Interrupted.by(SIGALRM).code:
            if self._is_past_its_time:
                return Outcome(Ending.PAST_ITS_TIME, f"past its time, {self.config.trial_timeout} s")
            return Outcome(Ending.INTERRUPTED, "the study's time is up")
        if isinstance(error, Interrupted | KeyboardInterrupt):
            return Outcome(Ending.INTERRUPTED, "asked to end", stops_study=error)
        if is_full_disk(error):  # no other trial would find more
            told = ResourceError(f"{machine_error(error)}; make room, and the same command goes on")
            return Outcome(Ending.INTERRUPTED, "no room on the disk", stops_study=told)
        if isinstance(error, FAILURES):
            return Outcome(Ending.INTERRUPTED, "the storage is out of reach")
        if is_out_of_memory(error):
            return Outcome(Ending.OUT_OF_MEMORY, machine_error(error))
        if isinstance(error, UserError) and not self.study.get_trials(deepcopy=False, states=JUDGED):
            return Outcome(Ending.INTERRUPTED, text, stops_study=error)  # no trial got by it: a device, data, a file
        return Outcome(Ending.FAILED, f"{type(error).__name__}: {text}")

    def _tell(self, outcome: Outcome) -> None:
        storage, state = self.storage, outcome.ending.state
        with exclusive(self.config.storage):
            if not self.is_ours():
                log.warning("Trial %s was taken by another process meanwhile", self.number)
                return
            storage.set_trial_user_attr(self.trial_id, REASON, outcome.reason)  # None too: it may have had one before
            if outcome.traceback:
                storage.set_trial_user_attr(self.trial_id, "traceback", outcome.traceback)
            if self._spent:
                storage.set_trial_user_attr(self.trial_id, SPENT, self._spent)
            if state == TrialState.WAITING:
                storage.set_trial_state_values(self.trial_id, state)
                return
            self.study.tell(self.number, outcome.value, state)
            if self.config.keep == "best":
                self._remove_what_is_not_best()

    def _remove_what_is_not_best(self) -> None:
        best = best_of(self.study)
        for trial in self.study.get_trials(deepcopy=False, states=STOPPED):
            folder = self.checkpoints(trial.number)
            if (best is None or trial.number != best.number) and not is_locked(folder.parent / LOCK):
                shutil.rmtree(folder, ignore_errors=True)
