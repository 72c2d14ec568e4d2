"""The `ExternalLogger` that keeps `metrics.csv` in a run folder: `metrics.jsonl` as a table with one header."""

import csv
import io
import os
from pathlib import Path

from gpt2.runtime.files import atomic_write
from gpt2.tracking.loggers import Config, LoggedRun
from gpt2.tracking.tracker import METRICS, Ended, ExternalLogger, Record, read_metrics


class CsvLogger(ExternalLogger):
    """Makes the table from `metrics.jsonl`, which a resumed run rewinds and whose records may have new keys."""

    title = "CSV"

    def __init__(self, _config: Config, run: LoggedRun):
        assert run.folder is not None
        self.source, self.path = run.folder / METRICS, run.folder / "metrics.csv"
        self._bytes_written = 0  # size of the source that the table was made from

    def log(self, record: Record) -> None:
        """Write the table if its source grew by a tenth: it is written whole each time."""
        if self.source.stat().st_size >= 1.1 * self._bytes_written:
            self._write()

    def _write(self) -> None:
        self._bytes_written = self.source.stat().st_size
        records = read_metrics(self.source)
        columns = dict.fromkeys(key for record in records for key in record if key != "sample")
        text = io.StringIO()
        table = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
        table.writeheader()
        table.writerows(records)
        with atomic_write(self.path) as file:
            file.write(text.getvalue().encode())

    def finish(self, ended: Ended, folder: Path | None) -> None:
        if self.source.exists():
            self._write()

    def where(self) -> list[str]:
        return [f"CSV: {os.path.relpath(self.path)}"] if self.path.exists() else []
