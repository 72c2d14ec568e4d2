"""docs/architecture.md: its layers and functions are those of the code, and its additions work in a copy of it.

All diffs are applied to one copy, so they also work together.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, TEXT
from tests.test_layers import LAYERS

PAGE = (ROOT / "docs" / "architecture.md").read_text()
HOW_TO_ADD = PAGE.split("## How to add")[1]
COPIED = ("gpt2", "conf", "experiments", "train.py", "pyproject.toml")


def blocks(text: str) -> list[tuple[str, str]]:
    """The fenced blocks, each with its language."""
    return re.findall(r"```(\w+)\n(.*?)```", text, flags=re.DOTALL)


def as_python(language: str, block: str) -> str:
    """A block as lines of Python that run it: shell lines become subprocesses."""
    if language == "python":
        return block
    lines = block.replace("\\\n", " ").splitlines()
    return "".join(f"subprocess.run([sys.executable, *{shlex.split(line)[1:]}], check=True)\n" for line in lines)


def run(folder: Path, *command: str, text: str | None = None) -> None:
    environment = {**os.environ, "PYTHONPATH": str(folder), "XDG_CACHE_HOME": str(folder / "cache")}
    streams = {"input": text, "capture_output": True, "text": True}
    done = subprocess.run(command, cwd=folder, env=environment, timeout=600, **streams)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("copy")
    for name in COPIED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    (folder / "book.txt").write_text(TEXT)
    for language, diff in blocks(HOW_TO_ADD):
        if language == "diff":
            run(folder, "git", "apply", "-C1", "-", text=diff)
    return folder


def test_layers_are_those_of_the_test():
    (listed,) = re.findall(r"## Layers.*?```\n(.*?)```", PAGE, flags=re.DOTALL)
    assert listed.replace(",", "").split("\n") == LAYERS.removeprefix("\n").split("\n")


@pytest.mark.parametrize(("function", "file"), re.findall(r"^\| `([\w.]+)` \| `(gpt2/\S+\.py)` \|", PAGE, re.MULTILINE))
def test_functions_of_the_journeys_exist(function, file):
    text = (ROOT / file).read_text()
    for name in function.split("."):
        assert re.search(rf"^ *(?:def|class) {name}\b", text, re.MULTILINE), f"{file} has no {name}"


def test_every_addition_has_a_diff_and_an_example():
    sections = re.split(r"^### ", HOW_TO_ADD, flags=re.MULTILINE)[1:]
    wanted = ("attention", "optimizer", "schedule", "data source", "sampling option", "logger", "callback", "preset")
    assert len(sections) == len(wanted)
    for name, section in zip(wanted, sections, strict=True):
        assert section.splitlines()[0].endswith(name)
        assert "diff" in dict(blocks(section)), name


def test_additions_work(copy):
    """One process runs every example in order, because it takes seconds to import torch."""
    script = "".join(as_python(*block) for block in blocks(HOW_TO_ADD) if block[0] in ("python", "bash"))
    run(copy, sys.executable, "-c", script)
