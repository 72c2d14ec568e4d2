"""Runs side by side: what differs between them, and what each came to. Needs no account, only their folders."""

import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import inf
from pathlib import Path
from typing import Any

from gpt2.analysis.runs import COLUMNS, SEED, RunResult, differences
from gpt2.errors import UserError
from gpt2.tracking.tracker import FINISHED

SHOWN = ("loss", "best", "bits_per_byte", "tokens", "tokens_per_second", "hours", "mfu")
# What has to do neither with the result of a run nor with its speed; groups end in a dot.
NOT_COMPARED = (
    *("started_with", "resume", "profile", "sample_prompt", "data.cache_dir", "data.preprocessing_num_workers"),
    *("train.save_every", "train.keep_checkpoints", "train.log_every", "train.auto_resume", "train.checkpoint_dir"),
    *("inference.", "wandb.", "study.", "choices"),
)


def short_names(keys: list[str]) -> dict[str, str]:
    """Keys without their group, where that is clear."""
    last = Counter(key.rpartition(".")[2] for key in keys)
    return {key: name if last[name := key.rpartition(".")[2]] == 1 else key for key in keys}


def shown_value(value: Any) -> str:
    """Such as 0.003, gpt2, [a, b]."""
    if isinstance(value, float):
        return f"{value:.10g}"
    if isinstance(value, list):
        return f"[{', '.join(map(shown_value, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


@dataclass
class Comparison:
    """Some runs, the best first."""

    runs: list[RunResult]
    sort: str = "loss"  # a column of `gpt2.analysis.runs`, or a key of the configuration

    def __post_init__(self) -> None:
        """
        Raises:
            UserError: There is nothing of that name to sort by.
        """
        keys = {key for run in self.runs for key in run.config if key.rpartition(".")[2] == self.sort}
        if self.sort not in COLUMNS and len(keys) == 1:
            (self.sort,) = keys
        column = COLUMNS.get(self.sort)
        if column is None and not any(self.sort in run.config for run in self.runs):
            raise UserError(
                f"sort: there is no {self.sort}; there are {', '.join(COLUMNS)}, and keys of the configuration such as "
                f"train.learning_rate"
            )
        place = _by_column(self.sort) if column else _by_key(self.sort)
        self.runs = sorted(self.runs, key=place)

    @cached_property
    def keys(self) -> list[str]:
        """Of the configuration, those in which the runs differ."""
        return [key for key in differences(self.runs) if not key.startswith(NOT_COMPARED)]

    @cached_property
    def names(self) -> dict[str, str]:
        return short_names(self.keys)

    @cached_property
    def telling(self) -> list[str]:
        """As few of these keys as tell all apart that differ, the seed at the end."""
        kept: list[str] = []
        for key in sorted(self.keys, key=lambda key: key == SEED):
            if self._distinguished([*kept, key]) > self._distinguished(kept):
                kept.append(key)
        return kept

    def _distinguished(self, keys: list[str]) -> int:
        return len({repr([run.config.get(key) for key in keys]) for run in self.runs})

    def label(self, run: RunResult) -> str:
        """What tells a run from the others; its folder, if its configuration does not."""
        if not run.config or (not self.telling and len(self.runs) > 1):
            return self.place(run)
        return self._shown(run, self.telling) or run.title

    def group(self, run: RunResult) -> str:
        """The same without the seed: of runs that differ by nothing else, the name."""
        if not run.config:
            return self.place(run)
        keys = [key for key in self.telling if key != SEED]
        return self._shown(run, keys) or (shown_value(run.config["name"]) if self.telling else self.label(run))

    def _shown(self, run: RunResult, keys: list[str]) -> str:
        return " ".join(shown_value(run.config.get(key)) if key == "name" else self.named(run, key) for key in keys)

    def named(self, run: RunResult, key: str) -> str:
        value = shown_value(run.config.get(key))
        return f"{self.names[key]}={value if len(value) <= 30 else value[:29] + '…'}"

    @cached_property
    def parent(self) -> Path:
        """The folder that all of them lie in."""
        return Path(os.path.commonpath([run.folder.absolute().parent for run in self.runs]))

    def place(self, run: RunResult) -> str:
        return str(run.folder.absolute().relative_to(self.parent))

    @property
    def tokenizers_differ(self) -> bool:
        return not {"data.tokenizer", "data.vocab_size", "model.vocab_size"}.isdisjoint(self.keys)

    @cached_property
    def notes(self) -> list[str]:
        """What to know before believing the figures."""
        found = []
        data = [key for key in self.keys if key.startswith("data.")]
        if self.tokenizers_differ:
            found.append("The tokenizers differ: losses are per token and do not compare, bits/byte do.")
        elif data:
            found.append(f"The data differ ({', '.join(self.names[key] for key in data)}): so does what is predicted.")
        parts = {
            run.config["train.eval_batches"] and run.config["train.eval_batches"] * run.config["train.batch_size"]
            for run in self.runs
            if run.config
        }
        if len(parts) > 1:
            found.append("The runs are validated on parts of the split that differ in size (train.eval_batches).")
        return found

    def rows(self) -> list[list[str]]:
        """A table: the names of its columns, then a row a run."""
        unfinished = any(run.state != FINISHED for run in self.runs)
        shown = dict.fromkeys([*SHOWN, *([self.sort] if self.sort in COLUMNS else [])])
        keys = [*self.keys, *([self.sort] if self.sort not in COLUMNS and self.sort not in self.keys else [])]
        head = ["run", *short_names(keys).values(), *(COLUMNS[name].header for name in shown)]
        rows = [head + (["state"] if unfinished else [])]
        for run in self.runs:
            figures = (_figure(run, name) for name in shown)
            row = [self.place(run), *(shown_value(run.config.get(key)) if run.config else "" for key in keys), *figures]
            rows.append(row + ([run.state or "?"] if unfinished else []))
        return rows

    def records(self) -> list[dict[str, Any]]:
        """All of it, for programs."""
        return [
            {
                "folder": os.path.relpath(run.folder),
                "title": run.title,
                "state": run.state,
                "config": {key: run.config.get(key) for key in self.keys},
                **{name: column.of(run) for name, column in COLUMNS.items()},
                **{
                    key: run.about.get(key) for key in ("tags", "started", "ended", "repository", "machine", "versions")
                },
            }
            for run in self.runs
        ]


