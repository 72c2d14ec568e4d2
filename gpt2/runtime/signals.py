"""Signals that ask a process to end: Ctrl-C, a scheduler's SIGTERM, and SIGUSR1 or 2, by which Slurm can warn ahead.

A process that is asked to end says so by its exit code, 128 and the number of the signal, as a shell would: 130 after
Ctrl-C, 143 after SIGTERM, 138 after SIGUSR1, 140 after SIGUSR2.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from gpt2.runtime.dist_env import dist_env

NAMES = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2")
SIGNALS = [number for name in NAMES if (number := getattr(signal, name, None)) is not None]


_asked: int | None = None  # by which signal this process was asked to end
_is_ending = False  # for another reason already


class Interrupted(SystemExit):
    """The process ends as it was asked to. Its exit code is 128 and the number of the signal."""

    @classmethod
    def by(cls, number: int) -> "Interrupted":
        return cls(128 + number)


def leave(number: int, _frame: Any = None) -> None:
    """End the process by an exception, so that what is half done is cleaned up on the way."""
    global _asked
    if _is_ending:
        return
    _asked = number
    _say(f"Interrupted by {signal.Signals(number).name}.")
    raise Interrupted.by(number)


def end_undisturbed() -> None:
    """This process is about to end, and says why: from now on it need not be asked to."""
    global _is_ending
    _is_ending = True


def exit_on_signals(also_by_ctrl_c: bool) -> None:
    """From now on signals end the process by `leave`; Ctrl-C may stay what it is to Python, a KeyboardInterrupt."""
    for number in SIGNALS:
        if number != signal.SIGINT or also_by_ctrl_c:
            signal.signal(number, leave)


@contextmanager
def reraise_interruption() -> Iterator[None]:
    """Let the exception of `leave` arrive, whatever the code that it came through has made of it."""
    try:
        yield
    except BaseException as error:
        if _asked is not None and not isinstance(error, SystemExit):
            raise Interrupted.by(_asked) from error
        raise


@contextmanager
def defer_signals(remember: Callable[[int], None]) -> Iterator[None]:
    """Have the first signal only remembered, by its number. A second Ctrl-C acts as it did before.

    Other signals are not as impatient: a scheduler sends two as a matter of course, and so does a terminal with a
    program between, to the group and through that program; half a second apart they are one. A signal is remembered
    too that came earlier and has been lost: Python ignores exceptions where it finalizes objects.
    """
    first: float | None = None

    def note(number: int, _frame: Any) -> None:
        nonlocal first
        if _is_ending:
            return
        if first is None:
            first = time.monotonic()
            remember(number)
            _say("Interrupted: finishing this step, then saving. Ctrl-C once more, and it stops at once.")
        elif number == signal.SIGINT and time.monotonic() - first > 0.5:
            restore()
            signal.raise_signal(number)

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    before: dict[int, Any] = {}
    try:
        for number in SIGNALS:
            before[number] = signal.getsignal(number)
            signal.signal(number, note)
    except ValueError:  # not the main thread: signals are somebody else's
        yield
        return
    try:
        if _asked is not None:
            remember(_asked)
        yield
    finally:
        restore()


def _say(text: str) -> None:
    """Past Python's buffers: a signal may come while they are in use. Rank 0 says it for all."""
    if dist_env().is_main:
        with suppress(OSError):
            os.write(2, f"\n{text}\n".encode())


def leave_to_parent() -> None:
    """In a child: Ctrl-C goes to every process of a terminal, SIGTERM often to a whole group; the parent decides."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
