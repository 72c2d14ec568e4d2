"""The table of external loggers, and the protection of a run from their failures.

Each logger works in its own thread, so a logger that raises or hangs does not stop the run. Its first error is logged
as a warning and disables it. At its end, a run waits for the loggers for a limited time. Secrets are removed here from
all that loggers receive about a run.
"""

import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from pkgutil import resolve_name
from queue import SimpleQueue
from typing import Any, TypeVar

from gpt2.config import EvaluateRun, GenerateRun, TrainRun
from gpt2.errors import one_line, without_secrets
from gpt2.runtime.files import remove
from gpt2.runtime.signals import start_in_thread
from gpt2.tracking.tracker import Ended, ExternalLogger, Record
from gpt2.tracking.wandb_runs import ID as WANDB_ID
from gpt2.tracking.wandb_runs import resolve_mode, stored_id

log = logging.getLogger(__name__)
T = TypeVar("T")

PATIENCE = "GPT2_WANDB_PATIENCE"  # environment variable: factor of all time limits, for slow networks and machines
ABANDON_SECONDS = 2.0
MLFLOW_ID = "mlflow_id"  # name of the file in a run folder

# The classes by their names in `gpt2.config.Logger`, as texts: importing a module imports its library.
LOGGERS = {
    "wandb": "gpt2.tracking.wandb_logger:WandbLogger",
    "tensorboard": "gpt2.tracking.tensorboard_logger:TensorBoardLogger",
    "mlflow": "gpt2.tracking.mlflow_logger:MlflowLogger",
    "csv": "gpt2.tracking.csv_logger:CsvLogger",
}

NOT_LOGGED = ("loggers", "wandb", "mlflow", "started_with", "resume", "resume_changes")  # keys of a configuration

Config = TrainRun | EvaluateRun | GenerateRun


@dataclass(frozen=True)
class LoggedRun:
    """The description of a run that a logger receives."""

    name: str
    group: str  # the experiment or the study
    job_type: str  # train, trial, evaluate or generate
    config: Record = field(default_factory=dict)  # nested
    tags: list[str] = field(default_factory=list)
    folder: Path | None = None  # the run folder, where a logger stores what it needs to continue a resumed run
    step: int = 0  # step of the checkpoint from which the run is resumed
    wandb_id: str | None = None  # W&B id in that checkpoint


def start_loggers(config: Config, run: LoggedRun) -> ExternalLogger:
    """Start the loggers that a configuration selects, in the background."""
    facts = {"name": run.name, "group": run.group, "config": run.config, "tags": [tag[:64] for tag in run.tags]}
    run, loggers = replace(run, **redact(facts)), []
    for name in dict.fromkeys(config.loggers):
        if name == "wandb" and resolve_mode(config.wandb.mode) == "off":
            continue
        try:
            loggers.append(resolve_name(LOGGERS[name])(config, run))
        except Exception as error:  # noqa: BLE001  # a logger never ends a run
            log.warning("The logger %s did not start: %s", name, one_line(error))
    return Loggers(loggers) if loggers else ExternalLogger()


def start_run_loggers(
    config: TrainRun, folder: Path, about: Record, wandb_id: str | None = None, step: int = 0
) -> ExternalLogger:
    """`start_loggers` for a run of `train.py`.

    Args:
        about: The content of `run.json`.
        wandb_id: The W&B id in the checkpoint of a resumed run.
        step: The step of this checkpoint.
    """
    if "copy_of" in about:
        for name in (WANDB_ID, MLFLOW_ID):
            remove(folder / name)
        wandb_id = stored_id(folder, None)
        log.info(f"Note    this folder is a copy of {about['copy_of']}: loggers get a run of its own")
    study = config.study
    facts = {key: about[key] for key in ("parameters", "tokens_per_step", "repository", "machine", "versions")}
    run = LoggedRun(
        name=about["title"] if study.trial is None else f"{study.name}-{study.trial:04}",
        group=study.name or config.name,
        job_type="train" if study.trial is None else "trial",
        config={**comparable(about["config"]), **facts, "folder": os.path.relpath(folder)},
        tags=about["tags"],
        folder=folder,
        step=step,
        wandb_id=wandb_id,
    )
    return start_loggers(config, run)


