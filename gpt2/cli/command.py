"""Runs the command line of a script: composes and checks the configuration and passes it to the script's function.

Hydra composes the configuration and runs sweeps. This module adds three things: everything is checked before anything
runs (all problems are printed, exit code 2, no run folder is left behind); a single run is composed and validated
once; and a prompt bypasses Hydra's grammar, because it is a text and not an expression.
"""

import logging
import os
import sys
import time
from argparse import Namespace
from contextlib import ExitStack, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from gpt2.cli.arguments import COMMANDS
from gpt2.cli.complete import resolve
from gpt2.cli.compose import compose, keyed_error, overrides_of, parsed, without_sweeps
from gpt2.cli.error_lines import SECONDS_AFTER_FIRST_RANK
from gpt2.cli.help import help_text
from gpt2.cli.hydra_private import EXECUTION_WHITELIST, bash_completion, parse_arguments
from gpt2.cli.job import (
    Task,
    collect_log,
    load_torch,
    require_writable_places,
    run_single,
    run_sweep_job,
    start_garbage_collection,
)
from gpt2.cli.launchers import log_submissions
from gpt2.cli.preflight import asks_for_information, check_flags, check_run, check_sweep
from gpt2.cli.resume import RunFolder, folder_of_run, refuse_second_run, sweep_arguments
from gpt2.cli.schema import register
from gpt2.config import GenerateRun, Run, TrainRun
from gpt2.errors import UserError
from gpt2.runtime.console import WithoutPasswords
from gpt2.runtime.dist_env import dist_env
from gpt2.runtime.files import run_lock, writable_folder
from gpt2.runtime.repository import CONF

OTHER_RANKS = ["hydra/job_logging=stderr", "hydra.output_subdir=null"]  # only rank 0 prints and writes `.hydra/`


def run_command_line(name: str, task: Task, arguments: list[str]) -> None:
    """Compose `conf/<name>.yaml` with the arguments and run the script's function."""
    arguments, prompt = take_prompt(arguments) if name == "generate" else (arguments, None)
    options = parse_arguments(arguments)
    refuse_deleted_folder()
    check_flags(options)
    if options.help:  # an abbreviation, such as --hel
        print(help_text(name))
    elif options.shell_completion and options.overrides == ["install=bash"]:
        print(bash_completion(COMMANDS))
    elif asks_for_information(options):
        print_information(name, task, arguments, options)
    elif options.multirun and not dist_env().by_torchrun:
        run_sweep(name, task, arguments, options)
    else:
        run_once(name, task, options, prompt)


def take_prompt(arguments: list[str]) -> tuple[list[str], str | None]:
    """Separate `prompt=...` from the other arguments. In the prompt, bytes that are not UTF-8 become U+FFFD."""
    rest, prompt = list[str](), None
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key.lstrip("+") == "prompt" and "=" in argument:
            prompt = os.fsencode(value).decode("utf-8", "replace")
        else:
            rest.append(argument)
    return rest, prompt


def refuse_deleted_folder() -> None:
    try:
        Path.cwd()
    except OSError as error:
        raise UserError("the current folder does not exist any more") from error


def call_hydra(name: str, task: Task, arguments: list[str]) -> None:
    register(name)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises errors, and `errors_as_lines` reports them
    sys.argv[1:] = arguments
    hydra.main(config_path=str(CONF), config_name=name, execution_whitelist=EXECUTION_WHITELIST)(task)()


def print_information(name: str, task: Task, arguments: list[str], options: Namespace) -> None:
    """Let Hydra answer `--cfg`, `--info`, `--hydra-help` or `--shell-completion`."""
    if not options.shell_completion:
        check_run(name, options)
    try:
        with redirect_stdout(WithoutPasswords(sys.stdout)):  # a storage or a text may be a URL with a password
            call_hydra(name, task, arguments)
    except (HydraException, OmegaConfBaseException, ValueError, KeyError) as error:
        if "COMP_LINE" not in os.environ:  # a shell that asks for completions expects no error line
            raise UserError(keyed_error(error)) from error


# ---------------------------------------------------------------------------------------------------------------------
# A single run


