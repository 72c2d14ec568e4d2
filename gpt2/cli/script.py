"""The command line of a script: arguments in, a checked configuration to the script's function, errors as lines.

Hydra composes the configuration and runs sweeps. This module adds three things: everything is checked before anything
runs (all problems are printed, exit code 2, no run folder is left behind); a single run is composed and validated
once; and a prompt bypasses Hydra's grammar, because it is text and no expression.
"""

import gc
import logging
import os
import shutil
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from gpt2.cli.arguments import COMMANDS
from gpt2.cli.complete import resolve
from gpt2.cli.compose import CONF, compose, keyed_error, overrides_of, parsed, to_yaml
from gpt2.cli.help import help_text
from gpt2.cli.hydra_private import bash_completion, parse_arguments, run_composed
from gpt2.cli.launchers import STOP, log_submissions, resumable_job
from gpt2.cli.preflight import asks_for_information, check_flags, check_run, check_sweep
from gpt2.cli.resume import RunFolder, folder_of_run, refuse_second_run, sweep_arguments
from gpt2.cli.sweep import named
from gpt2.cli.sweeper import run_trial
from gpt2.config import GenerateRun, Run, TrainRun
from gpt2.errors import LostRankError, ResourceError, UserError, machine_error, one_line
from gpt2.runtime.console import WithoutPasswords, printable, protect_output
from gpt2.runtime.dist_env import dist_env, exit_without_finalization, report_to_torchrun, silence_unless_main
from gpt2.runtime.files import LOCK, RunLockedError, reason, run_lock, writable_file, writable_folder
from gpt2.runtime.signals import Interrupted, admitted, exit_on_signals, reraise_interruption
from gpt2.runtime.waiting import waiting_for
from gpt2.tracking.tracker import ABOUT, INTERRUPTED, read_about, record_failure

TRUSTED = ["gpt2.*"]  # what a configuration may instantiate
OTHER_RANKS = ["hydra/job_logging=stderr", "hydra.output_subdir=null"]  # rank 0 alone prints and writes `.hydra/`
SECONDS_BEHIND_CAUSE = 1.0

log = logging.getLogger(__name__)

Task = Callable[..., Any]


def script(name: str) -> Callable[[Task], Callable[[], None]]:
    """Make a function of a checked configuration into the command line that `conf/<name>.yaml` describes."""

    def decorate(task: Task) -> Callable[[], None]:
        def main() -> None:
            exit_on_signals(also_by_ctrl_c=name != "generate")  # there, Ctrl-C ends a text and not the program
            arguments, prompt = take_prompt(sys.argv[1:]) if name == "generate" else (sys.argv[1:], None)
            protect_output()
            with exit_without_finalization(), errors_as_lines():
                silence_unless_main()
                options = parse_arguments(arguments)
                refuse_deleted_folder()
                check_flags(options)
                if options.help:
                    print(help_text(name))
                elif options.shell_completion and options.overrides == ["install=bash"]:
                    print(bash_completion(COMMANDS))
                elif asks_for_information(options) or options.multirun:
                    run_hydra(name, task, arguments, options)
                else:
                    run_once(name, task, options, prompt)

        return main

    return decorate


def refuse_deleted_folder() -> None:
    try:
        Path.cwd()
    except OSError as error:
        raise UserError("the folder that this was started in does not exist any more") from error


def run_hydra(name: str, task: Task, arguments: list[str], options: Namespace) -> None:
    """Let `hydra.main` answer --cfg and the like, or run a sweep that is checked here."""
    swept: set[str] = set()
    if not options.multirun and not options.shell_completion:
        check_run(name, options)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises errors, and `errors_as_lines` reports them

    def job(composed: DictConfig) -> Any:  # launchers pickle it
        return run_unless_stopped(partial(run_sweep_job, task, swept, composed))

    with ExitStack() as place:
        if options.multirun:
            arguments += sweep_arguments_if_valid(name, options, place)
            swept |= {override.key_or_group for override in parsed(options.overrides) if override.is_sweep_override()}
        else:  # a storage or a text may be a URL with a password
            place.enter_context(redirect_stdout(WithoutPasswords(sys.stdout)))
        sys.argv[1:] = arguments
        try:
            hydra.main(config_path=str(CONF), config_name=name, execution_whitelist=TRUSTED)(job)()
        except (HydraException, OmegaConfBaseException, ValueError, KeyError) as error:
            if "COMP_LINE" in os.environ:  # a shell asks for completions
                return
            if options.multirun and isinstance(error, ValueError | KeyError) and not isinstance(error, HydraException):
                raise
            raise UserError(keyed_error(error)) from error


