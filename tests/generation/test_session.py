"""The interactive session: its commands, and a session on a terminal."""

import codecs
import os
import pty
import select
import signal
import subprocess
import time

import pytest

from gpt2.config import InferenceConfig
from gpt2.generation.session import Session
from tests.conftest import Workspace


@pytest.fixture
def session() -> Session:
    """A session that records requests in `session.generated` instead of generating."""
    generated: list[tuple[str, InferenceConfig]] = []
    session = Session(lambda text, config: generated.append((text, config)), InferenceConfig(seed=3))
    session.generated = generated
    return session


def test_a_line_is_continued_and_an_empty_one_is_not(session):
    for line in ("Once upon", "", "   ", "  indented "):
        session.answer(line)
    assert [text for text, _ in session.generated] == ["Once upon", "  indented "]


def test_a_line_that_is_not_utf8_is_reported(session, monkeypatch, capsys):
    """With a standard input that is strict about UTF-8."""
    lines = iter([b"caf\xe9", b"text"])

    def typed(_prompt: str) -> str:
        try:
            return next(lines).decode()
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", typed)
    session.run()
    assert "error: this line is not UTF-8\n" in capsys.readouterr().out
    assert [text for text, _ in session.generated] == ["text"]


def test_a_text_may_begin_with_a_slash(session):
    session.answer(" /set the table")
    assert session.generated[0][0] == "/set the table"


def test_options_are_set_shown_and_reset(session, capsys):
    for line in ("/set temperature 0.5", "/set top_k null", "/set do_sample false", "/set max_new_tokens 7"):
        session.answer(line)
    session.answer("text")
    config = session.generated[0][1]
    assert (config.temperature, config.top_k, config.do_sample, config.max_new_tokens) == (0.5, None, False, 7)
    assert config.seed == 3
    session.answer("/config")
    assert {"temperature 0.5", "top_k null", "do_sample false"} <= set(capsys.readouterr().out.splitlines())
    for typed, stop in (('["\\n\\n", end]', ["\n\n", "end"]), ("a b", ["a b"]), ("User:", ["User:"]), ("[]", [])):
        session.answer(f"/set stop {typed}")
        assert session.config.stop == stop
    session.answer("/reset")
    session.answer("text")
    assert session.generated[1][1] == InferenceConfig(seed=3)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("/set temperature -1", "temperature: -1.0 is not a finite number of at least 0"),
        ("/set top_p 2", "top_p: 2.0 is not above 0 and at most 1"),
        ("/set top_k many", "top_k: 'many' is not a whole number or null"),
        ("/set quantization int8", "quantization applies when a model is loaded"),
        ("/set seed ${x}", "seed: '${x}' is not a whole number or null"),
        ("/set colour blue", "colour: there is no such key; there are max_new_tokens, "),
        ("/set temperature", "/set temperature is none of /set KEY VALUE"),
        ("/sett a b", "/sett a b is none of"),
        ("/", "/ is none of"),
    ],
)
def test_an_invalid_command_prints_an_error_and_changes_nothing(session, capsys, line, complaint):
    session.answer(line)
    assert complaint in capsys.readouterr().out
    assert session.config == session.initial
    assert not session.generated


class Terminal:
    """generate.py on a pseudo-terminal."""

    def __init__(self, workspace: Workspace, *arguments: str):
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            workspace.command("generate.py", *arguments),
            cwd=workspace.folder,
            env={**workspace.environment, "TERM": "dumb"},
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
        )
        os.close(slave)
        self.seen, self.decoder = "", codecs.getincrementaldecoder("utf-8")()

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def wait_for(self, text: str) -> str:
        """Wait until `text` is shown. Returns everything that was shown before it."""
        deadline = time.monotonic() + 120
        while text not in self.seen:
            assert time.monotonic() < deadline, f"{text!r} did not appear in {self.seen!r}"
            if select.select([self.master], [], [], 0.2)[0]:
                self.seen += self.decoder.decode(os.read(self.master, 4096))
        before, self.seen = self.seen.split(text, 1)
        return before


def test_a_session_on_a_terminal(trained: Workspace):
    terminal = Terminal(trained, "inference.max_new_tokens=5", "inference.seed=1")
    assert "(step 8)" in terminal.wait_for("/help lists the commands")
    terminal.wait_for("> ")
    terminal.type("def f\n")
    terminal.wait_for("def f")  # the echo of what was typed
    terminal.wait_for("def f")  # the prompt with its continuation
    terminal.wait_for("> ")
    terminal.type("def \x9bh\u202e\n")
    terminal.wait_for("def \ufffdh\ufffd")  # after the echo of exactly what was typed
    terminal.wait_for("> ")
    terminal.type("/set max_new_tokens 100000\n")
    terminal.wait_for("> ")
    terminal.type("def g\n")
    terminal.wait_for("def g")
    terminal.wait_for("def g")
    os.killpg(terminal.process.pid, signal.SIGINT)  # Ctrl-C ends the text, not the session
    terminal.wait_for("\n> ")  # the text may contain "> "
    terminal.type("/config\n")
    terminal.wait_for("max_new_tokens 100000")
    terminal.wait_for("> ")
    terminal.type("\x04")  # Ctrl-D
    assert terminal.process.wait(timeout=120) == 0


def test_a_piped_prompt_gives_only_text_on_standard_output(trained: Workspace):
    options = ["inference=greedy", "inference.max_new_tokens=8"]
    given = trained.run("generate.py", "prompt=def f\nx", *options)
    assert "tokens/s" in given.stderr
    piped = subprocess.run(
        trained.command("generate.py", *options, "quiet=true"),
        input="def f\nx\n",
        cwd=trained.folder,
        env=trained.environment,
        capture_output=True,
        text=True,
    )
    assert (piped.stdout, piped.stderr) == (given.stdout, "")
