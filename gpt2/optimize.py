"""Hyperparameter search from Python, with dataclasses and loaders as arguments.

`python train.py -m hparams_search=optuna` searches the same space, with the same pruning and the same report.
"""

import logging
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import optuna
import torch
from torch.utils.data import DataLoader

from gpt2.checkpoint import run_folder
from gpt2.config import GPT2Config, OptunaConfig, TrainingConfig
from gpt2.data_loader import batch_size_of, with_batch_size
from gpt2.errors import UserError
from gpt2.model import GPT2Model
from gpt2.runtime.console import progress_shown
from gpt2.runtime.device import choose_device
from gpt2.search import report
from gpt2.search.algorithms import Algorithms, extremes
from gpt2.search.space import default_space
from gpt2.search.storage import storage_errors
from gpt2.search.study import Study
from gpt2.search.trial import RunningTrial, quiet_optuna
from gpt2.train import Trainer
from gpt2.training.callbacks import ConsoleLog
from gpt2.validation import validate

log = logging.getLogger(__name__)

SPACE = default_space()


def with_parameters(
    parameters: dict[str, Any], base_config: GPT2Config, training_config: TrainingConfig
) -> tuple[GPT2Config, TrainingConfig]:
    """The configurations with the values of a trial, by key of `SPACE`.

    `model.dropout` sets all three dropouts. `train.batch_size` also scales `max_steps` and `eval_every`, so that all
    trials train on the same number of tokens and evaluate equally often. `conf/hparams_search/optuna.yaml` does the
    same.
    """
    model = {key.removeprefix("model."): value for key, value in parameters.items() if key.startswith("model.")}
    training = {key.removeprefix("train."): value for key, value in parameters.items() if key.startswith("train.")}
    if "dropout" in model:
        model |= dict.fromkeys(("attention_dropout", "residual_dropout"), model["dropout"])
    if "batch_size" in training:
        for key in ("max_steps", "eval_every"):
            if (steps := getattr(training_config, key)) is not None:
                training[key] = max(1, round(steps * training_config.batch_size / training["batch_size"]))
    return replace(base_config, **model), replace(training_config, **training)


class OptunaOptimizer:
    """Searches `SPACE` for the lowest validation loss. The objective is the lowest loss of a trial's evaluations.

    Trial N trains in `training_config.checkpoint_dir/trial_<N>`, and the report is written to `checkpoint_dir`. Only
    the checkpoints of the best trial are kept, unless `optuna_config.keep` is `all`. The batch size is searched if
    `train_loader` allows another one. After `optimize`, `study` is the Optuna study.
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
            UserError: A configuration is invalid, in itself or at an end of the space, or there is no such device.
        """
        self.space = dict(SPACE)
        batch_size = batch_size_of(train_loader)
        if batch_size is None:
            del self.space["train.batch_size"]
            log.info("The batch size is not searched, because train_loader does not allow another one.")
        else:
            training_config = replace(training_config, batch_size=batch_size)
        self.algorithms = Algorithms(optuna_config, training_config.seed)
        problems = validate(optuna_config, "optuna.")
        with quiet_optuna():
            problems += self.algorithms.problems("optuna.", self.space)
        for end in (0, -1):
            corner = {key: extremes(distribution)[end] for key, distribution in self.space.items()}
            model, training = with_parameters(corner, base_config, training_config)
            problems += validate(model, "model.") + validate(training, "train.")
        if problems:
            raise UserError(*dict.fromkeys(problems))
        choose_device(training_config.device, "train.device")
        self.train_loader, self.val_loader = train_loader, val_loader
        self.base_config, self.training_config = base_config, training_config
        self.optuna_config = optuna_config

    @progress_shown()
    def optimize(self) -> dict[str, Any]:
        """Run the missing trials of the study, until `timeout`. Returns the best values, by key of `SPACE`.

        The study continues after a trial that diverges, fails or is pruned; the reason is in the trial's
        `user_attrs["reason"]`.

        Raises:
            ResourceError: The storage is unreachable, or the disk is full. Finished trials are saved.
            UserError: The storage cannot be opened, its study has other settings, or no trial has a value.
            Interrupted: Ctrl-C or SIGTERM. The running trial is saved, and the next call resumes it.
        """
        with quiet_optuna(), storage_errors(self.optuna_config.storage):
            study = self._open()
            self.study = study.optuna
            with study:
                while trials := study.claim():
                    try:
                        self._run(trials[0].number, study)
                    finally:
                        study.settle(trials)
            best = study.best_or_failure()
            report.write(study.optuna, Path(self.training_config.checkpoint_dir))
            return dict(best.params)

    def _open(self) -> Study:
        folder = Path(self.training_config.checkpoint_dir)
        others = sorted(path.name for path in folder.glob("trial_*"))
        fixed = {
            f"{group}.{key}": value
            for group, values in (("model", self.base_config), ("train", self.training_config))
            for key, value in asdict(values).items()
            if key not in ("checkpoint_dir", "device", "num_workers") and f"{group}.{key}" not in self.space
        }
        study = Study(self.optuna_config, self.space, self.algorithms, self._folder, fixed)
        if others and self.optuna_config.storage and not study.optuna.get_trials(deepcopy=False):
            raise UserError(f"train.checkpoint_dir: {folder} has {others[0]} of another study")
        return study

    def _run(self, number: int, study: Study) -> None:
        pruner, claim = self.algorithms.pruner(), study.claims[number]
        trial = RunningTrial(
            number, study.storage, self.optuna_config, pruner, self._folder, claim, deadline=study.deadline
        )
        outcome = trial.run(lambda: self._train(trial))
        if outcome.stops_study is not None:
            raise outcome.stops_study

    def _train(self, trial: RunningTrial) -> float | None:
        """Train with a trial's parameters, and return the lowest validation loss."""
        parameters = trial.trial.params
        model_config, training_config = with_parameters(parameters, self.base_config, self.training_config)
        folder = self._folder(trial.number)
        if not trial.was_interrupted():
            shutil.rmtree(folder, ignore_errors=True)  # left by an earlier study
        train_loader = with_batch_size(self.train_loader, parameters.get("train.batch_size"))
        torch.manual_seed(training_config.seed)
        model = GPT2Model(model_config)
        callbacks = [ConsoleLog(trial.label), trial]
        trainer = Trainer(model, train_loader, self.val_loader, training_config, str(folder), callbacks)
        if checkpoint := run_folder.first_intact(run_folder.newest_first(folder)):
            trainer.load_checkpoint(str(checkpoint))
        trainer.train()
        return trainer.progress.best_val_loss

    def _folder(self, number: int) -> Path:
        return Path(self.training_config.checkpoint_dir) / f"trial_{number}"
