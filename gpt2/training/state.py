"""The state of a training besides model and optimizer, checks before it is resumed, and the checkpoints of a run."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gpt2.checkpoint import format as checkpoint
from gpt2.checkpoint import run_folder
from gpt2.checkpoint.record import Progress
from gpt2.config import PARAMETRIZATION, SHAPE, USER_KEYS, TrainingConfig
from gpt2.distributed.process_group import ProcessGroup
from gpt2.errors import UserError, is_out_of_memory, one_line
from gpt2.runtime.files import remove_unfinished
from gpt2.runtime.rng import RandomState
from gpt2.tokenizer import GPT2Tokenizer
from gpt2.training.optimizer import effective_rate

log = logging.getLogger(__name__)

DESCRIPTION = ("model", "train", "machine", "versions")  # parts of the record, with `data`, that describe the run
LIKE_WEIGHTS = ("exp_avg", "exp_avg_sq", "momentum_buffer", "z", "variance")  # optimizer state shaped as the weight
REDUCED = {"row_var": -1, "col_var": -2}  # state of Adafactor, and the dimension in which it has length 1


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
# Resuming with another configuration, data or machine


def check_compatible(path: Path, saved: Mapping[str, Any], current: Mapping[str, Any], accept_other_data: bool) -> None:
    """Compare the descriptions of the saved and of the current run.

    Raises:
        UserError: The model has another shape, activation or parametrization, or the data are others and are not
            accepted.
    """
    if saved["data"] != current["data"] and not accept_other_data:
        raise UserError(
            f"checkpoint: {path} was trained on other data (fingerprint {saved['data']}, not {current['data']}); "
            f"resume_changes=true (in Python accept_other_data=True) continues with the new data"
        )
    model, other = saved["model"], current["model"]
    scaling = PARAMETRIZATION if other["parametrization"] == "mup" else PARAMETRIZATION[:1]  # only mup has a base
    for kind, keys in (("shape", SHAPE), ("activation", ("activation",)), ("parametrization", scaling)):
        if problems := [f"{key}={model.get(key)}, not {other[key]}" for key in keys if model.get(key) != other[key]]:
            raise UserError(f"checkpoint: {path} holds a model of another {kind}: {', '.join(problems)}")


def check_tokenizer(path: Path, saved: str | None, tokenizer: GPT2Tokenizer | None) -> None:
    """Check that the tokens of the data mean what they meant in the saved run.

    Raises:
        UserError: The tokenizers differ.
    """
    if saved is None or tokenizer is None or saved == tokenizer.to_json():
        return
    if GPT2Tokenizer.from_json(saved).fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"checkpoint: {path} has another tokenizer than the data (data.tokenizer=train learns a new one from a "
            f"changed text); "
            f"train.init_from={path} starts a new run with its weights and tokenizer"
        )


def check_tensors(path: Path, tensors: Mapping[str, torch.Tensor], model: torch.nn.Module) -> None:
    """Check the tensors of a checkpoint, by the names of `Trainer.state_dict`, before they are loaded.

    Raises:
        UserError: Weights or optimizer state have other shapes than the model, or a number is not finite.
    """
    source = f"checkpoint: {path}"
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    stored = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    checkpoint.check_tensor_shapes(source, without_prefix("model/", stored), shapes)
    has_shape, entries = {*LIKE_WEIGHTS, *REDUCED}, without_prefix("optimizer/", stored)
    moments = {name: shape for name, shape in entries.items() if name.partition("/")[0] in has_shape}
    checkpoint.check_tensor_shapes(source, moments, {name: _state_shape(name, shapes) for name in moments})
    checkpoint.check_weights(source, dict(tensors))


def _state_shape(name: str, weights: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    kind, _, weight = name.partition("/")
    shape = list(weights.get(weight, ()))
    if kind in REDUCED and len(shape) > 1:
        shape[REDUCED[kind]] = 1
    return tuple(shape)


def log_changes(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Log each value of the run's description that differs from the checkpoint's, except the settings of its user."""
    before = _flat(saved)
    for key, value in _flat(current).items():
        if before.get(key) != value and key not in USER_KEYS:
            log.info("Changed: %s is %s, it was %s", key, value, before.get(key))


def log_raised_rate(progress: Progress, total_steps: int, config: TrainingConfig) -> None:
    """Log that training continues at a higher learning rate: another number of steps is another schedule."""
    before, now = progress.learning_rate, effective_rate(progress.step, total_steps, config)
    if progress.step >= config.warmup_steps and before and now > 1.01 * before:  # in the warm-up it rises anyway
        log.info(
            f"Changed: the learning rate of the next step is {now:.2e}, it was {before:.2e}. To keep it: "
            f"train.learning_rate={before:.2e} train.min_learning_rate={before:.2e} resume_changes=true. "
            f"With train.lr_schedule=wsd a run can be made longer at the same rate until its decay begins."
        )


def _flat(description: Mapping[str, Any]) -> dict[str, Any]:
    values = {f"{part}.{key}": value for part in DESCRIPTION for key, value in description[part].items()}
    return {**values, "data": description["data"]}


@contextmanager
def misfits_refused(path: Path) -> Iterator[None]:
    """Turn the error of a state that does not fit this training into a UserError."""
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise UserError(f"checkpoint: {path} was not written by Trainer: {one_line(error)}") from error


def restored_progress(saved: Mapping[str, Any], current: Mapping[str, Any]) -> Progress:
    """The saved progress; with another batch size the position is converted.

    With other data the epoch restarts, and the losses of the old data do not count as the best.
    """
    progress = Progress(**saved["progress"])
    if saved["data"] != current["data"]:
        return replace(progress, position=0, evaluated_at=0, val_loss=None, best_val_loss=None, best_at=0)
    blocks = progress.position * saved["train"]["batch_size"]
    return replace(progress, position=blocks // current["train"]["batch_size"])


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
