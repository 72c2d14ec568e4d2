"""Terminal output: text without control characters, log lines, and a progress line where output is a terminal."""

import logging
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, SpinnerColumn, TextColumn

from gpt2.errors import is_full_disk, without_password
from gpt2.runtime.dist_env import dist_env
from gpt2.runtime.waiting import end_waiting

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10.0  # interval of the log lines during a long task
SECONDS_BETWEEN_UPDATES = 0.5  # minimum interval of updates in a notebook; each is a message to the browser

# Characters that a terminal may act on instead of showing them: control characters except tab and newline, marks that
# change the direction of text or end a line, and lone surrogates, which stand for bytes that are not UTF-8.
UNSAFE = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
MOVES_OF_TQDM = re.compile(r"\r|(\n|\x1b\[A)*")


def printable(text: str) -> str:
    """Replace each character that a terminal may act on by U+FFFD."""
    return UNSAFE.sub("\ufffd", text)


class TerminalText:
    """A text stream that passes all text through `printable`.

    Generated text, names and files may contain anything. Only progress bars may write escape sequences. Those of rich
    are written to `unfiltered`; those of tqdm, which libraries use, are recognized by the module that calls `write`.
    """

    def __init__(self, stream: TextIO):
        self.unfiltered = stream

    def write(self, text: str) -> int:
        end_waiting()
        is_bar = sys._getframe(1).f_globals.get("__name__") == "tqdm.utils"
        start = match.end() if is_bar and (match := MOVES_OF_TQDM.match(text)) else 0
        self.unfiltered.write(text[:start] + printable(text[start:]))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.unfiltered, name)


class WithoutPasswords:
    """A text stream that replaces credentials with stars in each text that is written to it."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> int:
        self.stream.write(without_password(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class LogRecord(logging.LogRecord):
    """A log record of any library, without passwords.

    A record with the attribute `is_sample` holds generated text, which is not changed.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.exc_info and self.exc_info[0]:
            self.exc_text = without_password(logging.Formatter().formatException(self.exc_info))

    def getMessage(self) -> str:
        text = super().getMessage()
        return text if getattr(self, "is_sample", False) else without_password(text)


def protect_output() -> None:
    """For scripts: keep passwords out of log lines and standard error, and control characters from a terminal.

    Standard error includes tracebacks and warnings. A character that a stream cannot encode becomes a question mark.
    """
    logging.setLogRecordFactory(LogRecord)
    sys.excepthook = sys.__excepthook__
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")
            safe: Any = stream if name == "stdout" else WithoutPasswords(stream)
            setattr(sys, name, TerminalText(safe) if stream.isatty() else safe)


class ConsoleHandler(logging.StreamHandler):
    """Prints log records on standard output, above the progress line.

    `sys.stdout` is looked up each time, because rich replaces it while a progress line is shown. Records with the
    attribute `in_file_only` are skipped. Records with `on_progress_line` are skipped on a terminal and in a notebook,
    where the progress line shows the same.
    """

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:
        return sys.stdout

    def emit(self, record: logging.LogRecord) -> None:
        is_shown = getattr(record, "on_progress_line", False) and (is_terminal() or Console().is_jupyter)
        if not is_shown and not getattr(record, "in_file_only", False):
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """Continue without output if the output is closed, as after `| head` or when the terminal was closed."""
        _raise_full_disk()
        if isinstance(sys.exc_info()[1], OSError):
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123  # for the rest of the process
        else:
            super().handleError(record)


