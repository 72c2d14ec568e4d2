"""What a command line searches or sweeps: the settings in `hydra.sweeper`, and the values of each key.

Everything here is checked before anything runs. The notation is that of Hydra's Optuna plugin.
"""

import re
from dataclasses import fields
from itertools import islice
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.types import (
    ChoiceSweep,
    Glob,
    IntervalSweep,
    Override,
    Quote,
    QuotedString,
    RangeSweep,
    Transformer,
)
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gpt2.cli.compose import (
    KEYS_WITHOUT_EFFECT,
    compose,
    group_options,
    hydra_syntax,
    keyed_error,
    leaves,
    parsed,
)
from gpt2.config import OptunaConfig, StudyConfig
from gpt2.errors import UserError, one_line
from gpt2.runtime.repository import CONF
from gpt2.validation import COUNT, Problems, out_of_bounds, validate

if TYPE_CHECKING:  # a run without a study does not wait for Optuna's import
    from optuna.distributions import BaseDistribution

    from gpt2.search.algorithms import Algorithms

KEY = "hydra.sweeper."
MAX_RUNS = 1_000  # limit for a sweep, whose runs are all checked before the first one starts
KEYS_WITHOUT_EFFECT_IN_STUDY = ("name", "study", "inference", "started_with")  # keys or groups


# ---------------------------------------------------------------------------------------------------------------------
# The settings in `hydra.sweeper`


def study_sweeper(overrides: list[str]) -> DictConfig | None:
    """`hydra.sweeper` of a command line that runs a study, its interpolations resolved; None without a study.

    Raises:
        UserError: It cannot be composed.
    """
    try:
        composed = compose("train", overrides, with_hydra=True)
        sweeper = composed.hydra.sweeper
        if sweeper.get("_target_") != StudyConfig._target_:
            return None
        if sweeper.storage is None:
            sweeper.storage = f"sqlite:///{Path(composed.hydra.sweep.dir).absolute()}/study.db"
        OmegaConf.resolve(sweeper)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(keyed_error(error)) from error
    return sweeper


def validate_sweeper(fixed: list[str]) -> Problems:
    """The problem of a command line with a custom sweeper, because `hparams_search` chooses the sweeper."""
    values = {override.key_or_group: override.value() for override in parsed(fixed)}
    chosen, search = values.get("hydra/sweeper"), values.get("hparams_search")
    if "hydra/sweeper" not in values or chosen == "study" or (chosen == "basic" and search is None):
        return []
    remedy = f"hparams_search={search} has its own" if search else "a study is hparams_search=NAME"
    return [f"hydra/sweeper={hydra_syntax(chosen)}: {remedy}; leave it out"]


def study_settings(sweeper: DictConfig) -> OptunaConfig:
    values = {field.name: sweeper[field.name] for field in fields(OptunaConfig)}
    names = {key: str(sweeper[key].get("name")) for key in ("sampler", "pruner")}
    return OptunaConfig(**values | names)


def algorithms_of(sweeper: DictConfig, seed: int | None = None) -> "Algorithms":
    """The sampler and the pruner. `seed` is separate: a job cannot resolve its interpolation and needs no seed."""
    from gpt2.search.algorithms import Algorithms

    def options(algorithm: DictConfig) -> dict[str, Any]:
        return {str(key): algorithm[key] for key in algorithm if key not in ("name", "seed")}

    return Algorithms(study_settings(sweeper), seed, options(sweeper.sampler), options(sweeper.pruner))


def validate_study(sweeper: DictConfig, launcher: str) -> Problems:
    """The problems of a study's settings. `search_space` finds those of the space, the sampler and the pruner.

    Args:
        launcher: The class of Hydra's launcher.
    """
    from gpt2.search.storage import validate_storage

    problems = validate(study_settings(sweeper), KEY)
    problems += out_of_bounds(sweeper, {"n_jobs": COUNT}, KEY)
    if sweeper.n_jobs > 1 and "BasicLauncher" in launcher:
        problems.append(f"{KEY}n_jobs: {sweeper.n_jobs} trials at a time need hydra/launcher=joblib")
    name = sweeper.study_name
    groups = sorted(path.name for path in CONF.iterdir() if path.is_dir())
    if not re.fullmatch(r"[A-Za-z]\w*(-\w+)*", name) or name in groups:  # the name becomes a group: +NAME=best
        problems.append(
            f"{KEY}study_name: {name!r} must be letters, digits, '_' and '-', a letter first, and none of "
            f"{', '.join(groups)}"
        )
    if problem := validate_storage(sweeper.storage):
        problems.append(f"{KEY}storage: {problem}")
    return problems


# ---------------------------------------------------------------------------------------------------------------------
# The space, in Hydra's notation


def swept_values(swept: list[Override]) -> list[list[str]]:
    """For each sweep, one override for each value; for sweeps without a study.

    Raises:
        UserError: A sweep has no values, or too many.
    """
    choices, problems = list[list[str]](), list[str]()
    for override in swept:
        line, value, key = override.input_line, override.value(), override.get_key_element()
        values: list[str] = []
        if isinstance(value, IntervalSweep):
            problems.append(
                f"{line}: an interval needs hparams_search=NAME; a sweep needs values, such as train.beta2=0.9,0.99"
            )
        elif problem := problem_of_range(override):
            problems.append(problem)
        elif isinstance(value, Glob):
            values = value.filter(group_options("train", override.key_or_group))
            if not values:
                problems.append(f"{line}: no file of the group has such a name")
        else:
            every = override.sweep_iterator(transformer=_as_text)
            values = list(map(str, islice(every, MAX_RUNS + 1)))
        choices.append([f"{key}={text}" for text in values])
    if prod(map(len, choices)) > MAX_RUNS:
        problems.append(f"-m: more than {MAX_RUNS:,} runs; a search tries some of them, hparams_search=NAME")
    if problems:
        raise UserError(*problems)
    return choices


