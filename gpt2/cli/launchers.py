"""Hydra launchers, which run the jobs of a sweep: checks of their settings, and jobs that a scheduler restarts.

Slurm warns a job with a signal before it ends it, and submitit handles the signal by requeueing the job at once. During
training our own handler comes first: the step is finished and saved, then the signal is raised again for submitit. The
restarted job has the same folder and resumes from its newest checkpoint.
"""

import logging
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from gpt2.cli.compose import escaped
from gpt2.errors import ResourceError
from gpt2.runtime.console import ConsoleHandler
from gpt2.runtime.signals import Interrupted, blocked_in_children, defer_signals

KEY = "hydra.launcher."
STOP_FILE = ".interrupted"  # if a sweep's folder has this file, joblib's processes begin no further job
REQUEUE_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2)  # a cluster sends one of them before it ends a job


def uses_submitit(launcher: DictConfig) -> bool:
    """Whether submitit runs the jobs, outside this process. It submits all of them before it waits for one."""
    return "hydra_submitit_launcher" in launcher._target_


def requeues(launcher: DictConfig) -> bool:
    """Whether a job that reaches its time limit is restarted."""
    restarts = launcher.get("max_num_timeout")
    return isinstance(restarts, int) and restarts > 0


def log_submissions(enabled: bool = True) -> None:
    """Log the jobs that submitit submits and their folders, because the jobs print nothing on this terminal."""
    log = logging.getLogger("hydra_plugins.hydra_submitit_launcher.submitit_launcher")
    log.handlers, log.propagate = [ConsoleHandler()], False
    log.setLevel(logging.INFO if enabled else logging.WARNING)


@contextmanager
def wait_for_all_jobs() -> Iterator[None]:
    """Make submitit's launcher wait for all jobs. Without this it stops at the first one that is lost."""
    if find_spec("submitit") is None:
        yield
        return
    from submitit import Job

    results = Job.results

    def results_or_error(job: Any) -> list[Any]:
        try:
            return results(job)
        except Exception as error:  # noqa: BLE001  # the job was killed, or its result cannot be read
            return [JobReturn(status=JobStatus.FAILED, _return_value=error)]

    Job.results = results_or_error  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Job.results = results  # type: ignore[method-assign]


@contextmanager
def jobs_save_first(launcher: Launcher, folder: Path) -> Iterator[None]:
    """Pass signals on to joblib's processes, which save their runs before the signal ends the sweep in `folder`.

    Without this, joblib kills its processes as soon as this process raises an exception.
    """
    (folder / STOP_FILE).unlink(missing_ok=True)
    if getattr(launcher, "joblib", {}).get("backend") != "loky":
        yield
        return
    from multiprocessing import active_children

    received: list[int] = []

    def pass_on(number: int) -> None:
        children = active_children()
        if not children:
            raise Interrupted.by(number)
        received.append(number)
        (folder / STOP_FILE).touch()
        for child in children:
            with suppress(ProcessLookupError):
                os.kill(child.pid or 0, number)

    with blocked_in_children(), defer_signals(pass_on):
        try:
            yield
        finally:
            (folder / STOP_FILE).unlink(missing_ok=True)
            if received:
                raise Interrupted.by(received[0])


def validate_launcher(launcher: DictConfig) -> list[str]:
    """Problems with the settings of a launcher, or with the package that it needs."""
    target = launcher._target_
    package = target.split(".")[1] if target.startswith("hydra_plugins.") else None
    if package is not None and find_spec(f"hydra_plugins.{package}") is None:
        needed = f"`pip install {package.replace('_', '-')}==1.4.0rc3`"
        return [f"hydra/launcher: needs a package that is not installed, {needed}"]
    return _validate_submitit(launcher) if uses_submitit(launcher) else []


def _validate_submitit(launcher: DictConfig) -> list[str]:
    settings: dict[str, Any] = OmegaConf.to_container(launcher, resolve=True)  # type: ignore[assignment]
    minima = {"timeout_min": 1, "max_num_timeout": 0, "nodes": 1, "tasks_per_node": 1, "signal_delay_s": 0}
    problems = [
        f"{KEY}{key}: {settings[key]} is not a whole number of at least {minimum}"
        for key, minimum in minima.items()
        if key in settings and (type(settings[key]) is not int or settings[key] < minimum)
    ]
    if not problems and (delay := settings.get("signal_delay_s", 0)) >= 60 * (minutes := settings["timeout_min"]):
        problems.append(f"{KEY}signal_delay_s: {delay} seconds are not less than {KEY}timeout_min={minutes} minutes")
    return problems or _try_submitit(settings, "slurm" if launcher._target_.endswith("SlurmLauncher") else "local")


def _try_submitit(settings: dict[str, Any], cluster: str) -> list[str]:
    """Let submitit check the settings. The launcher itself would do so only after the sweep has begun."""
    import submitit
    from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf

    shared = set(OmegaConf.structured(BaseQueueConf).keys())
    own = ("_target_", "submitit_folder", "max_num_timeout", "python")  # for the launcher, not for submitit's executor
    parameters = {
        key if key in shared else f"{cluster}_{key}": value for key, value in settings.items() if key not in own
    }
    try:
        with TemporaryDirectory() as folder:
            submitit.AutoExecutor(folder, cluster=cluster).update_parameters(**parameters)
    except Exception as error:  # noqa: BLE001  # an unknown name, a wrong type, a machine without Slurm: no common class
        return [f"hydra.launcher: {str(error).splitlines()[0].replace(f'{cluster}_', '')}"]
    return []


# ---------------------------------------------------------------------------------------------------------------------
# Inside a job


def resumable_job(composed: DictConfig, run: Callable[[], Any]) -> Callable[[], Any]:
    """Wrap a job so that, inside a multirun with `train.auto_resume`, it resumes from its own checkpoint.

    Other jobs are returned unchanged; a trial is resumed by its study.
    """
    job = HydraConfig.get()
    if job.mode != RunMode.MULTIRUN:
        return run
    if uses_submitit(job.launcher):
        requeue_on_both_signals()
    if composed.study.trial is not None or not composed.train.auto_resume:
        return run
    composed.resume = escaped(job.runtime.output_dir)
    return partial(_run_until_requeued, run) if uses_submitit(job.launcher) else run


def requeue_on_both_signals() -> None:
    """Let SIGUSR1 and SIGUSR2 both requeue. submitit handles one; the other would kill a job before it trains."""
    handlers = [handler for number in REQUEUE_SIGNALS if callable(handler := signal.getsignal(number))]
    for number in REQUEUE_SIGNALS:
        if handlers and not callable(signal.getsignal(number)):
            signal.signal(number, handlers[0])


def _run_until_requeued(run: Callable[[], Any]) -> Any:
    """Run a job; if a signal interrupts it, raise the signal again, for submitit to requeue the job and exit.

    submitit ignores SIGTERM, which Slurm sends before it preempts a job. A job that ended without a signal would not be
    requeued then, so it continues until Slurm kills it.
    """
    while True:
        try:
            return run()
        except Interrupted as interruption:
            number = int(str(interruption.code)) - 128
            if number == signal.SIGINT:
                raise
            try:
                signal.raise_signal(number)
            except RuntimeError as error:  # submitit raises it after max_num_timeout restarts
                message = f"{error} A checkpoint was saved; the same command resumes."
                raise ResourceError(message) from error