class ProgressHandler(ConsoleHandler):
    """Prints records below the level of warnings, and passes warnings to the handlers of the root logger."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno < logging.WARNING:
            super().emit(record)
        else:
            logging.getLogger().callHandlers(record)


@contextmanager
def progress_shown() -> Iterator[None]:
    """For the Python API: print the log lines of this package while a function runs, unless logging is configured.

    Logging counts as configured if records of level INFO reach a handler, if the logger `gpt2` has a level, or if the
    effective level is above WARNING. Only rank 0 prints.
    """
    logger = logging.getLogger("gpt2")
    reaches_handler = logger.isEnabledFor(logging.INFO) and logger.hasHandlers()
    if reaches_handler or logger.level or logger.getEffectiveLevel() > logging.WARNING or not dist_env().is_main:
        yield
        return
    handler = ProgressHandler()
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False  # the handlers of the root logger may be meant for warnings only
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
        logger.propagate = True


class LogFile(logging.FileHandler):
    """Writes log records to a file; a full disk ends the run."""

    def __init__(self, filename: str):
        super().__init__(filename, encoding="utf-8", errors="backslashreplace")  # file names need not be UTF-8

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


class LiveProgress(Progress):
    """A progress display of rich on standard output, if that is a terminal.

    Rich prints other output above the display. This output is filtered first, because rich interprets escape sequences.
    """

    def __init__(self, *columns: ProgressColumn):
        console = Console(file=getattr(sys.stdout, "unfiltered", sys.stdout))
        super().__init__(*columns, console=console, transient=True, disable=not is_terminal())

    def start(self) -> None:
        end_waiting()
        super().start()
        if not self.disable:
            sys.stdout, sys.stderr = TerminalText(sys.stdout), TerminalText(sys.stderr)


@contextmanager
def track(description: str, unit: str) -> Iterator[Callable[..., None]]:
    """Show the progress of a long task: continuously on a terminal, otherwise as a log line every ten seconds.

    Yields:
        A function to call with the amount done and, if known, the total.
    """
    started = last_line = time.perf_counter()
    done = 0
    with LiveProgress(SpinnerColumn(), TextColumn("{task.description}", markup=False)) as progress:
        task = progress.add_task(description, total=None)

        def advance(so_far: int, of: int | None = None) -> None:
            nonlocal done, last_line
            done, now = so_far, time.perf_counter()
            out_of = "" if of is None else f" of {of:,}"
            rate = so_far / max(now - started, 1e-9)
            left = "" if of is None else f", {time_left((of - so_far) / max(rate, 1e-9))} left"
            text = f"{description}: {so_far:,}{out_of} {unit}, {rate:{',.0f' if rate >= 10 else '.2g'}} a second{left}"
            progress.update(task, description=text)
            if progress.disable and now - last_line > SECONDS_BETWEEN_LINES:
                log.info(text)
                last_line = now

        yield advance
    if done:
        log.info(f"{description}: {done:,} {unit} in {time.perf_counter() - started:.1f} s")


def time_left(seconds: float | None) -> str:
    """Format seconds as h:mm:ss or m:ss; -:-- if unknown."""
    if seconds is None or not math.isfinite(seconds):
        return "-:--"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class ProgressLine:
    """Step, loss, speed and time left on one line of a terminal; nothing if standard output is not a terminal."""

    def __init__(self, total_steps: int, step: int = 0, label: str = ""):
        columns = (
            TextColumn(f"{printable(label)}  step" if label else "step", markup=False),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[figures]}"),
        )
        self.progress = LiveProgress(*columns)
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


class NotebookLine(ProgressLine):
    """A `ProgressLine` for Jupyter, which updates one output. Rich would print a line for each update."""

    def __init__(self, total_steps: int, step: int = 0, label: str = ""):
        self.total_steps, self.label, self.at, self.figures = total_steps, printable(label), step, ""
        self.output: Any = None
        self._last_update = 0.0

    def __enter__(self) -> "NotebookLine":
        from IPython.display import display

        self.output = display(self._content(), raw=True, display_id=True)
        return self

    def __exit__(self, *error: Any) -> None:
        self.show("")
        self._update()

    def step(self, step: int) -> None:
        self.at = step
        if time.perf_counter() - self._last_update > SECONDS_BETWEEN_UPDATES:
            self._update()

    def show(self, text: str) -> None:
        self.figures = text

    def _update(self) -> None:
        if self.output:
            self.output.update(self._content(), raw=True)
        self._last_update = time.perf_counter()

    def _content(self) -> dict[str, str]:
        return {"text/plain": f"{self.label} step {self.at:,}/{self.total_steps:,}  {self.figures}".strip()}


def progress_line(total_steps: int, step: int = 0, label: str = "") -> ProgressLine:
    return (NotebookLine if Console().is_jupyter else ProgressLine)(total_steps, step, label)
