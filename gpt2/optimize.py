"""A search for hyperparameters from Python: a model trained anew for each trial, the unpromising ones cut short.

It takes dataclasses and loaders. `conf/hparams_search/optuna.yaml` searches the same `SPACE` on the command line, where
the study, its pruning and its report are the same.
"""

import logging
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from torch.utils.data import DataLoader

from gpt2.checkpoint import run_folder
from gpt2.config import GPT2Config, OptunaConfig, TrainingConfig
from gpt2.data_loader import batch_size_of, with_batch_size
from gpt2.errors import UserError
from gpt2.model import GPT2Model
from gpt2.runtime.device import choose_device
from gpt2.search import report as study_report
from gpt2.search.storage import failures_in_a_line
from gpt2.search.study import Study, seed_of_trial
from gpt2.search.trial import RunningTrial, optuna_is_quiet
from gpt2.train import Trainer
from gpt2.validation import PRUNERS, SAMPLERS, validate

log = logging.getLogger(__name__)

SPACE: dict[str, BaseDistribution] = {
    "train.learning_rate": FloatDistribution(1e-4, 1e-2, log=True),
    "train.warmup_steps": IntDistribution(10, 500, log=True),
    "train.weight_decay": FloatDistribution(1e-3, 0.3, log=True),
    "train.beta2": FloatDistribution(0.9, 0.999),
    "train.batch_size": CategoricalDistribution([4, 8, 16, 32]),  # at equal tokens
    "model.dropout": FloatDistribution(0.0, 0.3),  # in all three places
}


