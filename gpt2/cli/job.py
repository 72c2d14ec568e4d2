"""Runs a script's function with its complete configuration as a job of Hydra, in the output folder of the run."""

import gc
import logging
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict
from functools import cache, partial
from logging.handlers import MemoryHandler
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from gpt2.cli.complete import resolve
from gpt2.cli.compose import keyed_error, overrides_of, to_yaml
from gpt2.cli.error_lines import errors_as_lines, print_problems
from gpt2.cli.hydra_private import run_composed
from gpt2.cli.launchers import STOP_FILE, resumable_job
from gpt2.cli.resume import RunFolder, refuse_second_run
from gpt2.cli.sweep import name_of_run, named
from gpt2.cli.sweeper import run_trial
from gpt2.config import Run, TrainRun
from gpt2.errors import ResourceError, UserError, machine_error, one_line
from gpt2.runtime.console import protect_output
from gpt2.runtime.dist_env import dist_env
from gpt2.runtime.files import LOCK, RunLockedError, reason, run_lock, writable_file, writable_folder
from gpt2.runtime.signals import Interrupted, admitted, reraise_interruption
from gpt2.runtime.waiting import waiting_for
from gpt2.tracking.tracker import ABOUT, INTERRUPTED, read_about, record_failure

log = logging.getLogger(__name__)

_job_runs = threading.Lock()  # held while a process of joblib runs a job

Task = Callable[..., Any]


def run_task(task: Task, config: Run) -> Any:
    """Run a script's function in the current job of Hydra; `.hydra/config.yaml` gets its complete configuration."""
    job = HydraConfig.get()
    if isinstance(config, TrainRun) and config.resume is None:
        config.choices = {group: file for group, file in job.runtime.choices.items() if distinguishes_runs(group, file)}
        if config.train.init_from is not None:  # its shape replaces that of the group `model`
            config.choices["model"] = Path(config.train.init_from).name
    if job.output_subdir is not None:
        (output_folder() / job.output_subdir / "config.yaml").write_text(to_yaml(asdict(config)), encoding="utf-8")
    load_torch()
    return task(config)


def distinguishes_runs(group: str, file: str | None) -> bool:
    """Whether the file chosen in a group of `conf/` is a tag of the run."""
    return file not in (None, "default") and group not in ("wandb", "hparams_search") and not group.startswith("hydra/")


def load_torch() -> None:
    """Import PyTorch without garbage collection, which takes a fifth of the time and finds nothing to free."""
    if "torch" not in sys.modules:
        waiting_for("loading PyTorch")
        gc.disable()
        import torch  # noqa: F401
    start_garbage_collection()


def start_garbage_collection() -> None:
    """Enable garbage collection, which `gpt2.cli.script` disabled. Existing objects are exempt from it."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()


def output_folder() -> Path:
    """The folder of the current run."""
    return Path(HydraConfig.get().runtime.output_dir)


def require_writable_places(config: Any, places: ExitStack) -> None:
    """Refuse folders and files of a configuration that cannot be written to."""
    if (data := getattr(config, "data", None)) and data.cache_dir:
        places.enter_context(writable_folder(Path(data.cache_dir), "data.cache_dir"))
    for key in ("output", "to", "json"):  # the result of evaluate, of export, of a benchmark
        for file in filter(None, {getattr(one, key, None) for one in (config, *getattr(config, "others", []))}):
            places.enter_context(writable_file(Path(file), key))


@contextmanager
def clean_up_on_error(is_new: bool = True) -> Iterator[None]:
    """On an error, write it to train.log if it is a user's mistake, and remove a new run's folder if nothing ran."""
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit) as error:
        if isinstance(error, UserError):
            log.error("error: %s", error, extra={"in_file_only": True})  # `errors_as_lines` prints it
        if is_new and not isinstance(error, RunLockedError):
            remove_if_nothing_happened(output_folder(), HydraConfig.get())
        raise


def remove_if_nothing_happened(folder: Path, hydra_node: Any) -> None:
    """Remove the folder of a run that ended before it began: only Hydra has written to it.

    A run may also be interrupted after `run.json` was written, for example while W&B starts.
    """
    subdir = hydra_node.output_subdir
    of_hydra = {folder / LOCK, folder / f"{hydra_node.job.name}.log", *((folder / subdir).glob("*") if subdir else ())}
    if read_about(folder).get("state") == INTERRUPTED:
        of_hydra.add(folder / ABOUT)
    if all(path in of_hydra for path in folder.rglob("*") if not path.is_dir()):
        shutil.rmtree(folder)


# ---------------------------------------------------------------------------------------------------------------------
# A single run


def run_single(task: Task, composed: DictConfig, config: Run, folder: RunFolder, early_log: MemoryHandler) -> None:
    """Run a script's function once, with a configuration and a folder that are checked already."""
    began = False
    is_writer = isinstance(config, TrainRun) and dist_env().is_main

    def job(_composed: DictConfig) -> Any:
        nonlocal began
        began = True
        replay(early_log)
        clean_up = clean_up_on_error(folder.is_new) if is_writer else nullcontext()
        with errors_as_lines(), clean_up:
            return run_task(task, config)

    try:
        run_composed(composed, job)
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
    causes = [error]
    while cause := causes[-1].__cause__:
        causes.append(cause)
    if isinstance(causes[-1], OSError):
        return f"hydra.run.dir: cannot write {causes[-1].filename or 'the files of the run'}: {reason(causes[-1])}"
    return f"hydra: {': '.join(map(one_line, causes))}"


