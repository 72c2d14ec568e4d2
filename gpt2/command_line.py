"""A script's command line: checked whole, run by Hydra, its mistakes told in lines.

Hydra composes the configuration; this module adds what Hydra leaves out. The whole command line is checked before
anything runs: every fault in one line, exit code 2, and no run folder left behind. A prompt is kept out of Hydra's
hands, for it is text and no expression.
"""

import logging
import os
import shutil
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from copy import deepcopy
from functools import partial
from hashlib import sha256
from io import TextIOWrapper
from math import inf
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.utils import get_args_parser  # private, hence the exact pin of hydra-core
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gpt2.composition import CONF, compose, compose_or_refuse, explain, parsed, resolve, resumed_checkpoint
from gpt2.config import GenerateRun, StudyConfig, TrainRun, UserError
from gpt2.failures import machine_error, without_password
from gpt2.interruption import leave_when_asked, leaving_as_asked
from gpt2.jobs import is_of_submitit, launcher_faults, launcher_of, of_sweep, requeues, show_submissions
from gpt2.launch import launch, leave_terminal_to_main
from gpt2.run_folder import LOCK, Held, held
from gpt2.search_space import candidates, combined, searched
from gpt2.sweeper import run_trial, study_faults, study_sweeper

TRUSTED = ["gpt2.*"]  # what a configuration may have Hydra instantiate

log = logging.getLogger(__name__)

Task = Callable[..., Any]


def script(name: str) -> Callable[[Task], Callable[[], None]]:
    """Make a function of a checked configuration into the command line that `conf/<name>.yaml` describes."""

    def decorate(task: Task) -> Callable[[], None]:
        def main() -> None:
            leave_when_asked(also_by_ctrl_c=name != "generate")  # where Ctrl-C ends a text
            arguments, prompt = take_prompt(sys.argv[1:]) if name == "generate" else (sys.argv[1:], None)
            for stream in (sys.stdout, sys.stderr):  # a terminal that lacks a character shows a question mark
                if isinstance(stream, TextIOWrapper):
                    stream.reconfigure(errors="replace")
            options = get_args_parser().parse_intermixed_args(arguments)
            with faults_as_lines():
                leave_terminal_to_main()
                if options.multirun and (options.cfg or options.info):
                    raise UserError("-m: not together with --cfg and --info; one run is shown without it")
                if runs_something(options):
                    arguments += as_one(name, options) if launch().by_torchrun else checked(name, options)
                    os.environ["HYDRA_FULL_ERROR"] = "1"  # what Hydra cannot write for want of room is ours to tell

            def job(composed: DictConfig) -> Any:
                return run_job(name, task, composed, prompt)

            sys.argv[1:] = arguments
            with faults_as_lines():
                hydra.main(config_path=str(CONF), config_name=name, execution_whitelist=TRUSTED)(job)()

        return main

    return decorate


def checked(name: str, options: Namespace) -> list[str]:
    """Check a command line before anything runs. Returns what it lacks: see `folder_arguments` and `sweep_arguments`.

    Raises:
        UserError: With all that is wrong with it.
    """
    logging.disable(logging.WARNING)  # the run will say all that again
    check_command_line(name, options)
    show_submissions(options.multirun)
    missing: list[str] = []
    if name == "train":
        missing = (sweep_arguments if options.multirun else folder_arguments)(options.overrides)
    logging.disable(logging.NOTSET)
    return missing


def as_one(name: str, options: Namespace) -> list[str]:
    """`checked` by one rank for all: they run in the folder that it chose, and it alone leaves traces there."""
    missing: list[str] | int = []
    if launch().is_main:
        try:
            missing = checked_for_ranks(name, options)
        except UserError as error:
            tell(error)
            missing = error.exit_code
    from gpt2.distributed import told_by_main

    told: list[str] | int = told_by_main("arguments", missing)
    if isinstance(told, int):
        sys.exit(told)
    if launch().is_main:
        return told
    return [*told, "hydra/job_logging=rank", *(["hydra.output_subdir=null"] if name == "train" else [])]


def checked_for_ranks(name: str, options: Namespace) -> list[str]:
    """`checked`, and where the run is to be, for that may be another place each time that it is asked."""
    if name not in ("train", "evaluate") or options.multirun:
        asked = f"{name}.py{' -m' if options.multirun else ''}"
        raise UserError(f"{asked}: torchrun is for single runs of train.py and evaluate.py")
    missing = checked(name, options)
    if name == "train" and not any(argument.startswith("hydra.run.dir=") for argument in missing):
        composed = compose(name, options.overrides, with_hydra=True)
        missing.append(in_hydras_quotes("hydra.run.dir", composed.hydra.run.dir))
    return missing


