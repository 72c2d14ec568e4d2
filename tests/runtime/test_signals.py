"""Signals that end a process: deferred to the end of a step, raised as an exception, ignored by children."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress

import pytest

from gpt2.runtime.signals import SIGNALS, blocked_in_children, defer_signals, interruptibly
from tests.test_scripts import wait_for


@pytest.fixture
def handled() -> Iterator[list[int]]:
    """The signals that reach the handlers installed before `defer_signals`."""
    handled: list[int] = []
    before = {number: signal.signal(number, lambda number, _frame: handled.append(number)) for number in SIGNALS}
    yield handled
    for number, handler in before.items():
        signal.signal(number, handler)


def send(*numbers: int) -> None:
    for number in numbers:
        signal.raise_signal(number)


@pytest.mark.parametrize("first", SIGNALS)
@pytest.mark.parametrize("second", SIGNALS)
def test_first_signal_is_deferred_and_only_a_second_ctrl_c_acts(handled, capfd, monkeypatch, first, second):
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    received: list[int] = []
    with defer_signals(received.append):
        assert capfd.readouterr().err == ""
        send(first, second)  # at once, like a Ctrl-C that is delivered twice
        assert (received, handled) == ([first], [])
        assert "finishing this step, then saving" in capfd.readouterr().err
        now += 1
        send(second)
        assert (received, handled) == ([first], [second] if second == signal.SIGINT else [])
    handled.clear()
    send(first)
    assert (received, handled) == ([first], [first])


def test_second_ctrl_c_raises_keyboard_interrupt(capfd, monkeypatch):
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    received: list[int] = []
    with pytest.raises(KeyboardInterrupt), defer_signals(received.append):
        send(signal.SIGINT)
        now += 1
        send(signal.SIGINT)
    assert received == [signal.SIGINT]


def test_signal_before_the_block_is_not_lost():
    program = """
import signal
from gpt2.runtime import signals
signals.exit_on_signals(also_by_ctrl_c=True)
class Ends:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)  # Python ignores what is raised here
Ends()
with signals.defer_signals(print):
    pass
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"{signal.SIGINT}\n")


@pytest.mark.parametrize("interrupted", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_handlers_are_restored(interrupted, fails, capfd):
    before = [signal.getsignal(number) for number in SIGNALS]
    try:
        with defer_signals(lambda number: None):
            assert [signal.getsignal(number) for number in SIGNALS] != before
            if interrupted:
                send(signal.SIGTERM)
            if fails:
                raise ZeroDivisionError
    except ZeroDivisionError:
        assert fails
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_signals_can_be_deferred_again(handled, capfd):
    received: list[int] = []
    for _ in range(2):
        with defer_signals(received.append):
            send(signal.SIGTERM)
    assert (received, handled) == ([signal.SIGTERM] * 2, [])


def test_nothing_changes_off_the_main_thread(handled):
    received, seen = [], []

    def work() -> None:
        with defer_signals(received.append):
            seen.append([signal.getsignal(number) for number in SIGNALS])
        with pytest.raises(ZeroDivisionError), defer_signals(received.append):
            raise ZeroDivisionError
        seen.append("ended")

    before = [signal.getsignal(number) for number in SIGNALS]
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before, "ended"]
    send(signal.SIGTERM)
    assert (received, handled) == ([], [signal.SIGTERM])


@pytest.mark.parametrize("number", SIGNALS[:2])
def test_no_signal_is_lost_while_handlers_are_installed(handled, monkeypatch, number):
    set_handler, installed = signal.signal, []

    def set_then_send(which, handler):
        before = set_handler(which, handler)
        installed.append(which)
        if len(installed) == SIGNALS.index(number) + 1:
            send(number)
        return before

    received: list[int] = []
    monkeypatch.setattr(signal, "signal", set_then_send)
    with defer_signals(received.append):
        pass
    monkeypatch.undo()
    assert received + handled == [number]


# Signals in processes

PROGRAM = """
import sys, time
from gpt2.runtime import signals
signals.{begin}
try:
    print("ready", flush=True)
    sys.stdin.read()
finally:
    print("cleaned up", flush=True)
"""


def run_and_send(begin: str, number: int) -> tuple[int, str, str]:
    """Send a signal to a process that waits for input. Returns its exit code, output and errors."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", PROGRAM.format(begin=begin)], text=True, **pipes)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    with suppress(subprocess.TimeoutExpired):  # communicate() then closes its input, which ends it
        process.wait(0.2 if begin == "ignore_signals()" else 120)
    output, errors = process.communicate(timeout=120)
    return process.returncode, output, errors


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGUSR1", 138)])
def test_signal_ends_a_process_with_its_exit_code(name, code):
    returned, output, errors = run_and_send("exit_on_signals(also_by_ctrl_c=False)", getattr(signal, name))
    assert (returned, output) == (code, "cleaned up\n")
    assert errors == f"\nInterrupted by {name}.\n"


def test_ctrl_c_can_remain_a_keyboard_interrupt():
    returned, output, errors = run_and_send("exit_on_signals(also_by_ctrl_c=False)", signal.SIGINT)
    assert (returned, output) == (-signal.SIGINT, "cleaned up\n")
    assert "KeyboardInterrupt" in errors


@pytest.mark.parametrize("number", SIGNALS)
def test_children_ignore_signals(number):
    assert run_and_send("ignore_signals()", number) == (0, "cleaned up\n", "")


def test_signal_is_deferred_without_standard_error(capfd):
    received: list[int] = []
    copy = os.dup(2)
    os.close(2)
    try:
        with defer_signals(received.append):
            send(signal.SIGTERM)
    finally:
        os.dup2(copy, 2)
        os.close(copy)
    assert received == [signal.SIGTERM]


def test_computation_that_ignores_signals_is_abandoned():
    """The thread of the computation ends with the process."""
    calls, never = [], threading.Event()

    def meanwhile() -> None:
        calls.append(None)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        interruptibly(never.wait, meanwhile)
    assert len(calls) == 1
    never.set()


def test_result_or_error_of_a_computation_in_a_thread():
    assert interruptibly(lambda: 7, pytest.fail) == 7
    with pytest.raises(ZeroDivisionError):
        interruptibly(lambda: 1 // 0, pytest.fail)


def test_children_start_with_signals_blocked_until_they_unblock_them(handled):
    child = """
import os, signal
from gpt2.runtime.signals import SIGNALS, Interrupted, admitted
os.kill(os.getpid(), signal.SIGTERM)
assert signal.pthread_sigmask(signal.SIG_BLOCK, ()).issuperset(SIGNALS)
try:
    with admitted():
        print("not reached")
except Interrupted as interruption:
    print(interruption.code)
os.kill(os.getpid(), signal.SIGINT)  # blocked again
"""
    with blocked_in_children():
        done = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True)
        os.kill(os.getpid(), signal.SIGUSR1)  # this process receives them, in another thread
        wait_for(lambda: handled == [signal.SIGUSR1])
    assert (done.returncode, done.stdout) == (0, "143\n")
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()).intersection(SIGNALS)
