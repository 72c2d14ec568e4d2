"""The line that names what a script waits for."""

import io
import sys

import pytest

from gpt2.runtime.console import TerminalText
from gpt2.runtime.waiting import waiting_for


class Stream(io.StringIO):
    def __init__(self, is_terminal: bool):
        super().__init__()
        self.isatty = lambda: is_terminal


@pytest.mark.parametrize(
    ("out", "error", "rank"), [(True, True, "0"), (False, True, "0"), (True, False, "0"), (True, True, "1")]
)
def test_line_is_shown_on_a_terminal_and_removed_before_other_output(monkeypatch, out, error, rank):
    stdout, stderr = Stream(out), Stream(error)
    monkeypatch.setattr(sys, "__stdout__", stdout)
    monkeypatch.setattr(sys, "__stderr__", stderr)
    monkeypatch.setenv("RANK", rank)
    waiting_for("starting")
    waiting_for("loading")
    print("text", file=TerminalText(stdout))
    print("more", file=TerminalText(stdout))
    assert stdout.getvalue() == "text\nmore\n"
    is_shown = out and error and rank == "0"
    assert stderr.getvalue() == (f"starting ...\r{' ' * 12}\rloading ...\r{' ' * 11}\r" if is_shown else "")