def run_once(name: str, task: Task, options: Namespace, prompt: str | None) -> None:
    """Compose, check and run a command line without -m, in a single process or in one rank."""
    early_log = collect_log()
    with ExitStack() as places:
        if dist_env().is_main:
            composed, folder, config = prepare_on_main(name, options, places)
        else:
            composed, folder, config = prepare_on_rank(name, options)
        if isinstance(config, GenerateRun):
            config.prompt = prompt
        if isinstance(config, TrainRun) and config.plan:
            load_torch()
            from gpt2.cli.messages import print_plan

            print_plan(config)
        else:
            run_single(task, composed, config, folder, early_log)


def prepare_on_main(name: str, options: Namespace, places: ExitStack) -> tuple[DictConfig, RunFolder, Run]:
    """On rank 0: compose, choose the run folder and validate. The other ranks get the folder, or the exit code."""
    try:
        if dist_env().by_torchrun and (options.multirun or name not in ("train", "evaluate")):
            raise UserError("torchrun is for single runs of train.py and evaluate.py")
        composed = check_run(name, options)
        folder = folder_of_run(composed, options.overrides) if name == "train" else RunFolder(composed.hydra.run.dir)
        folder.apply(composed)
        is_plan = name == "train" and composed.plan  # a plan writes nothing and needs no other rank
        if not folder.is_new and not is_plan:  # locked before the checkpoint to resume from is chosen
            places.enter_context(run_lock(Path(folder.path)))
        config = resolve(name, composed, overrides_of(composed.hydra))
        if not is_plan:
            require_writable_places(config, places)
            if isinstance(config, TrainRun) and folder.is_new:  # before Hydra writes: it may be another run's
                places.enter_context(writable_folder(Path(folder.path), "hydra.run.dir"))
                places.enter_context(run_lock(Path(folder.path)))
                refuse_second_run(config, Path(folder.path))
    except UserError as error:
        share(error.exit_code)
        raise
    share(0 if is_plan else asdict(folder))
    return composed, folder, config


def share(value: Any) -> Any:
    """Return the value of rank 0 on all ranks; without torchrun, the value itself."""
    if not dist_env().by_torchrun:
        return value
    from gpt2.distributed.process_group import broadcast_from_main

    return broadcast_from_main(value)


def prepare_on_rank(name: str, options: Namespace) -> tuple[DictConfig, RunFolder, Run]:
    """On the other ranks: compose and resolve, with the folder that rank 0 chose."""
    shared = share(None)
    if isinstance(shared, int):
        if shared:  # rank 0 prints the reason
            time.sleep(SECONDS_AFTER_FIRST_RANK)
        sys.exit(shared)
    composed, folder = compose(name, [*options.overrides, *OTHER_RANKS], with_hydra=True), RunFolder(**shared)
    folder.apply(composed)
    return composed, folder, resolve(name, composed, overrides_of(composed.hydra))


# ---------------------------------------------------------------------------------------------------------------------
# A sweep


def run_sweep(name: str, task: Task, arguments: list[str], options: Namespace) -> None:
    """Check everything that a command line with -m would run, then let Hydra's sweeper run it."""
    logging.disable(logging.WARNING)  # each run repeats its warnings
    check_sweep(name, options)
    log_submissions()
    added = sweep_arguments(options.overrides)
    swept = {override.key_or_group for override in parsed(options.overrides) if override.is_sweep_override()}
    composed = compose(name, [*without_sweeps(options.overrides), *added], with_hydra=True)

    def job(composed: DictConfig) -> Any:  # launchers pickle it
        return run_sweep_job(task, swept, composed)

    with ExitStack() as places:
        places.enter_context(writable_folder(Path(composed.hydra.sweep.dir), "hydra.sweep.dir"))
        if logs := composed.hydra.launcher.get("submitit_folder"):
            places.enter_context(writable_folder(Path(str(logs).partition("%")[0]), "hydra.launcher.submitit_folder"))
        require_writable_places(composed, places)
        logging.disable(logging.NOTSET)
        start_garbage_collection()
        try:
            call_hydra(name, job, [*arguments, *added])
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(keyed_error(error)) from error
