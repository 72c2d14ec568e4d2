"""Run folders read back: configuration, progress and results, also of runs that are still training."""

import glob
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from math import isfinite, log
from pathlib import Path
from statistics import median
from typing import Any

from gpt2.config import TrainRun
from gpt2.errors import UserError
from gpt2.runtime.files import LOCK, is_locked
from gpt2.tracking.tracker import METRICS, RUNNING, Record, read_about, read_metrics

SEED = "train.seed"
KILLED = "killed"  # the state of a run whose process ended without recording how


def flat(nested: Record, prefix: str = "") -> dict[str, Any]:
    """The values of nested dictionaries by their dotted keys; an empty dictionary is a value."""
    result: dict[str, Any] = {}
    for key, value in nested.items():
        inner = flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {}
        result |= inner or {f"{prefix}{key}": value}
    return result


def is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and isfinite(value)


DEFAULTS = flat(asdict(TrainRun()))  # for keys that are newer than a run


class RunResult:
    """One run, read from its folder. Missing values are None."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.about = read_about(folder)

    @cached_property
    def records(self) -> list[Record]:
        return read_metrics(self.folder / METRICS)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The resolved configuration by dotted key; empty for a run that was started from Python."""
        nested = self.about.get("config")
        return {**DEFAULTS, **flat(nested)} if isinstance(nested, dict) else {}

    @property
    def title(self) -> str:
        return str(self.about.get("title") or self.folder.name)

    @property
    def state(self) -> str | None:
        state = self.about.get("state")
        if state == RUNNING and is_locked(self.folder / LOCK) is False:
            return KILLED
        return state if isinstance(state, str) else None

    def values(self, key: str) -> list[float]:
        """All finite values that were logged under a key, in order."""
        return [record[key] for record in self.records if is_finite(record.get(key))]

    def last(self, key: str) -> float | None:
        return next((r[key] for r in reversed(self.records) if is_finite(r.get(key))), None)

    def fact(self, key: str) -> float | None:
        """A number of `run.json`."""
        value = self.about.get(key)
        return value if is_finite(value) else None

    @property
    def best_loss(self) -> float | None:
        return min(self.values("val/loss"), default=None)

    @property
    def tokens_per_second(self) -> float | None:
        """The median, without the first value, which contains compilation and other one-time costs."""
        speeds = self.values("train/tokens_per_second")
        return median(speeds[1:] or speeds) if speeds else None

    @property
    def hours(self) -> float | None:
        seconds = self.last("seconds")
        return None if seconds is None else seconds / 3600

    @property
    def flops(self) -> float | None:
        """Floating point operations of training, without evaluation; see `GPT2Model.flops_per_token`."""
        tokens, flops_per_token = self.last("tokens"), self.fact("flops_per_token")
        return None if tokens is None or flops_per_token is None else tokens * flops_per_token

    @property
    def text_bytes(self) -> float | None:
        """Bytes of training text, estimated from the bytes per token of the validation set."""
        loss, bits, tokens = self.last("val/loss"), self.last("val/bits_per_byte"), self.last("tokens")
        return tokens * loss / log(2) / bits if loss and bits and tokens else None

    def curve(self, y: str, x: str) -> list[tuple[float, float]]:
        """Points (x, y) of the records that have both keys; `flops` is computed from `tokens`."""
        factor = self.fact("flops_per_token") if x == "flops" else 1.0
        key = "tokens" if x == "flops" else x
        if factor is None:
            return []
        return [(r[key] * factor, r[y]) for r in self.records if is_finite(r.get(y)) and is_finite(r.get(key))]


@dataclass
class Column:
    """A column of a comparison."""

    header: str
    of: Callable[[RunResult], float | None]
    shown: Callable[[float], str]
    is_less_better: bool = True


COLUMNS = {
    "loss": Column("val loss", lambda run: run.last("val/loss"), "{:.4f}".format),
    "best": Column("best", lambda run: run.best_loss, "{:.4f}".format),
    "bits_per_byte": Column("bits/byte", lambda run: run.last("val/bits_per_byte"), "{:.4f}".format),
    "steps": Column("steps", lambda run: run.last("step"), "{:,}".format, is_less_better=False),
    "tokens": Column("tokens", lambda run: run.last("tokens"), "{:,}".format, is_less_better=False),
    "text_bytes": Column("bytes of text", lambda run: run.text_bytes, "{:.3g}".format, is_less_better=False),
    "tokens_per_second": Column("tokens/s", lambda run: run.tokens_per_second, "{:,.0f}".format, is_less_better=False),
    "hours": Column("hours", lambda run: run.hours, "{:.3g}".format),
    "mfu": Column("MFU", lambda run: run.last("train/mfu"), "{:.1%}".format, is_less_better=False),
    "flops": Column("FLOPs", lambda run: run.flops, "{:.3g}".format),
    "parameters": Column("parameters", lambda run: run.fact("parameters"), "{:,}".format),
}

UNITS = {  # axis labels
    "loss": "validation loss (nats per token)",
    "best": "lowest validation loss (nats per token)",
    "bits_per_byte": "bits per byte of text",
    "flops": "floating point operations of training",
    "text_bytes": "bytes of text read",
}


def find_runs(places: Iterable[str]) -> list[RunResult]:
    """The runs in run folders, in folders that contain runs, such as a sweep's, and in patterns of such.

    Raises:
        UserError: Some places contain no run.
    """
    folders: dict[Path, Path] = {}
    problems: list[str] = []
    for place in places:
        matches = [place] if Path(place).exists() or not glob.has_magic(place) else sorted(glob.glob(place))
        runs = [run for match in matches for run in _runs_in(Path(match))]
        if not runs:
            problem = "contains no run" if matches and Path(matches[0]).exists() else "does not exist"
            problems.append(f"{place} {problem}; a run is a folder with a {METRICS}, such as outputs/runs/NAME/TIME")
        folders |= {run.resolve(): run for run in runs}
    if problems:
        raise UserError(*problems)
    try:
        results = [RunResult(folder) for folder in folders.values()]
        for result in results:
            result.records  # noqa: B018  # reads the file, so that an unreadable one is an error here
        return results
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}") from error


def _runs_in(folder: Path) -> list[Path]:
    if (folder / METRICS).is_file():
        return [folder]
    return sorted((path.parent for path in folder.glob(f"**/{METRICS}")), key=_natural_order)


def _natural_order(path: Path) -> list[tuple[int, str]]:
    """Sorts trial 10 after trial 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in path.parts]


def differences(runs: list[RunResult]) -> list[str]:
    """The keys in which the configurations of runs differ; runs without a configuration are ignored."""
    configs = [run.config for run in runs if run.config]
    keys = dict.fromkeys(key for config in configs for key in config)
    return [key for key in keys if len({repr(config[key]) for config in configs if key in config}) > 1]
