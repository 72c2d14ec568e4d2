"""Read run folders: configuration, progress and results, also of runs that are still training.

The files of a run folder may contain anything, so they are checked when they are read.
"""

import glob
import json
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, is_dataclass
from functools import cached_property
from math import isfinite
from math import log as logarithm
from pathlib import Path
from statistics import median
from typing import Any, get_type_hints

from gpt2.config import TrainRun
from gpt2.errors import UserError, few
from gpt2.runtime.files import LOCK, is_locked
from gpt2.runtime.plain_values import TYPE_WORDS, brief, choices_of, flat, from_plain
from gpt2.tracking.tracker import ABOUT, METRICS, RUNNING, Record, metrics_in

log = logging.getLogger(__name__)

SEED = "train.seed"
# States of a run that did not record its end: its process is dead, or may be running on another machine.
KILLED, UNSEEN = "killed", "running?"

DEFAULTS = flat(asdict(TrainRun()))  # a run lacks the keys that are newer than it
# The keys that `machine` in run.json replaces, because they may be `auto`, with its names for them.
FACTS = {"train.precision": "precision", "train.device": "device", "machine.ranks": "ranks"}

# Types of the values in run.json and in a line of metrics.jsonl.
ABOUT_TYPES = {
    **dict.fromkeys(("title", "state", "reason", "started", "ended", "tokenizer"), str),
    **dict.fromkeys(("repository", "machine", "versions", "config", "reached"), dict),
    **dict.fromkeys(("parameters", "flops_per_token"), float),
    "tags": list,
}
REPOSITORY_TYPES = {"commit": str, "dirty": bool}
RECORD_TYPES = {
    **dict.fromkeys(("step", "tokens", "seconds", "val/loss", "val/bits_per_byte"), float),
    **dict.fromkeys(("train/loss", "train/tokens_per_second", "train/mfu"), float),
    "sample": str,
}
MAX_LEVELS = 20  # deeper nested lists and groups may exceed Python's recursion limit
LARGEST = 10**100  # the product of two such numbers is still finite in fp64


def _problems_of(values: Record, kinds: Mapping[str, type], prefix: str = "") -> list[str]:
    """Return the problems: wrong types, numbers that are too large to compute with, and too deeply nested values."""
    problems = []
    for key, kind in kinds.items():
        if key not in values:
            continue
        value = values[key]
        is_number = kind is float and type(value) in (int, float)
        if not is_number and not isinstance(value, kind):
            problems.append(f"{prefix}{key}: {brief(value)} is not {TYPE_WORDS[kind]}")
        elif is_number and abs(value) > LARGEST:
            problems.append(f"{prefix}{key}: a number beyond 10^100")
        elif _is_deeper(value, MAX_LEVELS):
            problems.append(f"{prefix}{key}: more than {MAX_LEVELS} levels of values within values")
    return problems


