"""The state of a training besides model and optimizer, how it is resumed, and the checkpoints of a run."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from gpt2.checkpoint import run_folder
from gpt2.distributed.process_group import ProcessGroup
from gpt2.errors import UserError
from gpt2.runtime.files import remove_unfinished
from gpt2.runtime.rng import RandomState

log = logging.getLogger(__name__)

DESCRIPTION = ("model", "train", "machine", "versions")  # parts of the record, with `data`, that describe the run
SHAPE = ("vocab_size", "context_length", "d_model", "num_heads", "num_layers", "d_ff", "use_bias")  # fixed by weights


@dataclass
class Progress:
    """How far a run has come."""

    step: int = 0  # optimizer updates
    epoch: int = 0
    position: int = 0  # batches of this epoch that were trained on
    tokens: int = 0  # predicted
    seconds: float = 0.0  # in `train`, over all resumptions
    evaluated_at: int = 0  # step of the newest evaluation
    val_loss: float | None = None
    best_val_loss: float | None = None
    best_at: int = 0  # step of that evaluation; of equal ones the first
    learning_rate: float = 0.0  # of the newest step

    def advance(self, batches: int, batches_per_epoch: int, tokens: int) -> None:
        """Count a step. The end of an epoch is stored as position 0 of the next one."""
        self.step += 1
        self.tokens += tokens
        self.position += batches
        if self.position >= batches_per_epoch:
            self.epoch, self.position = self.epoch + 1, 0

    def is_best(self) -> bool:
        """Whether this step was evaluated and is the best so far."""
        return self.step == self.best_at > 0

    def same_but_time(self, other: "Progress | None") -> bool:
        return other is not None and replace(self, seconds=0.0) == replace(other, seconds=0.0)


# ---------------------------------------------------------------------------------------------------------------------
# State dicts


def with_prefix(prefix: str, entries: Mapping[str, Any]) -> dict[str, Any]:
    return {prefix + name: value for name, value in entries.items()}


def without_prefix(prefix: str, state: Mapping[str, Any]) -> dict[str, Any]:
    """The entries whose names start with `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def random_state_dict(device: torch.device, group: ProcessGroup) -> dict[str, Any]:
    """All ranks' random states, on rank 0: `random/cpu`, `random/rank1/cpu`, ..., and in `random` those of Python."""
    own = RandomState.now(device)
    state: dict[str, Any] = {"random": own.elsewhere}
    for rank, tensors in enumerate(group.gather_object(own.tensors)):
        state |= with_prefix(_random_prefix(rank), tensors)
    return state


def load_random_state_dict(state: Mapping[str, Any], device: torch.device, group: ProcessGroup, seed: int) -> None:
    """Restore this rank's random state; `seed` is for a rank that the saved run did not have."""
    tensors = without_prefix(_random_prefix(group.rank), state)
    if tensors:
        RandomState(device, tensors, {} if group.rank else state["random"]).restore()
    else:
        torch.manual_seed(seed)


def _random_prefix(rank: int) -> str:
    return f"random/rank{rank}/" if rank else "random/"


# ---------------------------------------------------------------------------------------------------------------------
# Resuming under other circumstances


def check_compatible(path: Path, saved: Mapping[str, Any], current: Mapping[str, Any], accept_other_data: bool) -> None:
    """Compare the descriptions of the saved and of the current run.

    Raises:
        UserError: The model has another shape, or the data are others and are not accepted.
    """
    model, other = saved["model"], current["model"]
    if problems := [f"{key}={model.get(key)}, not {other[key]}" for key in SHAPE if model.get(key) != other[key]]:
        raise UserError(f"checkpoint: {path} holds a model of another shape: {', '.join(problems)}")
    if saved["data"] != current["data"] and not accept_other_data:
        raise UserError(
            f"checkpoint: {path} was trained on other data (fingerprint {saved['data']}, not {current['data']}); "
            f"resume_changes=true continues with the new data"
        )


def log_changes(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Log each value of the run's description that differs from the checkpoint's."""
    before = _flat(saved)
    for key, value in _flat(current).items():
        if before.get(key) != value:
            log.info("Changed: %s is %s, it was %s", key, value, before.get(key))


def log_raised_rate(before: float, now: float) -> None:
    """Log that training continues at a higher learning rate: another number of steps is another schedule."""
    if before and now > 1.01 * before:
        log.info(
            f"Changed: the learning rate of the next step is {now:.2e}, it was {before:.2e}. To keep it: "
            f"train.learning_rate={before:.2e} train.min_learning_rate={before:.2e} resume_changes=true. "
            f"With train.lr_schedule=wsd a run can be made longer at the same rate until its decay begins."
        )


def _flat(description: Mapping[str, Any]) -> dict[str, Any]:
    values = {f"{part}.{key}": value for part in DESCRIPTION for key, value in description[part].items()}
    return {**values, "data": description["data"]}


def restored_progress(saved: Mapping[str, Any], current: Mapping[str, Any]) -> Progress:
    """The saved progress; with another batch size the position is converted, with other data the epoch restarts."""
    progress = Progress(**saved["progress"])
    blocks = progress.position * saved["train"]["batch_size"]
    is_same_data = saved["data"] == current["data"]
    return replace(progress, position=blocks // current["train"]["batch_size"] if is_same_data else 0)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints of a run


class RunCheckpoints:
    """The folder with a run's checkpoints: which state is already saved, their names, and which are removed."""

    def __init__(self, folder: Path, keep: int, is_main: bool):
        self.folder, self.keep, self.is_main = folder, keep, is_main
        self.saved: Progress | None = None  # progress of the newest checkpoint
        self._is_ours = False  # whether the checkpoints in the folder belong to this run
        self._foreign: set[Path] = set()  # those that do not; they are never removed

    def prepare(self) -> None:
        """Remove unfinished files, and warn if the folder holds checkpoints of another run."""
        if not self.is_main:
            return
        self._foreign = set() if self._is_ours else set(run_folder.newest_first(self.folder))
        if self._foreign:
            log.warning("%s holds another run: its best_model.pth and last.pth are replaced", self.folder)
        remove_unfinished(self.folder)

    def path_of(self, progress: Progress) -> Path:
        return self.folder / run_folder.step_name(progress.step)

    def loaded(self, path: Path, progress: Progress) -> None:
        self._is_ours = path.parent.resolve() == self.folder.resolve()
        if path.resolve() == self.path_of(progress).resolve():
            self.saved = replace(progress)

    def added(self, progress: Progress) -> None:
        self.saved, self._is_ours = replace(progress), True
        self.add_names(progress)

    def add_names(self, progress: Progress) -> None:
        """Give the newest checkpoint its second names, `last.pth` and, if it is the best, `best_model.pth`."""
        if not self.is_main:
            return
        run_folder.add_name(self.path_of(progress), run_folder.LAST)
        if progress.is_best():
            run_folder.add_name(self.path_of(progress), run_folder.BEST)

    def prune(self, progress: Progress) -> None:
        if self.is_main:
            run_folder.prune(self.folder, self.keep, progress.step, self._foreign)