def run_job(name: str, task: Task, composed: DictConfig, prompt: str | None) -> Any:
    """What Hydra calls, once a run."""
    job = HydraConfig.get()
    run = of_sweep(composed, partial(run_locked, name, task, composed, prompt))
    if name == "train" and composed.study.trial is not None:
        return run_trial(composed, lambda trial: run_locked(name, partial(task, trial=trial), composed))
    in_sweep = job.mode == RunMode.MULTIRUN
    problem: UserError | None = None
    with faults_as_lines():
        try:
            return run()
        except (UserError, KeyboardInterrupt, SystemExit) as error:
            if in_sweep and isinstance(error, UserError):  # the others go on; infinity is what this one is worth
                log.error("error: %s", error)
                problem = error
            else:
                if name == "train" and isinstance(error, UserError) and launch().is_main:
                    log.error("error: %s", error, extra={"in_file_only": True})  # the terminal is told at the end
                if job.output_subdir is not None and not isinstance(error, Held):
                    remove_if_nothing_happened(output_folder())
                raise
    if problem and is_of_submitit(job.launcher):  # whose terminal shows nothing; it ends when all of its jobs have
        raise problem
    return inf


def run_locked(name: str, task: Task, composed: DictConfig, prompt: str | None = None) -> Any:
    """Run what was composed, completed and checked, as the only one that writes to the run's folder."""
    job = HydraConfig.get()
    with held(output_folder()) if name == "train" and launch().is_main else nullcontext():
        config = resolve(name, composed, list(job.overrides.task))
        if isinstance(config, GenerateRun):
            config.prompt = prompt
        if isinstance(config, TrainRun) and config.resume is None:
            config.choices = {group: file for group, file in job.runtime.choices.items() if is_choice(group, file)}
            if config.train.init_from is not None:  # which brought its own shape
                config.choices["model"] = Path(config.train.init_from).name
        if job.output_subdir is not None:  # what runs, which a trained model may have completed
            OmegaConf.save(OmegaConf.structured(config), output_folder() / job.output_subdir / "config.yaml")
        return task(config)


def is_choice(group: str, file: str | None) -> bool:
    """Whether a group of `conf/` tells something of a run by the file that was chosen."""
    return file not in (None, "default") and group not in ("wandb", "hparams_search") and not group.startswith("hydra/")


def output_folder() -> Path:
    """Where the run under way keeps everything."""
    return Path(HydraConfig.get().runtime.output_dir)


def remove_if_nothing_happened(folder: Path) -> None:
    """Remove the folder of a run that found out, before it began, that it cannot: only Hydra has written to it."""
    hydras = {folder / LOCK, folder / f"{HydraConfig.get().job.name}.log", *(folder / ".hydra").glob("*")}
    if all(path in hydras for path in folder.rglob("*") if not path.is_dir()):
        shutil.rmtree(folder)
        with suppress(OSError):  # other runs of that name are there
            folder.parent.rmdir()


@contextmanager
def faults_as_lines() -> Iterator[None]:
    """Print a user's mistake as lines and exit with 2; leave quietly where nobody reads on, or on Ctrl-C."""
    try:
        with leaving_as_asked():
            yield
    except UserError as error:
        tell(error)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        leave_stdout_alone()
        sys.exit(0)
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        sys.exit(130)
    except (OSError, MemoryError, RuntimeError) as error:
        told = machine_error(error)
        if told is None:
            raise
        print(f"error: {told}", file=sys.stderr)
        leave_stdout_alone()
        sys.exit(1)


def tell(error: UserError) -> None:
    for fault in error.faults:
        print(f"error: {without_password(fault)}", file=sys.stderr)


