"""Checks a whole command line before anything runs, and reports every problem in it at once.

A single run is composed here, and not again before it runs. The checks of a sweep cover every value and every pair of
values; those of a study cover both ends of each range.
"""

import os
import re
from argparse import Namespace
from bisect import bisect_left
from collections.abc import Sequence
from contextlib import suppress
from copy import deepcopy
from itertools import chain
from typing import Any

from hydra.core.override_parser.types import ChoiceSweep, Glob, Override, OverrideType, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gpt2.cli.complete import resolve, typed
from gpt2.cli.compose import (
    compose,
    compose_defaults,
    composition_error,
    did_you_mean,
    group_options,
    hydra_syntax,
    keyed_error,
    override_at_fault,
    parsed,
)
from gpt2.cli.launchers import validate_launcher
from gpt2.cli.search_space import (
    grammar_error,
    search_space,
    study_sweeper,
    swept_values,
    validate_study,
    validate_sweeper,
)
from gpt2.config import SCHEMAS
from gpt2.errors import UserError, collecting
from gpt2.search.pairwise import combined
from gpt2.validation import FREE_TEXT_KEYS, PASSWORD_REFUSED, has_password


def asks_for_information(options: Namespace) -> bool:
    """Whether a command line requests information from Hydra, such as --cfg, instead of running something."""
    return any((options.hydra_help, options.cfg, options.info, options.shell_completion))


def check_flags(options: Namespace) -> None:
    """Refuse flags that contradict each other.

    Raises:
        UserError: Two flags contradict each other.
    """
    flags = {"-m": options.multirun, "-r": options.run, "--cfg": options.cfg, "--info": options.info}
    given = [flag for flag, value in {**flags, "-sc": options.shell_completion}.items() if value]
    if len(given) > 1:
        raise UserError(f"{given[0]}: not together with {given[1]}")
    if options.resolve and not options.cfg:
        raise UserError("--resolve: only with --cfg")


def check_run(name: str, options: Namespace) -> DictConfig:
    """Compose a single run, with its `hydra` node. `gpt2.cli.complete.resolve` completes and validates it.

    Raises:
        UserError: The command line is invalid. The error has all problems.
    """
    fixed, _, problems = check_overrides(name, options)
    with suppress(HydraException, OmegaConfBaseException):  # `validate_command_line` finds the causes
        composed = compose(name, fixed, with_hydra=True)
        problems += validate_composed(name, composed, "run")
        if not problems:
            return composed
    raise UserError(*dict.fromkeys(problems + validate_command_line(name, fixed, problems)))


def check_sweep(name: str, options: Namespace) -> None:
    """Compose and validate everything that a sweep or a study of train.py would run.

    Raises:
        UserError: The command line is invalid. The error has all problems.
    """
    fixed, swept, problems = check_overrides(name, options)
    problems += validate_command_line(name, fixed, problems) if problems else validate_sweep(fixed, swept)
    if problems:
        raise UserError(*dict.fromkeys(problems))


def check_overrides(name: str, options: Namespace) -> tuple[list[str], list[Override], list[str]]:
    """Check the form of each argument.

    Returns:
        The arguments with one value, the sweeps, and the problems of the other arguments.
    """
    fixed, swept, problems = [], [], []
    for flag in ("config_path", "config_dir", "config_name", "experimental_rerun"):
        if getattr(options, flag):
            problems.append(f"--{flag.replace('_', '-')}: is not supported here; a preset goes to conf/experiment")
    if options.multirun and name != "train":
        problems.append("-m: only train.py makes several runs")
    for text in options.overrides:
        if shown(text) != text:
            problems.append(f"{shown(text)}: is not UTF-8; rename the file, or match it by a pattern, such as *.txt")
            continue
        try:
            (override,) = parsed([text])
        except HydraException as error:
            problems.append(f"{text}: {grammar_error(error)}")
            continue
        if problem := problem_of(name, override, options):
            problems.append(problem)
        elif override.is_sweep_override() and options.multirun:
            swept.append(override)
        else:
            fixed.append(text)
    return fixed, swept, problems


def shown(text: str) -> str:
    """A text of the operating system as UTF-8. Other bytes become escapes."""
    return os.fsencode(text).decode("utf-8", "backslashreplace")


