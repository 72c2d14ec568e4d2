"""Checks a whole command line before anything runs, and reports every problem in it at once.

A single run is composed here, once, and runs without being composed again. Of a sweep all combinations are checked; of
a study both ends of each range.
"""

from argparse import Namespace
from contextlib import suppress
from copy import deepcopy
from itertools import chain

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gpt2.cli.complete import resolve
from gpt2.cli.compose import compose, compose_defaults, composition_error, parsed
from gpt2.cli.launchers import validate_launcher
from gpt2.cli.sweeper import (
    grammar_error,
    search_space,
    study_sweeper,
    swept_values,
    validate_study,
    validate_sweeper,
)
from gpt2.errors import UserError
from gpt2.search.pairwise import combined
from gpt2.validation import HOLDS_ANY_TEXT, NO_PASSWORD, has_password


def asks_for_information(options: Namespace) -> bool:
    """Whether a command line asks Hydra for information, such as --cfg, instead of running something."""
    return any((options.hydra_help, options.cfg, options.info, options.shell_completion))


def check_run(name: str, options: Namespace) -> DictConfig:
    """Compose a single run, with its `hydra` node. `gpt2.cli.complete.resolve` completes and validates it.

    Raises:
        UserError: With all problems.
    """
    fixed, _, problems = check_overrides(name, options)
    if not problems:
        with suppress(HydraException, OmegaConfBaseException):  # whose causes are found argument by argument
            return compose(name, fixed, with_hydra=True)
    raise UserError(*dict.fromkeys(problems + validate_rest(name, fixed, problems)))


def check_sweep(name: str, options: Namespace) -> None:
    """Compose and validate everything that a sweep or a study of train.py would run.

    Raises:
        UserError: With all problems.
    """
    fixed, swept, problems = check_overrides(name, options)
    problems += validate_rest(name, fixed, problems) if problems else validate_sweep(fixed, swept)
    if problems:
        raise UserError(*dict.fromkeys(problems))


def check_overrides(name: str, options: Namespace) -> tuple[list[str], list[Override], list[str]]:
    """Check the form of each argument.

    Returns:
        The arguments with one value, those that are swept, and the problems of all others.
    """
    fixed, swept, problems = [], [], []
    if any((options.config_path, options.config_dir, options.config_name, options.experimental_rerun)):
        problems.append(
            "--config-path, --config-dir, --config-name, --experimental-rerun: a preset goes to conf/experiment"
        )
    if options.multirun and name != "train":
        problems.append("-m: only train.py makes several runs")
    for text in options.overrides:
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException as error:
            problems.append(f"{text}: {grammar_error(error)}")
            continue
        if problem := problem_of(override, options.multirun):
            problems.append(problem)
        elif override.is_sweep_override() and options.multirun:
            swept.append(override)
        else:
            fixed.append(text)
    return fixed, swept, problems


def problem_of(override: Override, multirun: bool) -> str | None:
    """Why an argument is rejected, in one line; None if it may be used."""
    text, key, is_sweep = override.input_line, override.key_or_group, override.is_sweep_override()
    if override.is_delete():
        return f"{text}: keys cannot be deleted; null switches an optional value off"
    if key.rpartition(".")[2] not in HOLDS_ANY_TEXT and has_password(text):
        return f"{key}: {NO_PASSWORD}"
    if key in ("hydra", "hydra.sweeper") and isinstance(override.value(), dict):
        return f"{key}: one key at a time, such as hydra.sweeper.n_trials=20"
    if key.split(".")[0] == "study":
        return f"{text}: only a study sets that"
    if key == "resume" and multirun:
        return f"{text}: one run at a time, without -m; train.auto_resume=true resumes a sweep"
    if key == "train.auto_resume" and is_sweep:
        return f"{text}: one value for all runs of a sweep"
    if key == "hparams_search" and override.value() and not multirun:
        return f"{text}: a search is many runs, it needs -m"
    if is_sweep and key.startswith("hydra."):
        return f"{text}: Hydra's own keys have one value; a sweep is over other keys, such as train.beta2=0.9,0.99"
    return None


def validate_sweep(fixed: list[str], swept: list[Override]) -> list[str]:
    """Problems of a sweep in all its combinations, or of a study at both ends of each range that it searches."""
    if problems := validate_sweeper(fixed):
        return problems
    try:
        sweeper = study_sweeper(fixed)
    except UserError as error:
        return validate_command_line("train", fixed) or error.problems
    launcher = compose("train", fixed, with_hydra=True).hydra.launcher
    problems += validate_launcher(launcher)
    if sweeper:
        problems += validate_study(sweeper, launcher._target_)
    try:
        choices = search_space(sweeper, swept, fixed) if sweeper else swept_values(swept)
    except UserError as error:
        return problems + error.problems
    composed = compose("train", fixed)
    misfits = {value: problem for value in chain(*choices) if (problem := misfit(composed, fixed, value))}
    problems += misfits.values()
    choices = [[value for value in values if value not in misfits] for values in choices]
    for combination in combined(list(filter(None, choices))):  # a misfit would be found again in each
        overrides = [*fixed, *combination]
        changed = with_values(composed, list(combination))
        try:
            if changed is None:
                problems += validate_command_line("train", overrides)
            else:
                resolve("train", changed, overrides)
        except UserError as error:
            problems += error.problems
    return problems


def misfit(composed: DictConfig, fixed: list[str], override: str) -> str | None:
    """Why a value of a sweep does not compose; None if it does."""
    if with_values(composed, [override]) is not None:
        return None
    try:
        compose("train", [*fixed, override])
    except (HydraException, OmegaConfBaseException) as error:
        problem = composition_error(error)
        hint = "; int(...) around an interval draws whole numbers" if "'float' could not be conv" in problem else ""
        return f"{override}: {problem}{hint}"
    return None


def with_values(composed: DictConfig, overrides: list[str]) -> DictConfig | None:
    """A copy of a composition with single values changed, four times as fast as composing again; None if a group
    changes or a value does not fit.
    """
    result = deepcopy(composed)
    for override in parsed(overrides):
        key = override.key_or_group
        if override.is_add() or "." not in key or OmegaConf.is_config(OmegaConf.select(result, key)):
            return None
        try:
            OmegaConf.update(result, key, override.value())
        except OmegaConfBaseException:
            return None
    return result


def validate_rest(name: str, overrides: list[str], problems: list[str]) -> list[str]:
    """Problems of a single run without the arguments that have problems already, whose keys are missing there."""
    refused = {problem.partition(":")[0].partition("=")[0].lstrip("+") for problem in problems}
    others = validate_command_line(name, overrides)
    return [problem for problem in others if problem.partition(":")[0] not in refused]


def validate_command_line(name: str, overrides: list[str]) -> list[str]:
    """Problems of a single run: each override that does not compose, and the problems of the others together."""
    accepted: list[str] = []
    problems: list[str] = []
    try:
        composed = compose(name, overrides)
        accepted = overrides
    except (HydraException, OmegaConfBaseException):
        composed = compose_defaults(name)
        for override in overrides:
            try:
                composed = compose(name, [*accepted, override])
                accepted.append(override)
            except (HydraException, OmegaConfBaseException) as error:
                problems.append(f"{override}: {composition_error(error)}")
    try:
        resolve(name, composed, accepted)
    except UserError as error:
        refused = {override.lstrip("+").split("=")[0] for override in overrides if override not in accepted}
        problems += [problem for problem in error.problems if problem.split(":")[0] not in refused]
    return problems
