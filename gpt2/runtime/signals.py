"""Signals that end a process: Ctrl-C, SIGTERM, and SIGUSR1 or SIGUSR2, with which Slurm warns a job before its end.

A process that a signal ends exits with 128 plus the number of the signal, as a shell reports it: 130 after Ctrl-C, 143
after SIGTERM, 138 after SIGUSR1, 140 after SIGUSR2.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from gpt2.runtime.dist_env import dist_env

Result = TypeVar("Result")

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
SECONDS_OF_ONE_CTRL_C = 0.5

_received: int | None = None  # the signal that raised Interrupted


class Interrupted(SystemExit):
    """A signal ends this process; the exit code is 128 plus its number."""

    @classmethod
    def by(cls, number: int) -> "Interrupted":
        return cls(128 + number)


def exit_on_signals(also_by_ctrl_c: bool) -> None:
    """Make signals raise Interrupted from now on. Without `also_by_ctrl_c`, Ctrl-C still raises KeyboardInterrupt."""
    for number in SIGNALS:
        if number != signal.SIGINT or also_by_ctrl_c:
            signal.signal(number, _raise_interrupted)


def _raise_interrupted(number: int, _frame: Any) -> None:
    global _received
    _received = number
    _print(f"Interrupted by {signal.Signals(number).name}.")
    raise Interrupted.by(number)


@contextmanager
def reraise_interruption() -> Iterator[None]:
    """Raise Interrupted again if the code in the block turned it into another exception, as libraries do."""
    try:
        yield
    except BaseException as error:
        if _received is not None and not isinstance(error, SystemExit):
            raise Interrupted.by(_received) from error
        raise


@contextmanager
def defer_signals(on_signal: Callable[[int], None]) -> Iterator[None]:
    """Pass the first signal to `on_signal` instead of interrupting the block. A second Ctrl-C interrupts the block.

    A second signal of another kind is ignored, because schedulers routinely send two. One Ctrl-C may arrive twice,
    through the process group and through a parent process, so two within half a second count as one.

    `on_signal` also receives a signal that arrived before the block, because its exception may have been lost: Python
    ignores exceptions that are raised in `__del__`, for example. Outside the main thread this function does nothing.
    """
    first: float | None = None
    before: dict[int, Any] = {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def handle(number: int, _frame: Any) -> None:
        nonlocal first
        if first is None:
            first = time.monotonic()
            on_signal(number)
            _print("Interrupted: finishing this step, then saving. Press Ctrl-C again to stop at once.")
        elif number == signal.SIGINT and time.monotonic() - first > SECONDS_OF_ONE_CTRL_C:
            restore()
            os.kill(os.getpid(), number)  # any thread may receive it; this one may block signals

    try:
        for number in SIGNALS:
            before[number] = signal.getsignal(number)
            signal.signal(number, handle)
    except ValueError:  # not the main thread
        yield
        return
    try:
        if _received is not None:
            on_signal(_received)
        yield
    except Exception:
        if dist_env().by_torchrun:  # if a rank fails, torchrun sends SIGTERM, which would interrupt the error handling
            before[signal.SIGTERM] = signal.SIG_IGN
        raise
    finally:
        restore()


@contextmanager
def blocked_in_children() -> Iterator[None]:
    """Block signals in processes that start inside the block: a signal during their imports would print tracebacks.

    These processes unblock signals with `admitted`. A process inherits the signal mask of the thread that starts it, so
    this thread blocks signals. Another thread receives them for this process, and Python calls the handlers in the main
    thread.
    """
    from multiprocessing.resource_tracker import ensure_running

    ensure_running()  # it unblocks signals when it starts
    over = threading.Event()
    threading.Thread(target=over.wait, daemon=True).start()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        over.set()


@contextmanager
def admitted() -> Iterator[None]:
    """Unblock signals inside the block, in a process of `blocked_in_children`. Outside it, they stay pending."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    if not before.issuperset(SIGNALS):
        yield
        return
    if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:  # a new process
        exit_on_signals(also_by_ctrl_c=True)
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def interruptibly(function: Callable[[], Result], meanwhile: Callable[[], None]) -> Result:
    """Call a function that may compute for minutes in C or Rust, where Python cannot handle signals.

    The function runs in a thread, so signals interrupt the caller at once. The caller runs `meanwhile` twice a second.
    """
    result = start_in_thread(function)
    while not wait([result], timeout=0.5).done:
        meanwhile()
    return result.result()


def start_in_thread(function: Callable[[], Result]) -> Future[Result]:
    """Call a function in a daemon thread, which does not keep the process from exiting."""
    result: Future[Result] = Future()

    def work() -> None:
        try:
            result.set_result(function())
        except BaseException as error:  # noqa: BLE001  # a panic of Rust is not an Exception
            result.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return result


def _print(text: str) -> None:
    """Print on rank 0, bypassing Python's buffers: the signal may have interrupted code that uses them."""
    if dist_env().is_main:
        with suppress(OSError):
            os.write(2, f"\n{text}\n".encode())


def ignore_signals(_worker: int = 0) -> None:
    """For child processes: a terminal sends Ctrl-C to all of them, but the parent decides when they end."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