def with_choices_listed(override: Override) -> str:
    """A sweep with its choices as a list, `key='a b',c`: Hydra loses the quotes in `choice('a b',c)`."""
    if not isinstance(override.value(), ChoiceSweep):
        return str(override.input_line)
    return f"{override.get_key_element()}={','.join(map(str, override.sweep_iterator(transformer=_as_text)))}"


def _as_text(value: Any) -> str:
    """A value in the notation of an argument; `${` in it is an interpolation."""
    if not isinstance(value, str) or re.fullmatch(r"[\w./:-]+", value):
        return Transformer.str(value)
    return QuotedString(value, Quote.single).with_quotes()


def search_space(sweeper: DictConfig, swept: list[Override], fixed: list[str]) -> list[list[str]]:
    """The sweeps of `hydra.sweeper.params` and of the command line, without the keys that the command line fixes.

    Returns:
        For each key, one override for every choice, or for both ends of a range.

    Raises:
        UserError: The space is empty, invalid or not for this sampler, or the sampler or the pruner is invalid.
    """
    from gpt2.search.algorithms import extremes
    from gpt2.search.trial import quiet_optuna

    try:
        params = parsed([f"{key}={value}" for key, value in sweeper.params.items() if value is not None])
    except HydraException as error:
        raise UserError(f"{KEY}params: {grammar_error(error)}") from error
    given = {override.key_or_group for override in [*parsed(fixed), *swept]}
    space = [override for override in params if override.key_or_group not in given] + swept
    problems = [problem for override in space if (problem := _problem_of_sweep(override))]
    if not space:
        problems.append(f"{KEY}params: nothing is left to search, the command line fixes every parameter")
    drawn = {} if problems else distributions([str(override.input_line) for override in space])[0]
    with quiet_optuna():
        problems += algorithms_of(sweeper, sweeper.sampler.get("seed")).problems(KEY, drawn)
    if problems:
        raise UserError(*problems)
    return [[f"{key}={value}" for value in extremes(distribution)] for key, distribution in drawn.items()]


def _problem_of_sweep(override: Override) -> str | None:
    from gpt2.search.algorithms import extremes

    line, value, key = override.input_line, override.value(), override.key_or_group
    if key in ("data.tokenizer", "data.vocab_size"):
        reason = "losses per token cannot be compared between tokenizers"
        return f"{key}: {reason}; sweep it without a study, and compare bits per byte"
    if not override.is_sweep_override():
        return f"{KEY}params: {line} has one value, a search needs a sweep"
    if tags := set(getattr(value, "tags", ())) - {"log"}:
        return f"{line}: there is no tag {', '.join(sorted(map(str, tags)))}, only log"
    if isinstance(value, Glob):
        return f"{line}: a study needs the names, such as model=gpt2,gpt2_medium"
    if problem := problem_of_range(override):
        return problem
    try:
        space = distributions([str(line)])[0]
    except ValueError as error:
        return f"{line}: {one_line(error)}"
    choices = [choice for distribution in space.values() for choice in extremes(distribution)]
    if len(set(choices)) == 1 or not space:
        return f"{line}: has one value; {key}=VALUE fixes it, a search needs two"
    if twice := {str(choice) for choice in choices if choices.count(choice) > 1}:
        return f"{line}: {', '.join(sorted(twice))} is repeated"
    return None


def grammar_error(error: HydraException) -> str:
    """What is wrong with an argument that Hydra cannot parse."""
    if not isinstance(error.__cause__, TypeError | ValueError):
        hint = "experiment=NAME chooses a preset" if re.search(r"\.(py|ya?ml)\b", str(error)) else ""
        hint = hint or """quote a value with special characters for Hydra and the shell: "key='a,b'\""""
        return f"not of the form key=value ({hint})"
    reason = one_line(error.__cause__)  # raised by a function such as choice()
    return "Hydra's functions accept no null; write key=null,1e-5" if "NoneType is incompatible" in reason else reason


def problem_of_range(override: Override) -> str | None:
    """Why `range(...)` has no value; None for any other sweep."""
    value = override.value()
    if not isinstance(value, RangeSweep) or (value.step != 0 and next(iter(value.range()), None) is not None):
        return None
    return f"{override.input_line}: no number from {value.start} to below {value.stop} in steps of {value.step}"


def distributions(overrides: list[str]) -> "tuple[dict[str, BaseDistribution], dict[str, Any]]":
    """The sweeps of a command line as Optuna's distributions, and its fixed values."""
    # Private: checked with hydra-optuna-sweeper 1.4.0rc3, see test_private_api_of_the_optuna_plugin.
    from hydra_plugins.hydra_optuna_sweeper._impl import create_params_from_overrides

    space, fixed, _ = create_params_from_overrides([with_choices_listed(override) for override in parsed(overrides)])
    return {key: distribution for key, distribution in space.items() if key not in fixed}, fixed


def shared_settings(fixed: list[str], searched: set[str]) -> dict[str, Any]:
    """The configuration that all trials have in common. Interpolations are not resolved: some depend on the space."""
    composed = leaves(compose("train", fixed), resolve=False)
    ignored = {*searched, *KEYS_WITHOUT_EFFECT, *KEYS_WITHOUT_EFFECT_IN_STUDY}
    return {key: value for key, value in composed.items() if {key, key.split(".")[0]}.isdisjoint(ignored)}