def problem_of(name: str, override: Override, options: Namespace) -> str | None:
    """Why an argument is rejected, in one line; None if it may be used."""
    value, is_sweep = override.value(), override.is_sweep_override()
    text, key = override.input_line, override.key_or_group
    if override.is_delete():
        return f"{text}: keys cannot be deleted; null switches an optional value off"
    if key.rpartition(".")[2] not in FREE_TEXT_KEYS and has_password(text):
        return f"{key}: {PASSWORD_REFUSED}"
    if key.split(".")[0] == "study":
        return f"{text}: only a study sets this key"
    if key.startswith(("hydra.runtime", "hydra.overrides")):
        return f"{text}: Hydra sets that"
    if key.startswith("hydra.") and key.endswith("._target_"):
        return f"{text}: a group chooses the class, such as hydra/launcher=joblib"
    if key == "hydra.run.dir" and options.multirun and not is_sweep:
        return f"{text}: is for one run; with -m, hydra.sweep.dir is the folder of all runs"
    if key == "resume" and options.multirun:
        return f"{text}: one run at a time, without -m; train.auto_resume=true resumes a sweep"
    if key == "plan" and options.multirun and value is not False:
        return f"{text}: one run at a time, without -m"
    if key == "train.auto_resume" and is_sweep:
        return f"{text}: one value for all runs of a sweep"
    if key == "hparams_search" and value and not (options.multirun or asks_for_information(options)):
        return f"{text}: a search has many runs, so it needs -m"
    if is_sweep and override.is_hydra_override():
        return f"{text}: Hydra's own keys cannot be swept; a sweep is over other keys, such as train.beta2=0.9,0.99"
    if is_sweep and not options.multirun:
        remedy = "add -m" if name == "train" and not asks_for_information(options) else "give one value"
        return f"{text} is a sweep: {remedy}; if it is one value, a list needs brackets, a text with a comma quotes"
    if isinstance(value, dict) and "." not in key.removeprefix("hydra."):
        single = [f"{key}.{inner}={hydra_syntax(inner_value)}" for inner, inner_value in value.items()]
        return f"{key}: one key at a time, such as {single[0]}" if single else f"{text}: no value"
    may_be_name = override.type == OverrideType.CHANGE and not is_sweep and not non_names(override)
    # Composing the command line finds other wrong names. Here, each start would also have to compose the defaults.
    return None if may_be_name else problem_of_choice(name, override)


def non_names(override: Override) -> list[Any]:
    """The values that cannot name a file of a group, because Hydra parses them as a bool, null or a number."""
    value = override.value()
    choices = value.list if isinstance(value, ChoiceSweep) else [value]
    return [choice for choice in choices if not isinstance(choice, str | QuotedString | Glob)]


def problem_of_choice(name: str, override: Override) -> str | None:
    """Why a value names no file of its group; None if it may be a name, or the key is no group."""
    group, value = override.key_or_group, override.value()
    if "." in group or not (options := group_options(name, group)):
        return None
    is_new, values = override.type != OverrideType.CHANGE, non_names(override)
    is_chosen = group in compose_defaults(name, with_hydra=True).hydra.runtime.choices
    if is_chosen and not is_new and not values:
        return None
    if is_new and is_chosen:
        return f"{override.input_line}: the group is chosen already, leave out the +"
    if not (is_new or is_chosen or "/" in group):  # the presets of a study, such as learning_rate
        return f"{override.input_line}: there is no such group here{did_you_mean(SCHEMAS[name], group)}"
    for choice in values:
        word = hydra_syntax(choice) if isinstance(value, ChoiceSweep) else override.get_value_string()
        off = [option for option in options if choice in (None, False) and option in ("off", "none")]
        if off:
            hint = f"; {group}={off[0]} switches it off"
        else:
            hint = f"; quotes make it a name: {group}=\"'{word}'\"" if word in options else ""
        return f"{group}={word}: not one of {', '.join(options)}{hint}"
    return None


def validate_composed(name: str, composed: DictConfig, kind: str) -> list[str]:
    """Problems of the schema and of interpolations; if there are none, problems of Hydra's own node.

    That node has interpolations of our keys in its folders, so a problem with a key would be reported twice.
    """
    try:
        OmegaConf.to_object(typed(name, composed))
    except OmegaConfBaseException as error:
        return [keyed_error(error)]
    except UserError as error:
        return error.problems
    return validate_hydra(composed, kind)


def validate_hydra(composed: DictConfig, kind: str) -> list[str]:
    """Settings of Hydra's own node that our scripts do not support.

    Args:
        kind: `run` or `sweep`, whose folder is used.
    """
    problems = []
    if composed.hydra.job.chdir:
        problems.append("hydra.job.chdir: relative paths start in the folder of the command; leave it out")
    if composed.hydra.mode is not None:
        problems.append("hydra.mode: -m makes several runs; leave it out")
    folder = composed.hydra.runtime.cwd
    if composed.hydra.output_subdir is not None and shown(folder) != folder:  # Hydra writes it there
        problems.append(f"{shown(folder)}: the name of this folder is not UTF-8; start in another one")
    if not isinstance(composed.hydra.verbose, bool | str | ListConfig):
        problems.append("hydra.verbose: neither true nor names of loggers, [A,B]")
    for key in (f"hydra.{kind}.dir", "hydra.job.name", "hydra.output_subdir"):
        try:
            value = OmegaConf.select(composed, key, throw_on_missing=True)
        except OmegaConfBaseException as error:
            problems.append(keyed_error(error, key))
            continue
        if value is not None and not value.strip():
            problems.append(f"{key}: is empty; name a folder")
        elif value is not None and "/" in value and not key.endswith(".dir"):
            problems.append(f"{key}: {value!r} is a path, a name is wanted")
    return problems


