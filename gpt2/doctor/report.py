"""The rows that checks return: how checks are run, and how rows are printed."""

import logging
import textwrap
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from logging.handlers import BufferingHandler
from pathlib import Path
from typing import Any

import torch

from gpt2.errors import counted, machine_error, one_line, shortened
from gpt2.runtime.device import Precision, choose_precision
from gpt2.runtime.waiting import waiting_for

OK, SLOW, MISSING, WRONG = STATES = ("OK", "slow", "missing", "WRONG")
LINE_WIDTH, VALUE_COLUMN = 110, 30
REPORT = "a fault of this machine or installation, or a bug: please report it, with the file that json=FILE writes"


@dataclass(eq=False)
class Machine:
    """The examined machine. It is hashable, so that measurements for several checks can be cached."""

    device: torch.device
    folder: Path  # a temporary folder

    @property
    def precision(self) -> Precision:
        """The precision that `train.precision=auto` chooses."""
        return choose_precision("auto", self.device)


@dataclass(frozen=True)
class Row:
    """The result of a check."""

    value: str  # what was found
    status: str = OK
    advice: str = ""  # what to do, unless the status is OK
    expected: str = ""  # the condition for OK
    figures: dict[str, Any] = field(default_factory=dict)  # the figures behind `value`, for programs
    part: str = ""
    name: str = ""
    seconds: float = 0.0


Check = Callable[[Machine], Row | None]  # None: the check does not apply to this device
Checks = Mapping[str, Mapping[str, Check]]  # keys: part, name


@contextmanager
def collected_warnings() -> Iterator[list[logging.LogRecord]]:
    """Collect warnings of this package and of PyTorch instead of printing them between the rows."""
    handler, loggers = BufferingHandler(10**6), [logging.getLogger(name) for name in ("gpt2", "torch")]
    handler.setLevel(logging.WARNING)
    before = [(logger.handlers, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers, logger.propagate = [handler], False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield handler.buffer
    finally:
        for logger, (handlers, propagate) in zip(loggers, before, strict=True):
            logger.handlers, logger.propagate = handlers, propagate


def run_checks(machine: Machine, checks: Checks) -> Iterator[Row]:
    """Run checks in order. If a check raises an error, its row is WRONG with the error in one line."""
    for part, of_part in checks.items():
        for name, check in of_part.items():
            waiting_for(f"{part} {name}")
            began = time.perf_counter()
            try:
                with collected_warnings():
                    row = check(machine)
            except Exception as error:  # noqa: BLE001
                reason = machine_error(error) or f"{type(error).__name__}: {one_line(error)}"
                row = Row(shortened(reason, 300), WRONG, REPORT)
            if row is not None:
                advice, seconds = "" if row.status == OK else row.advice, round(time.perf_counter() - began, 3)
                yield replace(row, part=part, name=name, advice=advice, seconds=seconds)


def as_lines(row: Row) -> str:
    """Return a row for the terminal: status, name and value, and below them the advice."""
    start = f"  {row.status:<8}{row.name:<{VALUE_COLUMN - 10}}"
    options: dict[str, Any] = {"width": LINE_WIDTH, "break_long_words": False, "break_on_hyphens": False}
    lines = textwrap.wrap(row.value, initial_indent=start, subsequent_indent=" " * VALUE_COLUMN, **options)
    if row.status != OK:
        arrow = " " * VALUE_COLUMN + "-> "
        lines += textwrap.wrap(row.advice, initial_indent=arrow, subsequent_indent=" " * len(arrow), **options)
    return "\n".join(lines)


def summary(rows: Sequence[Row]) -> str:
    counts = Counter(row.status for row in rows)
    return f"{counted(len(rows), 'check')}: {', '.join(f'{counts[status]} {status}' for status in STATES)}"
