"""A comparison of run folders: the configuration keys in which the runs differ, and their results."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from os.path import commonprefix
from pathlib import Path
from typing import Any

from gpt2.analysis.runs import COLUMNS, SEED, RunResult, differences
from gpt2.errors import UserError, counted, few
from gpt2.tracking.tracker import FINISHED

SHOWN = ("loss", "best", "bits_per_byte", "tokens", "tokens_per_second", "hours", "mfu")
MAX_TABLE_KEYS = 6
MAX_VALUE_LENGTH = 24  # characters in a table
# Prefixes of keys that affect neither the result nor the speed of a run.
NOT_COMPARED = (
    *("started_with", "resume", "profile", "sample_prompt", "data.cache_dir", "data.preprocessing_num_workers"),
    *("train.save_every", "train.keep_checkpoints", "train.log_every", "train.auto_resume", "train.checkpoint_dir"),
    *("inference.", "loggers", "wandb.", "mlflow.", "study.", "choices.experiment", "choices.inference"),
    *("plan", "train.detect_anomaly", "train.eval_tasks"),
)
# The first keys of a table, in order. The other keys follow in the order of their declaration; the seed is last.
IMPORTANT = (
    *("name", "train.init_from", "choices.data", "data.files", "data.dataset_name", "data.tokenizer"),
    *("choices.model", "model.num_layers", "model.d_model", "train.optimizer", "train.learning_rate"),
    *("train.batch_size", "train.max_steps", "train.weight_decay", "train.precision", "machine.ranks", "train.device"),
)
TOKENIZER = {"data.tokenizer", "data.vocab_size", "model.vocab_size"}


def short_names(keys: list[str]) -> dict[str, str]:
    """Return keys without their group, unless two keys would get the same name."""
    last = Counter(key.rpartition(".")[2] for key in keys)
    return {key: name if last[name := key.rpartition(".")[2]] == 1 else key for key in keys}


def shown_value(value: Any) -> str:
    """Return a value of a configuration as text, such as 0.003, gpt2, [a, b] or null."""
    if isinstance(value, float):
        return f"{value:.10g}"
    if isinstance(value, list):
        return f"[{', '.join(map(shown_value, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def short_values(values: list[Any]) -> list[str]:
    """Return the cells of a column: numbers are rounded and long texts cut, but different values stay different."""
    exact = [shown_value(value) for value in values]
    long = {text for text in exact if len(text) > MAX_VALUE_LENGTH}
    common = len(commonprefix([*long])) if len(long) > 1 else 0  # noqa: RUF071  # not only paths
    for start, digits in ((0, 3), (common, 6)):
        short = [
            f"{value:.{digits}g}" if isinstance(value, float) else _cut(text, start)
            for value, text in zip(values, exact, strict=True)
        ]
        if len(set(short)) == len(set(exact)):
            return short
    return exact


def _cut(text: str, start: int) -> str:
    """Cut the first characters and the middle out of a text that is too long."""
    if len(text) <= MAX_VALUE_LENGTH:
        return text
    return ("…" if start else "") + without_middle(text[start:], MAX_VALUE_LENGTH)


def without_middle(text: str, longest: int) -> str:
    """Cut the middle out of a text that is too long. Paths and names mostly differ at their beginning and end."""
    head = longest // 3
    return text if len(text) <= longest else f"{text[:head]}…{text[head + 1 - longest :]}"


@dataclass
class Comparison:
    """Runs, the best first.

    `sort` and `columns` are names in `gpt2.analysis.runs.COLUMNS` or keys of the configuration. A key may be given
    without its group if only one group has it.
    """

    runs: list[RunResult]
    sort: str = ""  # empty: by loss, or by bits per byte if the tokenizers differ
    columns: Sequence[str] = ()  # empty: the keys of `informative`

    def __post_init__(self) -> None:
        """
        Raises:
            UserError: A name is neither a column nor a key.
        """
        self.sort = self._full_name(self.sort or ("bits_per_byte" if self.in_bits else "loss"), "sort")
        self.columns = [self._full_name(name, "columns") for name in self.columns]
        self.runs = sorted(self.runs, key=self._sort_key)

    def _full_name(self, name: str, option: str) -> str:
        keys = dict.fromkeys(key for run in self.runs for key in run.config)
        if name in COLUMNS or name in keys:
            return name
        groups = (self.keys, [key for key in keys if not key.startswith(NOT_COMPARED)], keys)
        matches = [[key for key in group if key.rpartition(".")[2] == name] for group in groups]
        if found := next(filter(None, matches), []):
            if len(found) > 1:
                raise UserError(f"{option}: {name} is ambiguous: {', '.join(found)}")
            return found[0]
        raise UserError(
            f"{option}: there is no {name}; there are {', '.join(COLUMNS)}, and keys of the configuration such as "
            f"train.learning_rate"
        )

    def _sort_key(self, run: RunResult) -> tuple[Any, ...]:
        """Sort key: numbers from the best to the worst, then text, then missing values."""
        column = COLUMNS.get(self.sort)
        value = column.of(run) if column else run.config.get(self.sort)
        sign = 1 if column is None or column.is_less_better else -1
        number = sign * value if isinstance(value, int | float) else None
        return (value is None, number is None, number or 0, str(value))

    @cached_property
    def keys(self) -> list[str]:
        """The configuration keys in which the runs differ, the most important first."""
        keys = [key for key in differences(self.runs) if not key.startswith(NOT_COMPARED)]
        ranks = {key: rank for rank, key in enumerate(IMPORTANT)}
        return sorted(keys, key=lambda key: (key == SEED, ranks.get(key, len(ranks))))

    @cached_property
    def names(self) -> dict[str, str]:
        return short_names(self.keys)

    @cached_property
    def distinguishing(self) -> list[str]:
        """A small subset of `keys` that distinguishes as many runs as all of them."""
        return self._distinguishing_among(self.keys)

    def _distinguishing_among(self, keys: list[str]) -> list[str]:
        chosen: list[str] = []
        for key in keys:
            if len(set(self._values(*chosen, key))) > len(set(self._values(*chosen))):
                chosen.append(key)
        return chosen

    def _values(self, *keys: str) -> list[str]:
        return [repr([run.config.get(key) for key in keys]) for run in self.runs]

    @cached_property
    def informative(self) -> list[str]:
        """At most `MAX_TABLE_KEYS` of `keys`, first keys that distinguish runs, last keys that repeat another key."""
        keys = sorted(self.keys, key=lambda key: key == "name")  # last, because most folders have the name
        values = {key: self._values(key) for key in keys}
        unequal = [key for n, key in enumerate(keys) if values[key] not in [values[other] for other in keys[:n]]]
        order = dict.fromkeys([*self._distinguishing_among(keys), *unequal, *keys])
        return sorted([*order][:MAX_TABLE_KEYS], key=lambda key: (key not in unequal, keys.index(key)))

    @property
    def table_keys(self) -> list[str]:
        """The configuration keys of the table: the sort key, and `columns` or else `informative`."""
        return [key for key in dict.fromkeys([self.sort, *(self.columns or self.informative)]) if key not in COLUMNS]

    @property
    def other_keys(self) -> list[str]:
        """The `keys` that the table leaves out."""
        return [key for key in self.keys if key not in self.table_keys]

    def label(self, run: RunResult) -> str:
        """Return the values that distinguish a run; its folder if no value does."""
        if not run.config or (not self.distinguishing and len(self.runs) > 1):
            return self.place(run)
        return self._shown(run, self.distinguishing) or run.title

    def group(self, run: RunResult) -> str:
        """Return `label` without the seed; the name of the experiment if the runs differ only in their seed."""
        if not run.config:
            return self.place(run)
        keys = [key for key in self.distinguishing if key != SEED]
        return self._shown(run, keys) or (shown_value(run.config["name"]) if self.distinguishing else self.label(run))

    def _shown(self, run: RunResult, keys: list[str]) -> str:
        values = {key: self.texts[key][run.folder] for key in keys}
        return " ".join(value if key == "name" else f"{self.names[key]}={value}" for key, value in values.items())

    @cached_property
    def texts(self) -> dict[str, dict[Path, str]]:
        """The short text of each value, by key and by the folder of the run."""
        folders = [run.folder for run in self.runs if run.config]
        return {
            key: dict(zip(folders, short_values([run.config.get(key) for run in self.runs if run.config]), strict=True))
            for key in {*self.keys, *self.table_keys}
        }

    @cached_property
    def parent(self) -> Path:
        """The folder that contains all runs."""
        return Path(os.path.commonpath([run.folder.absolute().parent for run in self.runs]))

    @property
    def headline(self) -> str:
        return f"{counted(len(self.runs), 'run')} in {os.path.relpath(self.parent)}"

    def place(self, run: RunResult) -> str:
        return str(run.folder.absolute().relative_to(self.parent))

    @property
    def tokenizers_differ(self) -> bool:
        """Whether the runs have different tokenizers. If it is not recorded, different settings count."""
        tokenizers = {run.about.get("tokenizer") for run in self.runs}
        return not TOKENIZER.isdisjoint(self.keys) if None in tokenizers else len(tokenizers) > 1

    @property
    def in_bits(self) -> bool:
        """Whether bits per byte are compared: the tokenizers differ, and all evaluated runs have bits per byte."""
        has_bits = all(run.values("val/bits_per_byte") for run in self.runs if run.values("val/loss"))
        return has_bits and self.tokenizers_differ

    @cached_property
    def notes(self) -> list[str]:
        """Reasons why results are not comparable."""
        notes = []
        data = [key for key in self.keys if key.startswith("data.") and key not in TOKENIZER]
        if self.tokenizers_differ:
            notes.append("The tokenizers differ: compare bits/byte, not losses, which are per token.")
        if data:
            notes.append(f"The data differ ({few([self.names[key] for key in data])}), so results do not compare.")
        sizes = {
            run.config["train.eval_batches"] and run.config["train.eval_batches"] * run.config["train.batch_size"]
            for run in self.runs
            if run.config
        }
        if len(sizes) > 1:
            notes.append("The runs are validated on parts of different sizes (train.eval_batches).")
        return notes

    @property
    def rest(self) -> str:
        """The number of keys that the table leaves out, and the first of them; empty if there are none."""
        names = [self.names[key] for key in self.other_keys]
        return f"{len(names)} more key{'s differ' if len(names) > 1 else ' differs'}: {few(names)}" if names else ""

    def rows(self, all_keys: bool = False) -> list[list[str]]:
        """Return the table: headers, then a row per run. Results come first; results that no run has are left out."""
        names = dict.fromkeys([*SHOWN, *(name for name in (self.sort, *self.columns) if name in COLUMNS)])
        columns = {COLUMNS[name].header: [COLUMNS[name].text(run) for run in self.runs] for name in names}
        figures = {head: cells for head, cells in columns.items() if {*cells} != {"n/a"} or head == "val loss"}
        if any(run.state != FINISHED for run in self.runs):
            figures["state"] = [run.state or "?" for run in self.runs]
        keys = [*self.table_keys, *(self.other_keys if all_keys else [])]
        settings = [[self.texts[key].get(run.folder, "") for run in self.runs] for key in keys]
        rows = zip(map(self.place, self.runs), *figures.values(), *settings, strict=True)
        return [["run", *figures, *short_names(keys).values()], *map(list, rows)]

    def records(self) -> list[dict[str, Any]]:
        """Return all facts and results of the runs, for JSON."""
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