def with_parameters(
    parameters: dict[str, Any], base_config: GPT2Config, training_config: TrainingConfig
) -> tuple[GPT2Config, TrainingConfig]:
    """The configurations with values of `SPACE` in their places.

    `model.dropout` is that of all three kinds. With another batch size `max_steps` and `eval_every` change as well: a
    trial sees as many tokens as any other, and is evaluated after as many.
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


def make_sampler(config: OptunaConfig, seed: int) -> optuna.samplers.BaseSampler:
    """The sampler of that name, in any case. `n_startup_trials` is how many TPE, CmaEs and GP draw at random first."""
    name = next(name for name in SAMPLERS if name.lower() == config.sampler.lower())
    own: dict[str, dict[str, Any]] = {"Random": {}, "QMC": {"scramble": True, "warn_independent_sampling": False}}
    options = own.get(name, {"n_startup_trials": config.n_startup_trials})
    if name == "CmaEs":
        options["warn_independent_sampling"] = False  # the batch size is a choice, which is drawn at random
    return getattr(optuna.samplers, f"{name}Sampler")(seed=seed % 2**32, **options)  # NumPy takes no larger seed


def make_pruner(config: OptunaConfig) -> optuna.pruners.BasePruner:
    """The pruner of that name, long or short, in any case. The first evaluation that it hears of has number 0."""
    name = next(long for long, short in PRUNERS.items() if config.pruner.lower() in (long.lower(), short))
    options = {
        "MedianPruner": {"n_startup_trials": config.n_startup_trials, "n_warmup_steps": config.n_warmup_steps},
        "SuccessiveHalvingPruner": {"min_resource": max(1, config.n_warmup_steps)},
    }
    return getattr(optuna.pruners, name)(**options.get(name, {}))  # Hyperband tries several warm-ups by itself


class OptunaOptimizer:
    """Searches `SPACE` for what gives the best validation loss: of each trial, the lowest that it reached.

    Trial N trains into `training_config.checkpoint_dir/trial_<N>`; only the folder of the best trial stays, unless
    `optuna_config.keep` is `all`. The report lies beside it. The batch size is searched if that of `train_loader` can
    be changed. `study` is the Optuna study, from `optimize` on.
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
        self.space = dict(SPACE)
        batch_size = batch_size_of(train_loader)
        if batch_size is None:
            del self.space["train.batch_size"]
            log.info("The batch size is not searched: the batches of this train_loader are cut by the caller.")
        else:
            training_config = replace(training_config, batch_size=batch_size)
        found = validate(optuna_config, "optuna.")
        for end in (0, -1):
            extreme = {key: _ends(distribution)[end] for key, distribution in self.space.items()}
            model, training = with_parameters(extreme, base_config, training_config)
            found += validate(model, "model.") + validate(training, "train.")
        if found:
            raise UserError(*dict.fromkeys(found))
        choose_device(training_config.device, "train.device")
        self.train_loader, self.val_loader = train_loader, val_loader
        self.base_config, self.training_config = base_config, training_config
        self.optuna_config = optuna_config

    def optimize(self) -> dict[str, Any]:
        """Run what the study lacks of its `n_trials`, until `timeout`. Returns the best values, by key of `SPACE`.

        Whatever a trial comes to, the study goes on; what it says of it is in `gpt2.search.study`. Each trial without a
        result says why in `user_attrs["reason"]`.

        Raises:
            MachineError: The storage is out of reach, or the disk is full; what is done is kept.
            UserError: The storage cannot be used, holds another study of that name, or no trial gave a value.
            Interrupted: Ctrl-C or SIGTERM. The trial that was under way is saved and waits, to be gone on with.
        """
        with optuna_is_quiet(), failures_in_a_line(self.optuna_config.storage):
            study = self._open()
            self.study = study.optuna
            with study:
                while trials := study.claim():
                    try:
                        self._run(trials[0].number, study)
                    finally:
                        study.settle(trials)
            best = study.best_or_failure()
            study_report.write(study.optuna, study.folder)
            return dict(best.params)

    def _open(self) -> Study:
        config, seed = self.optuna_config, self.training_config.seed
        others = sorted(path.name for path in Path(self.training_config.checkpoint_dir).glob("trial_*"))
        study = Study(
            self.optuna_config,
            self.space,
            lambda number: make_sampler(config, seed_of_trial(seed, number, config.sampler)),
            make_pruner(self.optuna_config),
            Path(self.training_config.checkpoint_dir),
            self._folder,
            fixed={
                f"{group}.{key}": value
                for group, config in (("model", self.base_config), ("train", self.training_config))
                for key, value in asdict(config).items()
                if key not in ("checkpoint_dir", "device", "num_workers") and f"{group}.{key}" not in self.space
            },
        )
        if others and self.optuna_config.storage and not study.optuna.get_trials(deepcopy=False):
            raise UserError(f"train.checkpoint_dir: {study.folder} holds {others[0]} of another study")
        return study

    def _run(self, number: int, study: Study) -> None:
        config = self.optuna_config
        claim = study.claims[number]
        trial = RunningTrial(number, study.storage, config, make_pruner(config), self._folder, claim, study.deadline)
        outcome = trial.run(lambda: self._train(trial))
        if outcome.stops_study is not None:
            raise outcome.stops_study

    def _train(self, trial: RunningTrial) -> float | None:
        """The lowest validation loss with a trial's parameters."""
        parameters = trial.trial.params
        model_config, training_config = with_parameters(parameters, self.base_config, self.training_config)
        folder = self._folder(trial.number)
        if not trial.goes_on():
            shutil.rmtree(folder, ignore_errors=True)  # of an earlier study
        train_loader = with_batch_size(self.train_loader, parameters.get("train.batch_size"))
        torch.manual_seed(training_config.seed)
        trainer = Trainer(GPT2Model(model_config), train_loader, self.val_loader, training_config, str(folder))
        if checkpoint := run_folder.first_intact(run_folder.newest_first(folder)):
            trainer.load_checkpoint(str(checkpoint))
        return trial.train(trainer)

    def _folder(self, number: int) -> Path:
        return Path(self.training_config.checkpoint_dir) / f"trial_{number}"


def _ends(distribution: BaseDistribution) -> tuple[Any, ...]:
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    return distribution.low, distribution.high
