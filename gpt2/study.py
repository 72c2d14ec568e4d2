"""A study that can be left alone: exactly its number of trials, whoever runs them and whatever happens to them.

`Study` hands trials out and `TrialUnderWay` is one of them as the process sees it that trains it; the two may be in
different processes and share nothing but the storage. A trial keeps its number, its parameters and its folder for life:
one that is interrupted goes back to WAITING, is taken again before any new one, and goes on from its checkpoint.

Knows neither Hydra nor W&B. What a trial's training is, is up to who runs it.
"""

import json
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
from typing import TYPE_CHECKING, Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, distribution_to_json
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState

from gpt2.config import Divergence, MachineError, OptunaConfig, UserError
from gpt2.failures import is_full_disk, is_out_of_memory, machine_error
from gpt2.interruption import Interrupted
from gpt2.storage import exclusive, open_storage
from gpt2.worker import Life, Worker

if TYPE_CHECKING:
    from gpt2.train import Trainer

log = logging.getLogger("study")  # beside those of the package, which Hydra configures anew for each trial

REASON, SPENT, DEATHS = "reason", "spent", "deaths"  # user attributes of a trial
FIXED = "fixed"  # user attribute of a study
# How often a process may die that has a trial, without news of it in between, until the trial is taken to be why: one
# that somebody started and may have killed, and one that a launcher started for this trial.
MOST_DEATHS, MOST_KILLS = 5, 2
STOPPED = [TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL]


class StudyFailure(UserError):
    """No trial gave a value."""

    exit_code = 1


