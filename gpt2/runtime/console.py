"""Terminal output: log lines, and a progress line if standard output is a terminal."""

import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

from gpt2.errors import is_full_disk

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10.0  # of the log about a long task


class ConsoleHandler(logging.StreamHandler):
    """Prints log records on standard output, above the progress line.

    `sys.stdout` is looked up each time, because rich replaces it while a progress line is shown. Records with the
    attribute `on_progress_line` are skipped on a terminal, where the line shows them; those with `in_file_only` always.
    """

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:
        return sys.stdout

    def emit(self, record: logging.LogRecord) -> None:
        is_shown = getattr(record, "on_progress_line", False) and is_terminal()
        if not is_shown and not getattr(record, "in_file_only", False):
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """Continue without output if the reader has gone, as after `| head` or when the terminal was closed."""
        _raise_full_disk()
        if isinstance(sys.exc_info()[1], OSError):
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123  # for the rest of the process
        else:
            super().handleError(record)


class LogFile(logging.FileHandler):
    """Writes log records to a file; a full disk ends the run."""

    def handleError(self, record: logging.LogRecord) -> None:
        _raise_full_disk()
        super().handleError(record)


def _raise_full_disk() -> None:
    """Raise the current exception if the disk is full: `logging` would print a traceback and continue."""
    error = sys.exc_info()[1]
    if error is not None and is_full_disk(error):
        raise error


def is_terminal() -> bool:
    console = Console()
    return console.is_terminal and not console.is_dumb_terminal


@contextmanager
def track(description: str, unit: str) -> Iterator[Callable[..., None]]:
    """Show the progress of a long task: on a terminal continuously, otherwise as a log line every ten seconds.

    Yields:
        A function of the amount done and, if known, the total.
    """
    started = last_line = time.perf_counter()
    done = 0
    columns = (SpinnerColumn(), TextColumn("{task.description}"))
    with Progress(*columns, transient=True, disable=not is_terminal()) as progress:
        task = progress.add_task(description, total=None)

        def advance(so_far: int, of: int | None = None) -> None:
            nonlocal done, last_line
            done, now = so_far, time.perf_counter()
            out_of = "" if of is None else f" of {of:,}"
            rate = so_far / max(now - started, 1e-9)
            text = f"{description}: {so_far:,}{out_of} {unit}, {rate:{',.0f' if rate >= 10 else '.2g'}} a second"
            progress.update(task, description=text)
            if progress.disable and now - last_line > SECONDS_BETWEEN_LINES:
                log.info(text)
                last_line = now

        yield advance
    if done:
        log.info(f"{description}: {done:,} {unit} in {time.perf_counter() - started:.1f} s")


def time_left(seconds: float | None) -> str:
    """Seconds as h:mm:ss or m:ss; -:-- if unknown."""
    if seconds is None or not math.isfinite(seconds):
        return "-:--"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class ProgressLine:
    """Step, loss, speed and time left on one line of a terminal; nothing if standard output is no terminal."""

    def __init__(self, total_steps: int, step: int = 0, label: str = ""):
        columns = (
            TextColumn(f"{label}  step" if label else "step", markup=False),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[figures]}"),
        )
        self.progress = Progress(*columns, disable=not is_terminal(), transient=True)
        self.task = self.progress.add_task("", total=total_steps, completed=step, figures="")

    def __enter__(self) -> "ProgressLine":
        self.progress.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.progress.stop()

    def step(self, step: int) -> None:
        self.progress.update(self.task, completed=step)

    def show(self, text: str) -> None:
        self.progress.update(self.task, figures=text)
