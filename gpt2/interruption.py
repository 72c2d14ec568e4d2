"""Signals that ask a process to end: Ctrl-C, a scheduler's SIGTERM, and SIGUSR1, by which Slurm can warn ahead.

A process that is asked to end says so by its exit code, 128 and the number of the signal, as a shell would: 130 after
Ctrl-C, 143 after SIGTERM, 138 after SIGUSR1.
"""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

SIGNALS = [number for name in ("SIGINT", "SIGTERM", "SIGUSR1") if (number := getattr(signal, name, None)) is not None]


_asked: int | None = None  # by which signal this process was asked to end


def leave(number: int, _frame: Any = None) -> None:
    """End the process by an exception, so that what is half done is cleaned up on the way."""
    global _asked
    _asked = number
    _say(f"Interrupted by {signal.Signals(number).name}.")
    raise SystemExit(128 + number)


def leave_when_asked() -> None:
    """From now on SIGTERM and SIGUSR1 end the process by `leave`; Ctrl-C stays Python's own KeyboardInterrupt."""
    for number in SIGNALS:
        if number != signal.SIGINT:
            signal.signal(number, leave)


@contextmanager
def leaving_as_asked() -> Iterator[None]:
    """Let the exception of `leave` arrive, whatever the code that it came through has made of it."""
    try:
        yield
    except BaseException as error:
        if _asked is not None and not isinstance(error, SystemExit):
            raise SystemExit(128 + _asked) from error
        raise


@contextmanager
def deferred(remember: Callable[[int], None]) -> Iterator[None]:
    """Have the first signal only remembered, by its number; a second one acts as it did before."""

    def note(number: int, _frame: Any) -> None:
        remember(number)
        restore()
        _say("Interrupted: finishing this step, then saving. Once more, and it stops at once.")

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
        yield
    finally:
        restore()


def _say(text: str) -> None:
    """Past Python's buffers: a signal may come while they are in use."""
    with suppress(OSError):
        os.write(2, f"\n{text}\n".encode())


def leave_to_parent() -> None:
    """In a child: Ctrl-C goes to every process of a terminal, SIGTERM often to a whole group; the parent decides."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
