"""Tables of bad inputs, and the checks that apply to every row.

A row is `("what", command, expected)`. The command is typed as in a shell, the command of `gpt2.main` first. `expected`
are the words of the one line on standard error, in this order; `...` stands for anything between them. A fourth value
is the exit code, if it is not 2.
"""

import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from tests import warm
from tests.conftest import ROOT, Workspace

SCRIPTS = ("train", "evaluate", "generate")
MOST_CPU_SECONDS = 20  # of a refusal, which takes one or two on an idle machine
LONGEST_LINE = 1500
LIMITED = str(Path(__file__).with_name("limited.py"))
# A run of one step, in case it starts.
TRAIN = (
    "train wandb=off data=text data.files=[corpus.txt] data.tokenizer=bytes model=gpt2_nano model.num_layers=1 "
    "train.num_workers=0 train.max_steps=1 train.warmup_steps=0 train.eval_batches=1 train.precision=fp32"
)


class Row(NamedTuple):
    what: str
    command: str
    expected: str
    code: int = 2
    given: bytes = b""  # standard input


def rows(table: Sequence) -> pytest.MarkDecorator:
    """Parametrize a test with the rows of a table."""
    return pytest.mark.parametrize("row", [pytest.param(Row(*row), id=row[0]) for row in table])


def arguments_of(command: str) -> list[str]:
    """The arguments for the warm server. The prefixes `user:` and `full:` limit the process, see `limited.py`."""
    name, *words = shlex.split(command)
    limit, _, name = name.rpartition(":")
    script = [str(ROOT / f"{name}.py")] if name in SCRIPTS else ["gpt2.main", name]
    return [*([LIMITED, limit] if limit else []), *([] if limit or name in SCRIPTS else ["-m"]), *script, *words]


def run(place: Workspace, row: Row) -> tuple[warm.Process, str, str]:
    """Run the command of a row to its end. Returns the process, its standard output and standard error."""
    process = warm.Process(arguments_of(row.command), place.folder, place.environment, given=row.given)
    try:
        output, errors = process.communicate(timeout=120)
    except BaseException:
        process.kill()
        raise
    return process, output, errors


def check(place: Workspace, row: Row) -> None:
    """Run a row and make the checks of every bad input."""
    before = tree(place.folder.parent)
    process, output, errors = run(place, row)
    assert process.returncode == row.code, output[-2000:] + errors[-2000:]
    assert "Traceback" not in output + errors, errors[-2000:]
    lines = errors.splitlines()
    assert len(lines) == 1, errors
    check_line(lines[0], row.expected)
    assert changes(before, tree(place.folder.parent)) == []
    assert process.cpu_seconds < MOST_CPU_SECONDS


def check_line(line: str, expected: str) -> None:
    assert line.startswith("error: "), line
    assert re.search(".*".join(map(re.escape, expected.split(" ... "))), line), line
    assert len(line) < LONGEST_LINE


Tree = dict[str, tuple[int, int] | None]


def tree(folder: Path) -> Tree:
    """All paths in a folder except caches, the home and locks; for files with size and time of change."""
    found: Tree = {}
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in ("cache", "home")]
        found |= dict.fromkeys((f"{root}/{name}" for name in folders), None)
        for path in (f"{root}/{name}" for name in files if name != ".lock"):
            status = os.lstat(path)
            found[path] = (status.st_size, status.st_mtime_ns)
    return found


def changes(before: Tree, after: Tree) -> list[str]:
    """The paths that are new, gone or different."""
    return sorted(path for path in before.keys() | after.keys() if before.get(path, 0) != after.get(path, 0))