def run_task(task: Task, config: Run) -> Any:
    """Run a script's function in the current job of Hydra; `.hydra/config.yaml` gets its complete configuration."""
    job = HydraConfig.get()
    if isinstance(config, TrainRun) and config.resume is None:
        config.choices = {group: file for group, file in job.runtime.choices.items() if is_choice(group, file)}
        if config.train.init_from is not None:  # whose shape replaces that of the group `model`
            config.choices["model"] = Path(config.train.init_from).name
    if job.output_subdir is not None:
        (output_folder() / job.output_subdir / "config.yaml").write_text(to_yaml(asdict(config)), encoding="utf-8")
    if "torch" not in sys.modules:
        load_torch()
    return task(config)


def load_torch() -> None:
    """Import PyTorch without garbage collection: what it makes stays, and searching it takes a fifth of the time."""
    waiting_for("loading PyTorch")
    gc.disable()
    import torch  # noqa: F401

    gc.freeze()
    gc.enable()


def is_choice(group: str, file: str | None) -> bool:
    """Whether the file chosen in a group of `conf/` distinguishes runs."""
    return file not in (None, "default") and group not in ("wandb", "hparams_search") and not group.startswith("hydra/")


def output_folder() -> Path:
    """The folder of the current run."""
    return Path(HydraConfig.get().runtime.output_dir)


# ---------------------------------------------------------------------------------------------------------------------
# A single run


def run_once(name: str, task: Task, options: Namespace, prompt: str | None) -> None:
    """Compose, check and run a command line without -m, in the only process or in one rank of torchrun's."""
    env = dist_env()
    early_log = EarlyLog()
    with ExitStack() as place:
        if env.is_main:
            composed, folder, config = prepare_on_main(name, options, place)
        else:
            composed, folder, config = prepare_on_rank(name, options)
        if isinstance(config, TrainRun) and config.plan:
            load_torch()
            from gpt2.cli.messages import print_plan

            return print_plan(config)
        if isinstance(config, GenerateRun):
            config.prompt = prompt
        began, is_writer = False, name == "train" and env.is_main

        def job(_composed: DictConfig) -> Any:
            nonlocal began
            began = True
            early_log.replay()
            with errors_as_lines(), clean_up_on_error(is_writer, folder.is_new):
                return run_task(task, config)

        try:
            run_composed(composed, job, TRUSTED)
        except Exception as error:
            if began:
                raise
            if is_writer and folder.is_new:
                remove_if_nothing_happened(Path(folder.path), composed.hydra)
            raise UserError(setup_problem(error)) from error


def setup_problem(error: BaseException) -> str:
    """Why Hydra could not start a run: its folder or log cannot be created, or one of its own keys is invalid."""
    if isinstance(error, OmegaConfBaseException):
        return keyed_error(error)
    texts = [one_line(error)]
    while error.__cause__:
        error = error.__cause__
        texts.append(one_line(error))
    if isinstance(error, OSError):
        return f"hydra.run.dir: cannot write {error.filename}: {reason(error)}"
    return f"hydra: {': '.join(texts)}"


def prepare_on_main(name: str, options: Namespace, place: ExitStack) -> tuple[DictConfig, RunFolder, Run]:
    """Compose, choose the run's folder and validate; the other ranks get the folder, or the exit code."""
    try:
        if dist_env().by_torchrun and name not in ("train", "evaluate"):
            raise UserError(f"{name}.py: torchrun is for single runs of train.py and evaluate.py")
        composed = check_run(name, options)
        folder = folder_of_run(composed, options.overrides) if name == "train" else RunFolder(composed.hydra.run.dir)
        folder.apply(composed)
        if name == "train" and composed.plan:  # which writes nothing and needs no other rank
            config = resolve(name, composed, overrides_of(composed.hydra))
            share(0)
            return composed, folder, config
        if not folder.is_new:  # locked before the checkpoint to resume from is chosen
            place.enter_context(run_lock(Path(folder.path)))
        config = resolve(name, composed, overrides_of(composed.hydra))
        enter_places(config, place)
        if isinstance(config, TrainRun) and folder.is_new:  # before Hydra writes to what may be another run's folder
            place.enter_context(writable_folder(Path(folder.path), "hydra.run.dir"))
            place.enter_context(run_lock(Path(folder.path)))
            refuse_second_run(config, Path(folder.path))
    except UserError as error:
        share(error.exit_code)
        raise
    share(asdict(folder))
    return composed, folder, config