@contextmanager
def optuna_is_quiet() -> Iterator[None]:
    """Leave it to this module to tell what happens."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(verbosity)


# ---------------------------------------------------------------------------------------------------------------------
# Handing trials out


class Study:
    """A study as one of the processes sees it that work on it; they do while they are in its context."""

    def __init__(
        self,
        config: OptunaConfig,
        space: dict[str, BaseDistribution],
        make_sampler: Callable[[int], optuna.samplers.BaseSampler],
        pruner: optuna.pruners.BasePruner,
        folder: Path,
        run_folder: Callable[[int], Path],
        fixed: dict[str, Any],
    ):
        """
        Args:
            space: By the key of a configuration.
            make_sampler: Given a number that is another one for each trial, seeds a sampler by it.
            folder: Of the study.
            run_folder: Of a trial, given its number.
            fixed: What all trials have in common. A study that has begun goes on only with the same.

        Raises:
            UserError: The storage cannot be opened, or holds a study of that name which is another one.
        """
        self.config, self.space, self.make_sampler = config, space, make_sampler
        self.folder, self.run_folder = folder, run_folder
        self.deadline = time.time() + (config.timeout or inf)
        self.storage = open_storage(config.storage)
        with exclusive(config.storage):
            self.optuna = optuna.create_study(
                storage=self.storage,
                study_name=config.study_name,
                direction=StudyDirection[config.direction.upper()],
                pruner=pruner,
                load_if_exists=True,
            )
            self._refuse_another(fixed)
        self.worker = Worker(folder, self.storage)
        self._mine = 0  # trials that ended here
        self._began = time.time()

    def _refuse_another(self, fixed: dict[str, Any]) -> None:
        """Remember what the study is about, or hold against it what it is said to be about."""
        config, known = self.config, self.optuna.user_attrs
        asked = {**{key: {"searched": _plain(distribution)} for key, distribution in self.space.items()}, **fixed}
        if FIXED not in known and not self.optuna.get_trials(deepcopy=False):
            self.optuna.set_user_attr(FIXED, asked)
        before = known.get(FIXED, asked)
        found = [
            f"{key}: {_shown(asked.get(key))} was asked for, the study has {_shown(before.get(key))}"
            for key in dict.fromkeys([*asked, *before])
            if asked.get(key) != before.get(key)
        ]
        if self.optuna.direction.name.lower() != config.direction:
            found.append(f"direction: the study is to {self.optuna.direction.name.lower()}")
        if found:
            found.append(f"study_name: {config.study_name} has begun otherwise; give this study a name of its own")
            raise UserError(*found)

    def __enter__(self) -> "Study":
        self.worker.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.worker.__exit__(*error)

    def claim(self, most: int = 1) -> list[Trial]:
        """The next trials, at most so many; none if all are done or under way, or the time is up."""
        while time.time() < self.deadline:
            with exclusive(self.config.storage):
                has_orphans = self._put_back_what_is_dead()
                taken: list[Trial] = []
                while len(taken) < most and len(self._trials(TrialState.RUNNING, *STOPPED)) < self.config.n_trials:
                    taken.append(self._ask())
                    if self._trial(taken[0].number).user_attrs.get(DEATHS):  # alone: it may be what kills
                        break
            if taken or not has_orphans:
                return taken
            time.sleep(1)
        return []

    def _ask(self) -> Trial:
        """A trial that waits, or else a new one. Its draw depends on its number and what is known by then, not on when
        this process began: resumed, a sampler that is seeded once would repeat itself (Optuna's issue 3255)."""
        self.optuna.sampler = self.make_sampler(len(self._trials()))
        trial = self.optuna.ask(self.space)
        self.worker.takes(self._id(trial.number))
        return trial

    def _put_back_what_is_dead(self) -> bool:
        """Have the trials wait that nobody works on any more. Whether others will soon be of that kind."""
        has_orphans = False
        for trial in self._trials(TrialState.RUNNING):
            life = self.worker.sees(trial.user_attrs, self.run_folder(trial.number))
            has_orphans |= life == Life.ORPHANED
            if life == Life.DEAD:
                self._put_back(trial)
        return has_orphans

    def _put_back(self, trial: FrozenTrial, most_deaths: int = MOST_DEATHS, problem: str | None = None) -> None:
        """Have a trial wait whose process died, unless that happens to it time and again."""
        news = len(trial.intermediate_values)
        deaths, news_before = trial.user_attrs.get(DEATHS, (0, 0))
        deaths = deaths + 1 if news == news_before else 1
        trial_id = self._id(trial.number)
        self.storage.set_trial_user_attr(trial_id, DEATHS, (deaths, news))
        if deaths < most_deaths:
            self.storage.set_trial_state_values(trial_id, TrialState.WAITING)
        else:
            self.storage.set_trial_user_attr(
                trial_id, REASON, f"its process died {deaths} times" + (f", {problem}" if problem else "")
            )
            self.storage.set_trial_state_values(trial_id, TrialState.FAIL)

    def settle(self, trials: list[Trial], problem: str | None = None) -> None:
        """See what has become of trials that were handed out here, and tell it; put back those that nobody ended.

        Args:
            problem: What may be the reason for that.
        """
        with exclusive(self.config.storage):
            for trial in trials:
                self.worker.trials.discard(self._id(trial.number))
                now = self._trial(trial.number)
                if now.state == TrialState.RUNNING:
                    self._put_back(now, MOST_KILLS, problem)
        for trial in trials:
            now = self._trial(trial.number)
            self._mine += now.state.is_finished()
            log.info("%s", self.line(now))

    # What it knows

    def _trials(self, *states: TrialState) -> list[FrozenTrial]:
        return self.optuna.get_trials(deepcopy=False, states=states or None)

    def _trial(self, number: int) -> FrozenTrial:
        return self.storage.get_trial(self._id(number))

    def _id(self, number: int) -> int:
        study = self.storage.get_study_id_from_name(self.config.study_name)
        return self.storage.get_trial_id_from_study_id_trial_number(study, number)

    def done(self) -> list[FrozenTrial]:
        return self._trials(*STOPPED)

    def shown_space(self, separator: str) -> str:
        return separator.join(
            _shown({"searched": _plain(distribution)}, key) for key, distribution in self.space.items()
        )

    def best(self) -> FrozenTrial | None:
        return best_of(self.optuna)

    def best_or_failure(self) -> FrozenTrial:
        """
        Raises:
            StudyFailure: No trial gave a value.
        """
        if best := self.best():
            return best
        done = self.done()
        if not done:
            raise StudyFailure(f"study {self.config.study_name}: no trial was finished in the time that it had")
        reasons = {trial.user_attrs.get(REASON, "unknown"): trial.number for trial in reversed(done)}
        told = "; ".join(f"trial {number}: {reason}" for reason, number in list(reversed(reasons.items()))[:3])
        raise StudyFailure(f"study {self.config.study_name}: none of its {len(done)} trials gave a value ({told})")

    def line(self, trial: FrozenTrial) -> str:
        """A trial in a line: how it ended, against the best, with which parameters."""
        best, done = self.best(), len(self.done())
        against = f"best {best.value:.4f} (trial {best.number})" if best else "none complete so far"
        if best and best.number == trial.number:
            against = "the best so far"
        seconds = trial.user_attrs.get(SPENT, {}).get("seconds")
        left = self.config.n_trials - done
        clock = [] if seconds is None else [f"{seconds:,.0f} s"]
        if left > 0 and self._mine:
            clock.append(f"{_clock((time.time() - self._began) / self._mine * left)} left")
        reason = f"  ({trial.user_attrs[REASON]})" if trial.user_attrs.get(REASON) else ""
        return "  ".join(
            [
                f"trial {trial.number:>3} {shown_state(trial):<11} {shown_value(trial)}",
                f"{against:<26}",
                shown_parameters(trial),
                ", ".join(clock) + reason,
            ]
        )


def best_of(study: optuna.Study) -> FrozenTrial | None:
    """The complete trial with the best value; the first of them where there are several."""
    return study.best_trial if study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)) else None


def shown_state(trial: FrozenTrial) -> str:
    return {TrialState.FAIL: "failed", TrialState.WAITING: "interrupted"}.get(trial.state, trial.state.name.lower())


def shown_value(trial: FrozenTrial) -> str:
    """A value, and for a pruned trial after how many evaluations."""
    value = "     -" if trial.value is None else f"{trial.value:.4f}"
    return f"{value} at {len(trial.intermediate_values)}" if trial.state == TrialState.PRUNED else value


