"""What runs the jobs of a sweep: its settings, checked before any work; and jobs that are put into the queue again.

Slurm warns a job of its end by a signal. submitit answers by asking Slurm to start the job again, but would do so in
the middle of a step. During training the signals are the trainer's, so ours come to their end in this order: the
step is finished and saved, then the same signal goes on to submitit. Started again, by submitit or by Slurm itself, a
job finds itself in the same folder and goes on from the newest checkpoint there.
"""

import logging
import signal
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from gpt2.cli.compose import compose
from gpt2.errors import ResourceError
from gpt2.runtime.console import ConsoleHandler
from gpt2.runtime.signals import Interrupted

T = TypeVar("T")

KEY = "hydra.launcher."
REQUEUING = (signal.SIGUSR1, signal.SIGUSR2)  # either may be what a cluster warns by


def launcher_of(overrides: list[str]) -> DictConfig:
    """The launcher that a command line chooses."""
    return compose("train", overrides, with_hydra=True).hydra.launcher


def requeues(launcher: DictConfig) -> bool:
    """Whether a launcher starts jobs again whose time was up."""
    times = launcher.get("max_num_timeout")
    return isinstance(times, int) and times > 0


def validate_launcher(launcher: DictConfig) -> list[str]:
    """What is missing for a launcher, or wrong with its settings."""
    target = launcher._target_
    package = target.split(".")[1] if target.startswith("hydra_plugins.") else None
    if package is not None and find_spec(f"hydra_plugins.{package}") is None:
        needed = f"`pip install {package.replace('_', '-')}==1.4.0rc3`"
        return [f"hydra/launcher: needs a package that is not installed, {needed}"]
    return _validate_submitit(launcher) if is_of_submitit(launcher) else []


def is_of_submitit(launcher: DictConfig) -> bool:
    """Whether its jobs run elsewhere, all submitted before the first of them is waited for."""
    return "hydra_submitit_launcher" in launcher._target_


def show_submissions(are_shown: bool = True) -> None:
    """Have submitit's launcher say which jobs there are and where: they print nothing on this terminal."""
    log = logging.getLogger("hydra_plugins.hydra_submitit_launcher.submitit_launcher")
    log.handlers, log.propagate = [ConsoleHandler()], False
    log.setLevel(logging.INFO if are_shown else logging.WARNING)


def _validate_submitit(launcher: DictConfig) -> list[str]:
    """What submitit would find wrong, which it says when the sweep has begun."""
    import submitit
    from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf

    settings: dict[str, Any] = OmegaConf.to_container(launcher, resolve=True)  # type: ignore[assignment]
    cluster = "slurm" if launcher._target_.endswith("SlurmLauncher") else "local"
    least = {"timeout_min": 1, "max_num_timeout": 0, "nodes": 1, "tasks_per_node": 1}
    found = [
        f"{KEY}{key}: {settings[key]} is not a whole number of at least {smallest}"
        for key, smallest in least.items()
        if key in settings and (type(settings[key]) is not int or settings[key] < smallest)
    ]
    if found:
        return found
    delay = settings.get("signal_delay_s", 30)
    if not isinstance(delay, int) or not 0 <= delay < settings["timeout_min"] * 60:
        return [
            f"{KEY}signal_delay_s: {delay} is no whole number of seconds that is less than "
            f"{KEY}timeout_min={settings['timeout_min']} minutes"
        ]
    shared = set(OmegaConf.structured(BaseQueueConf).keys())
    told = {
        key if key in shared else f"{cluster}_{key}": value
        for key, value in settings.items()
        if key not in ("_target_", "submitit_folder", "max_num_timeout", "python")
    }
    try:
        with TemporaryDirectory() as folder:
            submitit.AutoExecutor(folder, cluster=cluster).update_parameters(**told)
    except Exception as error:  # noqa: BLE001  # submitit's kinds are many: a name, a type, a machine without Slurm
        return [f"hydra.launcher: {str(error).splitlines()[0].replace(f'{cluster}_', '')}"]
    return []


# ---------------------------------------------------------------------------------------------------------------------
# In a job


def of_sweep(composed: DictConfig, run: Callable[[], T]) -> Callable[[], T]:
    """A run, as it is if a sweep is what it is part of: with train.auto_resume, it goes on from its own checkpoint."""
    job = HydraConfig.get()
    if job.mode != RunMode.MULTIRUN:
        return run
    if is_of_submitit(job.launcher):
        requeue_by_either_signal()
    if composed.study.trial is not None or not composed.train.auto_resume:
        return run
    composed.resume = job.runtime.output_dir
    return partial(_until_requeued, run) if is_of_submitit(job.launcher) else run


def requeue_by_either_signal() -> None:
    """Have both signals do what submitit does at one of them; the other would kill a job that does not train yet."""
    handlers = [handler for number in REQUEUING if callable(handler := signal.getsignal(number))]
    for number in REQUEUING:
        if handlers and not callable(signal.getsignal(number)):
            signal.signal(number, handlers[0])


def _until_requeued(run: Callable[[], Any]) -> Any:
    """Run; and what it was asked to end by, once it has saved itself, is for submitit to answer.

    That ends this process, and requeues its job. But submitit lets SIGTERM pass: a job that ended by itself then would
    not be requeued by Slurm. So it goes on until Slurm ends it.
    """
    while True:
        try:
            return run()
        except Interrupted as asked:
            number = int(str(asked.code)) - 128
            if number == signal.SIGINT:
                raise
            try:
                signal.raise_signal(number)
            except RuntimeError as error:  # submitit's: not requeued
                raise ResourceError(f"{error} It is saved, and the same command line goes on with it.") from error