def enter_places(config: Any, place: ExitStack) -> None:
    """Refuse the places of a configuration that cannot be written to."""
    if (data := getattr(config, "data", None)) and data.cache_dir:
        place.enter_context(writable_folder(Path(data.cache_dir), "data.cache_dir"))
    for key in ("output", "to", "json"):  # the result of evaluate, of export, of a benchmark
        for file in filter(None, {getattr(one, key, None) for one in (config, *getattr(config, "others", []))}):
            place.enter_context(writable_file(Path(file), key))


def share(value: Any) -> Any:
    """Rank 0's value on all ranks; the value itself without torchrun."""
    if not dist_env().by_torchrun:
        return value
    from gpt2.distributed.process_group import broadcast_from_main

    return broadcast_from_main(value)


def prepare_on_rank(name: str, options: Namespace) -> tuple[DictConfig, RunFolder, Run]:
    """The same on another rank, in the folder that rank 0 chose."""
    shared = share(None)
    if isinstance(shared, int):
        if shared:  # rank 0 has the reason, and torchrun's report names the rank that ends first
            time.sleep(SECONDS_BEHIND_CAUSE)
        sys.exit(shared)
    composed, folder = compose(name, [*options.overrides, *OTHER_RANKS], with_hydra=True), RunFolder(**shared)
    folder.apply(composed)
    return composed, folder, resolve(name, composed, overrides_of(composed.hydra))


class EarlyLog(logging.Handler):
    """Collects log records, such as that of a skipped checkpoint, until Hydra has configured logging for train.log.

    Hydra's configuration replaces this handler. A repeated message counts once: checkpoints are searched for the run's
    folder, and again when it is locked.
    """

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []
        logger = logging.getLogger("gpt2")
        logger.handlers = [self]
        logger.setLevel(logging.INFO)

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage() not in [earlier.getMessage() for earlier in self.records]:
            self.records.append(record)

    def replay(self) -> None:
        logging.getLogger("gpt2").removeHandler(self)  # where Hydra configures no logging
        for record in self.records:
            logging.getLogger(record.name).handle(record)


@contextmanager
def clean_up_on_error(is_writer: bool = True, is_new: bool = True) -> Iterator[None]:
    """Write a user's mistake to train.log as well, and remove the folder of a new run that did not begin."""
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit) as error:
        if is_writer and isinstance(error, UserError):
            log.error("error: %s", error, extra={"in_file_only": True})  # `errors_as_lines` prints it
        if is_writer and is_new and not isinstance(error, RunLockedError):
            remove_if_nothing_happened(output_folder(), HydraConfig.get())
        raise


def remove_if_nothing_happened(folder: Path, hydra_node: Any) -> None:
    """Remove the folder of a run that ended before it began: only Hydra has written to it.

    A run may also be interrupted after `run.json` was written, for example while W&B starts.
    """
    subdir = hydra_node.output_subdir
    hydras = {folder / LOCK, folder / f"{hydra_node.job.name}.log", *((folder / subdir).glob("*") if subdir else ())}
    if read_about(folder).get("state") == INTERRUPTED:
        hydras.add(folder / ABOUT)
    if all(path in hydras for path in folder.rglob("*") if not path.is_dir()):
        shutil.rmtree(folder)


# ---------------------------------------------------------------------------------------------------------------------
# A sweep


def sweep_arguments_if_valid(name: str, options: Namespace, place: ExitStack) -> list[str]:
    """Check a sweep; returns what `sweep_arguments` adds to its command line."""
    if dist_env().by_torchrun:
        if not dist_env().is_main:
            sys.exit(share(None))
        share(UserError.exit_code)
        raise UserError(f"{name}.py -m: torchrun is for single runs of train.py and evaluate.py")
    logging.disable(logging.WARNING)  # each run will repeat its warnings
    check_sweep(name, options)
    log_submissions()
    arguments = sweep_arguments(options.overrides)
    fixed = [str(override.input_line) for override in parsed(options.overrides) if not override.is_sweep_override()]
    composed = compose(name, [*fixed, *arguments], with_hydra=True)
    place.enter_context(writable_folder(Path(composed.hydra.sweep.dir), "hydra.sweep.dir"))
    if logs := composed.hydra.launcher.get("submitit_folder"):
        place.enter_context(writable_folder(Path(str(logs).partition("%")[0]), "hydra.launcher.submitit_folder"))
    enter_places(composed, place)
    logging.disable(logging.NOTSET)
    return arguments


