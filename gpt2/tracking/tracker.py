"""The files that record a run (`metrics.jsonl`, `run.json`, `samples.md`), and the interface of external loggers.

`gpt2.tracking.loggers` keeps errors of external loggers from ending a run.
"""

import json
import logging
import math
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

from gpt2.errors import DivergenceError, UserError, without_password
from gpt2.runtime.files import atomic_write, read_dict
from gpt2.runtime.signals import Interrupted

log = logging.getLogger(__name__)

Record = dict[str, Any]
Sample = tuple[int, str]  # step and text

METRICS, SAMPLES, ABOUT = "metrics.jsonl", "samples.md", "run.json"
KINDS = ("training records", "evaluations", "samples")
RUNNING, FINISHED, INTERRUPTED, FAILED, DIVERGED = "running", "finished", "interrupted", "failed", "diverged"
PRUNED, OUT_OF_MEMORY, PAST_ITS_TIME = "pruned", "out of memory", "past its time"  # trials only
ENDINGS = frozenset((FINISHED, INTERRUPTED, FAILED, DIVERGED, PRUNED, OUT_OF_MEMORY, PAST_ITS_TIME))


def read_metrics(path: Path) -> list[Record]:
    """Read the records of a `metrics.jsonl`. Damaged lines, such as the last line after a crash, are left out."""
    return metrics_in(path.read_bytes()) if path.exists() else []


def metrics_in(content: bytes) -> list[Record]:
    """Parse the records in a part of a `metrics.jsonl`."""
    records = []
    for line in content.split(b"\n"):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):  # invalid JSON or UTF-8, or very deep nesting
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records


def read_about(folder: Path) -> Record:
    """The content of a run folder's `run.json`; empty if it is missing or damaged."""
    return read_dict(folder / ABOUT)


def record_failure(folder: Path, error: Exception) -> None:
    """Write to `run.json` that a run failed before it began. A run that began has recorded its end itself."""
    about = read_about(folder)
    if about.get("state", FAILED) == FAILED and not (folder / METRICS).exists():
        ended = {"started": now(), **about, **vars(Ended.by(error)), "ended": now()}
        _replace(folder / ABOUT, json.dumps(ended, indent=2) + "\n")


@dataclass
class Ended:
    """How a run ended. A trial's exit code is the one that the same run would have outside of a study."""

    state: str
    exit_code: int = 0
    reason: str | None = None

    @classmethod
    def by(cls, error: BaseException) -> "Ended":
        if isinstance(error, DivergenceError):
            return cls(DIVERGED, error.exit_code, str(error))
        if isinstance(error, KeyboardInterrupt | Interrupted):
            return cls(INTERRUPTED, getattr(error, "code", 130))
        code = error.code if isinstance(error, SystemExit) else getattr(error, "exit_code", 1)
        return cls(FAILED, code if isinstance(code, int) else 1, without_password(f"{type(error).__name__}: {error}"))


class ExternalLogger:
    """Base class for external loggers; does nothing. `gpt2.tracking.loggers` calls it in its own thread."""

    title = "This logger"  # name in messages
    seconds = 30.0  # how long the end of a run waits until everything is logged
    id: str | None = None  # stored in checkpoints

    def start(self) -> None:
        """Called first. Do slow work here, such as connecting, but import libraries in `__init__`."""

    def log(self, record: Record) -> None:
        """Log one record of `metrics.jsonl`."""

    def show_table(self, name: str, columns: list[str], rows: list[Any]) -> None:
        """Show a table, such as `samples`; it replaces the previous table of that name."""

    def summarize(self, figures: Record) -> None:
        """Log figures of the run as a whole."""

    def flush(self) -> None:
        """Write out what was logged. Called when no other call is waiting."""

    def finish(self, ended: Ended, folder: Path | None) -> None:
        """End the run; `folder` is the run folder with its files. Called even after an error."""

    def abandon(self, ended: Ended) -> None:
        """Called in another thread if `finish` takes too long: release what would keep the process from exiting."""

    def where(self) -> list[str]:
        """Lines that say where the run can be viewed."""
        return []


