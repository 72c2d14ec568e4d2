"""Callbacks: hooks into a training for logging, files, trials and profiling, and the callbacks of the scripts.

`trainer` is always a `gpt2.train.Trainer`; it is not annotated because that module is in a layer above.
"""

import logging
import time
from collections.abc import Callable, Iterable
from itertools import takewhile
from pathlib import Path
from typing import Any

from gpt2.runtime.console import SECONDS_BETWEEN_LINES, printable, progress_line, time_left
from gpt2.tracking.tracker import LoggedSteps, Tracker

log = logging.getLogger(__name__)

Metrics = dict[str, Any]


class Callback:
    """Base class whose hooks do nothing. An exception raised by a hook ends the training with that exception.

    Each rank calls only the callbacks that its own Trainer received; the scripts give them to rank 0 alone. A hook must
    therefore not call anything collective, such as `Trainer.save_checkpoint`, when there are several ranks. Where all
    ranks have the callback, `extend_evaluation` may: it is called by all of them or by none.
    """

    def on_train_start(self, trainer: Any) -> None:
        """Called by `Trainer.train`, after a checkpoint was loaded and before the first step."""

    def on_step_end(self, trainer: Any) -> None:
        """Called after each optimizer step; `trainer.progress` counts it already."""

    def on_log(self, trainer: Any, metrics: Metrics) -> None:
        """Called with each record of `metrics.jsonl`: `step`, `tokens`, `seconds`, and `train/...` or `val/...`."""

    def on_validation_batch(self, trainer: Any, batch: int, batches: int) -> None:
        """Called before each batch of a validation, counted from 0."""

    def extend_evaluation(self, trainer: Any, metrics: Metrics) -> None:
        """Called after validation, before its result counts; may add entries to `metrics`, such as a sample.

        The model's weights are whole here, under FSDP too. If a signal interrupts the training here, the
        evaluation is discarded and repeated when the run resumes.
        """

    def on_evaluation_end(self, trainer: Any, metrics: Metrics) -> None:
        """Called with the record of an evaluation, after it was logged and, if it is the best, the model saved."""

    def before_checkpoint(self, trainer: Any) -> None:
        """Called before a checkpoint is written: everything logged before it must be on disk afterwards."""

    def on_checkpoint(self, trainer: Any, path: Path) -> None:
        """Called after a checkpoint was written."""

    def on_train_end(self, trainer: Any) -> None:
        """Called when training ended without an exception, also by a signal (`trainer.interrupted_by`)."""

    def on_exception(self, trainer: Any, error: BaseException) -> None:
        """Called when an exception ends the training, instead of `on_train_end`."""

    def state_dict(self) -> dict[str, Any]:
        """Plain entries that are added to the record of each checkpoint."""
        return {}

    def load_state_dict(self, record: dict[str, Any]) -> None:
        """Called with the record of the checkpoint that a run resumes from."""


