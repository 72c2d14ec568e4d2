"""The `ExternalLogger` that writes `metrics.csv` in a run folder: `metrics.jsonl` as a table with one header."""

import csv
import io
import os
from pathlib import Path

from gpt2.runtime.files import atomic_write
from gpt2.tracking.loggers import Config, LoggedRun
from gpt2.tracking.tracker import METRICS, Ended, ExternalLogger, Record, read_metrics


class CsvLogger(ExternalLogger):
    """Converts the whole `metrics.jsonl`: a resumed run removes records from it, and new records may have new keys."""

    title = "CSV"

    def __init__(self, _config: Config, run: LoggedRun):
        assert run.folder is not None
        self.source, self.path = run.folder / METRICS, run.folder / "metrics.csv"
        self._converted_bytes = 0  # size of the source at the last conversion

    def log(self, record: Record) -> None:
        """Write the table if its source grew by a tenth, because each time the whole table is written."""
        if self.source.stat().st_size >= 1.1 * self._converted_bytes:
            self._write()

    def _write(self) -> None:
        self._converted_bytes = self.source.stat().st_size
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