class LoggedSteps:
    """The steps at which training records, evaluations and samples were logged, as ranges [first, last, interval].

    A checkpoint stores them, so that a resumed run detects what is missing from its files.
    """

    def __init__(self, saved: Any = None):
        """`saved`: the `ranges` of an earlier instance; any other value is ignored."""
        self.ranges: dict[str, list[list[int]]] = {kind: [] for kind in KINDS}
        with suppress(TypeError, ValueError, KeyError, OverflowError):
            self.ranges = {kind: [[int(n) for n in (a, b, c)] for a, b, c in saved[kind]] for kind in KINDS}

    def add(self, kind: str, step: int) -> None:
        ranges = self.ranges[kind]
        if ranges and ranges[-1][2] in (0, step - ranges[-1][1]):  # 0: a single step so far
            ranges[-1][1:] = step, step - ranges[-1][1]
        else:
            ranges.append([step, step, 0])

    def includes(self, kind: str, step: int) -> bool:
        return any(step in steps for steps in self._steps(kind))

    def missing_from(self, present: dict[str, set[int]]) -> str:
        """Name the logged steps that are not present; empty if none is missing. Does not enumerate the ranges."""
        parts = []
        for kind in KINDS:
            steps = self._steps(kind)
            some = [str(n) for n in islice((n for part in steps for n in part if n not in present[kind]), 4)]
            if len(some) == 4:
                last = next(n for part in reversed(steps) for n in reversed(part) if n not in present[kind])
                some[3] = f"... {last}"
            if some:
                parts.append(f"{kind} of steps {', '.join(some)}")
        return "; ".join(parts)

    def _steps(self, kind: str) -> list[range]:
        return [range(first, last + 1, interval or 1) for first, last, interval in self.ranges[kind]]


