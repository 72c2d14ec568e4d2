"""A search for hyperparameters with Optuna: a model trained anew for each trial, the unpromising ones cut short.

A library: it takes dataclasses and loaders, and knows neither Hydra nor W&B. What `conf/hparams_search/optuna.yaml`
searches on the command line is the same `SPACE`.
"""

import gc
import logging
import shutil
import time
import traceback
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, Trial, TrialState
from torch.utils.data import DataLoader

from gpt2.config import Divergence, GPT2Config, OptunaConfig, TrainingConfig, UserError
from gpt2.device import choose_device
from gpt2.faults import PRUNERS, SAMPLERS, model_faults, optuna_faults, training_faults
from gpt2.model import GPT2Model
from gpt2.tracking import Record, Tracker
from gpt2.train import Trainer

log = logging.getLogger(__name__)

SPACE: dict[str, BaseDistribution] = {
    "train.learning_rate": FloatDistribution(1e-4, 1e-2, log=True),
    "train.warmup_steps": IntDistribution(10, 2000, log=True),
    "train.weight_decay": FloatDistribution(1e-3, 0.3, log=True),
    "train.beta2": FloatDistribution(0.9, 0.999),
    "model.dropout": FloatDistribution(0.0, 0.3),  # in all three places
}
INTERRUPTED = "interrupted"  # the reason of a trial that does not count


def with_parameters(
    parameters: dict[str, Any], base_config: GPT2Config, training_config: TrainingConfig
) -> tuple[GPT2Config, TrainingConfig]:
    """The configurations with values of `SPACE` in their places; `model.dropout` is that of all three kinds."""
    model = {key.removeprefix("model."): value for key, value in parameters.items() if key.startswith("model.")}
    training = {key.removeprefix("train."): value for key, value in parameters.items() if key.startswith("train.")}
    if "dropout" in model:
        model |= dict.fromkeys(("attention_dropout", "residual_dropout"), model["dropout"])
    return replace(base_config, **model), replace(training_config, **training)


def make_sampler(config: OptunaConfig, seed: int) -> optuna.samplers.BaseSampler:
    """The sampler of that name, in any case. `n_startup_trials` is how many TPE, CmaEs and GP draw at random first."""
    name = next(name for name in SAMPLERS if name.lower() == config.sampler.lower())
    own: dict[str, dict[str, Any]] = {"Random": {}, "QMC": {"scramble": True}}
    options = own.get(name, {"n_startup_trials": config.n_startup_trials})
    return getattr(optuna.samplers, f"{name}Sampler")(seed=seed % 2**32, **options)  # NumPy takes no larger seed


def make_pruner(config: OptunaConfig) -> optuna.pruners.BasePruner:
    """The pruner of that name, long or short, in any case. The first evaluation that it hears of has number 0."""
    name = next(long for long, short in PRUNERS.items() if config.pruner.lower() in (long.lower(), short))
    options = {
        "MedianPruner": {"n_startup_trials": config.n_startup_trials, "n_warmup_steps": config.n_warmup_steps},
        "SuccessiveHalvingPruner": {"min_resource": max(1, config.n_warmup_steps)},
    }
    return getattr(optuna.pruners, name)(**options.get(name, {}))  # Hyperband tries several warm-ups by itself


class Reporter(Tracker):
    """Tells a trial of each evaluation, numbered from 0, and ends it where its pruner says so. Keeps nothing."""

    def __init__(self, trial: Trial, total_steps: int):
        super().__init__()
        self.trial, self.total_steps, self.evaluations = trial, total_steps, 0

    def log(self, record: Record, sample: str | None = None) -> None:
        """Raises optuna.TrialPruned if other trials did better by now; not at the last step, which finishes a trial."""
        if "val/loss" not in record:
            return
        self.trial.report(record["val/loss"], self.evaluations)
        self.evaluations += 1
        if record["step"] < self.total_steps and self.trial.should_prune():
            raise optuna.TrialPruned(f"behind other trials at step {record['step']}")


