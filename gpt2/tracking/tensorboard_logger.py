"""The `ExternalLogger` for TensorBoard: event files in the folder `tensorboard` of a run."""

import json
import os
import threading
from pathlib import Path
from typing import Any

from gpt2.runtime.plain_values import flat
from gpt2.tracking.loggers import Config, LoggedRun
from gpt2.tracking.tracker import FINISHED, PRUNED, Ended, ExternalLogger, Record

_report = threading.excepthook


def _report_unless_of_writer(failed: "threading.ExceptHookArgs") -> None:
    """Skip errors of TensorBoard's thread: the next call of its writer raises them again, and a warning is logged."""
    if not failed.thread or not type(failed.thread).__module__.startswith("tensorboard."):
        _report(failed)


class TensorBoardLogger(ExternalLogger):
    """Writes scalars over steps, samples and the configuration as text, and hyperparameters."""

    title = "TensorBoard"

    def __init__(self, _config: Config, run: LoggedRun):
        from torch.utils.tensorboard import SummaryWriter  # noqa: F401  # imported in the main thread

        threading.excepthook = _report_unless_of_writer
        assert run.folder is not None
        self.run, self.folder, self.step = run, run.folder / "tensorboard", run.step

    def start(self) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        resumed = {"purge_step": self.step + 1} if self.step else {}  # a resumed run repeats later steps
        self.writer: Any = SummaryWriter(str(self.folder), **resumed)
        config = flat(self.run.config)
        values = {key: v if isinstance(v, bool | int | float | str) else json.dumps(v) for key, v in config.items()}
        self._hparams = hparams(values, {"val/loss": 0.0})  # the experiment, the start and the end of the session
        for summary in self._hparams[:2]:
            self._add_summary(summary)
        about = {"name": self.run.name, "group": self.run.group, "job_type": self.run.job_type, "tags": self.run.tags}
        self._add_text("configuration", json.dumps({**about, **self.run.config}, indent=2, default=str))

    def log(self, record: Record) -> None:
        self.step = record["step"]
        for key, value in record.items():
            if isinstance(value, int | float) and key != "step":
                self.writer.add_scalar(key, value, self.step)

    def show_table(self, name: str, columns: list[str], rows: list[Any]) -> None:
        """Add the last row, a step and a text: the table of samples has one more row with each call."""
        step, text = rows[-1]
        self._add_text(name, text, step)

    def _add_text(self, tag: str, text: str, step: int | None = None) -> None:
        """Add a text as a code block: TensorBoard renders Markdown, which would drop line breaks and spaces."""
        self.writer.add_text(tag, "".join(f"    {line}\n" for line in text.split("\n")), step or self.step)

    def _add_summary(self, summary: Any) -> None:
        self.writer.file_writer.add_summary(summary)

    def summarize(self, figures: Record) -> None:
        self.log({**figures, "step": self.step})

    def flush(self) -> None:
        self.writer.flush()

    def finish(self, ended: Ended, folder: Path | None) -> None:
        from matplotlib.image import imread

        self._add_text("state", f"{ended.state}{f': {ended.reason}' if ended.reason else ''}")
        if folder and (picture := folder / "curves.png").exists():
            self.writer.add_image("curves", imread(picture), self.step, dataformats="HWC")
        if ended.state in (FINISHED, PRUNED):
            self._add_summary(self._hparams[2])
        self.writer.close()

    def where(self) -> list[str]:
        logs = os.path.relpath(self.folder.parent.parent)
        return [f"TensorBoard: tensorboard --logdir {logs}"] if self.folder.is_dir() else []
