"""OptunaOptimizer: the space, resuming, pruning, and trials that fail."""

import logging
import os
import signal
import time
import weakref
from pathlib import Path
from typing import ClassVar

import optuna
import pytest
import torch
from omegaconf import OmegaConf
from torch.utils.data import DataLoader

from gpt2 import optimize
from gpt2.checkpoint import format as checkpoint
from gpt2.checkpoint import run_folder
from gpt2.cli.search_space import distributions
from gpt2.config import GPT2Config, OptunaConfig, TrainingConfig
from gpt2.data_loader import with_batch_size
from gpt2.errors import UserError
from gpt2.model import GPT2Model
from gpt2.optimize import SPACE, OptunaOptimizer, with_parameters
from gpt2.runtime.repository import CONF
from gpt2.runtime.signals import Interrupted
from gpt2.search import report
from gpt2.search.study import Study
from gpt2.train import Trainer
from tests.helpers import tiny_config

BLOCKS = [(torch.arange(16) * (1 + row % 3) + row) % 61 for row in range(16)]  # learnable
GOOD = {"train.learning_rate": 1e-2, "train.warmup_steps": 10, "train.weight_decay": 0.01, "train.beta2": 0.95}
GOOD |= {"train.batch_size": 8, "model.dropout": 0.15}


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Pictures take a second and have their own tests."""
    monkeypatch.setattr(report, "draw", lambda study, source: {})


def make_optimizer(folder: Path, blocks=BLOCKS, training=None, **study) -> OptunaOptimizer:
    """Each trial trains for 8 steps of 8 blocks and evaluates after 2, 4, 6 and 8 steps."""
    sizes = {"max_steps": 8, "eval_every": 2, "device": "cpu", "checkpoint_dir": str(folder / "kept")}
    loader = DataLoader(blocks, batch_size=8)
    config = TrainingConfig(**{**sizes, **(training or {})})
    return OptunaOptimizer(loader, loader, tiny_config(), config, OptunaConfig(**study))


def storage_with(folder: Path, *trials: dict) -> str:
    """A storage whose study starts with these trials, each with the values of GOOD except those it names."""
    url = f"sqlite:///{folder / 'study.db'}"
    study = optuna.create_study(study_name=OptunaConfig().study_name, storage=url)
    for changes in trials:
        study.enqueue_trial({**GOOD, **changes})
    return url


def is_in_space(values: dict) -> bool:
    return all(space._contains(space.to_internal_repr(values[key])) for key, space in SPACE.items())


def states(optimizer: OptunaOptimizer) -> list[str]:
    return [trial.state.name for trial in optimizer.study.trials]


def remaining_folders(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "kept").glob("trial_*"))


# ---------------------------------------------------------------------------------------------------------------------
# The space


def test_parameters_change_only_their_fields():
    model, training = with_parameters(GOOD, GPT2Config(d_model=64), TrainingConfig(batch_size=8, save_every=3))
    assert model == GPT2Config(d_model=64, dropout=0.15, attention_dropout=0.15, residual_dropout=0.15)
    same = {"batch_size": 8, "save_every": 3}
    assert training == TrainingConfig(**same, learning_rate=1e-2, warmup_steps=10, weight_decay=0.01, beta2=0.95)


@pytest.mark.parametrize(("batch_size", "steps", "every"), [(4, 200, 20), (8, 100, 10), (32, 25, 2)])
def test_batch_sizes_train_on_equal_tokens(batch_size, steps, every):
    before = TrainingConfig(batch_size=8, max_steps=100, eval_every=10)
    _, training = with_parameters({"train.batch_size": batch_size}, GPT2Config(), before)
    assert (training.batch_size, training.max_steps, training.eval_every) == (batch_size, steps, every)
    _, by_epochs = with_parameters({"train.batch_size": batch_size}, GPT2Config(), TrainingConfig(batch_size=8))
    assert by_epochs.max_steps is None


def test_no_parameters_change_nothing():
    assert with_parameters({}, tiny_config(), TrainingConfig()) == (tiny_config(), TrainingConfig())


def test_command_line_searches_the_same_space():
    search = OmegaConf.load(CONF / "hparams_search" / "optuna.yaml")
    overrides = [f"{key}={value}" for key, value in search.hydra.sweeper.params.items()]
    assert distributions(overrides) == (SPACE, {})
    composed = OmegaConf.merge({"model": {"dropout": 0.2}}, {"model": search.model})
    assert GPT2Config(**composed.model) == with_parameters({"model.dropout": 0.2}, GPT2Config(), TrainingConfig())[0]
    written = {key: value for key, value in search.hydra.sweeper.items() if key not in ("params", "n_jobs")}
    assert written == {key: getattr(OptunaConfig(), key) for key in written}


# ---------------------------------------------------------------------------------------------------------------------
# The study


def test_best_parameters_reproduce_the_best_loss(tmp_path, caplog, capfd):
    optimizer = make_optimizer(tmp_path, n_trials=3, sampler="random")
    with caplog.at_level(logging.INFO, logger="study"):
        best = optimizer.optimize()
    values = [trial.value for trial in optimizer.study.trials]
    assert states(optimizer) == ["COMPLETE"] * 3
    assert len(set(values)) == 3
    assert best.keys() == SPACE.keys()
    assert is_in_space(best)

    model_config, training_config = with_parameters(best, tiny_config(), optimizer.training_config)
    torch.manual_seed(training_config.seed)
    loader = with_batch_size(optimizer.train_loader, best["train.batch_size"])
    again = Trainer(GPT2Model(model_config), loader, optimizer.val_loader, training_config)
    again.train()
    assert again.progress.best_val_loss == min(values)

    lines = [record.getMessage() for record in caplog.records if record.name == "study"]
    assert [line.split()[:4] for line in lines] == [
        ["trial", f"{number}", "complete", f"{value:.4f}"] for number, value in enumerate(values)
    ]
    assert ("the best so far" if values[-1] == min(values) else f"best {min(values):.4f} (trial ") in lines[-1]
    assert capfd.readouterr().err == ""  # Optuna's own log lines are suppressed
    assert optuna.logging.get_verbosity() == optuna.logging.INFO  # but its verbosity is restored


def test_study_in_a_storage_is_filled_up_with_new_trials(tmp_path):
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    for n_trials, trials in ((2, 2), (4, 4), (3, 4)):
        optimizer = make_optimizer(tmp_path, n_trials=n_trials, storage=storage, sampler="random")
        assert optimizer.optimize() == optimizer.study.best_params
        assert states(optimizer) == ["COMPLETE"] * trials
        assert remaining_folders(tmp_path) == [f"trial_{optimizer.study.best_trial.number}"]
    assert len({trial.params["train.beta2"] for trial in optimizer.study.trials}) == 4


def test_resumed_study_matches_uninterrupted(tmp_path):
    def trials_of(folder: Path, *counts: int) -> list[tuple]:
        for n_trials in counts:
            folder.mkdir(exist_ok=True)
            storage = f"sqlite:///{folder / 'study.db'}"
            optimizer = make_optimizer(folder, n_trials=n_trials, storage=storage, n_startup_trials=2)
            optimizer.optimize()
        return [(trial.params, trial.value, trial.intermediate_values) for trial in optimizer.study.trials]

    assert trials_of(tmp_path / "one", 5) == trials_of(tmp_path / "other", 1, 3, 5)


def test_folder_of_another_study_is_refused(tmp_path):
    make_optimizer(tmp_path, n_trials=1, storage=f"sqlite:///{tmp_path / 'one.db'}").optimize()
    with pytest.raises(UserError, match=r"train.checkpoint_dir: .* has trial_0 of another study"):
        make_optimizer(tmp_path, n_trials=1, storage=f"sqlite:///{tmp_path / 'other.db'}").optimize()


def test_other_settings_are_refused(tmp_path):
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    make_optimizer(tmp_path, n_trials=1, storage=storage).optimize()
    with pytest.raises(UserError) as error:
        make_optimizer(tmp_path, n_trials=2, storage=storage, training={"max_steps": 4, "device": "auto"}).optimize()
    assert error.value.problems == [
        "train.max_steps: 4 was requested, the study has 8",
        "study_name: gpt2_optimization exists with other settings; choose another name",
    ]


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_only_the_best_trial_keeps_its_checkpoints(tmp_path, direction):
    optimizer = make_optimizer(tmp_path, n_trials=3, sampler="random", direction=direction)
    optimizer.optimize()
    best = (min if direction == "minimize" else max)(optimizer.study.trials, key=lambda trial: trial.value)
    assert remaining_folders(tmp_path) == [f"trial_{best.number}"]
    record = checkpoint.read_record(tmp_path / "kept" / f"trial_{best.number}" / run_folder.BEST)
    assert record["progress"]["val_loss"] == best.value
    assert record["train"]["learning_rate"] == best.params["train.learning_rate"]


@pytest.mark.parametrize(
    ("pruner", "n_warmup_steps", "evaluations", "state"),
    [
        ("median", 0, [0], "PRUNED"),
        ("median", 2, [0, 1, 2], "PRUNED"),
        ("median", 3, [0, 1, 2, 3], "COMPLETE"),  # at its end a trial is finished, not pruned
        ("asha", 2, [0, 1, 2], "PRUNED"),
        ("none", 0, [0, 1, 2, 3], "COMPLETE"),
    ],
)
def test_trial_behind_the_others_is_pruned_after_the_warm_up(tmp_path, pruner, n_warmup_steps, evaluations, state):
    storage = storage_with(tmp_path, {}, {"train.learning_rate": 1e-4})
    settings = {"pruner": pruner, "n_startup_trials": 1, "n_warmup_steps": n_warmup_steps}
    optimizer = make_optimizer(tmp_path, n_trials=2, storage=storage, **settings)
    assert optimizer.optimize() == GOOD
    assert states(optimizer) == ["COMPLETE", state]
    slow = optimizer.study.trials[1]
    assert list(slow.intermediate_values) == evaluations
    if state == "PRUNED":
        assert slow.user_attrs["reason"] == f"behind other trials at step {2 * len(evaluations)}"
    assert remaining_folders(tmp_path) == ["trial_0"]


def test_hyperband_prunes(tmp_path):
    slower_and_slower = [{"train.learning_rate": 1e-2 / 2**power} for power in range(6)]
    optimizer = make_optimizer(
        tmp_path, n_trials=6, storage=storage_with(tmp_path, *slower_and_slower), pruner="hyperband"
    )
    assert optimizer.optimize() == GOOD
    assert set(states(optimizer)) == {"COMPLETE", "PRUNED"}


# ---------------------------------------------------------------------------------------------------------------------
# What goes wrong


class Fragile(GPT2Model):
    """A model with a loss of NaN at high dropout and an error at low dropout. Only one instance may exist at a time."""

    alive: ClassVar = weakref.WeakSet()

    def __init__(self, config: GPT2Config):
        assert not self.alive, "the model of the previous trial still exists"
        super().__init__(config)
        self.alive.add(self)
        self.circle = [self]  # a reference cycle, which only garbage collection frees
        if config.dropout < 0.1:
            raise RuntimeError("too dry")
        if config.dropout > 0.2:
            torch.nn.init.constant_(self.final_norm.bias, float("nan"))


DIVERGES, BREAKS = {"model.dropout": 0.3}, {"model.dropout": 0.0}


def test_diverged_trial_is_pruned_broken_trial_failed_and_study_continues(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(optimize, "GPT2Model", Fragile)
    storage = storage_with(tmp_path, DIVERGES, BREAKS, {}, BREAKS, DIVERGES)
    optimizer = make_optimizer(tmp_path, n_trials=5, storage=storage)
    with caplog.at_level(logging.INFO, logger="study"):
        assert optimizer.optimize() == GOOD
    assert states(optimizer) == ["PRUNED", "FAIL", "COMPLETE", "FAIL", "PRUNED"]
    reasons = [trial.user_attrs.get("reason") for trial in optimizer.study.trials]
    diverged = reasons[0]
    assert diverged.startswith("step 1 (batch 1 of epoch 1): the loss is nan")
    assert reasons == [diverged, "RuntimeError: too dry", None, "RuntimeError: too dry", diverged]
    assert not any("tokens_saved" in trial.user_attrs.get("spent", {}) for trial in optimizer.study.trials)
    assert 'raise RuntimeError("too dry")' in optimizer.study.trials[1].user_attrs["traceback"]
    lines = [record.getMessage() for record in caplog.records if record.name == "study"]
    assert all((reason or "complete") in line for reason, line in zip(reasons, lines, strict=True))
    assert remaining_folders(tmp_path) == ["trial_2"]
    assert not Fragile.alive


def test_study_without_any_value_is_a_one_line_error(tmp_path, monkeypatch):
    monkeypatch.setattr(optimize, "GPT2Model", Fragile)
    storage = storage_with(tmp_path, DIVERGES, BREAKS)
    with pytest.raises(UserError, match=r"none of its 2 trials gave a value .*trial 1: RuntimeError: too dry") as error:
        make_optimizer(tmp_path, n_trials=2, storage=storage).optimize()
    assert error.value.exit_code == 1


class Interrupts(list):
    """16 blocks an epoch; sends one Ctrl-C when the 12th block is read."""

    def __getitem__(self, index):
        self.taken = getattr(self, "taken", 0) + 1
        if self.taken == 12:
            os.kill(os.getpid(), signal.SIGINT)
        return super().__getitem__(index)


def test_interrupted_trial_resumes_and_matches_uninterrupted(tmp_path):
    def make(name: str, blocks: list) -> OptunaOptimizer:
        (tmp_path / name).mkdir(exist_ok=True)
        storage = f"sqlite:///{tmp_path / name / 'study.db'}"
        return make_optimizer(tmp_path / name, blocks, n_trials=2, storage=storage, sampler="random", keep="all")

    straight = make("straight", BLOCKS)
    straight.optimize()
    optimizer = make("interrupted", Interrupts(BLOCKS))
    with pytest.raises(Interrupted) as interruption:
        optimizer.optimize()
    assert interruption.value.code == 128 + signal.SIGINT
    assert states(optimizer) == ["WAITING"]
    saved = checkpoint.read_record(tmp_path / "interrupted" / "kept" / "trial_0" / run_folder.LAST)["progress"]
    assert 0 < saved["step"] == optimizer.study.trials[0].user_attrs["spent"]["steps"] < 8

    again = make("interrupted", BLOCKS)
    again.optimize()
    assert states(again) == ["COMPLETE", "COMPLETE"]
    assert [(t.params, t.value, t.intermediate_values) for t in again.study.trials] == [
        (t.params, t.value, t.intermediate_values) for t in straight.study.trials
    ]


def test_timeout_interrupts_the_running_trial(tmp_path, monkeypatch):
    monkeypatch.setenv("GPT2_FAULT", "slow@1-9999")
    storage, claim = f"sqlite:///{tmp_path / 'study.db'}", Study.claim

    def claim_a_second_before_the_end(study: Study) -> list[optuna.trial.Trial]:
        trials = claim(study)
        study.deadline = time.time() + 1
        return trials

    monkeypatch.setattr(Study, "claim", claim_a_second_before_the_end)
    optimizer = make_optimizer(tmp_path, n_trials=9, timeout=100, storage=storage, training={"max_steps": 400})
    with pytest.raises(UserError, match="no trial has ended yet"):
        optimizer.optimize()
    assert states(optimizer) == ["WAITING"]
    assert optimizer.study.trials[0].user_attrs["spent"]["seconds"] < 2


def test_trial_longer_than_its_timeout_is_pruned(tmp_path, monkeypatch):
    monkeypatch.setenv("GPT2_FAULT", "slow@1-9999")
    optimizer = make_optimizer(tmp_path, n_trials=2, trial_timeout=1, training={"max_steps": 400})
    with pytest.raises(UserError, match="longer than trial_timeout=1 seconds"):
        optimizer.optimize()
    assert states(optimizer) == ["PRUNED", "PRUNED"]


@pytest.mark.parametrize(
    ("training", "study", "problem"),
    [
        ({}, {"sampler": "TPS"}, "optuna.sampler: 'TPS' is none of tpe, random, cmaes, gp, qmc"),
        (
            {},
            {"sampler": "grid"},
            "optuna.sampler: a grid needs values, and train.learning_rate is a range from",
        ),
        ({}, {"n_trials": 0}, "optuna.n_trials: 0 is not"),
        ({"accumulation_steps": 0}, {}, "train.accumulation_steps: 0 is not"),
        ({"min_learning_rate": 1e-3}, {}, "train.min_learning_rate: 0.001 is above train.learning_rate=0.0001"),
        ({"device": "cuda:99"}, {}, "train.device: there is no cuda:99 here"),
    ],
)
def test_problem_is_reported_before_any_trial(tmp_path, training, study, problem):
    with pytest.raises(UserError, match=problem) as error:
        make_optimizer(tmp_path, training=training, **study)
    assert len(error.value.problems) == 1


def test_unusable_storage_is_reported_without_password(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"storage: sqlite:.* cannot be opened: ") as error:
        make_optimizer(tmp_path, storage=f"sqlite:///{tmp_path}/file/study.db").optimize()
    assert len(error.value.problems[0].splitlines()) == 1
    with pytest.raises(UserError) as error:
        make_optimizer(tmp_path, storage="postgresql://me:secret@127.0.0.1:9/db").optimize()
    assert "secret" not in str(error.value)


def test_other_direction_is_refused(tmp_path):
    storage = storage_with(tmp_path)
    with pytest.raises(UserError, match=r"direction: maximize was requested, the study has minimize"):
        make_optimizer(tmp_path, storage=storage, direction="maximize").optimize()