class ConsoleLog(Callback):
    """Log lines for each record, and a progress line where standard output is a terminal. Every Trainer has one."""

    def __init__(self, label: str = ""):
        """`label` stands in front of the progress line."""
        self.label = label
        self.progress_line = progress_line(0)
        self._last_line = 0.0

    def on_train_start(self, trainer: Any) -> None:
        self.progress_line = progress_line(trainer.total_steps, trainer.progress.step, self.label)
        self.progress_line.__enter__()

    def on_train_end(self, trainer: Any) -> None:
        self.progress_line.__exit__()

    def on_exception(self, trainer: Any, error: BaseException) -> None:
        self.progress_line.__exit__()

    def on_step_end(self, trainer: Any) -> None:
        self.progress_line.step(trainer.progress.step)

    def on_log(self, trainer: Any, metrics: Metrics) -> None:
        if "train/loss" in metrics:
            self._log_training(trainer, metrics)
        if "val/loss" in metrics:
            self._log_evaluation(trainer, metrics)

    def _log_training(self, trainer: Any, metrics: Metrics) -> None:
        loss, tokens_per_second = metrics["train/loss"], metrics["train/tokens_per_second"]
        speed = f"{tokens_per_second:,.0f} tokens/s"
        if trainer.progress.step > 1:  # the first step is slow: it allocates memory and chooses kernels
            speed += f"  {time_left(seconds_left(trainer))} left"
        self.progress_line.show(f"loss {loss:.3f}  {speed}")
        log.info(
            f"step {metrics['step']:,}/{trainer.total_steps:,}  loss {loss:.4f}  "
            f"lr {metrics['train/learning_rate']:.2e}  grad norm {metrics['train/grad_norm']:.2f}  {speed}",
            extra={"on_progress_line": True},
        )

    def _log_evaluation(self, trainer: Any, metrics: Metrics) -> None:
        best = "  (best so far)" if trainer.progress.is_best() else ""
        names = (name for name in trainer.config.eval_tasks if f"val/{name}" in metrics)
        tasks = "".join(f"  {name} {metrics[f'val/{name}']:.3f}" for name in names)
        log.info(
            f"step {metrics['step']:,}  validation loss {metrics['val/loss']:.4f}  "
            f"perplexity {metrics['val/perplexity']:.2f}{tasks}{best}"
        )
        if "sample" in metrics:
            lines = printable(metrics["sample"]).split("\n")  # train.log is read on a terminal too
            log.info("\n".join(f"    | {line}" for line in lines), extra={"is_sample": True})

    def on_validation_batch(self, trainer: Any, batch: int, batches: int) -> None:
        self.progress_line.show(f"validating {batch:,}/{batches:,}")
        now = time.perf_counter()
        if batch == 0:
            self._last_line = now
        elif now - self._last_line > SECONDS_BETWEEN_LINES:
            log.info(f"validating: batch {batch:,} of {batches:,}", extra={"on_progress_line": True})
            self._last_line = now


def seconds_left(trainer: Any) -> float:
    """Until the last step at the mean speed so far, or until the time limit."""
    progress = trainer.progress
    by_steps = progress.seconds / max(1, progress.step) * (trainer.total_steps - progress.step)
    return max(0.0, min(by_steps, trainer.config.max_training_hours * 3600 - progress.seconds))


class TrackerLog(Callback):
    """Writes each record to a Tracker: `metrics.jsonl`, `samples.md` and the external logger."""

    def __init__(self, tracker: Tracker):
        self.tracker = tracker
        self._logged: LoggedSteps | None = None  # by the checkpoint

    def on_train_start(self, trainer: Any) -> None:
        self.tracker.rewind(trainer.progress.step, trainer.progress.evaluated_at, self._logged)
        self._logged = None

    def on_log(self, trainer: Any, metrics: Metrics) -> None:
        record = {key: value for key, value in metrics.items() if key != "sample"}
        self.tracker.log(record, metrics.get("sample"))

    def on_train_end(self, trainer: Any) -> None:
        progress = trainer.progress
        self.tracker.reached = {key: getattr(progress, key) for key in ("step", "tokens", "seconds")}

    def on_exception(self, trainer: Any, error: BaseException) -> None:
        self.on_train_end(trainer)

    def before_checkpoint(self, trainer: Any) -> None:
        self.tracker.flush()

    def state_dict(self) -> dict[str, Any]:
        return {"wandb_id": self.tracker.external.id, "logged": self.tracker.logged.ranges}

    def load_state_dict(self, record: dict[str, Any]) -> None:
        self._logged = LoggedSteps(record.get("logged"))


class Samples(Callback):
    """Adds a sample of the model's text to each evaluation."""

    def __init__(self, write: Callable[[int], Iterable[str]]):
        """`write`: given the step, yields the text piece by piece."""
        self.write = write

    def extend_evaluation(self, trainer: Any, metrics: Metrics) -> None:
        pieces = takewhile(lambda _: trainer.interrupted_by is None, self.write(trainer.progress.step))
        metrics["sample"] = "".join(pieces)
