"""The record of a checkpoint that `Trainer` wrote: its entries and their types.

Checksums prove that a checkpoint is complete, not that it can be trusted: its author may have written any value.
All readers get the values from this module, as plain data whose types are checked once.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from math import inf
from pathlib import Path
from typing import Any

from gpt2.checkpoint import format as checkpoint
from gpt2.config import GPT2Config, TrainingConfig, TrainRun
from gpt2.errors import UserError, few
from gpt2.runtime.plain_values import NO_SUCH_KEY, from_plain
from gpt2.validation import NOT_NEGATIVE, SEED, out_of_bounds, validate


@dataclass
class Progress:
    """The progress of a run."""

    step: int  # optimizer updates
    epoch: int = 0
    position: int = 0  # batches of this epoch that were trained on
    tokens: int = 0  # predicted tokens
    seconds: float = 0.0  # time spent in `train`, over all resumptions
    evaluated_at: int = 0  # step of the newest evaluation
    val_loss: float | None = None
    best_val_loss: float | None = None
    best_at: int = 0  # step of the best evaluation; of equal ones, the first
    learning_rate: float = 0.0  # at the newest step

    def advance(self, batches: int, batches_per_epoch: int, tokens: int) -> None:
        """Count a step. The end of an epoch is stored as position 0 of the next one."""
        self.step += 1
        self.tokens += tokens
        self.position += batches
        if self.position >= batches_per_epoch:
            self.epoch, self.position = self.epoch + 1, 0

    def next_step(self, batches: int) -> str:
        """Describe the next step for messages: its number and its place in the data."""
        first = self.position + 1
        place = f"batch {first}" if batches == 1 else f"batches {first} to {first + batches - 1}"
        return f"step {self.step + 1} ({place} of epoch {self.epoch + 1})"

    def limits_reached(self, config: TrainingConfig) -> list[str]:
        """The settings whose limit is reached, so that training ends here."""
        limits = {
            f"train.max_steps={config.max_steps}": self.step >= (config.max_steps or inf),
            f"train.max_epochs={config.max_epochs}": self.epoch >= config.max_epochs,
            f"train.max_training_hours={config.max_training_hours}": self.seconds >= config.max_training_hours * 3600,
        }
        return [limit for limit, is_reached in limits.items() if is_reached]

    def is_best(self) -> bool:
        """Whether this step was evaluated and is the best so far."""
        return self.step == self.best_at > 0

    def same_but_time(self, other: "Progress | None") -> bool:
        return other is not None and replace(self, seconds=0.0) == replace(other, seconds=0.0)


BOUNDS = {
    **dict.fromkeys(("step", "epoch", "position", "tokens", "evaluated_at", "best_at"), SEED),
    **dict.fromkeys(("seconds", "val_loss", "best_val_loss", "learning_rate"), NOT_NEGATIVE),
}


@dataclass
class Record:
    """The entries of a record that are read, with their types. Callbacks may add others."""

    model: GPT2Config
    train: TrainingConfig
    progress: Progress
    run: TrainRun | None  # None: not trained by train.py
    tokenizer: str | None  # result of `GPT2Tokenizer.to_json`
    versions: dict[str, str | None]
    data: Any = None  # fingerprint of the corpus
    machine: dict[str, str | int | bool | None] = field(default_factory=dict)
    scaler: dict[str, int | float] = field(default_factory=dict)
    steps_left_out: dict[str, int] = field(default_factory=dict)
    wandb_id: str | None = None


def read_record(path: Path) -> dict[str, Any]:
    """Read the record of a checkpoint, and check that its values have the types of `Record`.

    Raises:
        UserError: The file cannot be read or is damaged, or values have other types; all such values are named.
    """
    record = checkpoint.read_record(path)
    with wrong_values(path):
        known = {key: value for key, value in record.items() if key in Record.__dataclass_fields__}
        if isinstance(run := known.get("run"), dict):  # runs from before MLflow was added
            known["run"] = {"mlflow": {}, **run}
        checked: Record = from_plain(Record, known)
        if problems := validate(checked.model, "model."):
            raise UserError(*problems)
    return {**record, **asdict(checked), "progress": asdict(check_progress(path, record))}


def check_progress(path: Path, record: dict[str, Any]) -> Progress:
    """Return the progress in a record, after checking its values."""
    with wrong_values(path):
        values = record.get("progress")
        if isinstance(values, dict):
            values = {"step": 0} | {key: value for key, value in values.items() if key in BOUNDS}
        progress: Progress = from_plain(Progress, values, "progress.")
        if problems := out_of_bounds(vars(progress), BOUNDS, "progress."):
            raise UserError(*problems)
    return progress


@contextmanager
def wrong_values(path: Path) -> Iterator[None]:
    """Turn errors about values of a record into one line that names the file."""
    try:
        yield
    except UserError as error:
        unknown = [problem.partition(f": {NO_SUCH_KEY}")[0] for problem in error.problems if NO_SUCH_KEY in problem]
        problem = f"was not written by Trainer: {few(error.problems, '; ')}"
        if unknown:
            problem = f"is from another version of this program: this one has no {few(unknown)}"
        raise UserError(f"checkpoint: {path} {problem}") from error