class Tracker:
    """Writes a run's records to the files of its folder, if it has one, and to an external logger, if there is one.

    As a context manager, it records in `run.json` that the run is running and, at the end, how it ended.
    """

    def __init__(self, folder: Path | None = None, external: ExternalLogger | None = None, about: Record | None = None):
        """
        Args:
            about: Entries of `run.json` that are known before the run starts.
        """
        self.folder = folder
        self.external = external or ExternalLogger()
        self.about = about or {}
        self.samples: list[Sample] = []
        self.logged = LoggedSteps()
        self.reached: Record = {}  # step, tokens and seconds at the end; an interrupted run has not logged them
        self.outcome: Ended | None = None  # None: determined by the exception that ends the context

    @property
    def path(self) -> Path | None:
        return self.folder and self.folder / METRICS

    def rewind(self, step: int, evaluated_at: int, logged: LoggedSteps | None = None) -> None:
        """Remove training records after `step` and evaluations after `evaluated_at`: a resumed run repeats them.

        A sample that only one of `metrics.jsonl` and `samples.md` holds is restored in the other.

        Args:
            logged: The steps that the checkpoint stores. A warning names those that the files lack.

        Raises:
            UserError: A file cannot be read or replaced.
        """
        if self.folder is None or self.path is None or not (self.path.exists() or logged):
            return
        try:
            self._rewind(self.path, self.folder / SAMPLES, step, evaluated_at, logged or LoggedSteps())
        except (IsADirectoryError, PermissionError) as error:
            raise UserError(f"{error.filename}: {error.strerror}; a run writes this file") from error

    def _rewind(self, path: Path, samples_file: Path, step: int, evaluated_at: int, logged: LoggedSteps) -> None:
        records = read_metrics(path)
        damaged = len(path.read_bytes().splitlines()) - len(records) if path.exists() else 0
        if damaged > 1:  # a crash leaves one incomplete line
            log.warning("%s: %s damaged lines are removed", path, damaged)
        remaining = [r for r in records if r["step"] <= (evaluated_at if "val/loss" in r else step)]
        samples = {r["step"]: r["sample"] for r in remaining if isinstance(r.get("sample"), str)}

        text = samples_file.read_bytes().decode(errors="replace") if samples_file.exists() else ""
        known = {n: sample for n, sample in _samples_in(text).items() if logged.includes("samples", n)}
        if not text.startswith("".join(_section(*sample) for sample in samples.items())):
            restored = ", ".join(str(n) for n, sample in samples.items() if known.get(n) != sample)
            log.warning("%s: restored from %s: samples of steps %s", samples_file, METRICS, restored)
        samples = dict(sorted((known | samples).items()))
        self.samples = list(samples.items())

        self.logged = LoggedSteps()
        for record in remaining:
            self.logged.add(_kind(record), record["step"])
        for n in samples:
            self.logged.add("samples", n)
        present = {kind: {r["step"] for r in remaining if _kind(r) == kind} for kind in KINDS} | {"samples": {*samples}}
        if lost := logged.missing_from(present):
            log.warning("%s or %s was changed; lost: %s. The run continues without them.", path, SAMPLES, lost)
        _replace(path, "".join(json.dumps(record) + "\n" for record in remaining))
        _replace(samples_file, "".join(_section(*sample) for sample in self.samples))

    def log(self, record: Record, sample: str | None = None) -> None:
        """Add one record, which has `step`, `tokens` and `seconds`; NaN and infinity become null.

        A text sample is added to the record in `metrics.jsonl`, and as a section to `samples.md`.
        """
        finite = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in record.items()}
        self._append(METRICS, json.dumps(finite if sample is None else {**finite, "sample": sample}) + "\n")
        self.logged.add(_kind(record), record["step"])
        self.external.log(finite)
        if sample is not None:
            self.samples.append((record["step"], sample))
            self.logged.add("samples", record["step"])
            self._append(SAMPLES, _section(*self.samples[-1]))
            self.external.show_table("samples", ["step", "text"], list(self.samples))

    def flush(self) -> None:
        """Write everything that was logged to disk (fsync)."""
        if self.path and self.path.exists():
            with self.path.open("a") as file:
                os.fsync(file.fileno())

    def _append(self, name: str, text: str) -> None:
        if self.folder is None:
            return
        try:
            with (self.folder / name).open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            error.filename = str(self.folder / name)
            raise

    def __enter__(self) -> "Tracker":
        earlier = read_about(self.folder) if self.folder else {}
        if self.folder:
            self.about["folder"] = str(self.folder.resolve())
            if original := _original(earlier, self.about["folder"]):
                self.about["copy_of"] = original
        started = {"started": earlier.get("started", now())}
        self._write_about({**earlier, **self.about, **started, **vars(Ended(RUNNING)), "ended": None})
        return self

    def __exit__(self, _type: Any, error: BaseException | None, *_: Any) -> None:
        ended = self.outcome or (Ended.by(error) if error else Ended(FINISHED))
        try:
            reached = {"reached": self.reached} if self.reached else {}
            about = {**read_about(self.folder), **vars(ended), **reached, "ended": now()} if self.folder else {}
            self._write_about(about)
        except OSError as full:
            if not error:
                ended = Ended.by(full)
                raise
        finally:
            self.external.finish(ended, self.folder)
            for line in self.external.where() if error else ():  # without an error, the script prints them
                log.info(line)

    def _write_about(self, about: Record) -> None:
        if self.folder:
            _replace(self.folder / ABOUT, json.dumps(about, indent=2) + "\n")


def _original(about: Record, place: str) -> str | None:
    """The run folder of which this one is a copy; None if it is none, or has only moved.

    Args:
        about: The `run.json` of this folder.
        place: Its path.
    """
    before = about.get("folder")
    if not isinstance(before, str) or before == place:
        return None
    original = read_about(Path(before))
    return before if original and original.get("started") == about.get("started") else None


def now() -> str:
    """The time in UTC, to the second, in ISO 8601 format."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _kind(record: Record) -> str:
    return "evaluations" if "val/loss" in record else "training records"


def _section(step: int, sample: str) -> str:
    return f"## Step {step:,}\n\n```\n{sample}\n```\n\n"


def _samples_in(text: str) -> dict[int, str]:
    """Parse the samples, by step, of the sections of `samples.md`."""
    sections = re.findall(r"^## Step ([\d,]+)\n\n```\n(.*?)\n```\n\n(?=## Step |\Z)", text, re.DOTALL | re.MULTILINE)
    return {int(step.replace(",", "")): sample for step, sample in sections}


def _replace(path: Path, text: str) -> None:
    """Replace the content of a file atomically."""
    content = text.encode()
    if path.exists() and path.read_bytes() == content:
        return
    with atomic_write(path) as file:
        file.write(content)
