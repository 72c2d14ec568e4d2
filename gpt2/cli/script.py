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
from functools import partial
from io import TextIOWrapper
from math import inf
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.utils import get_args_parser  # private, hence the exact pin of hydra-core
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from gpt2.cli.complete import resolve
from gpt2.cli.compose import CONF, compose
from gpt2.cli.launchers import log_submissions, resumable_job, uses_submitit
from gpt2.cli.preflight import check_command_line, runs_something
from gpt2.cli.resume import folder_arguments, in_hydras_quotes, sweep_arguments
from gpt2.cli.sweeper import run_trial
from gpt2.config import GenerateRun, TrainRun
from gpt2.errors import LostRankError, UserError, machine_error, without_password
from gpt2.runtime.dist_env import dist_env, report_to_torchrun, silence_unless_main
from gpt2.runtime.files import LOCK, RunLockedError, run_lock
from gpt2.runtime.signals import exit_on_signals, reraise_interruption

TRUSTED = ["gpt2.*"]  # what a configuration may have Hydra instantiate

log = logging.getLogger(__name__)

Task = Callable[..., Any]


def script(name: str) -> Callable[[Task], Callable[[], None]]:
    """Make a function of a checked configuration into the command line that `conf/<name>.yaml` describes."""

    def decorate(task: Task) -> Callable[[], None]:
        def main() -> None:
            exit_on_signals(also_by_ctrl_c=name != "generate")  # where Ctrl-C ends a text
            arguments, prompt = take_prompt(sys.argv[1:]) if name == "generate" else (sys.argv[1:], None)
            for stream in (sys.stdout, sys.stderr):  # a terminal that lacks a character shows a question mark
                if isinstance(stream, TextIOWrapper):
                    stream.reconfigure(errors="replace")
            options = get_args_parser().parse_intermixed_args(arguments)
            with errors_as_lines():
                silence_unless_main()
                if options.multirun and (options.cfg or options.info):
                    raise UserError("-m: not together with --cfg and --info; one run is shown without it")
                if runs_something(options):
                    arguments += as_one(name, options) if dist_env().by_torchrun else checked(name, options)
                    os.environ["HYDRA_FULL_ERROR"] = "1"  # what Hydra cannot write for want of room is ours to tell

            def job(composed: DictConfig) -> Any:
                return run_job(name, task, composed, prompt)

            sys.argv[1:] = arguments
            with errors_as_lines():
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
    log_submissions(options.multirun)
    missing: list[str] = []
    if name == "train":
        missing = (sweep_arguments if options.multirun else folder_arguments)(options.overrides)
    logging.disable(logging.NOTSET)
    return missing


def as_one(name: str, options: Namespace) -> list[str]:
    """`checked` by one rank for all: they run in the folder that it chose, and it alone leaves traces there."""
    missing: list[str] | int = []
    if dist_env().is_main:
        try:
            missing = checked_for_ranks(name, options)
        except UserError as error:
            tell(error)
            missing = error.exit_code
    from gpt2.distributed.process_group import broadcast_from_main

    told: list[str] | int = broadcast_from_main(missing)
    if isinstance(told, int):
        sys.exit(told)
    if dist_env().is_main:
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
    run = resumable_job(composed, partial(run_locked, name, task, composed, prompt))
    if name == "train" and composed.study.trial is not None:
        return run_trial(composed, lambda trial: run_locked(name, partial(task, trial=trial), composed))
    in_sweep = job.mode == RunMode.MULTIRUN
    problem: UserError | None = None
    with errors_as_lines():
        try:
            return run()
        except (UserError, KeyboardInterrupt, SystemExit) as error:
            if in_sweep and isinstance(error, UserError):  # the others go on; infinity is what this one is worth
                log.error("error: %s", error)
                problem = error
            else:
                if name == "train" and isinstance(error, UserError) and dist_env().is_main:
                    log.error("error: %s", error, extra={"in_file_only": True})  # the terminal is told at the end
                if job.output_subdir is not None and not isinstance(error, RunLockedError):
                    remove_if_nothing_happened(output_folder())
                raise
    if problem and uses_submitit(job.launcher):  # whose terminal shows nothing; it ends when all of its jobs have
        raise problem
    return inf


def run_locked(name: str, task: Task, composed: DictConfig, prompt: str | None = None) -> Any:
    """Run what was composed, completed and checked, as the only one that writes to the run's folder."""
    job = HydraConfig.get()
    with run_lock(output_folder()) if name == "train" and dist_env().is_main else nullcontext():
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
def errors_as_lines() -> Iterator[None]:
    """Print a user's mistake as lines and exit with 2; leave quietly where nobody reads on, or on Ctrl-C."""
    try:
        with reraise_interruption():
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
    except Exception as error:
        told = machine_error(error)
        if told is None:
            report_to_torchrun(error)
            raise
        tell(UserError(told))
        leave_stdout_alone()
        sys.exit(1)


def tell(error: UserError) -> None:
    rank = f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""
    lines = [f"{rank}{without_password(problem)}" for problem in error.problems]
    for line in lines:
        print(f"error: {line}", file=sys.stderr)
    if type(error) is LostRankError:  # a consequence; torchrun's report shall show the cause
        return
    try:  # torchrun's report shows the traceback, and this one is short
        raise UserError(*lines) from None
    except UserError as short:
        report_to_torchrun(short)


def leave_stdout_alone() -> None:
    """Nobody takes what is still to be written; Python would complain when it flushes."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def take_prompt(arguments: list[str]) -> tuple[list[str], str | None]:
    """Split `prompt=...` off a command line, as the shell passed it; bytes that are not UTF-8 become U+FFFD."""
    is_prompt = [argument.lstrip("+").startswith("prompt=") for argument in arguments]
    rest = [argument for argument, taken in zip(arguments, is_prompt, strict=True) if not taken]
    texts = [argument.split("=", 1)[1] for argument, taken in zip(arguments, is_prompt, strict=True) if taken]
    return rest, os.fsencode(texts[-1]).decode("utf-8", "replace") if texts else None
