"""The files that record a run (`metrics.jsonl`, `run.json`, `samples.md`), and the interface of external loggers.

An error of an external logger (`gpt2.tracking.wandb_logger`) never ends a run.
"""

import json
import logging
import math
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gpt2.errors import DivergenceError
from gpt2.runtime.files import atomic_write
from gpt2.runtime.signals import Interrupted

log = logging.getLogger(__name__)

Record = dict[str, Any]
Sample = tuple[int, str]  # step and text

METRICS, ABOUT = "metrics.jsonl", "run.json"
RUNNING, FINISHED, INTERRUPTED, FAILED, DIVERGED = "running", "finished", "interrupted", "failed", "diverged"
PRUNED, OUT_OF_MEMORY, PAST_ITS_TIME = "pruned", "out of memory", "past its time"  # of trials
ENDINGS = frozenset((FINISHED, INTERRUPTED, FAILED, DIVERGED, PRUNED, OUT_OF_MEMORY, PAST_ITS_TIME))


def read_metrics(path: Path) -> list[Record]:
    """The records of a `metrics.jsonl`, without damaged lines, such as a last one that a crash cut short."""
    records = []
    for line in path.read_bytes().split(b"\n") if path.exists() else ():
        try:
            record = json.loads(line)
        except ValueError:  # invalid JSON or UTF-8
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records


def read_about(folder: Path) -> Record:
    """The `run.json` of a run folder; empty if it is missing or cannot be read."""
    try:
        about = json.loads((folder / ABOUT).read_bytes())
    except (OSError, ValueError):
        return {}
    return about if isinstance(about, dict) else {}


def record_failure(folder: Path, error: Exception) -> None:
    """Write to `run.json` that a run failed before it began; one that began has its own record."""
    about = read_about(folder)
    if about.get("state", FAILED) == FAILED and not (folder / METRICS).exists():
        ended = {"started": _now(), **about, **vars(Ended.by(error)), "ended": _now()}
        _replace(folder / ABOUT, json.dumps(ended, indent=2) + "\n")


@dataclass
class Ended:
    """How a run ended. For a trial of a study, the exit code is that of the same run by itself."""

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
        return cls(FAILED, code if isinstance(code, int) else 1, f"{type(error).__name__}: {error}")


class ExternalLogger:
    """Base class for external loggers; does nothing."""

    id: str | None = None

    def log(self, record: Record) -> None:
        """Log one record of `metrics.jsonl`."""

    def show_table(self, name: str, columns: list[str | int], rows: list[list[Any]]) -> None:
        """Show a table; it replaces the previous table of that name."""

    def summarize(self, figures: Record) -> None:
        """Log figures of the run as a whole."""

    def finish(self, ended: Ended, folder: Path | None) -> None:
        """End the run; `folder` is the run folder with its files."""

    def where(self) -> str | None:
        """One line that says where the run can be viewed; None if nowhere."""
        return None


class Tracker:
    """Writes a run's records to its files and to an external logger; without both, nowhere.

    As a context manager it writes to `run.json` that the run is running, and at the end how it ended.
    """

    def __init__(self, folder: Path | None = None, external: ExternalLogger | None = None, about: Record | None = None):
        """
        Args:
            about: Facts that are known before the run starts, for `run.json`.
        """
        self.folder = folder
        self.external = external or ExternalLogger()
        self.about = about or {}
        self.samples: list[Sample] = []
        self.outcome: Ended | None = None  # None: determined by the exception that ends the context

    @property
    def path(self) -> Path | None:
        return self.folder and self.folder / METRICS

    def rewind(self, step: int, evaluated_at: int) -> None:
        """Remove training records after `step` and evaluations after `evaluated_at`: a resumed run repeats them."""
        if self.folder is None or self.path is None or not self.path.exists():
            return
        records = read_metrics(self.path)
        remaining = [r for r in records if r["step"] <= (evaluated_at if "val/loss" in r else step)]
        self.samples = [(r["step"], r["sample"]) for r in remaining if "sample" in r]
        lost = len(self.path.read_bytes().splitlines()) - len(records)
        if lost > 1:  # a crash leaves one line unfinished
            log.warning("%s: %s damaged lines are removed", self.path, lost)
        _replace(self.path, "".join(json.dumps(record) + "\n" for record in remaining))
        _replace(self.folder / "samples.md", "".join(_section(*sample) for sample in self.samples))

    def log(self, record: Record, sample: str | None = None) -> None:
        """Add one record, which has `step`, `tokens` and `seconds`; NaN and infinity become null.

        A sample of text becomes a part of the record in `metrics.jsonl` and a section of `samples.md`.
        """
        finite = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in record.items()}
        self._append(METRICS, json.dumps(finite if sample is None else {**finite, "sample": sample}) + "\n")
        self.external.log(finite)
        if sample is not None:
            self.samples.append((record["step"], sample))
            self._append("samples.md", _section(*self.samples[-1]))
            self.external.show_table("samples", ["step", "text"], [list(sample) for sample in self.samples])

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
        started = {"started": earlier.get("started", _now())}
        self._write_about({**earlier, **self.about, **started, **vars(Ended(RUNNING)), "ended": None})
        return self

    def __exit__(self, _type: Any, error: BaseException | None, *_: Any) -> None:
        ended = self.outcome or (Ended.by(error) if error else Ended(FINISHED))
        try:
            self._write_about({**read_about(self.folder), **vars(ended), "ended": _now()} if self.folder else {})
        except OSError as full:
            if not error:
                ended = Ended.by(full)
                raise
        finally:
            self.external.finish(ended, self.folder)
            if error and (where := self.external.where()):  # otherwise the script prints it
                log.info("W&B: %s", where)

    def _write_about(self, about: Record) -> None:
        if self.folder:
            _replace(self.folder / ABOUT, json.dumps(about, indent=2) + "\n")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _section(step: int, sample: str) -> str:
    return f"## Step {step:,}\n\n```\n{sample}\n```\n\n"


def _replace(path: Path, text: str) -> None:
    """Replace the content of a file atomically."""
    content = text.encode()
    if path.exists() and path.read_bytes() == content:
        return
    with atomic_write(path) as file:
        file.write(content)