def leave_stdout_alone() -> None:
    """Nobody takes what is still to be written; Python would complain when it flushes."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def take_prompt(arguments: list[str]) -> tuple[list[str], str | None]:
    """Split `prompt=...` off a command line, as the shell passed it; bytes that are not UTF-8 become U+FFFD."""
    is_prompt = [argument.lstrip("+").startswith("prompt=") for argument in arguments]
    rest = [argument for argument, taken in zip(arguments, is_prompt, strict=True) if not taken]
    texts = [argument.split("=", 1)[1] for argument, taken in zip(arguments, is_prompt, strict=True) if taken]
    return rest, os.fsencode(texts[-1]).decode("utf-8", "replace") if texts else None


def folder_arguments(overrides: list[str]) -> list[str]:
    """What makes Hydra work in the folder of the run that is resumed, and leave its `.hydra` as it was.

    With `train.auto_resume` that is the folder of this very command line, whether anything is in it yet or not.
    """
    composed = compose("train", overrides)
    chosen = [override.value() for override in parsed(overrides) if override.key_or_group == "hydra.run.dir"]
    if composed.resume is None and not composed.train.auto_resume:
        return []
    if chosen and composed.resume is not None:
        raise UserError("hydra.run.dir: a run that is resumed goes on in its own folder; drop one of the two")
    if composed.resume is not None:
        resume = composed.resume
    else:
        resume = plain_name("hydra.run.dir", chosen[-1]) if chosen else own_folder("runs", composed.name, overrides)
    path = resumed_checkpoint(str(resume))
    folder = str(path.parent.parent if path else resume)
    arguments = [in_hydras_quotes("hydra.run.dir", folder), in_hydras_quotes("resume", resume)]
    return [*arguments, "hydra.output_subdir=null"] if path else arguments


def sweep_arguments(overrides: list[str]) -> list[str]:
    """What makes Hydra work in one folder, with `train.auto_resume` that of this very command line, and jobs go on.

    A launcher that starts jobs again brings `train.auto_resume` with it. A study goes on by itself anyway.
    """
    fixed = [override for override in parsed(overrides) if not override.is_sweep_override()]
    composed = compose("train", [str(override.input_line) for override in fixed], with_hydra=True)
    launcher, given = composed.hydra.launcher, {override.key_or_group: override.value() for override in fixed}
    if composed.hydra.sweeper._target_ == StudyConfig._target_:
        return []
    if not composed.train.auto_resume and not requeues(launcher):
        if not is_of_submitit(launcher) or "hydra.sweep.dir" in given:
            return []
        folder = composed.hydra.sweep.dir  # said once, or Hydra's copies of it would have suffixes of their own
        return [in_hydras_quotes("hydra.sweep.dir", folder)]
    if given.get("train.auto_resume") is False:
        again = f"hydra.launcher.max_num_timeout={launcher.max_num_timeout}"
        raise UserError(f"train.auto_resume: {again} starts jobs again, which then go on; drop one of the two")
    if "hydra.sweep.dir" in given:
        folder = plain_name("hydra.sweep.dir", given["hydra.sweep.dir"])
    else:
        folder = own_folder("sweeps", composed.name, overrides)
    return ["train.auto_resume=true", in_hydras_quotes("hydra.sweep.dir", folder)]


def plain_name(key: str, folder: Any) -> str:
    """A folder that is the same each time."""
    if "${" in str(folder):
        raise UserError(f"{key}: train.auto_resume needs a plain name, {folder} may be another each time")
    return str(folder)


def own_folder(kind: str, name: str, overrides: list[str]) -> str:
    """The folder of a command line, however its words are ordered and wherever its jobs run."""
    last = {override.key_or_group: override.input_line for override in parsed(overrides)}
    said = [str(text) for key, text in last.items() if not key.startswith(("hydra.launcher.", "hydra/launcher"))]
    return f"outputs/{kind}/{name}/auto-{sha256(chr(10).join(sorted(said)).encode()).hexdigest()[:8]}"


def in_hydras_quotes(key: str, value: Any) -> str:
    return f"{key}={QuotedString(str(value), Quote.single).with_quotes()}"


# ---------------------------------------------------------------------------------------------------------------------
# Checking a command line before anything runs


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
        found += command_line_faults(name, fixed)
    else:
        found += sweep_faults(fixed, swept)
    if found:
        raise UserError(*dict.fromkeys(found))


def sweep_faults(fixed: list[str], swept: list[Override]) -> list[str]:
    """All that is wrong with a sweep, or with a study and both ends of everything that it searches."""
    found: list[str] = []
    try:
        sweeper = study_sweeper(fixed)
    except UserError as error:  # whatever is swept
        return command_line_faults("train", fixed) or error.faults
    launcher = launcher_of(fixed)
    found += launcher_faults(launcher)
    if sweeper:
        found += study_faults(sweeper, launcher._target_)
        try:
            swept = searched(sweeper, swept, fixed)
        except UserError as error:
            return found + error.faults
    composed = compose("train", fixed)
    refused: set[str] = set()  # what does not compose, whatever else there is
    for combination in combined(list(map(candidates, swept))):
        if not refused.isdisjoint(combination):
            continue
        changed = with_values(composed, list(combination))
        try:
            if changed is None:
                found += command_line_faults("train", [*fixed, *combination])
                refused |= {text for text in combination if any(fault.startswith(f"{text}: ") for fault in found)}
            else:
                resolve("train", changed, [*fixed, *combination])
        except UserError as error:
            found += error.faults
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


def command_line_faults(name: str, overrides: list[str]) -> list[str]:
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
                found.append(f"{override}: {explain(error)}")
    try:
        resolve(name, composed, accepted)
    except UserError as error:
        refused = {override.lstrip("+").split("=")[0] for override in overrides if override not in accepted}
        found += [fault for fault in error.faults if fault.split(":")[0] not in refused]
    return found