def shown_parameters(trial: FrozenTrial) -> str:
    """Without the group in front of each, and in four digits."""
    values = {key.rpartition(".")[2]: value for key, value in trial.params.items()}
    return " ".join(
        f"{key}={value:.3g}" if isinstance(value, float) else f"{key}={value}" for key, value in values.items()
    )


def _plain(distribution: BaseDistribution) -> dict[str, Any]:
    return json.loads(distribution_to_json(distribution))["attributes"]


def _shown(value: Any, key: str = "a search") -> str:
    if not isinstance(value, dict) or "searched" not in value:
        return "nothing" if value is None else str(value)
    space = value["searched"]
    if "choices" in space:
        return f"{key} of {', '.join(map(str, space['choices']))}"
    return f"{key} from {space['low']:g} to {space['high']:g}{' (log)' if space['log'] else ''}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def seed_of_trial(seed: int, number: int) -> int:
    """Of 32 bits, another one for each trial."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])


# ---------------------------------------------------------------------------------------------------------------------
# Running one


class Ending(Enum):
    """How a trial ended, as a reader wants to know it."""

    COMPLETE = "complete"
    PRUNED = "pruned"
    DIVERGED = "diverged"
    OUT_OF_MEMORY = "out of memory"
    PAST_ITS_TIME = "past its time"
    FAILED = "failed"
    INTERRUPTED = "interrupted"

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


class TrialUnderWay:
    """A trial, in the process that trains it."""

    def __init__(
        self,
        number: int,
        storage: optuna.storages.BaseStorage,
        config: OptunaConfig,
        pruner: optuna.pruners.BasePruner,
        checkpoints: Callable[[int], Path],
        deadline: float = inf,
        ends_with_parent: bool = False,
    ):
        """
        Args:
            checkpoints: The folder of a trial, given its number, that is needed no more when it has ended.
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
        self._is_past_its_time = False
        self._spent: dict[str, float] = {}

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
            outcome = self._of_error(error)
            raise
        finally:
            trainer.tracker.ended(outcome.ending.value, has_failed=outcome.ending == Ending.FAILED)

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
            if self.is_orphaned():
                trainer.interrupt(SIGTERM)
            elif time.time() >= end:
                self._is_past_its_time = own <= self.deadline
                trainer.interrupt(SIGALRM)
                end = time.time() + 0.2  # once more, should training only just begin

    def _report(self, trainer: "Trainer") -> None:
        """Tell the study of an evaluation, and end a trial that is behind; never at its last step."""
        step = trainer.progress.step
        self._tell_evaluation(trainer)
        if step < trainer.total_steps and self.trial.should_prune():
            raise optuna.TrialPruned(f"behind other trials at step {step:,}")

    def _tell_evaluation(self, trainer: "Trainer") -> None:
        """Numbered from 0, as Optuna's pruners want it: an evaluation has the same number in a run that was resumed."""
        number = (trainer.progress.evaluated_at - 1) // trainer.config.eval_every
        loss = trainer.progress.val_loss
        if loss is not None and number not in self.storage.get_trial(self.trial_id).intermediate_values:
            self.trial.report(loss, number)

    # When it ends

    def run(self, train: Callable[[], float | None]) -> Outcome:
        """Train, and tell the study how it went."""
        if self.storage.get_trial(self.trial_id).state.is_finished():  # by a process that was taken to be dead
            return Outcome(Ending.INTERRUPTED, "finished elsewhere")
        try:
            outcome = self._of_value(train())
        except BaseException as error:  # noqa: BLE001  # whatever it is, the study goes on
            outcome = self._of_error(error)
            if outcome.ending == Ending.FAILED:
                outcome.traceback = traceback.format_exc()
        from gpt2.device import free_memory  # here, for it brings torch

        free_memory()
        self._tell(outcome)
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
        if isinstance(error, Divergence):
            return Outcome(Ending.DIVERGED, text.partition(";")[0])  # without its advice for a single run
        if isinstance(error, Interrupted) and self._is_past_its_time:
            return Outcome(Ending.PAST_ITS_TIME, f"past its time, {self.config.trial_timeout} s")
        if isinstance(error, Interrupted) and error.code == Interrupted.by(SIGALRM).code:
            return Outcome(Ending.INTERRUPTED, "the study's time is up")
        if isinstance(error, Interrupted | KeyboardInterrupt):
            return Outcome(Ending.INTERRUPTED, "asked to end", stops_study=error)
        if is_full_disk(error):  # no other trial would find more
            told = MachineError(f"{machine_error(error)}; make room, and the same command goes on")
            return Outcome(Ending.INTERRUPTED, "no room on the disk", stops_study=told)
        if is_out_of_memory(error):
            return Outcome(Ending.OUT_OF_MEMORY, machine_error(error))
        return Outcome(Ending.FAILED, f"{type(error).__name__}: {text}")

    def _tell(self, outcome: Outcome) -> None:
        storage, state = self.storage, outcome.ending.state
        with exclusive(self.config.storage):
            if storage.get_trial(self.trial_id).state != TrialState.RUNNING:
                log.warning("Trial %s was ended by another process meanwhile", self.number)
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
            if best is None or trial.number != best.number:
                shutil.rmtree(self.checkpoints(trial.number), ignore_errors=True)