def collect_log() -> MemoryHandler:
    """Collect log records, such as that of a skipped checkpoint, until Hydra has configured logging.

    Hydra's configuration replaces this handler.
    """
    early_log = MemoryHandler(capacity=1000, flushLevel=logging.CRITICAL + 1)
    logger = logging.getLogger("gpt2")
    logger.handlers = [early_log]
    logger.setLevel(logging.INFO)
    return early_log


def replay(early_log: MemoryHandler) -> None:
    """Log the collected records, each message once: checkpoints are searched before and after the folder is locked."""
    logging.getLogger("gpt2").removeHandler(early_log)  # Hydra has removed it, unless it configures no logging
    for record in {record.getMessage(): record for record in early_log.buffer}.values():
        logging.getLogger(record.name).handle(record)


# ---------------------------------------------------------------------------------------------------------------------
# Jobs of a sweep


def run_sweep_job(task: Task, swept: set[str], composed: DictConfig) -> Any:
    """One job of a sweep, in this process or in one of the launcher's.

    Args:
        swept: The keys that the sweep is over.

    Returns:
        The loss of its run, or the UserError that ended it, so that the other runs continue. A process of joblib also
        returns an interruption: an exception would make joblib kill the other processes.
    """
    protect_output()  # the launcher may have started this process
    is_worker = parent_process() is not None
    if is_worker:
        end_with_parent()
    try:
        with _job_runs if is_worker else nullcontext(), clean_up_on_error(), admitted():
            if is_worker and Path(HydraConfig.get().sweep.dir, STOP_FILE).exists():
                raise Interrupted.by(signal.SIGINT)
            run = resumable_job(composed, partial(run_locked, task, composed))
            if composed.study.trial is not None:
                return run_trial(composed, lambda trial: run_locked(partial(task, trial=trial), composed))
            log.info(f"Sweep   {name_of_run(HydraConfig.get().job.num, overrides_of(HydraConfig.get()), swept)}")
            with errors_as_lines():
                return loss_or_error(run, swept)
    except Interrupted as interruption:
        if is_worker:
            return interruption
        raise


@cache
def end_with_parent() -> None:
    """In a process of joblib: when its parent has been killed, save the run, as after SIGTERM, and end.

    Otherwise a killed sweep would leave processes that train or wait for jobs.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)
        with _job_runs:  # the run has saved
            os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def loss_or_error(run: Callable[[], Any], swept: set[str]) -> Any:
    """The loss of a run, or the error that ended it, which is printed and recorded."""
    try:
        with reraise_interruption():
            return run()
    except BrokenPipeError:
        raise
    except Exception as error:  # the other runs continue
        job, problem = HydraConfig.get(), error
        if not isinstance(problem, UserError):
            file = os.path.relpath(output_folder() / f"{job.job.name}.log")
            bug = f"{type(error).__name__}: {one_line(error)}; the traceback is in {file}"
            problem = ResourceError(machine_error(error) or bug)
        log.error("error: %s", problem, extra={"in_file_only": True}, exc_info=None if problem is error else error)
        print_problems(named(problem, job.job.num, overrides_of(job), swept))
        if not isinstance(error, RunLockedError):  # the folder belongs to another process
            with suppress(OSError):
                record_failure(output_folder(), problem)
        return problem


def run_locked(task: Task, composed: DictConfig) -> Any:
    """Lock the folder of a job, complete and validate its configuration, and run it."""
    with run_lock(output_folder()), ExitStack() as places:
        config = resolve("train", composed, overrides_of(HydraConfig.get()))
        assert isinstance(config, TrainRun)
        refuse_second_run(config, output_folder())
        require_writable_places(config, places)
        return run_task(task, config)