def run_unless_stopped(job: Callable[[], Any]) -> Any:
    """Run a job of a sweep. In a process of joblib, return the interruption that ends it: raised, it would kill others.

    No job begins after the sweep was interrupted.
    """
    from multiprocessing import parent_process

    if parent_process() is None:
        return job()
    try:
        with clean_up_on_error(), admitted():
            if Path(HydraConfig.get().sweep.dir, STOP).exists():
                raise Interrupted.by(signal.SIGINT)
            return job()
    except Interrupted as interruption:
        return interruption


def run_sweep_job(task: Task, swept: set[str], composed: DictConfig) -> Any:
    """One job of a sweep, in this process or in one of the launcher's.

    Args:
        swept: The keys that the sweep is over.

    Returns:
        Its loss, or the UserError that ended it: the other runs continue.
    """
    protect_output()  # the launcher may have started this process
    run = resumable_job(composed, partial(run_locked, task, composed))
    if composed.study.trial is not None:
        return run_trial(composed, lambda trial: run_locked(partial(task, trial=trial), composed))
    with errors_as_lines(), clean_up_on_error():
        try:
            with reraise_interruption():
                return run()
        except BrokenPipeError:
            raise
        except Exception as error:  # noqa: BLE001  # the other runs continue
            return report_failure(error, swept)


def report_failure(error: Exception, swept: set[str]) -> UserError:
    """Print and record the error that ended a run of a sweep. Returns it as a UserError."""
    job, problem = HydraConfig.get(), error
    if not isinstance(problem, UserError):
        file = os.path.relpath(output_folder() / f"{job.job.name}.log")
        bug = f"{type(error).__name__}: {one_line(error)}; the traceback is in {file}"
        problem = ResourceError(machine_error(error) or bug)
    log.error("error: %s", problem, extra={"in_file_only": True}, exc_info=None if problem is error else error)
    print_problems(named(problem, job.job.num, overrides_of(job), swept))
    if not isinstance(error, RunLockedError):  # the folder is another process's
        with suppress(OSError):
            record_failure(output_folder(), problem)
    return problem


def run_locked(task: Task, composed: DictConfig) -> Any:
    """Complete, validate and run a job, as the only process that writes to its folder."""
    with run_lock(output_folder()), ExitStack() as place:
        config = resolve("train", composed, overrides_of(HydraConfig.get()))
        assert isinstance(config, TrainRun)
        refuse_second_run(config, output_folder())
        enter_places(config, place)
        return run_task(task, config)


# ---------------------------------------------------------------------------------------------------------------------
# Errors and prompts


@contextmanager
def errors_as_lines() -> Iterator[None]:
    """Print expected errors as lines and exit with their code; exit quietly on Ctrl-C and a closed pipe."""
    try:
        with reraise_interruption():
            yield
    except UserError as error:
        print_problems(error)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        discard_stdout()
        sys.exit(0)
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        problem = machine_error(error)
        if problem is None:
            report_to_torchrun(error)
            raise
        print_problems(UserError(problem))
        discard_stdout()
        sys.exit(1)


def print_problems(error: UserError) -> None:
    """Print one line for each problem; under torchrun with the rank, and into torchrun's report."""
    rank = f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""
    lines = [f"{rank}{problem}" for problem in error.problems]
    for line in lines:
        print(f"error: {line}", file=sys.stderr)
    if type(error) is LostRankError:  # a consequence: torchrun's report shall show the cause, whose rank must end first
        time.sleep(SECONDS_BEHIND_CAUSE)
        return
    try:  # torchrun's report shows the traceback, and this one is short
        raise UserError(*map(printable, lines)) from None
    except UserError as short:
        report_to_torchrun(short)


def discard_stdout() -> None:
    """Discard what is buffered for standard output: Python would fail to flush it at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def take_prompt(arguments: list[str]) -> tuple[list[str], str | None]:
    """Take `prompt=...` out of a command line, as the shell passed it; bytes that are not UTF-8 become U+FFFD."""
    is_prompt = [argument.lstrip("+").startswith("prompt=") for argument in arguments]
    rest = [argument for argument, taken in zip(arguments, is_prompt, strict=True) if not taken]
    texts = [argument.split("=", 1)[1] for argument, taken in zip(arguments, is_prompt, strict=True) if taken]
    return rest, os.fsencode(texts[-1]).decode("utf-8", "replace") if texts else None
