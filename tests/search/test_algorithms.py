"""The tables of samplers and pruners."""

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from gpt2.config import OptunaConfig
from gpt2.optimize import SPACE
from gpt2.search.algorithms import SAMPLERS, Algorithms, grid
from gpt2.search.space import distribution


def is_in_space(values: dict) -> bool:
    return all(space._contains(space.to_internal_repr(values[key])) for key, space in SPACE.items())


@pytest.mark.parametrize("name", ["TPE", "Random", "CmaEs", "GP", "QMC"])
@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_every_sampler_samples_within_the_space_and_reproducibly(name):
    def draws(spelling: str, seed: int) -> list[dict]:
        config = OptunaConfig(sampler=spelling, n_startup_trials=1)
        study = optuna.create_study(sampler=Algorithms(config, seed).sampler(0, SPACE))
        assert type(study.sampler).__name__ == f"{name}Sampler"
        for _ in range(3):
            trial = study.ask(SPACE)
            study.tell(trial, trial.params["model.dropout"])
        return [trial.params for trial in study.trials]

    first = draws(name, 2**63 - 1)
    assert all(is_in_space(params) for params in first)
    assert draws(name.upper(), 2**63 - 1) == first
    assert draws(f"{name}sampler", 5)[-1] != first[-1]


@pytest.mark.parametrize(
    ("short", "name"),
    [
        *(("median", "MedianPruner"), ("asha", "SuccessiveHalvingPruner")),
        *(("hyperband", "HyperbandPruner"), ("none", "NopPruner")),
    ],
)
def test_pruner_by_short_name_or_class(short, name):
    for spelling in (short, short.upper(), name, name.lower()):
        assert type(Algorithms(OptunaConfig(pruner=spelling), seed=1).pruner()).__name__ == name


@pytest.mark.parametrize(
    ("config", "sampler", "pruner", "problem"),
    [
        (OptunaConfig(sampler="TPS"), {}, {}, "sampler: 'TPS' is none of tpe, random, cmaes, gp, qmc, grid"),
        (OptunaConfig(pruner="medain"), {}, {}, "pruner: 'medain' is none of median, asha, hyperband, none"),
        (OptunaConfig(sampler="grid"), {}, {}, "sampler: a grid needs values, and train.learning_rate is a range"),
        (OptunaConfig(), {"speed": 3}, {}, "sampler: TPESampler.__init__() got an unexpected keyword argument 'speed'"),
        (OptunaConfig(), {}, {"n_min_trials": 0}, "pruner: Number of trials for pruning must be at least 1"),
    ],
)
def test_problems_of_samplers_and_pruners(config, sampler, pruner, problem):
    (found,) = Algorithms(config, 1, sampler, pruner).problems("optuna.", SPACE)
    assert found.startswith(f"optuna.{problem}")


def test_grid_has_every_value():
    space = {
        "train.seed": CategoricalDistribution([3, 1]),
        "train.max_steps": IntDistribution(2, 8, step=3),
        "train.beta2": FloatDistribution(0.1, 0.4, step=0.1),
    }
    assert grid(space) == {"train.seed": [3, 1], "train.max_steps": [2, 5, 8], "train.beta2": [0.1, 0.2, 0.3, 0.4]}


def test_every_sampler_is_in_the_documented_list():
    assert list(SAMPLERS) == ["tpe", "random", "cmaes", "gp", "qmc", "grid"]


@pytest.mark.parametrize("sweep", ["range(1, 3)", "tag(lin, interval(0, 1))", "interval(0, 1, 2)", "3"])
def test_unsupported_sweeps_in_the_default_space_are_refused(sweep):
    import ast

    with pytest.raises(ValueError, match="is not choice"):
        distribution(ast.parse(sweep, mode="eval").body)