# ---------------------------------------------------------------------------------------------------------------------
# Isolation


class Loggers(ExternalLogger):
    """Several loggers, none of which can delay or end the run."""

    def __init__(self, loggers: list[ExternalLogger]):
        self.id = next((logger.id for logger in loggers if logger.id), None)
        self._isolated = [_Isolated(logger) for logger in loggers]

    def log(self, record: Record) -> None:
        self._call("log", record)

    def show_table(self, name: str, columns: list[str], rows: list[Any]) -> None:
        self._call("show_table", name, columns, rows)

    def summarize(self, figures: Record) -> None:
        self._call("summarize", figures)

    def finish(self, ended: Ended, folder: Path | None) -> None:
        self._call("finish", Ended(**redact(vars(ended))), folder)
        began = time.monotonic()
        try:
            for logger in self._isolated:
                logger.wait(began)
        finally:  # a second Ctrl-C ends the waiting
            for logger in self._isolated:
                logger.abandon(ended)

    def where(self) -> list[str]:
        return [line for logger in self._isolated for line in logger.where]

    def _call(self, method: str, *arguments: Any) -> None:
        for logger in self._isolated:
            logger.calls.put((method, arguments))


class _Isolated:
    """Calls the methods of a logger in order, in a thread. After an error, it calls only `finish`."""

    def __init__(self, logger: ExternalLogger):
        self.logger, self.where = logger, list[str]()
        self.calls: SimpleQueue[tuple[str, tuple[Any, ...]]] = SimpleQueue()
        self._works, self._done = True, threading.Event()
        threading.Thread(target=self._work, daemon=True, name=f"{logger.title} logger").start()

    def _work(self) -> None:
        method, arguments = "start", ()
        while True:
            self._try(method, *arguments)
            if method == "finish":
                break
            if self.calls.empty():
                self._try("flush")
            method, arguments = self.calls.get()
        with suppress(BaseException):
            self.where = self.logger.where()
        self._done.set()

    def _try(self, method: str, *arguments: Any) -> None:
        if self._works or method == "finish":
            try:
                getattr(self.logger, method)(*arguments)
            except BaseException as error:  # noqa: BLE001  # a logger never ends a run
                self._disable(one_line(error))

    def _disable(self, problem: str) -> None:
        if self._works:
            self._works = False
            title = self.logger.title
            log.warning("%s failed and logs nothing more of this run; metrics.jsonl is complete: %s", title, problem)

    def wait(self, began: float) -> None:
        """Wait until `finish` has returned, but only for the logger's time limit, counted from `began`."""
        seconds = limit(self.logger.seconds)
        if not self._done.wait(max(0.0, began + seconds - time.monotonic())):
            self._disable(f"no answer within {seconds:g} s")

    def abandon(self, ended: Ended) -> None:
        def call() -> None:
            with suppress(BaseException):
                self.logger.abandon(ended)

        if not self._done.is_set():
            self._works = False
            with suppress(TimeoutError):
                within(ABANDON_SECONDS, call)


def limit(seconds: float) -> float:
    return seconds * float(os.environ.get(PATIENCE, 1))


def within(seconds: float, call: Callable[[], T]) -> T:
    """Call a function in a thread, and return its result or raise its error if it takes less than `limit(seconds)`.

    Raises:
        TimeoutError: The call takes longer. Its thread keeps running and is ignored.
    """
    future = start_in_thread(call)
    try:
        return future.result(limit(seconds))
    except TimeoutError:
        if future.done():
            raise
        raise TimeoutError(f"no answer within {limit(seconds):g} s") from None


# ---------------------------------------------------------------------------------------------------------------------
# The description of a run


def comparable(config: Record) -> Record:
    """Return a nested configuration without the keys that do not matter when runs are compared."""
    values = {key: value for key, value in config.items() if key not in NOT_LOGGED}
    if "study" in values:
        values["study"] = {key: value for key, value in values["study"].items() if key != "claim"}
    return values


def redact(value: Any) -> Any:
    """Mask possible secrets in all strings of nested dictionaries and lists, see `without_secrets`."""
    if isinstance(value, dict):
        return {key: redact(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [redact(inner) for inner in value]
    return without_secrets(value) if isinstance(value, str) else value
