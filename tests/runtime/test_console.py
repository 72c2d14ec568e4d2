"""Terminal output."""

import io
import json
import logging
import shutil
import sys
import threading
import warnings
from pathlib import Path

import pytest
from tqdm import tqdm

from gpt2.runtime.console import ProgressLine, TerminalText, printable, progress_shown, protect_output, time_left
from tests.conftest import TINY, Workspace

ORDERS = "\x1b]0;title\x07\x1b[31;41m\x9b2J\x90q\x9c\x08\x7f\r\u202ea\u2066b\u200e\u200f\u061c\u2028"
SHOWN = "\ufffd]0;title\ufffd\ufffd[31;41m\ufffd2J\ufffdq" + "\ufffd" * 5 + "a\ufffdb" + "\ufffd" * 4


@pytest.mark.parametrize(
    ("seconds", "text"), [(5, "0:05"), (65, "1:05"), (3661, "1:01:01"), (None, "-:--"), (float("inf"), "-:--")]
)
def test_time_left_format(seconds, text):
    assert time_left(seconds) == text


def test_printable_replaces_control_characters_and_nothing_else():
    assert printable(ORDERS) == SHOWN
    directions = [*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x61C]
    unsafe = {*map(chr, [*range(0x20), *range(0x7F, 0xA0), *directions, 0x2028, 0x2029, 0xD800, 0xDFFF])} - {"\n", "\t"}
    assert {printable(character) for character in unsafe} == {"\ufffd"}
    harmless = "tab\t line\n é \u00a0\u00ad\u200b\u200c\u200d 👩\u200d👧 日本 עברית \ufeff\ue000"
    assert printable(harmless) == harmless


def test_only_progress_bars_of_tqdm_may_move_the_cursor():
    sent = io.StringIO()
    stream = TerminalText(sent)
    with tqdm(desc=ORDERS, total=2, file=stream, mininterval=0, ascii=True) as bar:
        bar.update()
    moves = sent.getvalue()
    assert moves.count("\r") > 1
    assert set(moves.replace(SHOWN, "")) & set(ORDERS) <= set("\r]0;titleqab[31;41m2J")
    print("\rover", file=stream)
    assert sent.getvalue() == f"{moves}\ufffdover\n"


