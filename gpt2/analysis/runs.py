"""Run folders as they are read: what was configured, how far they came, what they reached. Also while they go on."""

import glob
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from math import isfinite, log
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from gpt2.config import TrainRun
from gpt2.errors import UserError
from gpt2.runtime.files import LOCK, is_locked
from gpt2.tracking.tracker import METRICS, RUNNING, Record, read_about, read_metrics

SEED = "train.seed"
KILLED = "killed"  # a run that was going on when its process vanished


def flat(nested: Record, prefix: str = "") -> dict[str, Any]:
    """The values of nested dictionaries by their full keys; an empty dictionary is a value."""
    result: dict[str, Any] = {}
    for key, value in nested.items():
        inner = flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {}
        result |= inner or {f"{prefix}{key}": value}
    return result


def is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and isfinite(value)


DEFAULTS = flat(asdict(TrainRun()))  # what a run was not told, it had, whatever version of this repository it is from


class RunResult:
    """One run, read from its folder. What it does not tell is None."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.about = read_about(folder)

    @cached_property
    def records(self) -> list[Record]:
        return read_metrics(self.folder / METRICS)

    @cached_property
    def config(self) -> dict[str, Any]:
        """Its configuration, resolved, by full key. Empty of a run that was started from Python."""
        nested = self.about.get("config")
        if nested is None:  # of an earlier version
            try:
                nested = yaml.safe_load((self.folder / ".hydra" / "config.yaml").read_bytes())
            except (OSError, yaml.YAMLError):
                return {}
            if isinstance(nested, dict):  # the vocabulary became the tokenizer's, whatever stands there
                return {key: v for key, v in {**DEFAULTS, **flat(nested)}.items() if key != "model.vocab_size"}
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
        """All that was logged under a key, in order."""
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
        """The median of what was logged, without the first step, which is slow."""
        speeds = self.values("train/tokens_per_second")
        return median(speeds[1:] or speeds) if speeds else None

    @property
    def hours(self) -> float | None:
        seconds = self.last("seconds")
        return None if seconds is None else seconds / 3600

    @property
    def flops(self) -> float | None:
        """Floating point operations of its training, evaluations left out; see `GPT2Model.flops_per_token`."""
        tokens, each = self.last("tokens"), self.fact("flops_per_token")
        return None if tokens is None or each is None else tokens * each

    @property
    def text_bytes(self) -> float | None:
        """The bytes of text in its tokens, by the bytes a token that its validation set has."""
        loss, bits, tokens = self.last("val/loss"), self.last("val/bits_per_byte"), self.last("tokens")
        return tokens * loss / log(2) / bits if loss and bits and tokens else None

    def curve(self, y: str, x: str) -> list[tuple[float, float]]:
        """Points of two logged values, at the records that have both; `flops` counts as one."""
        factor = self.fact("flops_per_token") if x == "flops" else 1.0
        key = "tokens" if x == "flops" else x
        if factor is None:
            return []
        return [(r[key] * factor, r[y]) for r in self.records if is_finite(r.get(y)) and is_finite(r.get(key))]


@dataclass
class Column:
    """A figure of a run: how it is headed and written, and which is better."""

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

UNITS = {  # what axes say
    "loss": "validation loss (nats a token)",
    "best": "lowest validation loss (nats a token)",
    "bits_per_byte": "bits a byte of text",
    "flops": "floating point operations of training",
    "text_bytes": "bytes of text read",
}


def find_runs(places: Iterable[str]) -> list[RunResult]:
    """The runs that paths and patterns name: a run folder, or a folder with runs in it, such as a sweep's.

    Raises:
        UserError: With each place that has none.
    """
    folders: dict[Path, Path] = {}
    found: list[str] = []
    for place in places:
        matches = [place] if Path(place).exists() or not glob.has_magic(place) else sorted(glob.glob(place))
        runs = [run for match in matches for run in _runs_in(Path(match))]
        if not runs:
            there = "has no run in it" if matches and Path(matches[0]).exists() else "is not there"
            found.append(f"{place} {there}; a run is a folder with a {METRICS}, such as outputs/runs/NAME/TIME")
        folders |= {run.resolve(): run for run in runs}
    if found:
        raise UserError(*found)
    try:
        results = [RunResult(folder) for folder in folders.values()]
        for result in results:
            result.records  # noqa: B018  # read here, where what cannot be read is told
        return results
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}") from error


def _runs_in(folder: Path) -> list[Path]:
    if (folder / METRICS).is_file():
        return [folder]
    return sorted((path.parent for path in folder.glob(f"**/{METRICS}")), key=_as_people_count)


def _as_people_count(path: Path) -> list[tuple[int, str]]:
    """Trial 10 comes after trial 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in path.parts]


def differences(runs: list[RunResult]) -> list[str]:
    """The keys of the configuration in which runs differ, in its order; runs that have none are left out."""
    configs = [run.config for run in runs if run.config]
    keys = dict.fromkeys(key for config in configs for key in config)
    return [key for key in keys if len({repr(config[key]) for config in configs if key in config}) > 1]
