"""Callbacks: how anything beside the algorithm follows a training, and the ones that the scripts use.

`trainer` is always a `gpt2.train.Trainer`; it is not annotated because that module is in a layer above.
"""

from pathlib import Path
from typing import Any

Metrics = dict[str, Any]


class Callback:
    """Base class whose hooks do nothing. An exception raised by a hook ends the training with that exception.

    Each rank calls only the callbacks that its own Trainer received; the scripts give them to rank 0 alone. A hook must
    therefore not call anything collective, such as `Trainer.save_checkpoint`, when there are several ranks.
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

        The model's weights are whole here, under FSDP too. If a signal interrupts the training meanwhile, the
        evaluation is discarded and repeated when the run resumes.
        """

    def on_evaluation_end(self, trainer: Any, metrics: Metrics) -> None:
        """Called with the record of an evaluation, after it was logged and, if it is the best, the model saved."""

    def before_checkpoint(self, trainer: Any) -> None:
        """Called before a checkpoint is written: what the checkpoint counts as logged must be on disk by then."""

    def on_checkpoint(self, trainer: Any, path: Path) -> None:
        """Called after a checkpoint was written."""

    def on_train_end(self, trainer: Any) -> None:
        """Called when training ended without an exception, also by a signal (`trainer.interrupted_by`)."""

    def on_exception(self, trainer: Any, error: BaseException) -> None:
        """Called when an exception ends the training, instead of `on_train_end`."""

    def state_dict(self) -> dict[str, Any]:
        """Plain entries that are added to the record of each checkpoint."""
        return {}