def test_label_of_the_progress_line_and_text_above_it_are_printable(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", TerminalText(terminal))
    monkeypatch.setattr(sys, "stderr", Terminal())
    with ProgressLine(10, label=ORDERS):
        print(ORDERS)
        print(ORDERS, file=sys.stderr)
    sent = terminal.getvalue()
    assert sent.count(SHOWN) > 2
    assert "\x1b[2K" in sent  # rich clears its own line
    assert not any(order in sent for order in ("\x1b]", "\x07", "\x1b[31;41m", "\x9b", "\u202e"))


def test_only_a_terminal_is_protected(monkeypatch):
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", file)
    monkeypatch.setattr(sys, "stderr", None)  # closed
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    protect_output()
    print("\x1b[1mä", flush=True)
    assert sys.stdout is file
    assert file.buffer.getvalue() == b"\x1b[1m?\n"


def test_warnings_and_tracebacks_are_without_passwords(monkeypatch):
    file = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(sys, "stderr", file)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    for _ in range(2):  # as each job of a sweep does
        protect_output()
    error = OSError("https://user:t0k3n@host is down")
    sys.stderr.write(warnings.formatwarning(error, UserWarning, "x.py", 1, line="connect(password='t0k3n')"))
    sys.excepthook(OSError, error, None)
    threading.__excepthook__(threading.ExceptHookArgs((OSError, error, None, threading.current_thread())))
    sys.stderr.flush()
    assert sys.stderr.stream is file
    printed = file.buffer.getvalue().decode()
    assert "t0k3n" not in printed
    assert printed.count("https://***@host is down") == 3


# ---------------------------------------------------------------------------------------------------------------------
# The scripts


def only_text(sent: str) -> str:
    """The output on a terminal, which must not contain control sequences."""
    assert printable(sent) == sent
    return sent


def test_generated_text_on_a_terminal_and_in_a_pipe(trained: Workspace):
    free = ["inference.temperature=3", "inference.top_p=null", "inference.top_k=null", "inference.max_new_tokens=200"]
    command = ["generate.py", f"prompt={ORDERS}", *free, "inference.seed=1"]
    prompt = ORDERS.replace("\r", "\n")  # `run` treats it as the end of a line
    piped = trained.run(*command).stdout
    assert piped.startswith(prompt)
    assert set(piped.removeprefix(prompt)) & set("\x00\x01\x02\x03\x1b\x7f")  # the text is random bytes
    assert SHOWN in only_text(trained.on_terminal(*command))
    assert only_text(trained.on_terminal(*command, "inference.stream=false", "quiet=true")).startswith(SHOWN)


def test_training_on_a_terminal(workspace: Workspace):
    sent = workspace.on_terminal("train.py", *TINY, f"sample_prompt='{ORDERS}'")
    assert sent.count(f"    | {SHOWN}") == 2
    assert "\x1b[2K" in sent
    assert not any(order in sent for order in ("\x1b]", "\x07", "\x1b[31;41m", "\x9b", "\u202e"))


def test_names_on_a_terminal_and_in_a_pipe(trained: Workspace, tmp_path: Path):
    (run,) = trained.runs()
    for name in ("a", f"b{ORDERS}"):
        shutil.copytree(run, tmp_path / name)
    file = tmp_path / f"b{ORDERS}" / "run.json"
    about = json.loads(file.read_text())
    about["state"] = ORDERS
    about["config"]["name"] = ORDERS
    about["config"]["data"][ORDERS] = ORDERS
    file.write_text(json.dumps(about))
    command = ["-m", "gpt2.main", "compare", str(tmp_path), f"picture={tmp_path}/{ORDERS}.svg"]
    sent = only_text(trained.on_terminal(*command))
    assert f"b{SHOWN}" in sent
    assert sent.count(SHOWN) == 3
    assert "Glyph" not in sent
    assert trained.module(*command[1:]).stdout.count(ORDERS.replace("\r", "\n")) == 3


@pytest.mark.parametrize(
    "command",
    [
        ["evaluate.py", f"checkpoint='{ORDERS}'"],
        ["generate.py", "prompt=a", f"checkpoint='{ORDERS}'"],
        ["train.py", f"data.files=['{ORDERS}']", "data=text"],
        ["train.py", f"{ORDERS}=1"],
        ["-m", "gpt2.main", "study", ORDERS],
        ["-m", "gpt2.main", "compare", ORDERS],
        ["-m", "gpt2.main", "compare", f"sort={ORDERS}"],
        ["-m", "gpt2.main", ORDERS],
    ],
    ids=lambda command: " ".join(command).replace(ORDERS, "ORDERS"),
)
def test_errors_on_a_terminal(trained: Workspace, command):
    assert "[31;41m" in only_text(trained.on_terminal(*command, expect=2))


@pytest.mark.parametrize(
    ("root", "package", "printed", "handled"),
    [  # level of the root logger, which has a handler unless that is None; level of the logger `gpt2`
        (None, logging.NOTSET, "step 1\n", ""),
        (logging.WARNING, logging.NOTSET, "step 1\n", "careful\n"),  # basicConfig(), or a notebook on Colab
        (logging.INFO, logging.NOTSET, "", "step 1\ncareful\n"),
        (logging.ERROR, logging.NOTSET, "", ""),
        (logging.WARNING, logging.WARNING, "", "careful\n"),
        (logging.INFO, logging.INFO, "", "step 1\ncareful\n"),
    ],
)
def test_progress_is_printed_once_where_logging_is_not_configured(monkeypatch, capsys, root, package, printed, handled):
    logger, text = logging.getLogger("gpt2"), io.StringIO()
    monkeypatch.setattr(logging.root, "handlers", [] if root is None else [logging.StreamHandler(text)])
    before = logging.root.level, logger.level
    logging.root.setLevel(root or logging.WARNING)
    logger.setLevel(package)
    try:
        with progress_shown(), progress_shown():  # as a study shows it, and each of its trainings
            logging.getLogger("gpt2.train").info("step 1")
            logging.getLogger("gpt2.train").warning("careful")
        state = logger.handlers, logger.level, logger.propagate
        logging.getLogger("gpt2.train").info("after")
    finally:
        logging.root.setLevel(before[0])
        logger.setLevel(before[1])
    assert state == ([], package, True)
    out, err = capsys.readouterr()
    assert (out, err) == (printed, "careful\n" if root is None else "")
    assert text.getvalue().replace("after\n", "") == handled
