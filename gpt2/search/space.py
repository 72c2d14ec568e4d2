"""Read the search space of `conf/hparams_search/optuna.yaml` without Hydra."""

import ast

import yaml
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from gpt2.runtime.repository import CONF

SEARCH = CONF / "hparams_search" / "optuna.yaml"


def default_space() -> dict[str, BaseDistribution]:
    """Return the search space of `hparams_search=optuna`, by key of the configuration."""
    params = yaml.safe_load(SEARCH.read_bytes())["hydra"]["sweeper"]["params"]
    return {key: distribution(ast.parse(sweep, mode="eval").body) for key, sweep in params.items()}


def distribution(sweep: ast.expr, log: bool = False, integer: bool = False) -> BaseDistribution:
    """Convert a sweep in Hydra's notation, such as `int(tag(log, interval(10, 500)))`, which is also Python syntax.

    Raises:
        ValueError: It is not a choice, an interval, or an interval in `int(...)` or `tag(log, ...)`.
    """
    match sweep:
        case ast.Call(ast.Name("tag"), [ast.Name("log"), inner]):
            return distribution(inner, True, integer)
        case ast.Call(ast.Name("int"), [inner]):
            return distribution(inner, log, True)
        case ast.Call(ast.Name("choice"), choices):
            return CategoricalDistribution([ast.literal_eval(choice) for choice in choices])
        case ast.Call(ast.Name("interval"), [low, high]):
            cls = IntDistribution if integer else FloatDistribution
            return cls(ast.literal_eval(low), ast.literal_eval(high), log=log)
    raise ValueError(f"{SEARCH}: {ast.unparse(sweep)} is not choice(...), interval(...) or tag(log, interval(...))")
