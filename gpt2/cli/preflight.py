"""X."""

from argparse import Namespace
from copy import deepcopy

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gpt2.cli.complete import resolve
from gpt2.cli.compose import compose, compose_or_refuse, composition_error, parsed
from gpt2.cli.launchers import launcher_of, validate_launcher
from gpt2.cli.sweeper import search_space, study_sweeper, swept_values, validate_study
from gpt2.errors import UserError
from gpt2.search.pairwise import combined


def runs_something(options: Namespace) -> bool:
    """Whether this is a run, and not a question such as --help or --cfg, which Hydra answers itself."""
    questions = (options.help, options.hydra_help, options.cfg, options.info, options.shell_completion)
    return not any(questions)


def check_command_line(name: str, options: Namespace) -> None:
    """Compose and check everything that would run.

    Raises:
        UserError: With all the faults there are.
    """
    found: list[str] = []
    fixed: list[str] = []
    swept: list[Override] = []
    if any((options.config_path, options.config_dir, options.config_name, options.experimental_rerun)):
        found.append(
            "--config-path, --config-dir, --config-name, --experimental-rerun: a preset goes to conf/experiment"
        )
    if options.multirun and name != "train":
        found.append("-m: only train.py makes several runs")
    for text in options.overrides:
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException:
            found.append(f"{text}: not of the form key=value (a value with special characters needs quotes: key='a,b')")
            continue
        if override.is_delete():
            found.append(f"{text}: nothing can be taken out; null switches an optional value off")
        elif override.key_or_group in ("hydra", "hydra.sweeper") and isinstance(override.value(), dict):
            found.append(f"{override.key_or_group}: one key at a time, such as hydra.sweeper.n_trials=20")
        elif override.key_or_group.split(".")[0] == "study":
            found.append(f"{text}: a study fills that in")
        elif override.key_or_group == "resume" and options.multirun:
            found.append(f"{text}: one run at a time, without -m; train.auto_resume=true goes on with a sweep")
        elif override.key_or_group == "train.auto_resume" and override.is_sweep_override():
            found.append(f"{text}: all runs of a sweep go on by themselves, or none")
        elif override.key_or_group == "hparams_search" and override.value() and not options.multirun:
            found.append(f"{text}: a search is many runs, it needs -m")
        elif override.is_sweep_override() and override.key_or_group.startswith("hydra."):
            found.append(f"{text}: a sweep is over KEY=..., such as train.beta2=0.9,0.99; Hydra's own have one value")
        elif override.is_sweep_override() and options.multirun:
            swept.append(override)
        else:
            fixed.append(text)

    if found or not options.multirun:
        found += validate_command_line(name, fixed)
    else:
        found += validate_sweep(fixed, swept)
    if found:
        raise UserError(*dict.fromkeys(found))


def validate_sweep(fixed: list[str], swept: list[Override]) -> list[str]:
    """All that is wrong with a sweep, or with a study and both ends of everything that it searches."""
    found: list[str] = []
    try:
        sweeper = study_sweeper(fixed)
    except UserError as error:  # whatever is swept
        return validate_command_line("train", fixed) or error.problems
    launcher = launcher_of(fixed)
    found += validate_launcher(launcher)
    if sweeper:
        found += validate_study(sweeper, launcher._target_)
        try:
            swept = search_space(sweeper, swept, fixed)
        except UserError as error:
            return found + error.problems
    composed = compose("train", fixed)
    refused: set[str] = set()  # what does not compose, whatever else there is
    for combination in combined(list(map(swept_values, swept))):
        if not refused.isdisjoint(combination):
            continue
        changed = with_values(composed, list(combination))
        try:
            if changed is None:
                found += validate_command_line("train", [*fixed, *combination])
                refused |= {text for text in combination if any(fault.startswith(f"{text}: ") for fault in found)}
            else:
                resolve("train", changed, [*fixed, *combination])
        except UserError as error:
            found += error.problems
    return found


def with_values(composed: DictConfig, overrides: list[str]) -> DictConfig | None:
    """A composition with values changed, in a quarter of the time that another one takes; None if it takes that."""
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


def validate_command_line(name: str, overrides: list[str]) -> list[str]:
    """All that is wrong with a composition: each override that does not fit, and what contradicts what in the rest."""
    accepted: list[str] = []
    found: list[str] = []
    try:
        composed = compose(name, overrides)
        accepted = overrides
    except (HydraException, OmegaConfBaseException):
        composed = compose_or_refuse(name)
        for override in overrides:
            try:
                composed = compose(name, [*accepted, override])
                accepted.append(override)
            except (HydraException, OmegaConfBaseException) as error:
                found.append(f"{override}: {composition_error(error)}")
    try:
        resolve(name, composed, accepted)
    except UserError as error:
        refused = {override.lstrip("+").split("=")[0] for override in overrides if override not in accepted}
        found += [fault for fault in error.problems if fault.split(":")[0] not in refused]
    return found
