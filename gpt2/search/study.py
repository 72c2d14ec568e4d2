"""A study that can be left alone: exactly its number of trials, whoever runs them and whatever happens to them.

`Study` hands out trials, and a `gpt2.search.trial.RunningTrial` is one of them. The two may be in different processes
and share nothing but the storage. A trial keeps its number, its parameters and its folder for life:
one that is interrupted goes back to WAITING, is taken again before any new one, and goes on from its checkpoint.

Knows neither Hydra nor W&B. What a trial's training is, is up to who runs it.
"""

import json
import logging
import re
import time
from collections.abc import Callable
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, distribution_to_json
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState

from gpt2.checkpoint.run_folder import step_of
from gpt2.config import OptunaConfig
from gpt2.errors import UserError
from gpt2.runtime.console import time_left
from gpt2.runtime.files import LOCK, is_locked
from gpt2.search.lease import Life, Worker
from gpt2.search.storage import exclusive, open_storage
from gpt2.search.trial import DEATHS, REASON, SPENT, STOPPED, best_of

log = logging.getLogger("study")  # beside those of the package, which Hydra configures anew for each trial

FIXED = "fixed"  # user attribute of a study
# How often a process may die that has a trial, without news of it in between, until the trial is taken to be why: one
# that somebody started and may have killed, and one that a launcher started for this trial.
MOST_DEATHS, MOST_KILLS = 5, 2


class StudyFailure(UserError):
    """No trial gave a value."""

    exit_code = 1


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
        self.claims: dict[int, str] = {}  # of each trial that was taken here, the newest
        self._mine = 0  # trials that ended here
        self._began = time.time()

    def _refuse_another(self, fixed: dict[str, Any]) -> None:
        """Remember what the study is about, or hold against it what it is said to be about."""
        config, trials = self.config, self._trials()
        asked = {**{key: {"searched": _plain(distribution)} for key, distribution in self.space.items()}, **fixed}
        before = self.optuna.user_attrs.get(FIXED, asked)
        has_begun = any(trial.state != TrialState.WAITING or trial.intermediate_values for trial in trials)
        if not has_begun and all(trial.params.keys() <= self.space.keys() for trial in trials):
            before = asked  # nothing came of it so far: its first command may have been mistaken
            self.optuna.set_user_attr(FIXED, asked)
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
        for trial_id in list(self.worker.trials):  # taken, and not settled: something came in between
            trial = self.storage.get_trial(trial_id)
            if trial.state == TrialState.RUNNING and not self._leave(trial):
                self.storage.set_trial_state_values(trial_id, TrialState.WAITING)
            log.info("%s", self.line(self._trial(trial.number)))
        self.worker.__exit__(*error)

    def _leave(self, trial: FrozenTrial) -> bool:
        """Have no more to do with a trial that is said to run. Whether another process still works on it."""
        self.worker.release(self._id(trial.number))
        return bool(is_locked(self.run_folder(trial.number) / LOCK))

    def claim(self, most: int = 1) -> list[Trial]:
        """The next trials, at most so many; none if all are done or under way, or the time is up."""
        while time.time() < self.deadline:
            with exclusive(self.config.storage):
                has_orphans = self._put_back_what_is_dead()
                taken: list[Trial] = []
                while len(taken) < most and len(self._trials(TrialState.RUNNING, *STOPPED)) < self.config.n_trials:
                    waiting = self._trials(TrialState.WAITING)
                    may_kill = bool(waiting and waiting[0].user_attrs.get(DEATHS))
                    if taken and may_kill:
                        break
                    taken.append(self._ask(waiting))
                    if may_kill:  # alone
                        break
            if taken or not has_orphans:
                return taken
            time.sleep(1)
        return []

    def _ask(self, waiting: list[FrozenTrial]) -> Trial:
        """A trial that waits, or else a new one. Its draw depends on its number and what is known by then, not on when
        this process began: resumed, a sampler that is seeded once would repeat itself (Optuna's issue 3255)."""
        self.optuna.sampler = self.make_sampler(waiting[0].number if waiting else len(self._trials()))
        trial = self.optuna.ask()
        self._draw(trial)
        self.claims[trial.number] = self.worker.acquire(self._id(trial.number))
        return trial

    def _draw(self, trial: Trial) -> None:
        """Give a trial its parameters. One whose process died while it drew them gets those that it would have got."""
        before = trial.distributions
        init_distributed = {} if before.keys() == self.space.keys() else trial.relative_params
        for key, distribution in self.space.items():
            if (
                key in before and key not in init_distributed
            ):  # drawn again only to leave the generator where it was then
                self.optuna.sampler.sample_independent(self.optuna, self._trial(trial.number), key, distribution)
            trial._suggest(key, distribution)

    def _put_back_what_is_dead(self) -> bool:
        """Have the trials wait that nobody works on any more. Whether others will soon be of that kind."""
        has_orphans = False
        for trial in self._trials(TrialState.RUNNING):
            life = self.worker.status(trial.user_attrs, self.run_folder(trial.number))
            has_orphans |= life == Life.ORPHANED
            if life == Life.DEAD:
                self._put_back(trial)
        return has_orphans

    def _put_back(self, trial: FrozenTrial, most_deaths: int = MOST_DEATHS, problem: str | None = None) -> None:
        """Have a trial wait whose process died, unless that happens to it time and again."""
        saved = [step_of(path) or 0 for path in self.run_folder(trial.number).rglob("step_*.pth")]
        news = [len(trial.intermediate_values), max(saved, default=0)]
        deaths, news_before = trial.user_attrs.get(DEATHS, (0, [0, 0]))
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

        One whose process lives on is left to it: a launcher may give up on a batch of which only one job has died.

        Args:
            problem: What may be the reason for that.
        """
        with exclusive(self.config.storage):
            for trial in trials:
                now = self._trial(trial.number)
                if now.state == TrialState.RUNNING and not self._leave(now):
                    self._put_back(now, MOST_KILLS, problem)
                self.worker.trials.discard(self._id(trial.number))
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
        if elsewhere := self._trials(TrialState.RUNNING):
            raise StudyFailure(
                f"study {self.config.study_name}: none of its trials has given a value yet, other processes run "
                f"{len(elsewhere)} of them"
            )
        if not done:
            told = "no trial was finished in the time that it had; the same command goes on"
            raise StudyFailure(f"study {self.config.study_name}: {told}")
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
            clock.append(f"{time_left((time.time() - self._began) / self._mine * left)} left")
        reason = f"  ({trial.user_attrs[REASON]})" if trial.user_attrs.get(REASON) else ""
        return "  ".join(
            [
                f"trial {trial.number:>3} {shown_state(trial):<11} {shown_value(trial):<11}",
                f"{against:<26}",
                shown_parameters(trial),
                ", ".join(clock) + reason,
            ]
        )


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


def seed_of_trial(seed: int, number: int, sampler: str) -> int:
    """Of 32 bits, another one for each trial; the same for samplers whose draws are places in one sequence.

    Args:
        sampler: Its name or class, such as QMC or optuna.samplers.QMCSampler.
    """
    if re.search("QMC|Grid", sampler, re.IGNORECASE):
        return seed % 2**32
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