class OptunaOptimizer:
    """Searches `SPACE` for what gives the best validation loss: of each trial, the lowest that it reached.

    Trial N trains into `training_config.checkpoint_dir/trial_<N>`; only the folder of the best trial stays.
    `study` is the Optuna study, from `optimize` on.
    """

    study: optuna.Study

    def __init__(
        self,
        train_loader: DataLoader,
        val_loader: DataLoader,
        base_config: GPT2Config,
        training_config: TrainingConfig,
        optuna_config: OptunaConfig,
    ):
        """
        Raises:
            UserError: The configurations make no sense, if only at one end of the space; or the device is not there.
        """
        found = optuna_faults(optuna_config)
        for end in ("low", "high"):
            extreme = {key: getattr(distribution, end) for key, distribution in SPACE.items()}
            model, training = with_parameters(extreme, base_config, training_config)
            found += model_faults(model) + training_faults(training)
        if found:
            raise UserError(*dict.fromkeys(found))
        choose_device(training_config.device, "train.device")
        self.train_loader, self.val_loader = train_loader, val_loader
        self.base_config, self.training_config = base_config, training_config
        self.optuna_config = optuna_config

    def optimize(self) -> dict[str, Any]:
        """Run what the study lacks of its `n_trials`, until `timeout`. Returns the best values, by key of `SPACE`.

        A trial whose loss stops being a number is pruned; one that breaks otherwise has failed; the study goes on.
        Each trial without a result says why in `user_attrs["reason"]`.

        Raises:
            UserError: The storage cannot be used, or no trial gave a value.
            KeyboardInterrupt: Ctrl-C or SIGTERM, whose number it holds. The trial that was under way does not count.
        """
        deadline = time.monotonic() + (self.optuna_config.timeout or inf)
        verbosity = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        try:
            self.study = self._open_study()
            while self._trials_done() < self.optuna_config.n_trials and time.monotonic() < deadline:
                self._run_trial(self.study.ask(SPACE))
        finally:
            optuna.logging.set_verbosity(verbosity)
        if best := self._best():
            return dict(best.params)
        trials = self.study.get_trials(deepcopy=False)
        reason = trials[-1].user_attrs.get("reason")
        raise UserError(f"optuna: none of the study's {len(trials)} trials gave a value; the last: {reason}")

    def _open_study(self) -> optuna.Study:
        config = self.optuna_config
        direction = optuna.study.StudyDirection[config.direction.upper()]
        try:
            study = optuna.create_study(
                storage=config.storage, study_name=config.study_name, direction=direction, load_if_exists=True
            )
        except Exception as error:  # the database's, its driver's or Optuna's; not the URL, it may hold a password
            raise UserError(f"optuna.storage: cannot be opened: {' '.join(str(error).split())}") from error
        if study.direction != direction:
            raise UserError(f"optuna.direction: the study in this storage is to {study.direction.name.lower()}")
        study.pruner = make_pruner(config)
        # Seeded as before, a sampler would repeat the draws that the study has.
        study.sampler = make_sampler(config, self.training_config.seed + len(study.trials))
        return study

    def _trials_done(self) -> int:
        trials = self.study.get_trials(deepcopy=False)
        return sum(t.state.is_finished() and t.user_attrs.get("reason") != INTERRUPTED for t in trials)

    def _best(self) -> FrozenTrial | None:
        return self.study.best_trial if self.study.get_trials(False, [TrialState.COMPLETE]) else None

    def _run_trial(self, trial: Trial) -> None:
        """Train, tell the study how it went, and keep nothing but the checkpoints of the best trial."""
        best_before = self._best()
        state, value, reason = TrialState.FAIL, None, INTERRUPTED
        try:
            value = self._train(trial)
            state = TrialState.COMPLETE
        except optuna.TrialPruned as error:
            state, reason = TrialState.PRUNED, str(error)
        except Exception as error:  # noqa: BLE001  # a bug, a full disk: the other trials may not meet it
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            trial.set_user_attr("traceback", traceback.format_exc())
        finally:
            if state != TrialState.COMPLETE:
                trial.set_user_attr("reason", reason)
            told = self.study.tell(trial, value, state)
            best = self._best()
            for loser in [t for t in (told, best_before) if t and (best is None or t.number != best.number)]:
                shutil.rmtree(self._folder(loser.number), ignore_errors=True)
            _log_trial(told, best)
            gc.collect()  # what hangs in a circle of references goes before the next model comes

    def _train(self, trial: Trial) -> float:
        """The lowest validation loss with a trial's parameters."""
        model_config, training_config = with_parameters(trial.params, self.base_config, self.training_config)
        folder = self._folder(trial.number)
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier study
        torch.manual_seed(training_config.seed)
        trainer = Trainer(GPT2Model(model_config), self.train_loader, self.val_loader, training_config, str(folder))
        trainer.tracker = Reporter(trial, trainer.total_steps)
        try:
            trainer.train()
        except Divergence as error:  # a verdict on the parameters
            raise optuna.TrialPruned(str(error).partition(";")[0]) from error  # without its advice for a single run
        if trainer.interrupted_by is not None:
            raise KeyboardInterrupt(trainer.interrupted_by)
        if trainer.progress.best_val_loss is None:
            raise RuntimeError("training ended before its first evaluation")
        return trainer.progress.best_val_loss

    def _folder(self, number: int) -> Path:
        return Path(self.training_config.checkpoint_dir) / f"trial_{number}"


def _log_trial(trial: FrozenTrial, best: FrozenTrial | None) -> None:
    value = "-" if trial.value is None else f"{trial.value:.4f}"
    parameters = " ".join(f"{key}={number:.4g}" for key, number in trial.params.items())
    so_far = f"best so far {best.value:.4f}, trial {best.number}" if best else "none complete so far"
    reason = f"  ({trial.user_attrs['reason']})" if "reason" in trial.user_attrs else ""
    log.info("trial %s  %s  %s  %s  %s%s", trial.number, trial.state.name, value, parameters, so_far, reason)
