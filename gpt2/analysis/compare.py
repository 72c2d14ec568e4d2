"""A comparison of runs: the configuration keys in which they differ, and their results. Needs only their folders."""

import os
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from gpt2.analysis.runs import COLUMNS, SEED, RunResult, differences
from gpt2.errors import UserError
from gpt2.tracking.tracker import FINISHED

SHOWN = ("loss", "best", "bits_per_byte", "tokens", "tokens_per_second", "hours", "mfu")
# Keys that influence neither the result nor the speed of a run; groups end in a dot.
NOT_COMPARED = (
    *("started_with", "resume", "profile", "sample_prompt", "data.cache_dir", "data.preprocessing_num_workers"),
    *("train.save_every", "train.keep_checkpoints", "train.log_every", "train.auto_resume", "train.checkpoint_dir"),
    *("inference.", "wandb.", "study.", "choices"),
)


def short_names(keys: list[str]) -> dict[str, str]:
    """Keys without their group, where that is unambiguous."""
    last = Counter(key.rpartition(".")[2] for key in keys)
    return {key: name if last[name := key.rpartition(".")[2]] == 1 else key for key in keys}


def shown_value(value: Any) -> str:
    """A value of a configuration, such as 0.003, gpt2, [a, b]."""
    if isinstance(value, float):
        return f"{value:.10g}"
    if isinstance(value, list):
        return f"[{', '.join(map(shown_value, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


@dataclass
class Comparison:
    """Runs, sorted with the best first."""

    runs: list[RunResult]
    sort: str = "loss"  # a column of `gpt2.analysis.runs`, or a key of the configuration

    def __post_init__(self) -> None:
        """
        Raises:
            UserError: `sort` is neither a column nor a key.
        """
        keys = {key for run in self.runs for key in run.config}
        matches = {key for key in keys if key.rpartition(".")[2] == self.sort}
        if self.sort not in COLUMNS and len(matches) == 1:
            (self.sort,) = matches
        if self.sort not in COLUMNS and self.sort not in keys:
            raise UserError(
                f"sort: there is no {self.sort}; there are {', '.join(COLUMNS)}, and keys of the configuration such as "
                f"train.learning_rate"
            )
        self.runs = sorted(self.runs, key=self._sort_key)

    def _sort_key(self, run: RunResult) -> tuple[Any, ...]:
        """The better numbers first, then text, then missing values."""
        column = COLUMNS.get(self.sort)
        value = column.of(run) if column else run.config.get(self.sort)
        sign = 1 if column is None or column.is_less_better else -1
        number = sign * value if isinstance(value, int | float) else None
        return (value is None, number is None, number or 0, str(value))

    @cached_property
    def keys(self) -> list[str]:
        """The configuration keys in which the runs differ."""
        return [key for key in differences(self.runs) if not key.startswith(NOT_COMPARED)]

    @cached_property
    def names(self) -> dict[str, str]:
        return short_names(self.keys)

    @cached_property
    def distinguishing(self) -> list[str]:
        """A small subset of `keys` that distinguishes the same runs, with the seed last."""
        chosen: list[str] = []
        for key in sorted(self.keys, key=lambda key: key == SEED):
            if self._distinguished([*chosen, key]) > self._distinguished(chosen):
                chosen.append(key)
        return chosen

    def _distinguished(self, keys: list[str]) -> int:
        return len({repr([run.config.get(key) for key in keys]) for run in self.runs})

    def label(self, run: RunResult) -> str:
        """The values that distinguish a run; its folder if its configuration does not."""
        if not run.config or (not self.distinguishing and len(self.runs) > 1):
            return self.place(run)
        return self._shown(run, self.distinguishing) or run.title

    def group(self, run: RunResult) -> str:
        """`label` without the seed; the experiment's name if the runs differ in the seed alone."""
        if not run.config:
            return self.place(run)
        keys = [key for key in self.distinguishing if key != SEED]
        return self._shown(run, keys) or (shown_value(run.config["name"]) if self.distinguishing else self.label(run))

    def _shown(self, run: RunResult, keys: list[str]) -> str:
        parts = []
        for key in keys:
            value = shown_value(run.config.get(key))
            short = value if len(value) <= (60 if key == "name" else 30) else value[:29] + "…"
            parts.append(short if key == "name" else f"{self.names[key]}={short}")
        return " ".join(parts)

    @cached_property
    def parent(self) -> Path:
        """The folder that contains all runs."""
        return Path(os.path.commonpath([run.folder.absolute().parent for run in self.runs]))

    @property
    def headline(self) -> str:
        return f"{len(self.runs)} run{'s' * (len(self.runs) != 1)} in {os.path.relpath(self.parent)}"

    def place(self, run: RunResult) -> str:
        return str(run.folder.absolute().relative_to(self.parent))

    @property
    def tokenizers_differ(self) -> bool:
        return not {"data.tokenizer", "data.vocab_size", "model.vocab_size"}.isdisjoint(self.keys)

    @cached_property
    def notes(self) -> list[str]:
        """Reasons why results are not comparable."""
        notes = []
        data = [key for key in self.keys if key.startswith("data.")]
        if self.tokenizers_differ:
            notes.append("The tokenizers differ: compare bits/byte, not losses, which are per token.")
        elif data:
            notes.append(f"The data differ ({', '.join(self.names[key] for key in data)}), so losses do not compare.")
        sizes = {
            run.config["train.eval_batches"] and run.config["train.eval_batches"] * run.config["train.batch_size"]
            for run in self.runs
            if run.config
        }
        if len(sizes) > 1:
            notes.append("The runs are validated on parts of different sizes (train.eval_batches).")
        return notes

    def rows(self) -> list[list[str]]:
        """A table: the headers, then a row a run."""
        has_states = any(run.state != FINISHED for run in self.runs)
        columns = dict.fromkeys([*SHOWN, *([self.sort] if self.sort in COLUMNS else [])])
        keys = list(dict.fromkeys([*self.keys, *([] if self.sort in COLUMNS else [self.sort])]))
        head = ["run", *short_names(keys).values(), *(COLUMNS[name].header for name in columns)]
        rows = [head + ["state"] * has_states]
        for run in self.runs:
            values = (shown_value(run.config.get(key)) if run.config else "" for key in keys)
            figures = (_figure(run, name) for name in columns)
            rows.append([self.place(run), *values, *figures, *[run.state or "?"] * has_states])
        return rows

    def records(self) -> list[dict[str, Any]]:
        """Everything, for JSON."""
        about = ("tags", "started", "ended", "repository", "machine", "versions")
        return [
            {
                "folder": os.path.relpath(run.folder),
                "title": run.title,
                "state": run.state,
                "config": {key: run.config.get(key) for key in self.keys},
                **{name: column.of(run) for name, column in COLUMNS.items()},
                **{key: run.about.get(key) for key in about},
            }
            for run in self.runs
        ]


def _figure(run: RunResult, name: str) -> str:
    value = COLUMNS[name].of(run)
    return "n/a" if value is None else COLUMNS[name].shown(value)
