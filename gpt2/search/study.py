"""A study that any number of processes share. It runs exactly its number of trials, even if processes are killed.

`Study` claims trials; `gpt2.search.trial.RunningTrial` trains one of them, possibly in another process that shares only
the storage. An interrupted trial keeps its number, its parameters and its folder: it becomes WAITING, is claimed before
any new trial, and resumes from its checkpoint.
"""

import logging
import time
from collections.abc import Callable
from math import inf
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState

from gpt2.config import OptunaConfig
from gpt2.errors import UserError, counted
from gpt2.runtime.console import time_left
from gpt2.runtime.files import LOCK, is_locked
from gpt2.search.algorithms import Algorithms, Space
from gpt2.search.lease import Status, Worker, status
from gpt2.search.storage import exclusive, open_storage
from gpt2.search.trial import DEATHS, DONE, REASON, SPENT, best_of

log = logging.getLogger("study")  # not below the logger `gpt2`, which Hydra configures again for each trial

FIXED = "fixed"  # user attribute of a study: the settings that all trials share
MAX_DEATHS = 3  # a trial fails when this many processes have died in it without an evaluation in between


class StudyFailure(UserError):
    """No trial has a value."""

    exit_code = 1


class Study:
    """A study in one of the processes that work on it. Call `claim` and `settle` only inside its context."""

    def __init__(
        self,
        config: OptunaConfig,
        space: Space,
        algorithms: Algorithms,
        run_folder: Callable[[int], Path],
        fixed: dict[str, Any],
    ):
        """
        Args:
            space: The distributions by key of the configuration.
            run_folder: The run folder of a trial, given its number.
            fixed: The settings that all trials share. A study cannot be resumed with other settings.

        Raises:
            UserError: The storage cannot be opened, or has a study of that name with another space or other settings.
        """
        self.config, self.space, self.algorithms, self.run_folder = config, space, algorithms, run_folder
        self.deadline = time.time() + (config.timeout or inf)
        self.storage = open_storage(config.storage)
        with exclusive(config.storage):
            self.optuna = optuna.create_study(
                storage=self.storage,
                study_name=config.study_name,
                direction=StudyDirection[config.direction.upper()],
                pruner=algorithms.pruner(),
                load_if_exists=True,
            )
            self._check_settings(fixed)
        self.worker = Worker(self.storage)
        self.claims: dict[int, str] = {}  # the newest claim of each trial that this process claimed, by number
        self._ended_here = 0
        self._started = time.time()

    def _check_settings(self, fixed: dict[str, Any]) -> None:
        """Save space and settings. If the study has results, refuse a change."""
        config, trials = self.config, self._trials()
        requested = {**{key: f"a search {describe(distribution)}" for key, distribution in self.space.items()}, **fixed}
        saved = self.optuna.user_attrs.get(FIXED, requested)
        has_results = any(trial.state != TrialState.WAITING or trial.intermediate_values for trial in trials)
        if not has_results and all(trial.params.keys() <= self.space.keys() for trial in trials):
            saved = requested  # without results the settings may still change
            self.optuna.set_user_attr(FIXED, requested)
        problems = [
            f"{key}: {requested.get(key, 'nothing')} was requested, the study has {saved.get(key, 'nothing')}"
            for key in dict.fromkeys([*requested, *saved])
            if requested.get(key) != saved.get(key)
        ]
        direction = self.optuna.direction.name.lower()
        if direction != config.direction:
            problems.append(f"direction: {config.direction} was requested, the study has {direction}")
        if problems:
            problems.append(f"study_name: {config.study_name} exists with other settings; choose another name")
            raise UserError(*problems)

    def __enter__(self) -> "Study":
        self.worker.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for trial_id in list(self.worker.trials):  # claimed and not settled, because of an exception
            trial = self.storage.get_trial(trial_id)
            if trial.state == TrialState.RUNNING and not self._release(trial):
                self.storage.set_trial_state_values(trial_id, TrialState.WAITING)
            log.info("%s", self.line(self._trial(trial.number)))
        self.worker.__exit__(*error)

    def _release(self, trial: FrozenTrial) -> bool:
        """Release our claim of a trial. Return whether another process still trains it."""
        self.worker.release(self._id(trial.number))
        return bool(is_locked(self.run_folder(trial.number) / LOCK))

    # ------------------------------------------------------------------------------------------------------------------
    # Claiming trials

    def claim(self, limit: int = 1) -> list[Trial]:
        """Claim at most `limit` trials. The list is empty if no trial is left, or after the timeout."""
        while time.time() < self.deadline:
            with exclusive(self.config.storage):
                has_orphans = self._requeue_dead_trials()
                if any(DEATHS in trial.user_attrs for trial in self._trials(TrialState.WAITING)):
                    limit = 1  # it may kill its process again, and the other trials of that process with it
                left = self.config.n_trials - len(self._trials(TrialState.RUNNING, *DONE))
                claimed = [self._ask() for _ in range(min(limit, left))]
            if claimed or not has_orphans:
                return claimed
            time.sleep(1)
        return []

    def _ask(self) -> Trial:
        """Return a waiting trial, which keeps its parameters, or a new one if none waits."""
        waiting = self._trials(TrialState.WAITING)
        number = waiting[0].number if waiting else len(self._trials())
        self.optuna.sampler = self.algorithms.sampler(number, self.space)
        trial = self.optuna.ask(self.space)
        self.claims[trial.number] = self.worker.acquire(self._id(trial.number))
        return trial

    def _requeue_dead_trials(self) -> bool:
        """Requeue trials whose process is dead. Return whether a trial is orphaned: it will be dead soon."""
        has_orphans = False
        for trial in self._trials(TrialState.RUNNING):
            now = status(trial.user_attrs, self.run_folder(trial.number))
            has_orphans |= now == Status.ORPHANED
            if now == Status.DEAD:
                self._requeue(trial)
        return has_orphans

    def _requeue(self, trial: FrozenTrial, problem: str | None = None) -> None:
        """Make a trial WAITING after its process died, or FAIL if this happened repeatedly without progress."""
        evaluations = len(trial.intermediate_values)
        deaths, earlier_evaluations = trial.user_attrs.get(DEATHS, (0, 0))
        deaths = deaths + 1 if evaluations == earlier_evaluations else 1
        trial_id = self._id(trial.number)
        self.storage.set_trial_user_attr(trial_id, DEATHS, (deaths, evaluations))
        state = TrialState.WAITING
        if deaths >= MAX_DEATHS:
            state = TrialState.FAIL
            reason = f"its process died {deaths} times" + (f", {problem}" if problem else "")
            self.storage.set_trial_user_attr(trial_id, REASON, reason)
        self.storage.set_trial_state_values(trial_id, state)

    def settle(self, trials: list[Trial], problem: str | None = None) -> None:
        """Log how claimed trials ended, and requeue trials that did not end.

        A trial is not requeued while another process trains it: a launcher may give up on a batch when one job dies.

        Args:
            problem: The probable reason if a trial did not report its end.
        """
        with exclusive(self.config.storage):
            for trial in trials:
                now = self._trial(trial.number)
                if now.state == TrialState.RUNNING and not self._release(now):
                    self._requeue(now, problem)
                self.worker.trials.discard(self._id(trial.number))
        for trial in trials:
            now = self._trial(trial.number)
            self._ended_here += now.state.is_finished()
            log.info("%s", self.line(now))

    # ------------------------------------------------------------------------------------------------------------------
    # Results

    def _trials(self, *states: TrialState) -> list[FrozenTrial]:
        return self.optuna.get_trials(deepcopy=False, states=states or None)

    def _trial(self, number: int) -> FrozenTrial:
        return self.storage.get_trial(self._id(number))

    def _id(self, number: int) -> int:
        study = self.storage.get_study_id_from_name(self.config.study_name)
        return self.storage.get_trial_id_from_study_id_trial_number(study, number)

    def done(self) -> list[FrozenTrial]:
        return self._trials(*DONE)

    def best_or_failure(self) -> FrozenTrial:
        """
        Raises:
            StudyFailure: No trial has a value.
        """
        if best := best_of(self.optuna):
            return best
        problem = "no trial has ended yet; resume with the same command"
        if done := self.done():
            reasons = {trial.user_attrs.get(REASON, "unknown"): trial.number for trial in reversed(done)}
            examples = "; ".join(f"trial {number}: {reason}" for reason, number in list(reversed(reasons.items()))[:3])
            problem = f"none of its {counted(len(done), 'trial')} gave a value ({examples})"
            problem += "; another range needs another study name"
        raise StudyFailure(f"study {self.config.study_name}: {problem}")

    def line(self, trial: FrozenTrial) -> str:
        """Return a line about a trial: how it ended, the best trial so far, its parameters, and the time."""
        best, left = best_of(self.optuna), self.config.n_trials - len(self.done())
        comparison = f"best {best.value:.4f} (trial {best.number})" if best else "none complete so far"
        if best and best.number == trial.number:
            comparison = "the best so far"
        seconds = trial.user_attrs.get(SPENT, {}).get("seconds")
        times = [] if seconds is None else [f"{seconds:,.0f} s"]
        if left > 0 and self._ended_here:
            times.append(f"{time_left((time.time() - self._started) / self._ended_here * left)} left")
        value = "-" if trial.value is None else f"{trial.value:.4f}"
        reason = f"  ({trial.user_attrs[REASON]})" if trial.user_attrs.get(REASON) else ""
        return (
            f"trial {trial.number:>3} {state_name(trial):<11} {value:>6}  {comparison:<26}  "
            f"{shown_parameters(trial)}  {', '.join(times)}{reason}"
        )


def state_name(trial: FrozenTrial) -> str:
    return {TrialState.FAIL: "failed", TrialState.WAITING: "interrupted"}.get(trial.state, trial.state.name.lower())


def shown_parameters(trial: FrozenTrial) -> str:
    """Return the parameters of a trial without their groups, with three significant digits."""
    values = {key.rpartition(".")[2]: value for key, value in trial.params.items()}
    return " ".join(f"{key}={f'{value:.3g}' if isinstance(value, float) else value}" for key, value in values.items())


def describe(distribution: BaseDistribution) -> str:
    if isinstance(distribution, CategoricalDistribution):
        return f"of {', '.join(map(str, distribution.choices))}"
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    return f"from {distribution.low:g} to {distribution.high:g}{' (log)' if distribution.log else ''}"
