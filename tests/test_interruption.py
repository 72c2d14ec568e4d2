"""Signals that ask to end: what they do to a process, to a step, and to whoever handled them before."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress

import pytest

from gpt2.runtime.signals import SIGNALS, defer_signals


@pytest.fixture
def acted() -> Iterator[list[int]]:
    """What reached the handlers that were there before."""
    acted: list[int] = []
    before = {number: signal.signal(number, lambda number, _frame: acted.append(number)) for number in SIGNALS}
    yield acted
    for number, handler in before.items():
        signal.signal(number, handler)


def ask(*numbers: int) -> None:
    for number in numbers:
        signal.raise_signal(number)


@pytest.mark.parametrize("first", SIGNALS)
@pytest.mark.parametrize("second", SIGNALS)
def test_the_first_signal_is_remembered_and_only_ctrl_c_is_heard_again(acted, capfd, monkeypatch, first, second):
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    remembered: list[int] = []
    with defer_signals(remembered.append):
        assert capfd.readouterr().err == ""
        ask(first, second)  # at once: one and the same, through a terminal's group and a program between
        assert (remembered, acted) == ([first], [])
        assert "finishing this step, then saving" in capfd.readouterr().err
        now += 1
        ask(second)
        assert (remembered, acted) == ([first], [second] if second == signal.SIGINT else [])
    acted.clear()
    ask(first)
    assert (remembered, acted) == ([first], [first])


def test_ctrl_c_twice_is_a_keyboard_interrupt(capfd, monkeypatch):
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    remembered: list[int] = []
    with pytest.raises(KeyboardInterrupt), defer_signals(remembered.append):
        ask(signal.SIGINT)
        now += 1
        ask(signal.SIGINT)
    assert remembered == [signal.SIGINT]


def test_a_signal_whose_exception_was_lost_is_remembered_after_all():
    program = """
import signal
from gpt2.runtime import signals as interruption
interruption.exit_on_signals(also_by_ctrl_c=True)
class Ends:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)  # Python ignores what is raised here
Ends()
with interruption.defer_signals(print):
    pass
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"{signal.SIGINT}\n")


@pytest.mark.parametrize("asked", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_the_handlers_are_those_of_before_however_it_ends(asked, fails, capfd):
    before = [signal.getsignal(number) for number in SIGNALS]
    try:
        with defer_signals(lambda number: None):
            assert [signal.getsignal(number) for number in SIGNALS] != before
            if asked:
                ask(signal.SIGTERM)
            if fails:
                raise ZeroDivisionError
    except ZeroDivisionError:
        assert fails
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_it_may_be_entered_again(acted, capfd):
    remembered: list[int] = []
    for _ in range(2):
        with defer_signals(remembered.append):
            ask(signal.SIGTERM)
    assert (remembered, acted) == ([signal.SIGTERM] * 2, [])


def test_off_the_main_thread_signals_stay_with_whom_they_are(acted):
    remembered, seen = [], []

    def work() -> None:
        with defer_signals(remembered.append):
            seen.append([signal.getsignal(number) for number in SIGNALS])
        with pytest.raises(ZeroDivisionError), defer_signals(remembered.append):
            raise ZeroDivisionError
        seen.append("ended")

    before = [signal.getsignal(number) for number in SIGNALS]
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before, "ended"]
    ask(signal.SIGTERM)
    assert (remembered, acted) == ([], [signal.SIGTERM])


@pytest.mark.parametrize("number", SIGNALS[:2])
def test_a_signal_that_comes_while_its_handlers_are_put_in_place_is_remembered_or_acts(acted, monkeypatch, number):
    set_handler, installed = signal.signal, []

    def and_then_a_signal(which, handler):
        before = set_handler(which, handler)
        installed.append(which)
        if len(installed) == SIGNALS.index(number) + 1:
            ask(number)
        return before

    remembered: list[int] = []
    monkeypatch.setattr(signal, "signal", and_then_a_signal)
    with defer_signals(remembered.append):
        pass
    monkeypatch.undo()
    assert remembered + acted == [number]


# Processes

PROGRAM = """
import sys, time
from gpt2.runtime import signals as interruption
interruption.{begin}
try:
    print("ready", flush=True)
    sys.stdin.read()
finally:
    print("cleaned up", flush=True)
"""


def asked_to_end(begin: str, number: int) -> tuple[int, str, str]:
    """How a process ends that gets a signal while it waits: its exit code, its output and its errors."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", PROGRAM.format(begin=begin)], text=True, **pipes)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    with suppress(subprocess.TimeoutExpired):  # communicate() closes its input, at which it ends by itself
        process.wait(0.2 if begin == "leave_to_parent()" else 10)
    output, errors = process.communicate(timeout=10)
    return process.returncode, output, errors


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGUSR1", 138)])
def test_a_process_that_is_asked_to_end_cleans_up_and_says_so(name, code):
    returned, output, errors = asked_to_end("exit_on_signals(also_by_ctrl_c=False)", getattr(signal, name))
    assert (returned, output) == (code, "cleaned up\n")
    assert errors == f"\nInterrupted by {name}.\n"


def test_ctrl_c_stays_pythons_own():
    returned, output, errors = asked_to_end("exit_on_signals(also_by_ctrl_c=False)", signal.SIGINT)
    assert (returned, output) == (-signal.SIGINT, "cleaned up\n")
    assert "KeyboardInterrupt" in errors


@pytest.mark.parametrize("number", SIGNALS)
def test_a_child_leaves_the_decision_to_its_parent(number):
    assert asked_to_end("leave_to_parent()", number) == (0, "cleaned up\n", "")


def test_a_process_without_standard_error_is_interrupted_all_the_same(capfd):
    remembered: list[int] = []
    copy = os.dup(2)
    os.close(2)
    try:
        with defer_signals(remembered.append):
            ask(signal.SIGTERM)
    finally:
        os.dup2(copy, 2)
        os.close(copy)
    assert remembered == [signal.SIGTERM]