def validate_sweep(fixed: list[str], swept: list[Override]) -> list[str]:
    """Problems of a sweep in all its combinations, or of a study at both ends of each range that it searches."""
    if problems := validate_sweeper(fixed):
        return problems
    try:
        sweeper = study_sweeper(fixed)
    except UserError as error:
        return validate_command_line("train", fixed) or error.problems
    whole = compose("train", fixed, with_hydra=True)
    launcher = whole.hydra.launcher
    problems += validate_composed("train", whole, "sweep") + validate_launcher(launcher)
    if sweeper:
        found = validate_study(sweeper, launcher._target_)
        if whole.hydra.sweeper.storage is None:  # the storage is a file in the folder of the sweep
            found = [problem.replace("hydra.sweeper.storage:", "hydra.sweep.dir:") for problem in found]
        problems += found
    try:
        choices = search_space(sweeper, swept, fixed) if sweeper else swept_values(swept)
    except UserError as error:
        return problems + error.problems
    composed = compose("train", fixed)
    rejected = {value: problem for value in chain(*choices) if (problem := problem_of_value(composed, fixed, value))}
    problems += rejected.values()
    choices = [[value for value in values if value not in rejected] for values in choices]
    for combination in combined(list(filter(None, choices))):
        overrides = [*fixed, *combination]
        changed = with_values(composed, list(combination))
        if changed is None:
            problems += validate_command_line("train", overrides)
        else:
            with collecting(problems):
                resolve("train", changed, overrides)
    return problems


def problem_of_value(composed: DictConfig, fixed: list[str], override: str) -> str | None:
    """Why a value of a sweep does not compose; None if it does."""
    if with_values(composed, [override]) is not None:
        return None
    if (error := failure_of_composition("train", [*fixed, override])) is None:
        return None
    problem = composition_error(error)
    hint = "; int(...) around an interval draws whole numbers" if "'float' could not be conv" in problem else ""
    return f"{override}: {problem}{hint}"


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


def validate_command_line(name: str, overrides: list[str], earlier: Sequence[str] = ()) -> list[str]:
    """Problems of a single run: each override that does not compose, and the problems of the others together.

    Args:
        earlier: Known problems. No further problem of their keys is returned.
    """
    found, accepted = dict[str, str](), list(overrides)
    while error := failure_of_composition(name, accepted):
        if not accepted:
            compose_defaults(name)  # raises: `conf/` itself is broken
        blamed = override_at_fault(error, accepted)
        if blamed is None:
            blamed, error = first_at_fault(name, accepted)
        accepted.remove(blamed)
        found[blamed] = f"{blamed}: {composition_error(error)}"
        with suppress(HydraException):  # the grammar refuses it
            found[blamed] = problem_of_choice(name, *parsed([blamed])) or found[blamed]
    problems = [found[override] for override in dict.fromkeys(overrides) if override in found]
    composed = compose(name, accepted)
    refused = {key_of(text) for text in (*earlier, *problems)}
    problems_of_values: list[str] = []
    with collecting(problems_of_values):
        resolve(name, composed, accepted)
    return problems + [problem for problem in problems_of_values if key_of(problem) not in refused]


def first_at_fault(name: str, overrides: list[str]) -> tuple[str, Exception]:
    """The first override that does not compose with those before it, found by bisection, and Hydra's error."""
    counts = range(1, len(overrides))
    index = bisect_left(counts, True, key=lambda count: failure_of_composition(name, overrides[:count]) is not None)
    error = failure_of_composition(name, overrides[: index + 1])
    assert error is not None
    return overrides[index], error


def failure_of_composition(name: str, overrides: list[str]) -> Exception | None:
    """Hydra's error about overrides that do not compose; None if they do."""
    try:
        compose(name, overrides)
    except (HydraException, OmegaConfBaseException) as error:
        return error
    return None


def key_of(text: str) -> str:
    """The key of an argument or of a problem, `key: what is wrong`."""
    return re.split("[:=]", text.lstrip("+"), maxsplit=1)[0]