def _is_deeper(value: Any, levels: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return bool(inner) and (levels == 0 or any(_is_deeper(item, levels - 1) for item in inner))


def _present(values: Record) -> Record:
    """Leave out null and numbers that are not finite."""
    return {
        key: value
        for key, value in values.items()
        if value is not None and not (isinstance(value, float) and not isfinite(value))
    }


def _known(kind: type, values: Any) -> Any:
    """Leave out keys and choices of a configuration that this version lacks: another version may have written it."""
    if not isinstance(values, dict):
        return values
    known = {}
    for key, hint in get_type_hints(kind).items():
        if is_dataclass(hint):
            known[key] = _known(hint, values.get(key, {}))  # type: ignore[arg-type]
        elif key in values and not (choices_of(hint) and isinstance(values[key], str)):
            known[key] = values[key]
    return known


def _content_of(path: Path) -> bytes | None:
    """Return the content of a file; None if it does not exist.

    Raises:
        UserError: It cannot be read, or is not a regular file but, for example, a folder or a pipe.
    """
    if not path.exists():
        return None
    if not path.is_file():
        raise UserError(f"{path}: not a file")
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error


def read_checked_about(path: Path) -> Record:
    """Return the content of a `run.json`; empty if it does not exist.

    Raises:
        UserError: It cannot be read, or has values that no run writes.
    """
    content = _content_of(path)
    try:
        about = {} if content is None else json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON") from error
    if not isinstance(about, dict):
        raise UserError(f"{path}: {brief(about)} is not {TYPE_WORDS[dict]}")
    about = _present(about)
    problems = _problems_of(about, ABOUT_TYPES)
    if not problems:
        problems += _problems_of(_present(about.get("repository", {})), REPOSITORY_TYPES, "repository.")
        problems += _problems_of(_present(about.get("reached", {})), RECORD_TYPES, "reached.")
        try:
            from_plain(TrainRun, _known(TrainRun, about.get("config", {})), "config.")
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(f"{path}: {few(problems, '; ')}")
    return about


def read_checked_metrics(path: Path) -> list[Record]:
    """Return the records of a `metrics.jsonl`, without damaged lines.

    Raises:
        UserError: It cannot be read, no line is a record, or a record has values that no run writes.
    """
    content = _content_of(path) or b""
    records = [_present(record) for record in metrics_in(content)]
    if content.strip() and not records:
        raise UserError(f"{path}: no line is a record of a run")
    for record in records:
        if problems := _problems_of(record, RECORD_TYPES):
            raise UserError(f"{path}: step {brief(record['step'])}: {few(problems, '; ')}")
    return records


class RunResult:
    """The results of a run. Its files are read on first use; missing values are None.

    A property raises a UserError if its file is damaged; `problem` is the message of this error.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    @cached_property
    def about(self) -> Record:
        return read_checked_about(self.folder / ABOUT)

    @cached_property
    def records(self) -> list[Record]:
        return read_checked_metrics(self.folder / METRICS)

    @property
    def problem(self) -> str | None:
        try:
            _ = self.about, self.records
        except UserError as error:
            return str(error)
        return None

    @cached_property
    def requested(self) -> dict[str, Any]:
        """The configuration by dotted key; empty for a run of the Python API."""
        nested = self.about.get("config")
        return {} if nested is None else {**DEFAULTS, **flat(nested)}

    @cached_property
    def config(self) -> dict[str, Any]:
        """`requested`, with the precision and device that `auto` became, and the number of ranks."""
        machine = self.about.get("machine", {})
        facts = {key: machine[name] for key, name in FACTS.items() if name in machine}
        return self.requested and self.requested | facts

    @property
    def title(self) -> str:
        return str(self.about.get("title") or self.folder.name)

    @property
    def state(self) -> str | None:
        state = self.about.get("state")
        if state == RUNNING:
            return {True: RUNNING, False: KILLED, None: UNSEEN}[is_locked(self.folder / LOCK)]
        return state

    def values(self, key: str) -> list[float]:
        """Return all values of a key in order."""
        return [record[key] for record in self.records if key in record]

    def last(self, key: str) -> float | None:
        """Return the last value of a metric. An interrupted run has made steps after its last record."""
        value = next(reversed(self.values(key)), None)
        reached, step = self.about.get("reached", {}), next(reversed(self.values("step")), 0)
        return reached[key] if key in reached and reached.get("step", 0) > step else value

    @property
    def tokens_per_second(self) -> float | None:
        """The median without the first value, which includes compilation and other one-time costs.

        If there is only one value: the mean over the whole run, evaluations included.
        """
        if speeds := self.values("train/tokens_per_second")[1:]:
            return median(speeds)
        tokens, seconds = self.last("tokens"), self.last("seconds")
        return tokens / seconds if tokens and seconds else None

    @property
    def flops(self) -> float | None:
        """Floating point operations of training, without evaluation; see `GPT2Model.flops_per_token`."""
        tokens, flops_per_token = self.last("tokens"), self.about.get("flops_per_token")
        return None if tokens is None or flops_per_token is None else tokens * flops_per_token

    @property
    def text_bytes(self) -> float | None:
        """Bytes of training text, estimated from the bytes per token of the validation set."""
        loss, bits, tokens = self.last("val/loss"), self.last("val/bits_per_byte"), self.last("tokens")
        return tokens * loss / logarithm(2) / bits if loss and bits and tokens else None

    def curve(self, y: str, x: str) -> list[tuple[float, float]]:
        """Return the points (x, y) of the records that have both keys."""
        return [(record[x], record[y]) for record in self.records if {x, y} <= record.keys()]


@dataclass
class Column:
    """A result of runs, as a column of a comparison."""

    header: str
    of: Callable[[RunResult], float | None]
    shown: Callable[[float], str]
    is_less_better: bool = True

    def text(self, run: RunResult) -> str:
        value = self.of(run)
        return "n/a" if value is None else self.shown(value)


COLUMNS = {
    "loss": Column("val loss", lambda run: run.last("val/loss"), "{:.4f}".format),
    "best": Column("best", lambda run: min(run.values("val/loss"), default=None), "{:.4f}".format),
    "bits_per_byte": Column("bits/byte", lambda run: run.last("val/bits_per_byte"), "{:.4f}".format),
    "steps": Column("steps", lambda run: run.last("step"), "{:,}".format, is_less_better=False),
    "tokens": Column("tokens", lambda run: run.last("tokens"), "{:,}".format, is_less_better=False),
    "text_bytes": Column("bytes of text", lambda run: run.text_bytes, "{:.3g}".format, is_less_better=False),
    "tokens_per_second": Column("tokens/s", lambda run: run.tokens_per_second, "{:,.0f}".format, is_less_better=False),
    "hours": Column("hours", lambda run: (s := run.last("seconds")) and s / 3600, "{:.3g}".format),
    "mfu": Column("MFU", lambda run: run.last("train/mfu"), "{:.1%}".format, is_less_better=False),
    "flops": Column("FLOPs", lambda run: run.flops, "{:.3g}".format),
    "parameters": Column("parameters", lambda run: run.about.get("parameters"), "{:,}".format),
}

UNITS = {  # labels of axes
    "loss": "validation loss (nats per token)",
    "best": "lowest validation loss (nats per token)",
    "bits_per_byte": "bits per byte of text",
    "flops": "floating point operations of training",
    "text_bytes": "bytes of text read",
    "parameters": "parameters with embeddings",
}


def find_runs(places: Iterable[str]) -> list[RunResult]:
    """Find runs in run folders, in folders that contain runs, such as that of a sweep, and by glob patterns of both.

    A run with a damaged file is left out with a warning.

    Raises:
        UserError: Some places contain no run, or no run can be read.
    """
    folders: dict[Path, Path] = {}
    problems: list[str] = []
    for place in places:
        try:
            matches = [place] if Path(place).exists() or not glob.has_magic(place) else sorted(glob.glob(place))
            runs = [run for match in matches for run in _runs_in(Path(match))]
        except OSError as error:  # for example, the name is too long
            problems.append(f"{place}: {error.strerror}")
            continue
        if not runs:
            problem = "contains no run" if matches and Path(matches[0]).exists() else "does not exist"
            problems.append(f"{place} {problem}; a run is a folder with a {METRICS}, such as outputs/runs/NAME/TIME")
        folders |= {run.resolve(): run for run in runs}
    if problems:
        raise UserError(*problems)
    results = [RunResult(folder) for folder in folders.values()]
    damaged = list(filter(None, (result.problem for result in results)))
    if len(damaged) == len(results):
        raise UserError(f"no run can be read: {few(damaged, '; ')}")
    for line in damaged:
        log.warning("%s; this run is left out", line)
    return [result for result in results if not result.problem]


def _runs_in(folder: Path) -> list[Path]:
    if (folder / METRICS).is_file():
        return [folder]
    return sorted((path.parent for path in folder.glob(f"**/{METRICS}")), key=_natural_order)


def _natural_order(path: Path) -> list[tuple[int, str]]:
    """Sort key that places trial 10 after trial 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in path.parts]


def differences(runs: list[RunResult]) -> list[str]:
    """Return the keys in which the configurations of runs differ. Runs without a configuration are ignored."""
    configs = [run.config for run in runs if run.config]
    keys = dict.fromkeys(key for config in configs for key in config)
    return [key for key in keys if len({repr(config[key]) for config in configs if key in config}) > 1]
