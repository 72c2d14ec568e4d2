"""Samplers and pruners by name, for `OptunaOptimizer` and for `hydra/sweeper`.

To add a sampler, add an entry to `SAMPLERS`, and a file of the same name with its options for the command line to
`conf/hydra/sweeper/sampler`. For pruners these are `PRUNERS` and `conf/hydra/sweeper/pruner`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import numpy as np
from optuna import pruners, samplers
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler

from gpt2.config import OptunaConfig
from gpt2.errors import one_line

Space = dict[str, BaseDistribution]


@dataclass(frozen=True)
class Algorithm:
    """A class of Optuna, and the options that differ from its defaults."""

    cls: Callable[..., Any]
    options: Callable[[OptunaConfig], dict[str, Any]] = lambda _: {}
    is_sequence: bool = False  # trials are points of one sequence, so all need the same seed


def _random_first(config: OptunaConfig) -> dict[str, Any]:
    return {"n_startup_trials": config.n_startup_trials}


SAMPLERS = {  # names are case-insensitive
    "tpe": Algorithm(samplers.TPESampler, lambda c: _random_first(c) | {"multivariate": True, "constant_liar": True}),
    "random": Algorithm(samplers.RandomSampler),
    "cmaes": Algorithm(  # draws categorical parameters at random
        samplers.CmaEsSampler,
        lambda c: _random_first(c) | {"consider_pruned_trials": True, "warn_independent_sampling": False},
    ),
    "gp": Algorithm(samplers.GPSampler, _random_first),
    "qmc": Algorithm(
        samplers.QMCSampler,
        lambda _: {"scramble": True, "warn_independent_sampling": False, "warn_asynchronous_seeding": False},
        is_sequence=True,
    ),
    "grid": Algorithm(samplers.GridSampler, is_sequence=True),
}
PRUNERS = {
    "median": Algorithm(
        pruners.MedianPruner, lambda c: _random_first(c) | {"n_warmup_steps": c.n_warmup_steps, "n_min_trials": 1}
    ),
    "asha": Algorithm(
        pruners.SuccessiveHalvingPruner, lambda c: {"min_resource": max(1, c.n_warmup_steps), "reduction_factor": 3}
    ),
    "hyperband": Algorithm(pruners.HyperbandPruner),  # without n_warmup_steps: each bracket has its own warm-up
    "none": Algorithm(pruners.NopPruner),
}


@dataclass(frozen=True)
class Algorithms:
    """The sampler and the pruner of a study."""

    config: OptunaConfig
    seed: int | None  # None: random
    sampler_options: dict[str, Any] = field(default_factory=dict)  # they override the options of the table
    pruner_options: dict[str, Any] = field(default_factory=dict)

    def sampler(self, trial: int, space: Space) -> BaseSampler:
        """Return the sampler of one trial.

        Each trial has its own sampler, seeded by its number: a sampler that is seeded once per process would
        repeat its draws when a study is resumed (https://github.com/optuna/optuna/issues/3255).
        """
        algorithm, seed = find(SAMPLERS, self.config.sampler), self.seed
        if seed is not None:  # NumPy's seeds have at most 32 bits
            seeds = np.random.SeedSequence([seed, trial])
            seed = seed % 2**32 if algorithm.is_sequence else int(seeds.generate_state(1)[0])
        options = {"search_space": grid(space)} if algorithm.cls is samplers.GridSampler else {}
        return algorithm.cls(seed=seed, **options, **algorithm.options(self.config) | self.sampler_options)

    def pruner(self) -> BasePruner:
        """Return the pruner. Its steps are the evaluations of a trial, counted from 0."""
        algorithm = find(PRUNERS, self.config.pruner)
        return algorithm.cls(**algorithm.options(self.config) | self.pruner_options)

    def problems(self, prefix: str, space: Space) -> list[str]:
        """Return why Optuna rejects the names or options."""
        problems = []
        for key, make in (("sampler", lambda: self.sampler(0, space)), ("pruner", self.pruner)):
            try:
                make()
            except (ValueError, TypeError) as error:
                problems.append(f"{prefix}{key}: {one_line(error)}")
        return problems


def find(table: dict[str, Algorithm], name: str) -> Algorithm:
    """Return the entry with this name, which may also be the name of its class.

    Raises:
        ValueError: The table has no such entry.
    """
    for short, algorithm in table.items():
        if name.lower() in (short, algorithm.cls.__name__.lower()):
            return algorithm
    raise ValueError(f"{name!r} is none of {', '.join(table)}")


def grid(space: Space) -> dict[str, list[Any]]:
    """Return all values of each parameter.

    Raises:
        ValueError: A parameter is a continuous range.
    """
    values: dict[str, list[Any]] = {}
    for key, distribution in space.items():
        if isinstance(distribution, CategoricalDistribution):
            values[key] = list(distribution.choices)
            continue
        assert isinstance(distribution, FloatDistribution | IntDistribution)
        low, high, step = distribution.low, distribution.high, distribution.step
        if step is None:
            raise ValueError(f"a grid needs values, and {key} is a range from {low} to {high}")
        count = round((high - low) / step) + 1
        # Decimal, because 0.1 + 2 * 0.1 is not 0.3 in binary floating point.
        values[key] = [type(low)(Decimal(str(low)) + n * Decimal(str(step))) for n in range(count)]
    return values


def extremes(distribution: BaseDistribution) -> Sequence[Any]:
    """Return all choices, or both ends of a range."""
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    return distribution.low, distribution.high