def _by_column(name: str) -> Callable[[RunResult], float]:
    column = COLUMNS[name]
    sign = 1 if column.is_less_better else -1

    def place(run: RunResult) -> float:
        value = column.of(run)
        return inf if value is None else sign * value

    return place


def _by_key(key: str) -> Callable[[RunResult], tuple[Any, ...]]:
    """Numbers before text, and what a run does not have at the end."""

    def place(run: RunResult) -> tuple[Any, ...]:
        value = run.config.get(key)
        is_number = isinstance(value, int | float)
        return (value is None, not is_number, value if is_number else 0, str(value))

    return place


def _figure(run: RunResult, name: str) -> str:
    value = COLUMNS[name].of(run)
    return "n/a" if value is None else COLUMNS[name].shown(value)


def as_text(rows: list[list[str]]) -> str:
    """Columns side by side: text to the left, numbers to the right."""
    columns = list(zip(*rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    is_text = [not all(is_number(cell) for cell in column[1:]) for column in columns]
    lines = (
        "  ".join(
            cell.ljust(width) if left else cell.rjust(width)
            for cell, width, left in zip(row, widths, is_text, strict=True)
        )
        for row in rows
    )
    return "\n".join(map(str.rstrip, lines))


def as_markdown(rows: list[list[str]]) -> str:
    columns = list(zip(*rows, strict=True))
    rule = ["---:" if all(is_number(cell) for cell in column[1:]) else "---" for column in columns]
    cells = ([" ".join(cell.split()).replace("|", r"\|") for cell in row] for row in (rows[0], rule, *rows[1:]))
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def is_number(cell: str) -> bool:
    """Whether a cell of a table is one, such as 12,500 or 31% or **2.38 ± 0.01**, or stands for one not there."""
    number = r"\**-?\d[\d,]*(\.\d+)?(e[+-]?\d+)?%?( ± [\d.]+)?\**"
    return cell in ("n/a", "null", "") or re.fullmatch(number, cell) is not None
