"""The `ExternalLogger` that keeps `metrics.csv` in a run folder: `metrics.jsonl` as a table with one header."""

import csv
import io
import os
from pathlib import Path

from gpt2.runtime.files import atomic_write
from gpt2.tracking.loggers import LoggedRun
from gpt2.tracking.tracker import METRICS, Ended, ExternalLogger, Record, metrics_in


class CsvLogger(ExternalLogger):
    """Follows `metrics.jsonl`, so that a resumed run, which rewinds that file, has the same table."""

    title = "CSV"

    def __init__(self, run: LoggedRun):
        assert run.folder is not None
        self.source, self.path = run.folder / METRICS, run.folder / "metrics.csv"
        self.columns: list[str] = []
        self._read = 0  # bytes of the source that are in the table

    def log(self, record: Record) -> None:
        """Add the new records of the source. A new key becomes a column, for which the table is written again."""
        records = self._new_records()
        if any(key not in self.columns for record in records for key in record):
            self._read = 0
            records = self._new_records()
            self.columns = list(dict.fromkeys(key for record in records for key in record))
            with atomic_write(self.path) as file:
                file.write(self._rows([dict(zip(self.columns, self.columns, strict=True)), *records]))
        else:
            with self.path.open("ab") as file:
                file.write(self._rows(records))

    def _new_records(self) -> list[Record]:
        with self.source.open("rb") as file:
            file.seek(self._read)
            content = file.read()
        end = content.rfind(b"\n") + 1  # of the last whole line
        self._read += end
        return [
            {key: value for key, value in record.items() if key != "sample"} for record in metrics_in(content[:end])
        ]

    def _rows(self, records: list[Record]) -> bytes:
        text = io.StringIO()
        csv.DictWriter(text, self.columns, lineterminator="\n").writerows(records)
        return text.getvalue().encode()

    def finish(self, ended: Ended, folder: Path | None) -> None:
        if self.source.exists():
            self.log({})  # a resumed run may have rewound the source and added nothing

    def where(self) -> list[str]:
        return [f"CSV: {os.path.relpath(self.path)}"] if self.columns else []
